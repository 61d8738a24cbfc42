//! QEMU's storage daemon: a server of others'.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use launcher::devices::virtio::Device;

use crate::driver::{FLUSH, Guest, IN, OUT, SLOTS};
use crate::{Folder, MIB, capacity, exists, noise, until};

/// Killed when it is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(folder: &Folder) -> Daemon {
        let path = |name| folder.path(name).display().to_string();
        let monitor = folder.path("monitor.sock");
        // That of an earlier one.
        let _ = fs::remove_file(&monitor);
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=disk,filename={}",
                path("disk.img")
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
                 addr.type=unix,addr.path={}",
                path("disk.sock")
            ))
            .arg("--chardev")
            .arg(format!(
                "socket,id=monitor,server=on,wait=off,path={}",
                path("monitor.sock")
            ))
            .args(["--monitor", "chardev=monitor"])
            .spawn()
            .unwrap();
        let daemon = Daemon(child);
        // It makes what it is asked for in this order. That somebody comes to its monitor only to
        // go again, one time in thirty it does not survive (QEMU 10.0.2).
        until("the daemon listens", || exists(&monitor));
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_driver_chooses_the_cache_of_the_daemon() {
    let folder = Folder::with_image(MIB);
    let _daemon = Daemon::start(&folder);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    for writeback in [0, 1] {
        guest.drive(&mut device, features);
        guest.run(0, OUT, 0, &noise(1, 512));
        device.write_config(32, &[writeback]);
        guest.run(0, OUT, 0, &noise(2, 512));
        device.reset();
    }
    // It has hung up on nobody.
    assert!(device.handle().is_connected());
}

#[test]
fn requests_are_answered_by_the_daemon() {
    let folder = Folder::with_image(4 * MIB);
    let _daemon = Daemon::start(&folder);
    let mut device = folder.open(2, false).unwrap();
    assert_eq!(capacity(&device), 4 * MIB / 512);
    let mut guest = Guest::new(2);
    let features = device.features();
    for round in 0..3 {
        guest.drive(&mut device, features);
        for queue in 0..2 {
            for nth in 0..u64::from(SLOTS) {
                let sector = 8 * (32 * queue as u64 + nth);
                guest.submit(queue, OUT, sector, &noise((round << 20) + sector, 4096));
            }
            for _ in 0..SLOTS {
                assert_eq!(guest.wait(queue, 0).1, 0);
            }
        }
        guest.run(0, FLUSH, 0, &[]);
        for nth in 0..64 {
            let expected = noise((round << 20) + 8 * nth, 4096);
            assert!(folder.image(8 * nth, 4096) == expected);
            assert!(guest.run(1, IN, 8 * nth, &[0; 4096]) == expected);
        }
        device.reset();
    }
}

#[test]
fn a_disk_that_grows_at_the_daemon_grows_in_the_guest() {
    let folder = Folder::with_image(4 * MIB);
    let _daemon = Daemon::start(&folder);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    let mut monitor = None;
    until("the monitor is reached", || {
        monitor = UnixStream::connect(folder.path("monitor.sock")).ok();
        monitor.is_some()
    });
    let monitor = monitor.unwrap();
    let mut answers = BufReader::new(monitor.try_clone().unwrap());
    let mut tell = |command: &str| {
        writeln!(&monitor, "{command}").unwrap();
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            answers.read_line(&mut line).unwrap();
            assert!(!line.contains("\"error\""), "{line}");
        }
    };
    tell("{\"execute\": \"qmp_capabilities\"}");
    tell(
        "{\"execute\": \"block_resize\", \"arguments\": {\"node-name\": \"disk\", \"size\": 8388608}}",
    );
    guest
        .line
        .wait("a change of the configuration", |it| it.config_changes == 1);
    assert_eq!(capacity(&device), 8 * MIB / 512);
    guest.run(0, OUT, 5 * MIB / 512, &noise(5, 4096));
    assert_eq!(folder.image(5 * MIB / 512, 4096), noise(5, 4096));
}

/// It keeps no record of the requests in flight.
#[test]
fn a_daemon_that_dies_with_nothing_in_flight_is_replaced_and_else_the_driver_is_told() {
    let folder = Folder::with_image(4 * MIB);
    let mut daemon = Daemon::start(&folder);
    let mut device = folder.open(1, false).unwrap();
    let mut guest = Guest::new(1);
    let features = device.features();
    guest.drive(&mut device, features);
    for round in 0..3 {
        guest.run(0, OUT, 0, &noise(round, 4096));
        drop(daemon);
        until("it is gone", || !device.handle().is_connected());
        daemon = Daemon::start(&folder);
        until("it is there again", || device.handle().is_connected());
        assert_eq!(guest.run(0, IN, 0, &[0; 4096]), noise(round, 4096));
    }
    drop(daemon);
    until("it is gone", || !device.handle().is_connected());
    guest.submit(0, OUT, 0, &noise(9, 4096));
    assert!(!guest.line.state().needs_reset);
    let _daemon = Daemon::start(&folder);
    guest
        .line
        .wait("the need of a reset", |state| state.needs_reset);
    device.reset();
    guest.drive(&mut device, features);
    guest.run(0, OUT, 0, &noise(9, 4096));
}
