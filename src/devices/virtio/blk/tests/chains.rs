//! Chains and rings that a driver must not make: no panic, no hang, no byte written where the
//! driver did not ask for it, and each head returned once.

use virtio_queue::desc::split::Descriptor;

use super::fake::{Call, boot};
use super::*;

const NEXT: u32 = 1;
const WRITE: u32 = 2;
const INDIRECT: u32 = 4;

/// Places of a read request of one sector.
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x2000;
const TABLE: u64 = BUFFERS + 0x3000;

impl Guest {
    /// Places the header of a read of sector 0.
    fn place_read(&self) {
        self.store(HEADER, &header(VIRTIO_BLK_T_IN, 0));
        self.store(DATA, &[UNTOUCHED; 0x1000]);
        self.store(STATUS, &[UNTOUCHED]);
    }

    /// Submits a chain of `count` descriptors that `describe` sets up; it begins at the first of
    /// those it is given. Returns the used length.
    fn crafted(&mut self, count: usize, describe: impl FnOnce(&Driver, &[u16])) -> u32 {
        let driver = &mut self.drivers[0];
        let indices: Vec<u16> = (0..count).map(|_| driver.take_free()).collect();
        describe(driver, &indices);
        driver.submit(indices[0]);
        let (head, len) = driver.wait_used();
        assert_eq!(head, indices[0]);
        len
    }
}

/// A guest that has placed the header of a read, and whose disk records what reaches it.
fn reader() -> (Guest, Arc<fake::Script>) {
    let (guest, script) = boot(|_, _| {});
    guest.place_read();
    (guest, script)
}

#[test]
fn section_2_7_5_2_a_loop_is_returned_with_length_0() {
    let (mut guest, script) = reader();
    let len = guest.crafted(1, |driver, d| driver.describe(d[0], HEADER, 16, NEXT, d[0]));
    assert_eq!(len, 0);
    let len = guest.crafted(3, |driver, d| {
        driver.describe(d[0], HEADER, 16, NEXT, d[1]);
        driver.describe(d[1], DATA, 512, NEXT | WRITE, d[2]);
        driver.describe(d[2], STATUS, 1, NEXT | WRITE, d[1]);
    });
    assert_eq!(len, 0);
    let len = guest.crafted(1, |driver, d| driver.describe(d[0], HEADER, 0, NEXT, d[0]));
    assert_eq!(len, 0, "of empty buffers");
    assert_eq!(guest.load(STATUS, 1), [UNTOUCHED]);
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn section_2_7_5_a_next_index_out_of_range_is_returned_with_length_0() {
    let (mut guest, script) = reader();
    for next in [256, 257, 0xffff] {
        let len = guest.crafted(2, |driver, d| {
            driver.describe(d[0], HEADER, 16, NEXT, d[1]);
            driver.describe(d[1], STATUS, 1, NEXT | WRITE, next);
        });
        assert_eq!(len, 0);
    }
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn section_2_7_4_2_readable_after_writable_is_ioerr_if_there_is_a_place_for_it() {
    let (mut guest, script) = reader();
    let answer = guest.chain_request(&[
        writable(DATA, 512),
        readable(HEADER, 16),
        writable(STATUS, 1),
    ]);
    assert_eq!((answer.status, answer.len), (IOERR, 1));
    assert_eq!(answer.data, [UNTOUCHED; 512]);

    let chain = [
        readable(HEADER, 16),
        writable(STATUS, 1),
        readable(DATA, 512),
    ];
    let head = guest.drivers[0].chain(&chain);
    guest.drivers[0].submit(head);
    assert_eq!(guest.drivers[0].wait_used(), (head, 0));
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn buffers_outside_guest_memory_are_ioerr_and_reach_no_disk() {
    let (mut guest, script) = reader();
    let outside = [
        HOLE,
        HOLE - 511,
        HOLE - 1,
        2 * HOLE - 1,
        END - 1,
        END,
        1 << 40,
        u64::MAX - 5,
    ];
    for data in outside {
        let buffers = [
            readable(HEADER, 16),
            writable(data, 512),
            writable(STATUS, 1),
        ];
        guest.store(STATUS, &[UNTOUCHED]);
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
        assert_eq!(guest.drivers[0].wait_used(), (head, 1), "{data:#x}");
        assert_eq!(guest.load(STATUS, 1), [IOERR], "{data:#x}");
    }
    for header in [
        HOLE,
        HOLE - 15,
        HOLE - 1,
        END - 15,
        END,
        u64::MAX - 15,
        u64::MAX,
    ] {
        let answer = guest.chain_request_at(&[readable(header, 16), writable(STATUS, 1)]);
        assert_eq!(answer, (1, IOERR), "{header:#x}");
    }
    for status in [HOLE, END, u64::MAX] {
        let buffers = [
            readable(HEADER, 16),
            writable(DATA, 512),
            writable(status, 1),
        ];
        let head = guest.drivers[0].chain(&buffers);
        guest.drivers[0].submit(head);
        assert_eq!(guest.drivers[0].wait_used(), (head, 0), "{status:#x}");
    }
    assert_eq!(guest.load(DATA, 512), [UNTOUCHED; 512]);
    assert_eq!(guest.load(HOLE - 512, 512), [0; 512]);
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

impl Guest {
    /// Carries out a request whose status is at [`STATUS`]; returns its used length and status.
    fn chain_request_at(&mut self, buffers: &[Buf]) -> (u32, u8) {
        self.store(STATUS, &[UNTOUCHED]);
        let head = self.drivers[0].chain(buffers);
        self.drivers[0].submit(head);
        let (used, len) = self.drivers[0].wait_used();
        assert_eq!(used, head);
        (len, self.load(STATUS, 1)[0])
    }
}

#[test]
fn buffers_may_straddle_regions_of_guest_memory() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        for before in [1, 100, 511, 512, 4095] {
            let data = SEAM - before;
            guest.store(HEADER, &header(VIRTIO_BLK_T_IN, 3));
            let buffers = [
                readable(HEADER, 16),
                writable(data, 4096),
                writable(STATUS, 1),
            ];
            let answer = guest.chain_request(&buffers);
            assert_eq!((answer.status, answer.len), (OK, 4097));
            assert!(answer.data == pattern(3 * 512, 4096));

            let written = pattern(SIZE + before, 4096);
            guest.store(HEADER, &header(VIRTIO_BLK_T_OUT, 64));
            guest.store(data, &written);
            let buffers = [
                readable(HEADER, 16),
                readable(data, 4096),
                writable(STATUS, 1),
            ];
            assert_eq!(guest.chain_request(&buffers), status(OK));
            assert!(guest.image()[64 * 512..][..4096] == written);
        }
        let at = SEAM - 7;
        guest.store(at, &header(VIRTIO_BLK_T_IN, 9));
        let buffers = [readable(at, 16), writable(DATA, 512), writable(STATUS, 1)];
        assert_eq!(guest.chain_request(&buffers).data, pattern(9 * 512, 512));
    });
}

#[test]
fn empty_buffers_are_passed_over() {
    let (mut guest, _) = reader();
    let answer = guest.chain_request(&[
        readable(HOLE, 0),
        readable(HEADER, 16),
        writable(u64::MAX, 0),
        writable(DATA, 512),
        writable(STATUS, 1),
        writable(HOLE, 0),
    ]);
    assert_eq!(
        answer,
        Answer {
            status: OK,
            data: pattern(0, 512),
            len: 513
        }
    );
    let len = guest.crafted(1, |driver, d| driver.describe(d[0], 0, 0, 0, 0));
    assert_eq!(len, 0, "nothing but an empty buffer");
}

#[test]
fn a_status_that_overlaps_the_data_still_says_ioerr() {
    let (mut guest, script) = reader();
    script.fail(|_| true, libc::EIO);
    let buffers = [readable(HEADER, 16), writable(DATA, 512), writable(DATA, 1)];
    assert_eq!(guest.chain_request(&buffers).status, IOERR);
}

#[test]
fn section_2_7_5_2_lengths_of_2_32_are_no_alias_of_small_ones() {
    let (mut guest, script) = reader();
    for buffers in [
        vec![
            readable(HEADER, 16),
            writable(DATA, u32::MAX),
            writable(STATUS, 1),
        ],
        vec![readable(HEADER, u32::MAX), writable(STATUS, 1)],
        // 2^32 + 512 bytes altogether.
        vec![
            readable(HEADER, 16),
            writable(DATA, u32::MAX - 15),
            writable(DATA, 512),
            writable(STATUS, 1),
        ],
    ] {
        assert_eq!(guest.chain_request_at(&buffers), (1, IOERR));
    }
    // As long as a chain may be: nearly 2^32 bytes, all inside guest memory.
    let len = 16 << 20;
    let mut buffers = vec![readable(HEADER, 16)];
    buffers.extend([writable(0, len); 254]);
    buffers.push(writable(STATUS, 1));
    guest.store(HEADER, &header(VIRTIO_BLK_T_IN, 0));
    let head = guest.drivers[0].indirect(2 * HOLE, &buffers);
    guest.drivers[0].submit(head);
    assert_eq!(guest.drivers[0].wait_used(), (head, 1));
    assert_eq!(guest.load(STATUS, 1), [IOERR]);
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

fn request() -> [Buf; 3] {
    [
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 1),
    ]
}

#[test]
fn section_2_7_5_3_2_indirect_tables_hold_whole_requests() {
    each_backend(|setup| {
        let mut guest = setup.boot();
        for table in [TABLE, TABLE + 1, SEAM - 8, SEAM - 16] {
            guest.place_read();
            let driver = &mut guest.drivers[0];
            let head = driver.indirect(table, &request());
            driver.submit(head);
            assert_eq!(driver.wait_used(), (head, 513));
            assert_eq!(guest.load(DATA, 512), pattern(0, 512));
            assert_eq!(guest.load(STATUS, 1), [OK]);
        }
    });
}

#[test]
fn section_2_7_5_3_2_the_write_flag_of_an_indirect_descriptor_is_ignored() {
    let (mut guest, _) = reader();
    write_table(&guest.memory, TABLE, &request());
    let len = guest.crafted(1, |driver, d| {
        driver.describe(d[0], TABLE, 48, INDIRECT | WRITE, 0);
    });
    assert_eq!(len, 513);
}

#[test]
fn section_2_7_5_3_2_an_indirect_descriptor_may_come_last_in_a_chain() {
    let (mut guest, _) = reader();
    write_table(&guest.memory, TABLE, &request()[1..]);
    let len = guest.crafted(2, |driver, d| {
        driver.describe(d[0], HEADER, 16, NEXT, d[1]);
        driver.describe(d[1], TABLE, 32, INDIRECT, 0);
    });
    assert_eq!(len, 513);
    assert_eq!(guest.load(STATUS, 1), [OK]);
}

#[test]
fn section_2_7_5_3_1_indirect_tables_that_break_the_rules_are_returned_with_length_0() {
    let (mut guest, script) = reader();
    write_table(&guest.memory, TABLE, &request());
    // With a next one; of no length, or none of whole descriptors; outside guest memory.
    let tables = [
        (TABLE, 48, INDIRECT | NEXT),
        (TABLE, 0, INDIRECT),
        (TABLE, 47, INDIRECT),
        (TABLE, 8, INDIRECT),
        (TABLE, 32, INDIRECT),
        (HOLE, 48, INDIRECT),
        (HOLE - 20, 48, INDIRECT),
        (u64::MAX - 3, 48, INDIRECT),
    ];
    for (table, len, flags) in tables {
        let len = guest.crafted(1, |driver, d| driver.describe(d[0], table, len, flags, 0));
        assert_eq!(len, 0, "{table:#x}");
    }
    // Within another table; within itself; a loop; an index that only the other table has.
    let nested = |flags, next| Descriptor::new(TABLE, 48, flags, next);
    for descriptor in [
        nested(INDIRECT as u16, 0),
        nested((INDIRECT | NEXT) as u16, 0),
        nested(NEXT as u16, 0),
        nested(NEXT as u16, 3),
    ] {
        guest
            .memory
            .write_obj(descriptor, GuestAddress(TABLE + 0x100))
            .unwrap();
        let len = guest.crafted(1, |driver, d| {
            driver.describe(d[0], TABLE + 0x100, 48, INDIRECT, 0);
        });
        assert_eq!(len, 0, "{descriptor:?}");
    }
    assert_eq!(guest.load(STATUS, 1), [UNTOUCHED]);
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn section_2_7_5_3_1_indirect_descriptors_must_be_negotiated() {
    let setup = Setup::raw().decline(VIRTIO_RING_F_INDIRECT_DESC);
    let mut guest = setup.boot();
    guest.place_read();
    let head = guest.drivers[0].indirect(TABLE, &request());
    guest.drivers[0].submit(head);
    assert_eq!(guest.drivers[0].wait_used(), (head, 0));
    guest.still_serves();
}

#[test]
fn section_2_7_5_3_1_a_chain_longer_than_the_largest_queue_is_returned_with_length_0() {
    let (mut guest, script) = reader();
    let mut buffers = vec![readable(HEADER, 16)];
    buffers.extend([writable(DATA, 2); 255]);
    buffers.push(writable(STATUS, 1));
    let head = guest.drivers[0].indirect(TABLE, &buffers);
    guest.drivers[0].submit(head);
    assert_eq!(guest.drivers[0].wait_used(), (head, 0));
    assert_eq!(script.calls(), []);
    guest.still_serves();
}

#[test]
fn what_a_request_says_is_copied_once() {
    let (mut guest, script) = reader();
    script.hold();
    let driver = &mut guest.drivers[0];
    let head = driver.chain(&request());
    driver.submit(head);
    script.wait_calls(1);
    // While it is in flight the driver changes the header and every descriptor.
    guest.store(HEADER, &header(VIRTIO_BLK_T_OUT, 1 << 55));
    for index in 0..256 {
        guest.drivers[0].describe(index, HOLE, u32::MAX, NEXT | INDIRECT, index);
    }
    script.release();
    assert_eq!(guest.drivers[0].wait_used(), (head, 513));
    assert_eq!(script.calls(), [Call::Read(0, 512)]);
    assert_eq!(guest.load(DATA, 512), pattern(0, 512));
    assert_eq!(guest.load(STATUS, 1), [OK]);
}

#[test]
fn a_head_that_is_made_available_twice_is_returned_twice() {
    let (mut guest, script) = reader();
    script.hold();
    let driver = &mut guest.drivers[0];
    let head = driver.chain(&request());
    driver.offer(head);
    driver.offer(head);
    driver.publish();
    script.wait_calls(2);
    script.release();
    guest.drivers[0].poll_used(2);
    assert_eq!(guest.drivers[0].used_entry(), Some((head, 513)));
    assert_eq!(guest.drivers[0].used_entry(), Some((head, 513)));
    settle(&guest);
    assert_eq!(guest.drivers[0].used_entry(), None);
    guest.still_serves();
}

/// After `harm` the device asks for a reset, takes nothing more, and works after the reset.
fn needs_reset_after(harm: impl FnOnce(&mut Guest)) {
    let (mut guest, script) = reader();
    guest.still_serves();
    harm(&mut guest);
    guest
        .line
        .wait("DEVICE_NEEDS_RESET", |state| state.needs_reset);
    settle(&guest);
    script.release();
    let used = guest.drivers[0].used_index();
    guest.drivers[0].kick();
    settle(&guest);
    script.forget();
    guest.drivers[0].publish_index(used + 1);
    guest.drivers[0].kick();
    settle(&guest);
    assert_eq!(script.calls(), []);
    guest.reset();
    guest.activate().unwrap();
    guest.still_serves();
}

#[test]
fn section_2_7_6_an_available_index_that_runs_away_needs_a_reset() {
    needs_reset_after(|guest| {
        guest.drivers[0].publish_index(1 + 257);
        guest.drivers[0].kick();
    });
    needs_reset_after(|guest| {
        // Decremented (section 2.7.6.1).
        guest.drivers[0].publish_index(0);
        guest.drivers[0].kick();
    });
}

#[test]
fn section_2_7_6_a_head_out_of_range_needs_a_reset() {
    for head in [256, 257, 0xffff] {
        needs_reset_after(|guest| {
            guest.drivers[0].offer(head);
            guest.drivers[0].publish_index(2);
            guest.drivers[0].kick();
        });
    }
}

#[test]
fn more_chains_than_descriptors_in_flight_need_a_reset() {
    let (mut guest, script) = reader();
    script.hold();
    let head = guest.drivers[0].chain(&request());
    for _ in 0..256 {
        guest.drivers[0].offer(head);
    }
    guest.drivers[0].publish();
    script.wait_calls(256);
    assert!(!guest.line.state().needs_reset);
    guest.drivers[0].offer(head);
    guest.drivers[0].publish();
    guest.drivers[0].kick();
    guest
        .line
        .wait("DEVICE_NEEDS_RESET", |state| state.needs_reset);
    assert_eq!(script.calls().len(), 256);
    script.release();
    guest.reset();
    guest.activate().unwrap();
    guest.still_serves();
}

#[test]
fn one_broken_virtqueue_stops_the_device_but_not_what_is_in_flight() {
    let (mut guest, script) = boot(|setup, _| setup.queues = 2);
    guest.place_read();
    script.hold();
    let head = guest.drivers[1].chain(&request());
    guest.drivers[1].submit(head);
    script.wait_calls(1);
    guest.drivers[0].publish_index(999);
    guest.drivers[0].kick();
    guest
        .line
        .wait("DEVICE_NEEDS_RESET", |state| state.needs_reset);
    script.release();
    assert_eq!(guest.drivers[1].wait_used(), (head, 513));
}

/// A generator of pseudorandom numbers.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

#[test]
fn random_chains_write_nothing_but_device_writable_buffers() {
    for seed in 1..=8 {
        let mut random = Random::new(seed);
        let mut guest = Setup {
            ro: true,
            ..Setup::raw()
        }
        .boot();
        let mut returned = 0;
        for round in 0..200 {
            guest.store(BUFFERS, &vec![UNTOUCHED; 0x8000]);
            let mut may_write = vec![false; 0x8000];
            let driver = &mut guest.drivers[0];
            let indices: Vec<u16> = (0..8).map(|_| driver.take_free()).collect();
            let table = BUFFERS + 0x7000;
            for at in 0..16 {
                let address = BUFFERS + random.below(0x6000);
                let address = random.pick(&[address, address, address, HOLE, SEAM - 3, table]);
                let len = random.pick(&[0, 1, 16, 16, 512, 512, 513, 4096, u32::MAX]);
                let flags = random.below(8) as u32 & random.pick(&[3, 3, 3, 7]);
                let next = random.pick(&[&indices[..], &[0, 1, 2, 3, 300]].concat());
                if flags & WRITE != 0 {
                    let end = (address + u64::from(len)).min(BUFFERS + 0x8000);
                    for byte in address.max(BUFFERS)..end {
                        may_write[(byte - BUFFERS) as usize] = true;
                    }
                }
                if at < 8 {
                    driver.describe(indices[at], address, len, flags, next);
                } else {
                    let next = (at as u16 - 7) % 8;
                    let descriptor = Descriptor::new(address, len, flags as u16, next);
                    let address = GuestAddress(table + 16 * (at as u64 - 8));
                    driver.memory.write_obj(descriptor, address).unwrap();
                }
            }
            let heading = header(random.pick(&[0, 0, 1, 8, 11, 13]), random.below(2050));
            for _ in 0..4 {
                let at = BUFFERS + random.below(0x6000);
                driver
                    .memory
                    .write_slice(&heading, GuestAddress(at))
                    .unwrap();
            }
            let before = guest.load(BUFFERS, 0x8000);
            let driver = &mut guest.drivers[0];
            driver.submit(indices[0]);
            let (head, len) = driver.wait_used();
            assert_eq!(head, indices[0]);
            returned += u32::from(len > 0);
            for index in &indices[1..] {
                // Back to the free ones: a chain of its own that says nothing.
                driver.describe(*index, 0, 0, 0, 0);
                driver.submit(*index);
                assert_eq!(driver.wait_used(), (*index, 0));
            }
            let after = guest.load(BUFFERS, 0x8000);
            let changed = (0..0x8000).find(|at| before[*at] != after[*at] && !may_write[*at]);
            assert_eq!(changed, None, "seed {seed} round {round}");
        }
        assert!(returned > 20, "seed {seed}: {returned} chains had a status");
        assert!(guest.image() == pattern(0, SIZE));
        assert!(!guest.line.state().needs_reset);
        guest.still_serves();
    }
}
