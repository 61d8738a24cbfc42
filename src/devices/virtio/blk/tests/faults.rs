//! Errors of the host: the guest sees IOERR, never OK, and the disk goes on.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::fake::{Call, boot};
use super::*;

#[test]
fn section_5_2_6_a_host_error_is_ioerr_and_the_disk_goes_on() {
    for errno in [
        libc::EIO,
        libc::ENOSPC,
        libc::EFBIG,
        libc::ETIMEDOUT,
        libc::EINTR,
    ] {
        let (mut guest, script) = boot(|_, _| {});
        script.fail(|_| true, errno);
        assert_eq!(guest.read(0, 512).status, IOERR);
        assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
        assert_eq!(guest.flush(), status(IOERR));
        assert_eq!(guest.discard(&[segment(0, 8, 0)]), status(IOERR));
        assert_eq!(guest.write_zeroes(&[segment(0, 8, 0)]), status(IOERR));
        script.heal();
        assert_eq!(guest.read(0, 512).data, pattern(0, 512));
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        assert_eq!(guest.flush(), status(OK));
        assert_eq!(guest.discard(&[segment(0, 8, 0)]), status(OK));
        assert_eq!(guest.write_zeroes(&[segment(0, 8, 0)]), status(OK));
        assert_eq!(guest.blk.handle().counters().host_errors.value(), 5);
        guest.blk.close().unwrap();
    }
}

#[test]
fn section_5_2_6_a_failure_ends_a_request_of_several_segments() {
    let (mut guest, script) = boot(|_, _| {});
    script.fail(|call| matches!(call, Call::Discard(512, _)), libc::EIO);
    let segments = [segment(0, 1, 0), segment(1, 1, 0), segment(2, 1, 0)];
    assert_eq!(guest.discard(&segments), status(IOERR));
    assert_eq!(
        script.calls(),
        [Call::Discard(0, 512), Call::Discard(512, 512)]
    );
}

#[test]
fn one_request_that_fails_does_not_touch_those_beside_it() {
    let (mut guest, script) = boot(|_, _| {});
    script.fail(
        |call| matches!(call, Call::Read(offset, _) if offset % 1024 == 512),
        libc::EIO,
    );
    script.hold();
    let chains: Vec<_> = (0..32)
        .map(|sector| {
            let at = BUFFERS + 0x1000 * sector;
            let buffers = guest.place(at, &header(VIRTIO_BLK_T_IN, sector), &[], 512);
            let head = guest.drivers[0].chain(&buffers);
            guest.drivers[0].submit(head);
            (head, sector, buffers)
        })
        .collect();
    script.wait_calls(32);
    script.release();
    for _ in 0..32 {
        let (head, len) = guest.drivers[0].wait_used();
        let (_, sector, buffers) = chains.iter().find(|chain| chain.0 == head).unwrap();
        let answer = guest.answer(buffers, len);
        if sector % 2 == 1 {
            assert_eq!((answer.status, answer.len), (IOERR, 1));
        } else {
            assert_eq!((answer.status, answer.len), (OK, 513));
            assert_eq!(answer.data, pattern(sector * 512, 512));
        }
    }
}

/// An error of the kernel, below the ring: the image is a memfd sealed against writing.
#[test]
fn a_refusal_of_the_kernel_is_ioerr() {
    each_backend(|setup| {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::io::write(&file, &pattern(0, SIZE)).unwrap();
        let mut guest = boot_from(&setup, &file);
        assert_eq!(guest.write(1, &[1; 512]), status(OK));
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
        assert_eq!(guest.write_zeroes(&[segment(0, 8, 0)]), status(IOERR));
        assert_eq!(
            guest.read(0, 1024).data,
            [pattern(0, 512), vec![1; 512]].concat()
        );
        assert_eq!(guest.flush(), status(OK));
    });
}

/// The image shrinks behind our back: a read of what is gone is zeroes or IOERR, never what the
/// guest had in its buffer.
#[test]
fn an_image_cut_short_on_the_host_never_leaks_the_guests_own_bytes() {
    each_backend(|setup| {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&file, &pattern(0, SIZE)).unwrap();
        let mut guest = boot_from(&setup, &file);
        ftruncate(&file, 1024).unwrap();
        let answer = guest.read(1, 1024);
        match answer.status {
            OK => assert_eq!(answer.data, [pattern(512, 512), vec![0; 512]].concat()),
            other => assert_eq!(other, IOERR),
        }
        assert_eq!(guest.read(0, 1024).data, pattern(0, 1024));
    });
}

/// A guest whose image is an open file of ours.
fn boot_from(setup: &Setup, file: &OwnedFd) -> Guest {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let blk = Blk::open(setup.options(path.into())).unwrap();
    setup.plug(blk, tempfile::tempdir().unwrap())
}
