//! The crate `virtio-drivers`, a second and independent driver, drives our devices through our
//! PCI bus: the configuration ports, the window of the BARs, virtqueues in guest memory.
//!
//! Its own `PciTransport` reads and writes registers through pointers, which nothing can
//! intercept in a process without a guest. So its walk of the bus, its drivers and its
//! virtqueues are used as they are, and the registers by a `Transport` that lies beside this
//! file.

#![allow(clippy::unwrap_used, reason = "tests and what they share")]

mod machine;

use std::os::unix::fs::FileExt;

use formats::Engine;
use launcher::devices::virtio::rng::Rng;
use virtio_drivers::Error;
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceType, InterruptStatus};

use machine::{Disk, GuestHal, Machine, Registers};

type Driver = VirtIOBlk<GuestHal, Registers>;

const SIZE: usize = 1 << 20;

/// Pseudorandom bytes.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut byte = || {
        state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
        (state >> 24) as u8
    };
    (0..len).map(|_| byte()).collect()
}

/// Runs a test on both raw formats and both engines.
fn each_backend(test: impl Fn(Disk)) {
    for format in ["raw", "sparse-raw"] {
        for engine in [Engine::IoUring, Engine::Threads] {
            println!("{format} {engine:?}");
            let mut disk = Disk::new(&noise(1, SIZE));
            (disk.format, disk.engine) = (format, engine);
            test(disk);
        }
    }
}

#[test]
fn the_walk_of_the_bus_finds_the_device() {
    let (machine, _) = Disk::new(&noise(1, SIZE)).plug();
    let root = machine.root();
    let found: Vec<_> = root.enumerate_bus(0).collect();
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!((found[0].1.class, found[0].1.subclass), (6, 0), "a bridge");
    let (_, info) = &found[1];
    assert_eq!((info.vendor_id, info.device_id), (0x1af4, 0x1042));
    let registers = machine.registers();
    use virtio_drivers::transport::Transport;
    assert_eq!(registers.device_type(), DeviceType::Block);
}

#[test]
fn what_is_read_is_what_the_host_has() {
    each_backend(|disk| {
        let (machine, _) = disk.plug();
        let mut driver = Driver::new(machine.registers()).unwrap();
        assert_eq!(driver.capacity(), (SIZE / SECTOR_SIZE) as u64);
        assert!(!driver.readonly());
        let mut bytes = vec![0; SIZE];
        for (at, chunk) in bytes.chunks_mut(SECTOR_SIZE * 7).enumerate() {
            driver.read_blocks(7 * at, chunk).unwrap();
        }
        assert!(bytes == noise(1, SIZE));
    });
}

#[test]
fn what_is_written_is_what_the_host_has() {
    each_backend(|disk| {
        let (machine, _) = disk.plug();
        let mut driver = Driver::new(machine.registers()).unwrap();
        let mut expected = noise(1, SIZE);
        for (sector, sectors) in [(0, 1), (1, 2), (100, 64), (2047, 1), (3, 1), (512, 256)] {
            let data = noise(sector as u32 + 7, sectors * SECTOR_SIZE);
            driver.write_blocks(sector, &data).unwrap();
            expected[sector * SECTOR_SIZE..][..data.len()].copy_from_slice(&data);
        }
        driver.flush().unwrap();
        assert!(disk.image() == expected);
        let mut bytes = vec![0; SIZE];
        driver.read_blocks(0, &mut bytes).unwrap();
        assert!(bytes == expected);
    });
}

#[test]
fn the_id_is_the_one_given() {
    let (machine, _) = Disk::new(&noise(1, SIZE)).plug();
    let mut driver = Driver::new(machine.registers()).unwrap();
    let mut id = [0; 20];
    let len = driver.device_id(&mut id).unwrap();
    assert_eq!(&id[..len], b"SECOND DRIVER");
}

#[test]
fn as_many_requests_as_its_virtqueue_holds_are_in_flight_at_once() {
    each_backend(|disk| {
        let (machine, _) = disk.plug();
        let mut driver = Driver::new(machine.registers()).unwrap();
        let count = usize::from(driver.virt_queue_size());
        let mut requests: Vec<_> = (0..count)
            .map(|at| {
                let buffer = noise(at as u32 + 50, 8 * SECTOR_SIZE);
                (BlkReq::default(), buffer, BlkResp::default())
            })
            .collect();
        let mut tokens = Vec::new();
        for (at, (request, buffer, response)) in requests.iter_mut().enumerate() {
            // SAFETY: the vector keeps all three where they are until they are completed below.
            let token = unsafe { driver.write_blocks_nb(8 * at, request, buffer, response) };
            tokens.push(token.unwrap());
        }
        for _ in 0..count {
            let token = loop {
                match driver.peek_used() {
                    Some(token) => break token,
                    None => std::thread::yield_now(),
                }
            };
            let at = tokens.iter().position(|it| *it == token).unwrap();
            let (request, buffer, response) = &mut requests[at];
            // SAFETY: these are the three that were passed for this token.
            unsafe { driver.complete_write_blocks(token, request, buffer, response) }.unwrap();
            assert_eq!(response.status(), RespStatus::OK);
        }
        let image = disk.image();
        for (at, (_, buffer, _)) in requests.iter().enumerate() {
            assert!(image[8 * at * SECTOR_SIZE..][..buffer.len()] == *buffer);
        }
    });
}

#[test]
fn a_read_only_disk_is_seen_as_such_and_refuses_writes() {
    let mut disk = Disk::new(&noise(1, SIZE));
    disk.ro = true;
    let (machine, _) = disk.plug();
    let mut driver = Driver::new(machine.registers()).unwrap();
    assert!(driver.readonly());
    assert_eq!(driver.write_blocks(0, &[1; 512]), Err(Error::IoError));
    driver.flush().unwrap();
    let mut bytes = [0; 512];
    driver.read_blocks(0, &mut bytes).unwrap();
    assert!(disk.image() == noise(1, SIZE));
}

#[test]
fn a_request_past_the_end_is_an_error_and_the_disk_goes_on() {
    let disk = Disk::new(&noise(1, SIZE));
    let (machine, _) = disk.plug();
    let mut driver = Driver::new(machine.registers()).unwrap();
    let end = SIZE / SECTOR_SIZE;
    for sector in [end - 1, end, 1 << 55, usize::MAX - 1] {
        assert_eq!(
            driver.read_blocks(sector, &mut [0; 1024]),
            Err(Error::IoError)
        );
        assert_eq!(driver.write_blocks(sector, &[1; 1024]), Err(Error::IoError));
    }
    assert!(disk.image() == noise(1, SIZE));
    driver.write_blocks(end - 1, &[9; 512]).unwrap();
    driver.flush().unwrap();
    assert_eq!(disk.image()[SIZE - 512..], [9; 512]);
}

#[test]
fn a_resize_shows_in_the_isr_status_and_to_the_next_driver() {
    let disk = Disk::new(&noise(1, SIZE));
    let (machine, blk) = disk.plug();
    let mut driver = Driver::new(machine.registers()).unwrap();
    assert!(driver.ack_interrupt() == InterruptStatus::empty());
    blk.resize(2 * SIZE as u64).unwrap();
    let changed = InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT;
    assert!(driver.ack_interrupt() == changed);
    assert!(driver.ack_interrupt() == InterruptStatus::empty());
    // The driver ends, its transport resets the device, and another takes over.
    drop(driver);
    let mut driver = Driver::new(machine.registers()).unwrap();
    assert_eq!(driver.capacity(), (2 * SIZE / SECTOR_SIZE) as u64);
    driver.write_blocks(SIZE / SECTOR_SIZE, &[7; 512]).unwrap();
    let mut bytes = [0; 512];
    disk.file().read_exact_at(&mut bytes, SIZE as u64).unwrap();
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn the_entropy_source_fills_a_buffer() {
    let machine = Machine::new(Rng::new());
    let mut driver = VirtIORng::<GuestHal, _>::new(machine.registers()).unwrap();
    let mut bytes = [0; 64];
    assert_eq!(driver.request_entropy(&mut bytes), Ok(64));
    assert_ne!(bytes, [0; 64]);
}
