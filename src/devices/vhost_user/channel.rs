//! Messages of the back end to us (vhost-user: "Back-end message types"). Only that the
//! configuration has changed is one that we do something about.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

/// Length of a message's header: request, flags and size, each a u32 of this machine.
const HEADER: usize = 12;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Bits of the flags: the version, an answer, an answer wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// No message to a front end is longer, header and all.
const LONGEST: usize = 4096;

/// Our end of the channel, and what has come of a message.
pub(super) struct Channel {
    ours: OwnedFd,
    buffer: Vec<u8>,
}

/// What came out of the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    Nothing,
    ConfigChanged,
    /// There will be none any more: the back end has closed it.
    End,
}

impl Channel {
    /// A channel, and the back end's end of it.
    pub(super) fn new() -> io::Result<(Channel, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let channel = Channel {
            ours,
            buffer: Vec::new(),
        };
        Ok((channel, theirs))
    }

    /// Readable when there are messages.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// Takes what has come, without waiting. Descriptors that come along are closed by the kernel,
    /// as nobody asks for them.
    ///
    /// # Errors
    ///
    /// A message that cannot be one.
    pub(super) fn take(&mut self) -> io::Result<News> {
        let mut part = [0; LONGEST];
        let len = match recv(&self.ours, &mut part, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(News::End),
            Ok((len, _)) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        self.buffer.extend_from_slice(&part[..len]);
        let mut news = News::Nothing;
        while let Some((header, _)) = self.buffer.split_first_chunk::<HEADER>() {
            let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *header;
            let request = u32::from_ne_bytes([r0, r1, r2, r3]);
            let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
            let size = u32::from_ne_bytes([s0, s1, s2, s3]) as usize;
            if size > LONGEST - HEADER {
                let what = format!("a message of {size} bytes, expected at most {LONGEST}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            if self.buffer.len() < HEADER + size {
                break;
            }
            self.buffer.drain(..HEADER + size);
            let known = request == CONFIG_CHANGE;
            if known {
                news = News::ConfigChanged;
            }
            if flags & NEED_REPLY != 0 {
                self.answer(request, known)?;
            }
        }
        Ok(news)
    }

    fn answer(&self, request: u32, done: bool) -> io::Result<()> {
        let words = [request, VERSION | REPLY, 8, u32::from(!done), 0];
        let words = words.map(u32::to_ne_bytes);
        // A back end that does not read its answers has no use for them.
        send(
            &self.ours,
            words.as_flattened(),
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(to: &OwnedFd, words: &[u32]) {
        for word in words {
            rustix::io::write(to, &word.to_ne_bytes()).unwrap();
        }
    }

    #[test]
    fn a_change_of_the_configuration_is_news_and_nothing_else_is() {
        let (mut channel, theirs) = Channel::new().unwrap();
        assert_eq!(channel.take().unwrap(), News::Nothing);
        tell(&theirs, &[9, 1, 8, 1, 2]);
        assert_eq!(channel.take().unwrap(), News::Nothing);
        tell(&theirs, &[CONFIG_CHANGE, 1, 0]);
        assert_eq!(channel.take().unwrap(), News::ConfigChanged);
        assert_eq!(channel.take().unwrap(), News::Nothing);
        drop(theirs);
        assert_eq!(channel.take().unwrap(), News::End);
    }

    #[test]
    fn a_message_may_come_in_pieces() {
        let (mut channel, theirs) = Channel::new().unwrap();
        for word in [CONFIG_CHANGE, 1] {
            tell(&theirs, &[word]);
            assert_eq!(channel.take().unwrap(), News::Nothing);
        }
        tell(&theirs, &[0]);
        assert_eq!(channel.take().unwrap(), News::ConfigChanged);
    }

    #[test]
    fn who_wants_an_answer_gets_it() {
        let (mut channel, theirs) = Channel::new().unwrap();
        tell(&theirs, &[CONFIG_CHANGE, 1 | NEED_REPLY, 0]);
        tell(&theirs, &[7, 1 | NEED_REPLY, 0]);
        assert_eq!(channel.take().unwrap(), News::ConfigChanged);
        let mut answers = [0; 40];
        assert_eq!(rustix::io::read(&theirs, &mut answers).unwrap(), 40);
        let expected = [[CONFIG_CHANGE, 5, 8, 0, 0], [7, 5, 8, 1, 0]];
        let expected = expected.as_flattened().iter();
        let expected: Vec<u8> = expected.flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(answers[..], expected);
    }

    #[test]
    fn a_message_without_end_is_an_error() {
        let (mut channel, theirs) = Channel::new().unwrap();
        tell(&theirs, &[CONFIG_CHANGE, 1, u32::MAX]);
        assert!(channel.take().is_err());
    }

    #[test]
    fn a_back_end_that_reads_no_answers_does_not_hold_us_up() {
        let (mut channel, theirs) = Channel::new().unwrap();
        let message = [CONFIG_CHANGE, 1 | NEED_REPLY, 0].map(u32::to_ne_bytes);
        let refused = (0..100_000).any(|_| {
            rustix::io::write(&theirs, message.as_flattened()).unwrap();
            channel.take().is_err()
        });
        assert!(refused);
    }
}
