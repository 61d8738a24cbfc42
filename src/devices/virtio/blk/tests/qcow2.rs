//! A qcow2 overlay under a driver: what depends on both, the device and the format.

use std::path::Path;
use std::process::Command;

use formats::OptionValue;

use super::*;

/// Runs `qemu-img`, which has to be content.
fn qemu_img(dir: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(dir)
        .output()
        .expect("qemu-img (package qemu-utils) is needed");
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An overlay of [`SIZE`] bytes over a base three times as long, plugged in.
fn overlay(engine: Engine, cluster_size: u64) -> Guest {
    let setup = Setup {
        engine,
        ..Setup::new(formats::find("qcow2").unwrap())
    };
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, pattern(0, 3 * SIZE)).unwrap();
    let mut options = setup.options(dir.path().join("disk.qcow2"));
    options.image.size = Some(SIZE);
    options.image.backing = vec![base];
    options.image.options = vec![("cluster_size", OptionValue::Number(cluster_size))];
    setup.plug(Blk::open(options).unwrap(), dir)
}

/// With clusters of 512 bytes the L1 table has to move for each MiB or two; the base goes on behind the overlay's
/// first end, but nothing of it may come into sight.
#[test]
fn an_overlay_grows_while_the_guest_writes_and_its_new_space_reads_as_zeroes() {
    for engine in [Engine::IoUring, Engine::Threads] {
        for cluster_size in [512, 64 << 10] {
            let mut guest = overlay(engine, cluster_size);
            let mut model = pattern(0, SIZE);
            let handle = guest.blk.handle();
            let growing = std::thread::spawn(move || {
                for size in 2..=8 {
                    handle.resize(size * SIZE).unwrap();
                }
            });
            let mut sector = 0;
            while !growing.is_finished() || sector < 1000 {
                sector += 7;
                let at = sector % (SIZE / 512 - 4);
                let data = pattern(at * 512 + 8 * SIZE, 1536);
                assert_eq!(guest.write(at, &data), status(OK));
                model[at as usize * 512..][..1536].copy_from_slice(&data);
            }
            growing.join().unwrap();

            let capacity = u64::from_le_bytes(guest.config()[..8].try_into().unwrap());
            assert_eq!(capacity, 8 * SIZE / 512);
            assert_eq!(guest.line.state().config_changes, 7);
            model.resize(8 << 20, 0);
            for sector in [SIZE, 2 * SIZE, 3 * SIZE - 4096, 3 * SIZE, 8 * SIZE - 4096] {
                assert_eq!(guest.read(sector / 512, 4096).data, [0; 4096]);
            }
            for at in [SIZE - 512, 3 * SIZE - 512, 8 * SIZE - 1024] {
                let data = pattern(at + 16 * SIZE, 1024);
                assert_eq!(guest.write(at / 512, &data), status(OK));
                model[at as usize..][..1024].copy_from_slice(&data);
            }
            assert_eq!(guest.flush(), status(OK));
            let seen = guest.read(0, 1 << 20);
            assert!(
                seen.data == model[..1 << 20],
                "what was written is not read"
            );

            guest.blk.close().unwrap();
            let dir = guest.dir.path();
            std::fs::write(dir.join("model"), &model).unwrap();
            qemu_img(dir, &["check", "-q", "disk.qcow2"]);
            let files = ["-f", "raw", "-F", "qcow2", "model", "disk.qcow2"];
            qemu_img(dir, &[&["compare", "-q"], &files[..]].concat());
            assert!(
                std::fs::read(dir.join("base.raw")).unwrap() == pattern(0, 3 * SIZE),
                "the base has changed"
            );
        }
    }
}
