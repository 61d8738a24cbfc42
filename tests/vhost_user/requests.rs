//! A server that is there.

use rustix::process::Signal;
use vmm_sys_util::eventfd::EventFd;

use launcher::devices::virtio::Device;

use crate::driver::{FLUSH, GET_ID, Guest, IN, LEN, OUT, SLOTS};
use crate::{Folder, MIB, capacity, noise};

#[test]
fn requests_are_answered_by_the_server() {
    let folder = Folder::with_image(4 * MIB);
    let _server = folder.serve(&["--id", "SERVED"]);
    let mut device = folder.open(1, false).unwrap();
    assert_eq!(capacity(&device), 4 * MIB / 512);
    assert_eq!(device.handle().size(), 4 * MIB);
    assert!(device.handle().is_connected());
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    assert_eq!(guest.run(0, IN, 7, &[0; 1024]), folder.image(7, 1024));
    let data = noise(1, LEN as usize);
    guest.run(0, OUT, 64, &data);
    guest.run(0, FLUSH, 0, &[]);
    assert_eq!(folder.image(64, data.len()), data);
    assert_eq!(guest.run(0, IN, 64, &vec![0; data.len()]), data);
    let id = guest.run(0, GET_ID, 0, &[0; 20]);
    assert_eq!(&id[..6], b"SERVED");
}

#[test]
fn each_virtqueue_is_served() {
    let folder = Folder::with_image(4 * MIB);
    let _server = folder.serve(&["--queues", "4"]);
    let mut device = folder.open(3, false).unwrap();
    assert_eq!(device.queue_max_sizes().len(), 3);
    let mut num_queues = [0; 2];
    device.read_config(34, &mut num_queues);
    assert_eq!(num_queues, [3, 0], "not those of the server");
    let mut guest = Guest::new(3);
    let features = device.features();
    guest.drive(&mut device, features);
    for queue in 0..3 {
        for nth in 0..u64::from(SLOTS) {
            let sector = 8 * (32 * queue as u64 + nth);
            guest.submit(queue, OUT, sector, &noise(sector, 4096));
        }
    }
    for queue in 0..3 {
        for _ in 0..SLOTS {
            let (slot, status, _) = guest.wait(queue, 0);
            assert_eq!(status, 0, "{slot}");
        }
    }
    for nth in 0..3 * 32 {
        assert_eq!(folder.image(8 * nth, 4096), noise(8 * nth, 4096));
    }
}

#[test]
fn a_reset_loses_no_request_and_the_next_driver_finds_the_device_anew() {
    let folder = Folder::with_image(4 * MIB);
    let _server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    for round in 0..20 {
        // With event indices or without: what one driver negotiated is not the next one's.
        let features = match round % 2 {
            0 => device.features(),
            _ => crate::driver::VERSION_1,
        };
        guest.drive(&mut device, features);
        for nth in 0..u64::from(SLOTS) {
            guest.submit(0, OUT, 8 * nth, &noise(round << 8 | nth, 4096));
        }
        // The first is done: so the device has begun, and the rest may be anywhere.
        let (first, status, _) = guest.wait(0, 0);
        assert_eq!(status, 0);
        device.reset();
        let mut done = vec![first];
        while let Some((slot, status, _)) = guest.done(0, 0) {
            assert_eq!(status, 0);
            done.push(slot);
        }
        for slot in done {
            let nth = u64::from(slot);
            let expected = noise(round << 8 | nth, 4096);
            assert!(folder.image(8 * nth, 4096) == expected, "{round}: {nth}");
        }
    }
    assert!(!guest.line.state().needs_reset);
}

#[test]
fn a_disk_that_grows_at_its_server_grows_in_the_guest() {
    let folder = Folder::with_image(4 * MIB);
    let mut server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    folder.resize(8 * MIB);
    server.signal(Signal::HUP);
    assert!(server.line().contains("grown from 4MiB to 8MiB"));
    guest
        .line
        .wait("a change of the configuration", |it| it.config_changes == 1);
    assert_eq!(capacity(&device), 8 * MIB / 512);
    guest.run(0, OUT, 5 * MIB / 512, &noise(5, 4096));
    assert_eq!(folder.image(5 * MIB / 512, 4096), noise(5, 4096));
}

#[test]
fn the_server_signals_the_drivers_interrupt_itself_where_it_has_an_eventfd() {
    let folder = Folder::with_image(4 * MIB);
    let _server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let event = EventFd::new(0).unwrap();
    guest.line.set_direct(Some(event.try_clone().unwrap()));
    let features = device.features();
    guest.drive(&mut device, features);
    let read_directly = |guest: &mut Guest, expected: &[u8]| {
        guest.submit(0, IN, 7, &[0; 1024]);
        loop {
            event.read().unwrap();
            if let Some((_, status, data)) = guest.done(0, 1024) {
                assert_eq!((status, &data[..]), (0, expected));
                break;
            }
        }
    };
    let expected = folder.image(7, 1024);
    read_directly(&mut guest, &expected);
    assert_eq!(guest.line.state().queues, 0, "nothing came through us");
    // The driver maps the virtqueue to no vector, and back.
    guest.line.set_direct(None);
    device.remapped();
    assert_eq!(guest.run(0, IN, 7, &[0; 1024]), expected);
    guest.line.set_direct(Some(event.try_clone().unwrap()));
    device.remapped();
    read_directly(&mut guest, &expected);
}

#[test]
fn the_driver_chooses_the_cache_of_the_server() {
    let folder = Folder::with_image(4 * MIB);
    let _server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    let writeback = |device: &dyn Device| {
        let mut field = [0];
        device.read_config(32, &mut field);
        field[0]
    };
    assert_eq!(writeback(&device), 1);
    device.write_config(32, &[0]);
    assert_eq!(writeback(&device), 0);
    guest.run(0, OUT, 0, &noise(3, 512));
    device.reset();
    assert_eq!(writeback(&device), 1, "as it was for the first driver");
}
