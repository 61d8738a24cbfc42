//! One connection: a front end's messages, one after another, until it goes or makes a mistake.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketType,
    sockopt,
};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::backend::Backend;
use super::{lock, wrong};

/// Length of a message's header: request, flags and size, each a u32 of this machine.
const HEADER: usize = 12;
/// Most files that the library takes with a message.
const MAX_FILES: usize = 32;
/// Bits of the flags: the version, an answer, an answer wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Serves a front end until it goes; the error is its mistake, or the host's.
pub(super) fn serve(stream: UnixStream, backend: Backend) -> io::Result<()> {
    let backend = Arc::new(Mutex::new(backend));
    let mut handler = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&backend));
    loop {
        match next(&stream, &backend, &mut handler) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Takes the next message, and does what it says.
fn next(
    stream: &UnixStream,
    backend: &Mutex<Backend>,
    handler: &mut BackendReqHandler<Mutex<Backend>>,
) -> io::Result<()> {
    if is_channel(stream)? {
        return take_channel(stream, &mut lock(backend));
    }
    handler.handle_request().map_err(|error| match error {
        Error::ReqHandlerError(error) | Error::SocketBroken(error) => error,
        Error::Disconnected => io::ErrorKind::UnexpectedEof.into(),
        error => io::Error::other(error.to_string()),
    })
}

/// Whether the front end has closed the connection, with answers to read still or without.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// Whether the next message brings the channel for messages to the front end. The library has a
/// type for it that cannot say that the configuration has changed.
///
/// Fails if not all of the message's files can be taken, which the library does not tell: it would
/// go on behind the header.
fn is_channel(stream: &UnixStream) -> io::Result<bool> {
    let mut header = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut header)];
        rustix::net::recvmsg(stream, &mut parts, &mut control, flags)
    })?;
    // The files that a look brings are copies: counted, they go.
    let files = control.drain().map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => rights.count(),
        _ => 0,
    });
    let too_many = files.sum::<usize>() > MAX_FILES;
    if too_many || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(wrong(format!(
            "the files of a message are more than {MAX_FILES}, or more than this process may open"
        )));
    }
    let [r0, r1, r2, r3, ..] = header;
    let request = u32::from_ne_bytes([r0, r1, r2, r3]);
    Ok(received.bytes == HEADER && request == FrontendReq::SET_BACKEND_REQ_FD as u32)
}

/// Takes the message that brings the channel.
fn take_channel(stream: &UnixStream, backend: &mut Backend) -> io::Result<()> {
    let mut header = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut header)];
    rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    let [_, _, _, _, f0, f1, f2, f3, size @ ..] = header;
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    if size != [0; 4] || flags & !NEED_REPLY != VERSION {
        return Err(wrong("a message for the channel that makes no sense"));
    }
    if !backend.has(VhostUserProtocolFeatures::BACKEND_REQ) {
        return Err(wrong("a channel that was not negotiated"));
    }
    let [channel] = <[OwnedFd; 1]>::try_from(files)
        .map_err(|files| wrong(format!("{} files for the channel, expected 1", files.len())))?;
    let kind = (
        sockopt::socket_domain(&channel)?,
        sockopt::socket_type(&channel)?,
    );
    if kind != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(wrong("a channel that is no stream between processes"));
    }
    backend.calls().set_channel(Some(channel));
    if flags & NEED_REPLY != 0 && backend.acknowledges() {
        let request = FrontendReq::SET_BACKEND_REQ_FD as u32;
        let words = [request, VERSION | REPLY, 8, 0, 0];
        let mut to = stream;
        to.write_all(words.map(u32::to_ne_bytes).as_flattened())?;
    }
    Ok(())
}
