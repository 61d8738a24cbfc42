//! What the device offers, and how the two sides notify each other.

use std::time::Duration;

use super::fake::boot;
use super::*;

fn bits(features: u64) -> Vec<u32> {
    (0..64).filter(|bit| features & 1 << bit != 0).collect()
}

#[test]
fn section_5_2_1_the_device_id_is_2() {
    assert_eq!(Setup::raw().open().0.device_type(), 2);
}

#[test]
fn section_5_2_3_features_are_offered_exactly_when_backed() {
    let always = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
    ];
    let offers = |setup: Setup, more: &[u32]| {
        let mut expected = [&always, more].concat();
        expected.sort_unstable();
        assert_eq!(bits(setup.open().0.features()), expected);
    };
    let (discard, zeroes) = (VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES);
    offers(Setup::raw(), &[zeroes]);
    offers(Setup::sparse_raw(), &[discard, zeroes]);
    offers(
        Setup {
            ro: true,
            ..Setup::raw()
        },
        &[VIRTIO_BLK_F_RO],
    );
    offers(
        Setup {
            ro: true,
            ..Setup::sparse_raw()
        },
        &[VIRTIO_BLK_F_RO],
    );
    offers(
        Setup {
            queues: 2,
            ..Setup::raw()
        },
        &[VIRTIO_BLK_F_MQ, zeroes],
    );
}

#[test]
fn section_5_2_4_the_configuration_space_is_little_endian_and_may_be_read_in_any_pieces() {
    let (mut blk, _dir) = Setup {
        queues: 3,
        block_size: 4096,
        ..Setup::sparse_raw()
    }
    .open();
    blk.negotiated(blk.features());
    let mut whole = [0xff; 80];
    blk.read_config(0, &mut whole);
    assert_eq!(
        whole[..8],
        (SIZE / 512).to_le_bytes(),
        "capacity, in sectors"
    );
    assert_eq!(whole[12..16], 254u32.to_le_bytes(), "seg_max");
    assert_eq!(whole[20..24], 4096u32.to_le_bytes(), "blk_size");
    assert_eq!(whole[32], 1, "writeback");
    assert_eq!(whole[34..36], 3u16.to_le_bytes(), "num_queues");
    assert_eq!(whole[60..], [0; 20], "past the end");
    for (offset, len) in [
        (0, 4),
        (4, 4),
        (3, 1),
        (34, 2),
        (58, 8),
        (60, 4),
        (1 << 40, 8),
    ] {
        let mut piece = vec![0xff; len];
        blk.read_config(offset, &mut piece);
        let expected: Vec<u8> = (0..len)
            .map(|at| whole.get(offset as usize + at).copied().unwrap_or(0))
            .collect();
        assert_eq!(piece, expected, "{offset} {len}");
    }
    blk.read_config(u64::MAX, &mut [0; 8]);
}

#[test]
fn section_5_2_5_2_padding_is_zero() {
    let config = Setup::sparse_raw().boot().config();
    assert_eq!(config[33], 0, "unused0");
    assert_eq!(config[57..60], [0; 3], "unused1");
}

#[test]
fn section_5_2_5_2_without_flush_writeback_is_0_from_negotiation_on() {
    let (mut blk, _dir) = Setup::raw().open();
    let mut writeback = [9];
    blk.negotiated(blk.features() & !(1 << VIRTIO_BLK_F_FLUSH));
    blk.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
    blk.reset();
    blk.negotiated(blk.features());
    blk.read_config(32, &mut writeback);
    assert_eq!(writeback, [1]);

    let guest = Setup::raw().decline(VIRTIO_BLK_F_FLUSH).boot();
    assert_eq!(guest.config()[32], 0);
}

#[test]
fn section_5_2_6_1_only_writeback_is_writable_and_only_if_negotiated() {
    let mut guest = Setup::raw().boot();
    let before = guest.config();
    for offset in (0..70).filter(|offset| *offset != 32) {
        guest.blk.write_config(offset, &[0]);
    }
    guest.blk.write_config(u64::MAX, &[0; 8]);
    guest.blk.write_config(0, &[]);
    assert_eq!(guest.config(), before);
    guest.blk.write_config(30, &[0; 4]);
    assert_eq!(guest.config()[32], 0);
    guest.reset();
    assert_eq!(guest.config()[32], 1, "the cache mode after reset");

    let mut guest = Setup::raw().decline(VIRTIO_BLK_F_CONFIG_WCE).boot();
    guest.blk.write_config(32, &[0]);
    assert_eq!(guest.config()[32], 1);
}

#[test]
fn section_5_2_2_each_virtqueue_is_served_and_interrupts_by_itself() {
    each_backend(|setup| {
        let mut guest = Setup { queues: 4, ..setup }.boot();
        for index in [3, 0, 2, 1, 3] {
            let at = BUFFERS + 0x10000 * index as u64;
            let sector = index as u64 * 7;
            let buffers = guest.place(at, &header(VIRTIO_BLK_T_IN, sector), &[], 1024);
            let others = |guest: &Guest| {
                let mut queues = guest.line.state().queues;
                queues.remove(&(index as u16));
                queues
            };
            let before = others(&guest);
            let driver = &mut guest.drivers[index];
            let head = driver.chain(&buffers);
            driver.submit(head);
            let (_, len) = driver.wait_used();
            let answer = guest.answer(&buffers, len);
            assert_eq!(answer.data, pattern(sector * 512, 1024));
            settle(&guest);
            assert_eq!(others(&guest), before);
        }
        let queues = guest.line.state().queues;
        assert!(
            (0..4).all(|index| queues.contains_key(&index)),
            "{queues:?}"
        );
    });
}

#[test]
fn section_5_2_4_seg_max_holds_for_every_queue_size() {
    for queue_size in [4, 64, 256] {
        let mut guest = Setup {
            queue_size,
            ..Setup::raw()
        }
        .boot();
        let seg_max = guest.config()[12..16]
            .try_into()
            .map(u32::from_le_bytes)
            .unwrap();
        let (head, data, end) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x100000);
        guest.store(head, &header(VIRTIO_BLK_T_IN, 0));
        let mut buffers = vec![readable(head, 16)];
        // Every other sector's place, so that no two segments lie side by side.
        buffers.extend((0..seg_max).map(|i| writable(data + u64::from(i) * 1024, 512)));
        buffers.push(writable(end, 1));
        let driver = &mut guest.drivers[0];
        let chain = driver.indirect(BUFFERS + 0x200000, &buffers);
        driver.submit(chain);
        assert_eq!(driver.wait_used(), (chain, seg_max * 512 + 1));
        let answer = guest.answer(&buffers, 0);
        assert_eq!(answer.status, OK);
        assert!(answer.data == pattern(0, u64::from(seg_max) * 512));
    }
}

#[test]
fn section_2_7_7_2_without_event_idx_flags_suppress_interrupts() {
    let mut guest = Setup::raw().decline(VIRTIO_RING_F_EVENT_IDX).boot();
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
    // The field `used_event` is to be ignored.
    guest.drivers[0].set_used_event(0);
    guest.drivers[0].set_available_flags(1);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].submit(head);
    guest.drivers[0].poll_used(1);
    settle(&guest);
    assert_eq!(guest.line.state(), State::default());
    guest.drivers[0].used().unwrap();

    guest.drivers[0].set_available_flags(0);
    let head = guest.drivers[0].chain(&buffers);
    guest.drivers[0].submit(head);
    guest.drivers[0].poll_used(1);
    settle(&guest);
    assert_eq!(guest.line.state().queues, [(0, 1)].into());
}

#[test]
fn section_2_7_7_2_with_event_idx_the_device_interrupts_at_used_event() {
    let mut guest = Setup::raw().boot();
    let buffers = guest.place(BUFFERS, &header(VIRTIO_BLK_T_IN, 0), &[], 512);
    // The lower bit of `flags` is to be ignored.
    guest.drivers[0].set_available_flags(1);
    guest.drivers[0].set_used_event(3);
    for used in 0..6 {
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
        guest.drivers[0].poll_used(1);
        settle(&guest);
        guest.drivers[0].used().unwrap();
        let interrupts = guest.line.state().queues.get(&0).copied().unwrap_or(0);
        assert_eq!(interrupts, u64::from(used >= 3), "after buffer {used}");
    }
}

#[test]
fn one_interrupt_tells_of_a_whole_batch() {
    for declined in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut guest = Setup {
            declined,
            ..Setup::raw()
        }
        .boot();
        let driver = &mut guest.drivers[0];
        for _ in 0..64 {
            let head = driver.chain(&[readable(BUFFERS, 16), writable(BUFFERS + 16, 1)]);
            driver.offer(head);
        }
        driver.publish();
        driver.poll_used(64);
        settle(&guest);
        assert_eq!(guest.line.state().queues, [(0, 1)].into());
        assert_eq!(guest.blk.handle().counters().interrupts.value(), 1);
    }
}

#[test]
fn the_driver_is_told_of_much_data_before_the_whole_batch_is_served() {
    let mut guest = Setup {
        declined: 1 << VIRTIO_RING_F_EVENT_IDX,
        ..Setup::raw()
    }
    .boot();
    let driver = &mut guest.drivers[0];
    for _ in 0..64 {
        let head = driver.chain(&[
            readable(BUFFERS, 16),
            writable(BUFFERS + 4096, 4096),
            writable(BUFFERS + 16, 1),
        ]);
        driver.offer(head);
    }
    driver.publish();
    driver.poll_used(64);
    settle(&guest);
    let interrupts = guest.blk.handle().counters().interrupts.value();
    assert!((2..64).contains(&interrupts), "{interrupts} interrupts");
}

#[test]
fn section_2_7_10_2_the_device_asks_for_a_notification_before_it_sleeps() {
    let mut guest = Setup::raw().boot();
    for index in 0..3 {
        // Flags are 0, and the next buffer notifies.
        guest.drivers[0].wait_suppression((0, index));
        guest.still_serves();
    }
    assert_eq!(guest.drivers[0].kicks, 3);

    let mut guest = Setup::raw().decline(VIRTIO_RING_F_EVENT_IDX).boot();
    guest.still_serves();
    guest.drivers[0].wait_suppression((0, 0));
}

#[test]
fn section_2_7_10_2_spurious_notifications_do_nothing() {
    let mut guest = Setup {
        queues: 2,
        ..Setup::raw()
    }
    .boot();
    for _ in 0..100 {
        guest.drivers[0].kick();
        guest.drivers[1].kick();
    }
    settle(&guest);
    assert_eq!(guest.line.state(), State::default());
    guest.still_serves();
}

#[test]
fn the_rings_and_their_indices_wrap_around() {
    for (declined, queue_size) in [(0, 4), (0, 256), (1 << VIRTIO_RING_F_EVENT_IDX, 256)] {
        let setup = Setup {
            declined,
            queue_size,
            ..Setup::raw()
        };
        let mut guest = setup.boot();
        let request = [readable(BUFFERS, 16), writable(BUFFERS + 16, 1)];
        // Indices are 16 bits wide, whatever the size of the ring.
        let batch = queue_size / 2;
        for round in 0..0x1_0000 / 128 + 8 {
            let driver = &mut guest.drivers[0];
            for _ in 0..batch {
                let head = driver.chain(&request);
                driver.offer(head);
            }
            driver.publish();
            for _ in 0..batch {
                driver.wait_used();
            }
            assert_eq!(driver.used_index(), ((round + 1) * u32::from(batch)) as u16);
        }
        guest.still_serves();
    }
}

#[test]
fn counters_tell_what_the_disk_has_done() {
    let (mut guest, script) = boot(|_, _| {});
    guest.read(0, 1024);
    guest.write(0, &[1; 512]);
    guest.write(1, &[1; 512]);
    guest.flush();
    guest.discard(&[segment(0, 1, 0), segment(1, 1, 0)]);
    guest.write_zeroes(&[segment(0, 1, 0)]);
    guest.read(u64::MAX, 512);
    script.fail(|_| true, libc::EIO);
    guest.flush();
    let handle = guest.blk.handle();
    let counters = handle.counters();
    assert_eq!(
        (counters.reads.value(), counters.read_bytes.value()),
        (1, 1024)
    );
    assert_eq!(
        (counters.writes.value(), counters.written_bytes.value()),
        (2, 1024)
    );
    assert_eq!(
        (counters.flushes.value(), counters.discards.value()),
        (1, 1)
    );
    assert_eq!(counters.write_zeroes.value(), 1);
    for latency in [
        &counters.read_latency,
        &counters.write_latency,
        &counters.flush_latency,
    ] {
        let times = latency.percentiles();
        assert!(times.p50 > Duration::ZERO && times.p50 <= times.max);
        assert!(times.max < Duration::from_secs(60));
    }
    assert_eq!(
        (counters.refused.value(), counters.host_errors.value()),
        (1, 1)
    );
}
