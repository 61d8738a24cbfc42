//! What a driver is told of writes that were lost with an earlier device.

use std::sync::atomic::{AtomicU8, Ordering};

use super::super::Unflushed;
use super::*;

/// A record, as a transport keeps one.
#[derive(Default)]
struct Kept(AtomicU8);

const SAFE: u8 = 0;
const HELD: u8 = 1;
const LOST: u8 = 2;

impl Unflushed for Kept {
    fn is_lost(&self) -> bool {
        self.0.load(Ordering::SeqCst) == LOST
    }

    fn is_held(&self) -> bool {
        self.0.load(Ordering::SeqCst) == HELD
    }

    fn hold(&self) {
        self.0.store(HELD, Ordering::SeqCst);
    }

    fn release(&self) {
        self.0.store(SAFE, Ordering::SeqCst);
    }
}

impl Kept {
    fn state(&self) -> u8 {
        self.0.load(Ordering::SeqCst)
    }
}

/// An empty disk, whose record says this of an earlier device.
fn boot(format: &str, declined: u64, state: u8) -> (Guest, Arc<Kept>) {
    let mut setup = Setup::new(formats::find(format).unwrap());
    setup.declined = declined;
    let dir = tempfile::tempdir().unwrap();
    let mut options = setup.options(dir.path().join("disk"));
    options.image.size = Some(SIZE);
    let blk = Blk::open(options).unwrap();
    let kept = Arc::new(Kept(AtomicU8::new(state)));
    blk.record_unflushed(Some(Arc::clone(&kept) as _));
    (setup.plug(blk, dir), kept)
}

#[test]
fn a_write_that_makes_an_image_grow_is_recorded_until_it_is_flushed() {
    let (mut guest, kept) = boot("qcow2", 0, SAFE);
    assert_eq!(guest.read(0, 512).status, OK);
    assert_eq!(kept.state(), SAFE);
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    assert_eq!(kept.state(), HELD);
    assert_eq!(guest.flush(), status(OK));
    assert_eq!(kept.state(), SAFE);
    // In place.
    assert_eq!(guest.write(0, &[2; 512]), status(OK));
    assert_eq!(kept.state(), SAFE);
    assert_eq!(guest.write_zeroes(&[segment(0, 128, 1)]), status(OK));
    assert_eq!(kept.state(), HELD);
    // A flush from elsewhere does it too, after a reset.
    guest.reset();
    assert_eq!(kept.state(), HELD);
    guest.blk.handle().flush().unwrap();
    assert_eq!(kept.state(), SAFE);
}

#[test]
fn a_device_that_was_reset_and_goes_on_knows_what_is_unflushed() {
    let (mut guest, kept) = boot("qcow2", 0, SAFE);
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    guest.reset();
    guest.activate().unwrap();
    assert_eq!(kept.state(), HELD);
    assert_eq!(guest.flush(), status(OK));
    assert_eq!(kept.state(), SAFE);
}

#[test]
fn a_write_that_goes_through_is_not_recorded() {
    let declined = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let (mut guest, kept) = boot("qcow2", declined, SAFE);
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
    assert_eq!(kept.state(), SAFE);
}

#[test]
fn a_write_that_the_host_has_is_not_recorded() {
    for format in ["raw", "sparse-raw"] {
        let (mut guest, kept) = boot(format, 0, SAFE);
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        assert_eq!(kept.state(), SAFE);
    }
}

#[test]
fn a_driver_whose_writes_were_lost_is_told_by_one_flush_that_fails() {
    for format in ["qcow2", "raw"] {
        let (mut guest, kept) = boot(format, 0, LOST);
        // Reads and writes go on, and say nothing; nor does what is not the driver's flush.
        assert_eq!(guest.write(0, &[1; 512]), status(OK));
        assert_eq!(guest.read(0, 512).status, OK);
        guest.blk.handle().flush().unwrap();
        assert_eq!(kept.state(), LOST);
        assert_eq!(guest.flush(), status(IOERR));
        assert_eq!(kept.state(), HELD);
        assert_eq!(guest.flush(), status(OK));
        assert_eq!(kept.state(), SAFE);
        assert_eq!(guest.read(0, 512).data, [1; 512]);
    }
}

#[test]
fn a_driver_that_writes_through_is_told_by_a_write_that_fails() {
    let declined = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let (mut guest, _kept) = boot("qcow2", declined, LOST);
    assert_eq!(guest.write(0, &[1; 512]), status(IOERR));
    assert_eq!(guest.write(0, &[1; 512]), status(OK));
}
