//! From opening to closing: errors at the door, activation, reset, resize, close, panic.

use std::path::PathBuf;
use std::time::Duration;

use super::chains::Random;
use super::fake::{Call, boot};
use super::*;

/// Opening fails; returns the key at fault and the message.
fn refused(change: impl FnOnce(&mut BlkOptions)) -> (&'static str, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = Setup::raw().options(dir.path().join("disk.img"));
    std::fs::write(&options.image.path, [0; 1536]).unwrap();
    change(&mut options);
    let error = Blk::open(options).unwrap_err();
    (error.key, error.message)
}

#[test]
fn opening_says_which_option_is_at_fault() {
    let (key, message) = refused(|options| options.image.path = PathBuf::from("/nowhere/disk"));
    assert_eq!(key, "path");
    assert!(message.contains("/nowhere/disk"), "{message}");
    for queues in [0, 65] {
        let (key, message) = refused(|options| options.queues = queues);
        assert_eq!(key, "queues");
        assert_eq!(message, format!("`queues` is {queues}, expected 1 to 64"));
    }
    for block_size in [0, 1, 256, 513, 1000, 131072] {
        let (key, _) = refused(|options| options.image.block_size = block_size);
        assert_eq!(key, "block_size");
    }
    let (key, message) = refused(|options| options.image.block_size = 1024);
    assert_eq!(key, "block_size");
    assert!(message.contains("1536"), "{message}");
    let (key, _) = refused(|options| options.id = Some("x".repeat(21)));
    assert_eq!(key, "id");
}

#[test]
fn a_disk_that_was_refused_leaves_the_image_free() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = Setup::raw().options(dir.path().join("disk.img"));
    std::fs::write(&options.image.path, [0; 1536]).unwrap();
    options.image.block_size = 1024;
    for _ in 0..3 {
        Blk::open(options.clone()).unwrap_err();
    }
    options.image.block_size = 512;
    Blk::open(options).unwrap();
}

#[test]
fn an_empty_disk_has_no_sectors() {
    each_backend(|setup| {
        let mut guest = Setup { size: 512, ..setup }.boot();
        guest.blk.handle().resize(0).unwrap();
        assert_eq!(guest.config()[..8], [0; 8]);
        assert_eq!(guest.read(0, 512).status, IOERR);
        guest.still_serves();
    });
}

#[test]
fn closing_flushes_and_closes_the_image() {
    let (mut guest, script) = boot(|_, _| {});
    guest.write(0, &[1; 512]);
    let handle = guest.blk.handle();
    guest.blk.close().unwrap();
    assert_eq!(script.calls(), [Call::Write(0, 512), Call::Close]);
    let error = handle.resize(512).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert_eq!(handle.size(), SIZE);
}

#[test]
fn closing_reports_what_the_host_says() {
    let (guest, script) = boot(|_, _| {});
    script.fail(|call| call == Call::Close, libc::ENOSPC);
    let error = guest.blk.close().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn dropping_closes_the_image_even_while_requests_are_in_flight() {
    let (mut guest, script) = boot(|_, _| {});
    script.hold();
    for sector in 0..8 {
        let at = BUFFERS + 0x1000 * sector;
        let buffers = guest.place(at, &header(VIRTIO_BLK_T_OUT, sector), &[7; 512], 0);
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
    }
    script.wait_calls(8);
    let blk = guest.blk;
    let dropped = std::thread::spawn(move || drop(blk));
    std::thread::sleep(Duration::from_millis(20));
    assert!(!dropped.is_finished(), "requests are in flight");
    script.release();
    in_time("a disk to close", move || dropped.join().unwrap());
    assert_eq!(script.calls().last(), Some(&Call::Close));
    assert_eq!(guest.drivers[0].used_index(), 8);
    assert_eq!(script.bytes.lock().unwrap()[..8 * 512], [7; 8 * 512]);
}

#[test]
fn a_reset_waits_for_the_requests_in_flight() {
    let (mut guest, script) = boot(|_, _| {});
    script.hold();
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].submit(head);
    script.wait_calls(1);
    let mut blk = guest.blk;
    let reset = std::thread::spawn(move || {
        blk.reset();
        blk
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!reset.is_finished(), "a request is in flight");
    script.release();
    guest.blk = in_time("a reset", move || reset.join().unwrap());
    assert_eq!(guest.drivers[0].used_index(), 1);
    assert_eq!(guest.load(buffers[1].address, 512), pattern(0, 512));
    // From here on nothing is touched.
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].submit(head);
    guest.drivers[0].kick();
    settle(&guest);
    assert_eq!(guest.drivers[0].used_index(), 1);
    assert_eq!(script.calls().len(), 1);
}

#[test]
fn a_driver_is_told_of_the_requests_that_a_reset_waits_for() {
    let (mut guest, script) = boot(|_, _| {});
    script.hold();
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].set_used_event(0);
    guest.drivers[0].submit(head);
    script.wait_calls(1);
    let mut blk = guest.blk;
    let reset = std::thread::spawn(move || {
        blk.reset();
        blk
    });
    std::thread::sleep(Duration::from_millis(20));
    script.release();
    guest.blk = in_time("a reset", move || reset.join().unwrap());
    assert_eq!(guest.drivers[0].used_index(), 1);
    // A front end may go on with the same virtqueue: nobody interrupts for this request later.
    assert_eq!(guest.line.state().queues.get(&0), Some(&1));
}

#[test]
fn a_reset_before_activation_does_nothing() {
    let (mut blk, _dir) = Setup::raw().open();
    blk.reset();
    blk.reset();
    blk.close().unwrap();
}

#[test]
fn the_same_disk_serves_the_next_machine() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        assert_eq!(guest.write(3, &[0x33; 512]), status(OK));
        guest.reset();
        guest.memory = guest_memory();
        guest.activate().unwrap();
        assert_eq!(guest.read(3, 512).data, [0x33; 512]);
    });
}

#[test]
fn rings_outside_guest_memory_are_refused() {
    let mut guest = Setup::raw().boot();
    guest.reset();
    let mut active = guest.drivers[0].active();
    use virtio_queue::QueueT;
    active
        .queue
        .set_used_ring_address(Some(HOLE as u32), Some(0));
    let error = guest.blk.activate(Activation {
        memory: Arc::clone(&guest.memory),
        features: guest.features,
        queues: vec![active],
        interrupt: Arc::clone(&guest.line) as _,
    });
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    guest.blk.reset();
    guest.activate().unwrap();
    guest.still_serves();
}

#[test]
fn activating_twice_is_an_error() {
    let mut guest = Setup::raw().boot();
    guest.activate().unwrap_err();
    guest.reset();
    guest.activate().unwrap();
    guest.still_serves();
}

#[test]
fn a_thousand_resets_with_requests_in_flight() {
    for engine in [Engine::IoUring, Engine::Threads] {
        in_time("a thousand resets", move || {
            let setup = Setup {
                engine,
                queues: 2,
                ..Setup::sparse_raw()
            };
            let mut guest = setup.boot();
            let mut random = Random::new(1);
            for round in 0..1000 {
                let count = random.below(24) as u16;
                for request in 0..count {
                    let at = BUFFERS + 0x4000 * u64::from(request);
                    let sector = u64::from(request) * 16;
                    let buffers = match random.below(3) {
                        0 => guest.place(at, &header(VIRTIO_BLK_T_IN, sector), &[], 4096),
                        1 => {
                            // What is there already, so that the disk never changes.
                            let data = pattern(sector * 512, 4096);
                            guest.place(at, &header(VIRTIO_BLK_T_OUT, sector), &data, 0)
                        }
                        _ => guest.place(at, &header(VIRTIO_BLK_T_FLUSH, 0), &[], 0),
                    };
                    let driver = &mut guest.drivers[usize::from(request % 2)];
                    let head = driver.chain(&buffers);
                    driver.submit(head);
                }
                if random.below(4) == 0 && count > 0 {
                    guest.drivers[0].wait_used();
                }
                guest.reset();
                let used = [guest.drivers[0].used_index(), guest.drivers[1].used_index()];
                assert!(used[0] + used[1] <= count, "round {round}");
                let memory = guest.load(BUFFERS, 0x4000);
                guest.drivers[0].kick();
                guest.drivers[1].kick();
                assert_eq!(guest.load(BUFFERS, 0x4000), memory);
                guest.activate().unwrap();
            }
            guest.still_serves();
            assert!(guest.image() == pattern(0, SIZE));
            guest.blk.close().unwrap();
        });
    }
}

#[test]
fn section_5_2_6_2_a_resize_changes_the_capacity_and_tells_the_driver() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        let handle = guest.blk.handle();
        let capacity = |guest: &Guest| u64::from_le_bytes(guest.config()[..8].try_into().unwrap());

        handle.resize(2 * SIZE).unwrap();
        guest
            .line
            .wait("a configuration change", |state| state.config_changes == 1);
        assert_eq!(capacity(&guest), 2 * SIZE / 512);
        assert_eq!(handle.size(), 2 * SIZE);
        assert_eq!(
            guest.read(SIZE / 512, 512).data,
            [0; 512],
            "new space is zero"
        );
        assert_eq!(guest.write(SIZE / 512 + 5, &[9; 512]), status(OK));
        assert_eq!(guest.image().len() as u64, 2 * SIZE);

        handle.resize(SIZE / 2).unwrap();
        assert_eq!(guest.line.state().config_changes, 2);
        assert_eq!(capacity(&guest), SIZE / 2 / 512);
        assert_eq!(guest.read(SIZE / 2 / 512, 512).status, IOERR);
        assert_eq!(guest.write(SIZE / 2 / 512, &[9; 512]), status(IOERR));
        assert!(guest.image() == pattern(0, SIZE / 2));

        handle.resize(SIZE / 2).unwrap();
        assert_eq!(guest.line.state().config_changes, 2, "nothing has changed");
    });
}

#[test]
fn a_resize_works_before_the_driver_is_there() {
    let (mut blk, _dir) = Setup::raw().open();
    blk.handle().resize(2 * SIZE).unwrap();
    let line = Arc::new(Line::default());
    blk.connect(Arc::clone(&line) as _);
    blk.handle().resize(3 * SIZE).unwrap();
    assert_eq!(line.state().config_changes, 1);
    let mut capacity = [0; 8];
    blk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 3 * SIZE / 512);
}

#[test]
fn a_resize_that_cannot_be_is_refused_with_the_reason() {
    let refused = |setup: Setup, size: u64| {
        let guest = setup.boot();
        let error = guest.blk.handle().resize(size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(guest.blk.handle().size(), SIZE);
        assert_eq!(guest.line.state(), State::default());
        error.to_string()
    };
    let message = refused(
        Setup {
            block_size: 4096,
            ..Setup::raw()
        },
        SIZE + 512,
    );
    assert_eq!(
        message,
        format!(
            "the size {} is no multiple of `block_size`, 4096",
            SIZE + 512
        )
    );
    let message = refused(
        Setup {
            ro: true,
            ..Setup::raw()
        },
        2 * SIZE,
    );
    assert!(
        message.ends_with("is read-only, it cannot be resized"),
        "{message}"
    );
    let (guest, script) = boot(|_, limits| limits.resize = false);
    guest.blk.handle().resize(2 * SIZE).unwrap_err();
    assert_eq!(script.calls(), []);
}

#[test]
fn a_resize_that_fails_on_the_host_changes_nothing() {
    let (mut guest, script) = boot(|_, _| {});
    script.fail(|call| matches!(call, Call::Resize(_)), libc::ENOSPC);
    let error = guest.blk.handle().resize(2 * SIZE).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(guest.blk.handle().size(), SIZE);
    assert_eq!(guest.line.state().config_changes, 0);
    assert_eq!(guest.read(SIZE / 512, 512).status, IOERR);
    assert_eq!(guest.read(0, 512).status, OK);
}

#[test]
fn a_resize_and_requests_wait_for_each_other() {
    let (mut guest, script) = boot(|_, _| {});
    let submit = |guest: &mut Guest, at: u64| {
        let buffers = guest.place(at, &header(VIRTIO_BLK_T_IN, SIZE / 512 - 1), &[], 512);
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
        buffers
    };
    script.hold();
    let before = submit(&mut guest, BUFFERS);
    script.wait_calls(1);
    let handle = guest.blk.handle();
    let resize = std::thread::spawn(move || handle.resize(SIZE / 2));
    std::thread::sleep(Duration::from_millis(20));
    let after = submit(&mut guest, BUFFERS + 0x1000);
    guest.drivers[0].kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(script.calls(), [Call::Read(SIZE - 512, 512)]);
    script.release();
    in_time("a resize", move || resize.join().unwrap()).unwrap();
    let (_, len) = guest.drivers[0].wait_used();
    assert_eq!(guest.answer(&before, len).data, pattern(SIZE - 512, 512));
    let (_, len) = guest.drivers[0].wait_used();
    assert_eq!(guest.answer(&after, len).status, IOERR);
}

#[test]
fn a_driver_is_told_of_the_requests_that_a_resize_waits_for_and_of_those_after_it() {
    let (mut guest, script) = boot(|_, _| {});
    let submit = |guest: &mut Guest, at: u64| {
        let buffers = guest.place(at, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
    };
    let told = |guest: &Guest, times: u64| {
        let enough = |state: &State| state.queues.get(&0) >= Some(&times);
        guest.line.wait("an interrupt", enough);
    };
    script.hold();
    guest.drivers[0].set_used_event(0);
    submit(&mut guest, BUFFERS);
    script.wait_calls(1);
    let handle = guest.blk.handle();
    let resize = std::thread::spawn(move || handle.resize(SIZE / 2));
    std::thread::sleep(Duration::from_millis(20));
    script.release();
    // It sleeps until it is told, and does not look before.
    told(&guest, 1);
    in_time("a resize", move || resize.join().unwrap()).unwrap();
    guest.drivers[0].set_used_event(1);
    submit(&mut guest, BUFFERS + 0x1000);
    told(&guest, 2);
    assert_eq!(guest.drivers[0].used_index(), 2);
}

#[test]
fn a_panic_on_the_disks_thread_hangs_nobody() {
    let (mut guest, script) = boot(|_, _| {});
    // The fake disk indexes its bytes: a read beyond them panics.
    script.bytes.lock().unwrap().clear();
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 8), &[], 512);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].submit(head);
    guest
        .line
        .wait("DEVICE_NEEDS_RESET", |state| state.needs_reset);
    let mut blk = guest.blk;
    in_time("what comes after a panic", move || {
        let error = blk.handle().resize(512).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        blk.reset();
        let error = blk.close().unwrap_err();
        assert_eq!(error.to_string(), "the disk's thread has panicked");
    });
}

#[test]
fn what_is_written_to_an_ephemeral_disk_never_reaches_its_image() {
    let setup = Setup {
        ephemeral: true,
        ..Setup::sparse_raw()
    };
    let (blk, dir) = setup.open();
    let path = dir.path().join("disk.img");
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut guest = setup.plug(blk, dir);
    assert_eq!(guest.write(8, &[0xee; 4096]), status(OK));
    assert_eq!(guest.discard(&[segment(64, 8, 0)]), status(OK));
    assert_eq!(guest.write_zeroes(&[segment(128, 8, 1)]), status(OK));
    assert_eq!(guest.flush(), status(OK));
    assert_eq!(guest.read(8, 4096).data, [0xee; 4096]);
    assert_eq!(guest.read(64, 4096).data, [0; 4096]);
    assert_eq!(guest.read(128, 4096).data, [0; 4096]);
    assert_eq!(guest.read(16, 4096).data, pattern(8192, 4096));
    guest.blk.handle().resize(2 * SIZE).unwrap();
    let Guest { blk, dir, .. } = guest;
    blk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == pattern(0, SIZE));
    let after = std::fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(after, modified);
    // The next run finds the image as it was.
    let mut guest = setup.plug(Blk::open(setup.options(path)).unwrap(), dir);
    assert_eq!(guest.read(8, 4096).data, pattern(4096, 4096));
}
