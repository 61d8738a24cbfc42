//! Transfers of neighbouring bytes that are about to be submitted, made into one.
//!
//! A driver that reads or writes on and on in small requests makes several available at once;
//! one transfer of all of them costs the kernel, and the disk, little more than one of each.
//! One that fails or falls short is asked for again piece by piece, so that every operation has
//! its own result. A write that is asked for again may so come after one that was asked for later;
//! whoever has two in flight for the same bytes has no promise of an order.

use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use super::op::{Kind, Request};
use super::shortcut::MAX_LEN;
use super::table::Token;

/// Bytes of a merged transfer. There are disks that take no more at once, for which the kernel would
/// hand a longer one to a thread of its own.
const MAX_RUN: usize = 128 << 10;
/// Pieces of memory of a merged transfer, likewise.
const MAX_PIECES: usize = 32;

/// A transfer that may have neighbours.
#[derive(Clone, Copy)]
pub(super) struct Part {
    token: Token,
    fd: RawFd,
    write: bool,
    offset: u64,
    len: usize,
    /// The pieces of memory, which are the request's.
    pieces: *const [libc::iovec],
}

/// Parts that follow each other in a file, and the pieces of memory of all of them.
#[derive(Default)]
struct Run {
    parts: Vec<Part>,
    pieces: Vec<libc::iovec>,
    len: usize,
}

/// The transfers that are collected or under way merged.
#[derive(Default)]
pub(super) struct Merges {
    /// The transfer that came last, with the entry that it has by itself.
    last: Option<(Part, squeue::Entry)>,
    /// What it continues, if it does: its place among `runs`. It is in there too.
    run: Option<usize>,
    runs: Vec<Run>,
    /// Places in `runs` that are not in use.
    free: Vec<usize>,
}

impl Part {
    /// A transfer that is short enough to gain by a neighbour.
    pub(super) fn of(token: Token, request: &Request) -> Option<Part> {
        let write = match request.kind {
            Kind::Read => false,
            Kind::Write => true,
            _ => return None,
        };
        let len = request.left();
        let short = (1..=MAX_LEN).contains(&len) && request.iovecs().len() < MAX_PIECES;
        (short && !request.may_block).then(|| Part {
            token,
            fd: request.file.as_raw_fd(),
            write,
            offset: request.offset,
            len,
            pieces: request.iovecs(),
        })
    }

    fn is_followed_by(&self, next: &Part) -> bool {
        self.offset.checked_add(self.len as u64) == Some(next.offset)
            && (self.fd, self.write) == (next.fd, next.write)
    }
}

impl Run {
    fn has_room_for(&self, part: &Part) -> bool {
        self.len + part.len <= MAX_RUN && self.pieces.len() + part.pieces.len() <= MAX_PIECES
    }

    fn push(&mut self, part: Part) {
        // SAFETY: the pieces belong to a request that is with the engine, from its issue to the
        // report of its result, and stays where it is: the run ends before that report.
        self.pieces.extend_from_slice(unsafe { &*part.pieces });
        self.len += part.len;
        self.parts.push(part);
    }

    /// The entry for the whole; `None` for an empty one.
    fn entry(&self) -> Option<squeue::Entry> {
        let first = self.parts.first()?;
        let (fd, pieces, count) = (Fd(first.fd), self.pieces.as_ptr(), self.pieces.len() as u32);
        Some(match first.write {
            true => opcode::Writev::new(fd, pieces, count)
                .offset(first.offset)
                .build(),
            false => opcode::Readv::new(fd, pieces, count)
                .offset(first.offset)
                .build(),
        })
    }

    /// What the kernel's result for the whole means for each.
    fn share(&mut self, result: i32, done: &mut Vec<(Token, i32)>) {
        let mut left = usize::try_from(result).unwrap_or(0);
        for part in self.parts.drain(..) {
            let count = left.min(part.len);
            left -= count;
            // A part without a byte may be at the end of the file, or what failed, or not.
            let result = match count {
                0 => -libc::EAGAIN,
                count => count as i32,
            };
            done.push((part.token, result));
        }
        self.pieces.clear();
        self.len = 0;
    }
}

impl Merges {
    /// Takes a transfer, which has `entry` by itself, and returns the entry before it unless that
    /// goes on.
    pub(super) fn push(&mut self, part: Part, entry: squeue::Entry) -> Option<squeue::Entry> {
        if let Some((last, _)) = self.last
            && last.is_followed_by(&part)
            && self.join(last, part)
        {
            self.last = Some((part, entry));
            return None;
        }
        let before = self.take();
        self.last = Some((part, entry));
        before
    }

    /// Adds a part to the run that `last` ends, or is to begin; false if there is no room.
    fn join(&mut self, last: Part, part: Part) -> bool {
        let index = *self.run.get_or_insert_with(|| {
            let index = self.free.pop().unwrap_or_else(|| {
                self.runs.push(Run::default());
                self.runs.len() - 1
            });
            self.runs[index].push(last);
            index
        });
        let room = self.runs[index].has_room_for(&part);
        if room {
            self.runs[index].push(part);
        }
        room
    }

    /// The entry that nothing is added to any more.
    pub(super) fn take(&mut self) -> Option<squeue::Entry> {
        let (_, alone) = self.last.take()?;
        let Some(index) = self.run.take() else {
            return Some(alone);
        };
        let entry = self.runs[index].entry()?;
        Some(entry.user_data(Token::merged(index).0))
    }

    /// Appends the results of the transfers that are behind `token`, which the kernel reported
    /// `result` of; false if that is no merged one.
    pub(super) fn report(
        &mut self,
        token: Token,
        result: i32,
        done: &mut Vec<(Token, i32)>,
    ) -> bool {
        let Some(index) = token.as_merged() else {
            return false;
        };
        if let Some(run) = self.runs.get_mut(index) {
            run.share(result, done);
            self.free.push(index);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::File;
    use super::super::op::End;
    use super::*;
    use crate::testing::segments;

    const LEN: usize = 4096;

    fn file() -> File {
        tempfile::tempfile().unwrap().into()
    }

    /// Transfers of 4 KiB.
    fn transfers(kind: fn() -> Kind, file: &File, offsets: &[u64]) -> Vec<Request> {
        let transfer =
            |offset: &u64| Request::transfer(kind(), file, *offset, segments(&[0; LEN]), End::Once);
        offsets.iter().map(transfer).collect()
    }

    fn read() -> Kind {
        Kind::Read
    }

    /// How many entries are submitted for these requests.
    fn entries(merges: &mut Merges, requests: &[Request]) -> usize {
        let parts = requests.iter().zip(0..);
        let parts = parts.map(|(request, token)| Part::of(Token(token), request).unwrap());
        let before = parts.filter_map(|part| merges.push(part, opcode::Nop::new().build()));
        before.count() + usize::from(merges.take().is_some())
    }

    /// What three neighbours have of the result of the whole.
    fn shares(result: i32) -> Vec<(u64, i32)> {
        let mut merges = Merges::default();
        let three = transfers(read, &file(), &[0, 4096, 8192]);
        assert_eq!(entries(&mut merges, &three), 1);
        let mut done = Vec::new();
        assert!(merges.report(Token::merged(0), result, &mut done));
        done.iter()
            .map(|(token, count)| (token.0, *count))
            .collect()
    }

    #[test]
    fn neighbours_are_one_transfer_of_which_each_has_its_share() {
        assert_eq!(shares(3 * 4096), [(0, 4096), (1, 4096), (2, 4096)]);
    }

    #[test]
    fn what_a_transfer_did_not_reach_is_asked_for_again() {
        let again = -libc::EAGAIN;
        assert_eq!(shares(4096 + 512), [(0, 4096), (1, 512), (2, again)]);
        assert_eq!(shares(4096), [(0, 4096), (1, again), (2, again)]);
        assert_eq!(shares(0), [(0, again), (1, again), (2, again)]);
        assert_eq!(shares(-libc::EIO), [(0, again), (1, again), (2, again)]);
    }

    #[test]
    fn what_is_apart_in_place_kind_or_file_stays_apart() {
        let (one, other) = (file(), file());
        let apart = [
            transfers(read, &one, &[8192, 4096]),
            transfers(read, &one, &[0, 8192]),
            transfers(read, &one, &[0, 0]),
        ];
        for requests in apart {
            assert_eq!(entries(&mut Merges::default(), &requests), 2);
        }
        let mut kinds = transfers(read, &one, &[0]);
        kinds.extend(transfers(|| Kind::Write, &one, &[4096]));
        kinds.extend(transfers(|| Kind::Write, &other, &[8192]));
        assert_eq!(entries(&mut Merges::default(), &kinds), 3);
    }

    #[test]
    fn long_ones_and_those_for_another_thread_are_left_alone() {
        let file = file();
        let long = Request::transfer(Kind::Read, &file, 0, segments(&[0; MAX_LEN + 1]), End::Once);
        assert!(Part::of(Token(0), &long).is_none());
        let mut blocking = transfers(read, &file, &[0]).remove(0);
        blocking.may_block = true;
        assert!(Part::of(Token(0), &blocking).is_none());
        let empty = Request::transfer(Kind::Read, &file, 0, segments(&[]), End::Once);
        assert!(Part::of(Token(0), &empty).is_none());
    }

    #[test]
    fn a_long_row_is_several_transfers() {
        let offsets: Vec<_> = (0..75).map(|index| index * 4096).collect();
        let row = transfers(read, &file(), &offsets);
        let mut merges = Merges::default();
        assert_eq!(entries(&mut merges, &row), 3);
        let mut done = Vec::new();
        for (index, parts) in [32, 32, 11].into_iter().enumerate() {
            assert!(merges.report(Token::merged(index), parts * 4096, &mut done));
        }
        assert_eq!(done.len(), 75);
        assert!(done.iter().all(|(_, count)| *count == 4096));
        // Their places are used again.
        assert_eq!(entries(&mut merges, &row), 3);
        assert_eq!(merges.runs.len(), 3);
    }
}
