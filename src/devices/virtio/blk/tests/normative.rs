//! What a device MUST or MUST NOT do, where no behaviour tested elsewhere says it by its section.

use std::sync::atomic::{AtomicBool, Ordering};

use super::fake::boot;
use super::*;

#[test]
fn section_2_7_5_1_device_readable_buffers_are_not_written() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        let kinds = [
            VIRTIO_BLK_T_IN,
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_FLUSH,
            VIRTIO_BLK_T_GET_ID,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
            99,
        ];
        for kind in kinds {
            for (out, back) in [(0, 512), (512, 0), (16, 0), (16, 20)] {
                let header = header(kind, 1);
                let out = vec![1; out];
                guest.raw_request(&header, &out, back);
                assert_eq!(guest.load(BUFFERS, 16), header, "type {kind}");
                assert_eq!(guest.load(BUFFERS + 0x100, out.len()), out, "type {kind}");
            }
        }
    });
}

/// Whoever sees the new index sees all that goes with it, without waiting for the interrupt.
#[test]
fn section_2_7_8_2_length_and_data_are_there_before_the_used_index() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        for round in 0..200 {
            let sector = round % 64;
            let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, sector), &[], 512);
            let head = guest.drivers[0].chain(&buffers);
            guest.drivers[0].submit(head);
            guest.drivers[0].poll_used(1);
            let used = guest.drivers[0].used().unwrap();
            assert_eq!(used, (head, 513), "round {round}");
            let answer = guest.answer(&buffers, used.1);
            assert_eq!(answer.status, OK);
            assert_eq!(answer.data, pattern(sector * 512, 512), "round {round}");
        }
    });
}

#[test]
fn section_2_7_10_2_flags_of_the_used_ring_are_0_or_1_and_0_with_event_idx() {
    for declined in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut guest = Setup {
            declined,
            ..Setup::raw()
        }
        .boot();
        let most = u16::from(declined != 0);
        let done = AtomicBool::new(false);
        let driver = &mut guest.drivers[0];
        // The used ring's first field, looked at all the time by another thread.
        let (memory, used) = (Arc::clone(&driver.memory), GuestAddress(driver.used_ring()));
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let flags: u16 = memory.read_obj(used).unwrap();
                    assert!(flags <= most, "{flags}");
                    std::thread::yield_now();
                }
            });
            for _ in 0..50 {
                for _ in 0..16 {
                    let request = [readable(BUFFERS, 16), writable(BUFFERS + 16, 1)];
                    let head = driver.chain(&request);
                    driver.offer(head);
                }
                driver.publish();
                for _ in 0..16 {
                    driver.wait_used();
                }
            }
            done.store(true, Ordering::SeqCst);
            watch.join().unwrap();
        });
    }
}

#[test]
fn section_5_2_5_2_flush_is_offered_with_config_wce() {
    for setup in [Setup::raw(), Setup::sparse_raw()] {
        for ro in [false, true] {
            let setup = Setup {
                ro,
                ..setup.clone()
            };
            let features = setup.open().0.features();
            assert!(has(features, VIRTIO_BLK_F_CONFIG_WCE));
            assert!(has(features, VIRTIO_BLK_F_FLUSH));
        }
    }
}

#[test]
fn section_5_2_5_2_with_config_wce_but_not_flush_writeback_is_0() {
    let guest = Setup::raw().decline(VIRTIO_BLK_F_FLUSH).boot();
    assert!(has(guest.features, VIRTIO_BLK_F_CONFIG_WCE));
    assert_eq!(guest.config()[32], 0);
}

#[test]
fn section_5_2_6_2_discard_with_unmap_is_unsupp() {
    let (mut guest, script) = boot(|_, _| {});
    assert_eq!(guest.discard(&[segment(0, 8, 1)]), status(UNSUPP));
    let segments = [segment(0, 8, 0), segment(8, 8, 1)];
    assert_eq!(guest.discard(&segments), status(UNSUPP));
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_2_a_completed_flush_makes_completed_writes_of_all_virtqueues_stable() {
    let (mut guest, script) = boot(|setup, _| setup.queues = 2);
    let out = guest.place(BUFFERS, &header(VIRTIO_BLK_T_OUT, 0), &[1; 512], 0);
    let head = guest.drivers[1].chain(&out);
    guest.drivers[1].submit(head);
    guest.drivers[1].wait_used();
    // Its completion waits for the image's, however long that takes.
    script.hold();
    let flush = guest.place(BUFFERS, &header(VIRTIO_BLK_T_FLUSH, 0), &[], 0);
    let head = guest.drivers[0].chain(&flush);
    guest.drivers[0].submit(head);
    script.wait_calls(2);
    settle_held(&guest);
    assert_eq!(guest.drivers[0].used_index(), 0);
    script.release();
    let (_, len) = guest.drivers[0].wait_used();
    assert_eq!(guest.answer(&flush, len), status(OK));
    let expected = [fake::Call::Write(0, 512), fake::Call::Flush];
    assert_eq!(script.calls(), expected);
}

/// Waits a while: what must not come has had its chance.
fn settle_held(guest: &Guest) {
    settle(guest);
    std::thread::sleep(std::time::Duration::from_millis(20));
}

#[test]
fn section_5_2_6_2_zone_requests_are_unsupp_as_zones_are_not_offered() {
    const ZONED: u32 = 17;
    let (mut guest, script) = boot(|_, _| {});
    assert!(!has(guest.features, ZONED));
    for kind in [15, 16, 18, 20, 22, 24, 26] {
        assert_eq!(guest.request(kind, 0, &[], 0), status(UNSUPP));
        assert_eq!(guest.request(kind, 0, &[], 512).status, UNSUPP);
    }
    assert_eq!(script.calls(), []);
}

#[test]
fn section_5_2_6_2_lifetime_is_not_offered_without_metrics() {
    const LIFETIME: u32 = 15;
    const GET_LIFETIME: u32 = 10;
    let mut guest = Setup::raw().boot();
    assert!(!has(guest.features, LIFETIME));
    assert_eq!(guest.request(GET_LIFETIME, 0, &[], 6).status, UNSUPP);
}

#[test]
fn section_5_2_6_2_secure_erase_is_unsupp_whatever_its_flags() {
    const SECURE_ERASE: u32 = 14;
    let (mut guest, script) = boot(|_, _| {});
    for flags in [0, 1, 2, u32::MAX] {
        let answer = guest.request(SECURE_ERASE, 0, &segment(0, 8, flags), 0);
        assert_eq!(answer, status(UNSUPP), "flags {flags:#x}");
    }
    assert_eq!(script.calls(), []);
}
