//! A server that goes, and comes again.

use std::time::Instant;

use launcher::devices::virtio::Device;
use rustix::process::Signal;

use crate::driver::{Guest, IN, OUT, SLOTS};
use crate::{Folder, MIB, capacity, noise, until};

#[test]
fn requests_in_flight_when_the_server_is_killed_are_done_by_the_next() {
    let folder = Folder::with_image(16 * MIB);
    let mut device = {
        let _server = folder.serve(&["--queues", "2"]);
        folder.open(2, false).unwrap()
    };
    let mut guest = Guest::new(2);
    let features = device.features();
    guest.drive(&mut device, features);
    let mut wanted = vec![[0; 2]; 2 * usize::from(SLOTS)];
    let mut number = 0;
    for round in 0..12 {
        let server = folder.serve(&["--queues", "2"]);
        until("it is connected", || device.handle().is_connected());
        // Some come before it is killed, some while nobody is there.
        for part in 0..2 {
            for queue in 0..2 {
                while guest.in_flight(queue) < usize::from(SLOTS) / (2 - part) {
                    number += 1;
                    let place = number % wanted.len();
                    // Two writes of one place at once have no order.
                    if wanted[place][1] != 0 {
                        break;
                    }
                    let slot =
                        guest.submit(queue, OUT, 16 * place as u64, &noise(number as u64, 8192));
                    wanted[place] = [number, 1 + usize::from(slot) + 1000 * queue];
                }
            }
            if part == 0 {
                for _ in 0..round {
                    collect(&mut guest, &mut wanted);
                }
                server.signal(Signal::KILL);
                until("it is gone", || !device.handle().is_connected());
            }
        }
        drop(server);
        collect(&mut guest, &mut wanted);
    }
    let _server = folder.serve(&["--queues", "2"]);
    let start = Instant::now();
    while guest.in_flight(0) + guest.in_flight(1) > 0 {
        collect(&mut guest, &mut wanted);
        assert!(
            start.elapsed() < crate::driver::PATIENCE,
            "requests are lost"
        );
    }
    for (place, [number, _]) in wanted.iter().enumerate() {
        if *number > 0 {
            let expected = noise(*number as u64, 8192);
            assert!(folder.image(16 * place as u64, 8192) == expected, "{place}");
        }
    }
    assert!(!guest.line.state().needs_reset);
}

/// Takes what is done.
fn collect(guest: &mut Guest, wanted: &mut [[usize; 2]]) {
    for queue in 0..2 {
        while let Some((slot, status, _)) = guest.done(queue, 0) {
            assert_eq!(status, 0);
            let key = 1 + usize::from(slot) + 1000 * queue;
            let place = wanted.iter_mut().find(|[_, it]| *it == key).unwrap();
            place[1] = 0;
        }
    }
}

#[test]
fn a_driver_may_reset_the_device_and_start_it_while_nobody_serves_it() {
    let folder = Folder::with_image(4 * MIB);
    let server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    guest.run(0, OUT, 0, &noise(1, 512));
    server.kill();
    until("it is gone", || !device.handle().is_connected());
    guest.submit(0, OUT, 8, &noise(2, 512));
    device.reset();
    guest.drive(&mut device, features);
    device.write_config(32, &[0]);
    guest.submit(0, OUT, 16, &noise(3, 512));
    let _server = folder.serve(&[]);
    let (_, status, _) = guest.wait(0, 0);
    assert_eq!(status, 0);
    assert_eq!(folder.image(16, 512), noise(3, 512));
    assert_eq!(folder.image(8, 512), vec![8; 512], "given up by its driver");
    assert_eq!(guest.run(0, IN, 0, &[0; 512]), noise(1, 512));
    assert!(!guest.line.state().needs_reset);
}

#[test]
fn another_disk_does_not_take_the_place_of_the_one_that_is_gone() {
    let folder = Folder::with_image(4 * MIB);
    let server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    let expected = guest.run(0, IN, 9, &[0; 512]);
    server.kill();
    until("it is gone", || !device.handle().is_connected());
    guest.submit(0, IN, 9, &[0; 512]);
    for (arguments, len) in [
        (&["--ro"][..], 4 * MIB),
        (&["--block-size", "4096"], 4 * MIB),
        (&[], 3 * MIB),
    ] {
        folder.resize(len);
        let mut server = folder.serve(arguments);
        // It is looked at, and left.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!device.handle().is_connected(), "{arguments:?}");
        assert!(guest.done(0, 0).is_none());
        server.signal(Signal::TERM);
        server.child.wait().unwrap();
    }
    assert_eq!(capacity(&device), 4 * MIB / 512);
    folder.resize(6 * MIB);
    let _server = folder.serve(&[]);
    let (_, status, data) = guest.wait(0, 512);
    assert_eq!((status, data), (0, expected));
    assert_eq!(capacity(&device), 6 * MIB / 512, "it has grown meanwhile");
    assert!(guest.line.state().config_changes > 0);
}

#[test]
fn a_server_that_hangs_does_not_hold_up_the_end_of_the_vm() {
    let folder = Folder::with_image(4 * MIB);
    let server = folder.serve(&[]);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    server.signal(Signal::STOP);
    guest.submit(0, OUT, 0, &noise(1, 512));
    device.handle().give_up();
    device.reset();
    drop(device);
}
