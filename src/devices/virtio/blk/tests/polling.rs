//! Requests of a disk whose thread looks for more before it sleeps.

use super::*;

/// With each limit, engine and way to suppress notifications: two virtqueues.
fn each(test: impl Fn(Guest)) {
    for poll in [Duration::ZERO, Duration::from_secs(5)] {
        each_backend(|setup| {
            let setup = Setup {
                poll: Some(poll),
                queues: 2,
                ..setup
            };
            test(setup.boot());
            test(setup.decline(VIRTIO_RING_F_EVENT_IDX).boot());
        });
    }
}

#[test]
fn no_notification_is_lost_whether_the_thread_sleeps_or_looks() {
    each(|mut guest| {
        let request = [
            readable(BUFFERS, 16),
            writable(BUFFERS + 16, 512),
            writable(BUFFERS + 528, 1),
        ];
        guest.store(BUFFERS, &header(VIRTIO_BLK_T_IN, 0));
        for round in 0..400 {
            let driver = &mut guest.drivers[round / 7 % 2];
            let head = driver.chain(&request);
            driver.submit(head);
            assert_eq!(driver.wait_used(), (head, 513));
        }
        guest.still_serves();
    });
}

#[test]
fn a_reset_and_a_close_end_it() {
    each(|mut guest| {
        for _ in 0..10 {
            guest.still_serves();
            guest.reset();
            guest.activate().unwrap();
        }
        guest.still_serves();
        guest.blk.close().unwrap();
    });
}

#[test]
fn a_thread_without_requests_sleeps() {
    let setup = Setup {
        poll: Some(Duration::from_micros(50)),
        ..Setup::raw()
    };
    let mut guest = setup.boot();
    for _ in 0..100 {
        guest.still_serves();
    }
    // The driver is asked for a notification when the last window is over.
    let index = guest.drivers[0].used_index();
    guest.drivers[0].wait_suppression((0, index));
    guest.still_serves();
}
