//! The command itself: its socket, its locks, its errors.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use rustix::process::Signal;

use crate::guest::Guest;
use crate::{Folder, MIB};

#[test]
fn the_socket_is_for_its_user_and_goes_with_the_server() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let meta = fs::metadata(&server.socket).unwrap();
    assert_eq!(meta.mode() & 0o777, 0o600);
    server.end();
}

#[test]
fn it_says_what_it_serves_and_where() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let output = {
        let mut child = folder
            .command(&["disk.img", "--ro"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        while !folder.path("disk.sock").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // The signal may come before the line, and yet all is orderly.
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, Signal::INT).unwrap();
        child.wait().unwrap();
        std::io::read_to_string(child.stderr.take().unwrap()).unwrap()
    };
    assert_eq!(
        output,
        "serving disk.img (sparse-raw, 1MiB, read-only) at disk.sock\n"
    );
}

#[test]
fn a_socket_that_a_killed_server_has_left_is_replaced() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    folder.serve(&["disk.img"]).kill();
    assert!(folder.path("disk.sock").exists());
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    assert_eq!(guest.read(7, 512), [7; 512]);
    server.end();
}

#[test]
fn a_socket_where_somebody_listens_is_refused() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    folder.raw("other.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let (code, said) = folder.refused(&["other.img"]);
    assert_eq!(code, 4);
    assert_eq!(
        said,
        "error: cannot listen at `disk.sock`: another process listens there\n\
         help: name another place with `--socket PATH`\n"
    );
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    assert_eq!(guest.read(7, 512), [7; 512]);
    server.end();
}

#[test]
fn what_is_no_socket_is_not_replaced() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    fs::write(folder.path("disk.sock"), "mine").unwrap();
    let (code, said) = folder.refused(&["disk.img"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("what is there is no socket"), "{said}");
    assert_eq!(fs::read(folder.path("disk.sock")).unwrap(), b"mine");
}

#[test]
fn an_image_in_use_is_refused_and_one_that_is_served_is_in_use() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    fs::rename(&server.socket, folder.path("first.sock")).unwrap();
    let (code, said) = folder.refused(&["disk.img"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("disk.img"), "{said}");
    let mut other = Command::new("qemu-io");
    let other = other.args(["-f", "raw", "-c", "write 0 512"]);
    let output = other.arg(folder.path("disk.img")).output().unwrap();
    assert!(!output.status.success());
    fs::rename(folder.path("first.sock"), &server.socket).unwrap();
    server.end();
}

#[test]
fn options_of_an_image_are_not_for_a_disk_of_a_vm() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    for options in [
        &["vm.toml", "0", "--ro"][..],
        &["vm.toml", "0", "--queues", "2"],
        &["vm.toml", "0", "--format", "raw"],
        &["disk.img", "--queues", "0"],
        &["disk.img", "--queues", "65"],
        &["vm.toml", "0", "--poll-us", "2"],
        &["vm.toml", "0", "--cpus", "0"],
        &["disk.img", "--poll-us", "1001"],
        &["disk.img", "--cpus", "65535"],
        &["disk.img", "--cpus", "0-1"],
        &["disk.img", "--block-size", "1000"],
        &["disk.img", "--id", "a name of more than 20 characters"],
        &["disk.img", "--format", "vmdk"],
        &["disk"],
    ] {
        let (code, said) = folder.refused(options);
        assert_eq!(code, 2, "{options:?}: {said}");
    }
}

#[test]
fn a_vm_without_a_disk_is_told_from_an_image() {
    let folder = Folder::new();
    let (code, said) = folder.refused(&["vm.toml"]);
    assert_eq!(code, 2);
    assert_eq!(
        said,
        "error: `vm.toml` is the file of a VM, expected an image, or a disk too\n\
         help: name the disk: `launcher disk serve vm.toml 0 --socket SOCKET`\n"
    );
}

#[test]
fn a_disk_of_a_vm_has_what_its_file_says() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let text = "[boot]\nkernel = 'k'\n[[block]]\npath = 'disk.img'\nephemeral = true\n\
                queues = 2\nid = 'ROOT'\n";
    fs::write(folder.path("vm.toml"), text).unwrap();
    let before = fs::read(&image).unwrap();
    let server = folder.serve(&["vm.toml", "ROOT"]);
    let mut guest = Guest::new(2);
    let _front = guest.attach(&server.socket);
    guest.write(0, &[0xff; 4096]);
    assert_eq!(guest.read(0, 4096), [0xff; 4096]);
    server.end();
    assert_eq!(fs::read(&image).unwrap(), before);
    let (code, said) = folder.refused(&["vm.toml", "1"]);
    assert_eq!(code, 2, "{said}");

    // An image that is not the one that is meant.
    let digest = "00".repeat(32);
    let text = format!("{text}sha256 = '{digest}'\n");
    fs::write(folder.path("vm.toml"), text).unwrap();
    let (code, said) = folder.refused(&["vm.toml", "0"]);
    assert!(code != 0 && said.contains("sha256"), "{code}: {said}");
}

#[test]
fn a_socket_that_cannot_be_made_leaves_the_image_alone() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let _taken = UnixListener::bind(folder.path("disk.sock")).unwrap();
    let (code, _) = folder.refused(&["disk.img"]);
    assert_eq!(code, 4);
    let mut other = Command::new("qemu-io");
    let other = other.args(["-f", "raw", "-c", "write 0 512"]);
    crate::done(other.arg(folder.path("disk.img")));
}
