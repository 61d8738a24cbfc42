//! Errors of the host: the guest sees IOERR, never OK, and the disk goes on.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use formats::{Attempt, Fault, Opening, Ring, What};

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

/// What the host does with the operations of the disk of this name.
type Host = fn(&Attempt) -> Option<Fault>;

static HOSTS: Mutex<Vec<(PathBuf, Host)>> = Mutex::new(Vec::new());

/// sparse-raw on a host that fails: below the ring, where a kernel would.
static FAILING: Format = Format {
    name: "failing",
    extensions: &[],
    description: "for tests",
    abilities: &[],
    options: &[],
    open: |ring, image| open(ring, image),
    create: |_| unreachable!(),
};

fn open<'a>(ring: &'a Ring, image: &'a Image) -> Opening<'a> {
    let hosts = HOSTS.lock().unwrap();
    let host = hosts.iter().find(|(path, _)| *path == image.path);
    ring.inject(host.unwrap().1);
    (Setup::sparse_raw().format.open)(ring, image)
}

/// Boots a guest on each engine whose disk is on such a host.
fn each_engine_on(host: Host, test: impl Fn(Guest)) {
    for engine in [Engine::IoUring, Engine::Threads] {
        let setup = Setup {
            engine,
            ..Setup::new(&FAILING)
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, pattern(0, SIZE)).unwrap();
        HOSTS.lock().unwrap().push((path.clone(), host));
        let blk = Blk::open(setup.options(path)).unwrap();
        test(setup.plug(blk, dir));
    }
}

#[test]
fn section_5_2_6_an_errno_of_the_kernel_is_ioerr_for_that_request_alone() {
    let bad_sectors = |attempt: &Attempt| {
        let bad = (0x8000..0x9000).contains(&attempt.offset);
        bad.then_some(Fault::Errno(libc::EIO))
    };
    each_engine_on(bad_sectors, |mut guest| {
        assert_eq!(guest.read(0x8000 / 512, 512).status, IOERR);
        assert_eq!(guest.write(0x8000 / 512, &[1; 512]), status(IOERR));
        assert_eq!(guest.discard(&[segment(0x8000 / 512, 8, 0)]), status(IOERR));
        assert_eq!(
            guest.write_zeroes(&[segment(0x8000 / 512, 8, 0)]),
            status(IOERR)
        );
        assert_eq!(guest.read(0x9000 / 512, 512).data, pattern(0x9000, 512));
        assert_eq!(guest.write(0x7000 / 512, &[1; 512]), status(OK));
        assert_eq!(guest.flush(), status(OK));
        assert!(guest.image()[0x8000..] == pattern(0x8000, SIZE - 0x8000));
    });
}

#[test]
fn section_5_2_6_2_a_flush_that_fails_on_the_host_is_never_ok() {
    let no_sync =
        |attempt: &Attempt| (attempt.what == What::Sync).then_some(Fault::Errno(libc::EIO));
    each_engine_on(no_sync, |mut guest| {
        assert_eq!(guest.flush(), status(IOERR));
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        guest.blk.write_config(32, &[0]);
        assert_eq!(guest.write(0, &[1; 512]), status(IOERR), "write-through");
        assert_eq!(guest.flush(), status(IOERR));
        guest.still_serves();
        guest.blk.close().unwrap_err();
    });
}

#[test]
fn section_5_2_6_2_after_a_flush_that_failed_none_is_ok_though_the_host_serves_again() {
    static NO_SYNC: AtomicBool = AtomicBool::new(false);
    let no_sync = |attempt: &Attempt| {
        let fails = attempt.what == What::Sync && NO_SYNC.load(Ordering::SeqCst);
        fails.then_some(Fault::Errno(libc::ENOSPC))
    };
    each_engine_on(no_sync, |mut guest| {
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        assert_eq!(guest.flush(), status(OK));
        NO_SYNC.store(true, Ordering::SeqCst);
        assert_eq!(guest.write(0, &[2; 512]), status(OK));
        assert_eq!(guest.flush(), status(IOERR));
        NO_SYNC.store(false, Ordering::SeqCst);
        assert_eq!(guest.flush(), status(IOERR));
        // Still the guest sees all that it wrote, and may go on without a promise.
        assert_eq!(guest.write(1, &[3; 512]), status(OK));
        assert_eq!(guest.read(0, 1024).data, [[2; 512], [3; 512]].concat());
        guest.blk.close().unwrap_err();
    });
}

#[test]
fn short_transfers_are_continued() {
    let three_sectors_and_a_bit = |attempt: &Attempt| {
        matches!(attempt.what, What::Read | What::Write).then_some(Fault::Short(1600))
    };
    each_engine_on(three_sectors_and_a_bit, |mut guest| {
        assert!(guest.read(1, 65536).data == pattern(512, 65536));
        let data = pattern(SIZE, 65536);
        assert_eq!(guest.write(7, &data), status(OK));
        assert!(guest.image()[7 * 512..][..65536] == data);
    });
}

#[test]
fn a_transfer_that_fails_half_way_is_ioerr() {
    let half_way = |attempt: &Attempt| match (attempt.what, attempt.offset) {
        (What::Read | What::Write, 0) => Some(Fault::Short(1024)),
        (What::Read, _) => Some(Fault::Errno(libc::EIO)),
        (What::Write, _) => Some(Fault::Errno(libc::ENOSPC)),
        _ => None,
    };
    each_engine_on(half_way, |mut guest| {
        let read = guest.read(0, 4096);
        assert_eq!((read.status, read.len), (IOERR, 1));
        assert_eq!(guest.write(0, &[1; 4096]), status(IOERR));
        assert!(guest.image()[1024..] == pattern(1024, SIZE - 1024));
        guest.still_serves();
    });
}

#[test]
fn a_full_host_disk_serves_again_when_there_is_space() {
    static FULL: AtomicBool = AtomicBool::new(false);
    let full = |attempt: &Attempt| {
        let full = attempt.what == What::Write && FULL.load(Ordering::SeqCst);
        full.then_some(Fault::Errno(libc::ENOSPC))
    };
    each_engine_on(full, |mut guest| {
        FULL.store(true, Ordering::SeqCst);
        for _ in 0..50 {
            assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
        }
        assert_eq!(guest.read(0, 512).data, pattern(0, 512));
        FULL.store(false, Ordering::SeqCst);
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        assert_eq!(guest.read(0, 512).data, [1; 512]);
    });
}
