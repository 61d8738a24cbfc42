//! What commands say of a disk that another process serves.

use std::fs;

use crate::program::{Done, launcher};
use crate::{Folder, MIB};

const VM: &str = "boot.kernel = 'vmlinuz'\n\n[[block]]\nvhost_user = 'disk.sock'\n";

fn run(folder: &Folder, arguments: &[&str]) -> Done {
    let at = folder.path("");
    let mut command = launcher(&at, &at, arguments);
    command.env("XDG_STATE_HOME", &at);
    command.output().unwrap().into()
}

#[track_caller]
fn refused(folder: &Folder, arguments: &[&str]) -> (i32, String) {
    let Done { code, out, err } = run(folder, arguments);
    assert_eq!(out, "");
    (code, err)
}

#[test]
fn commands_for_images_say_who_has_it() {
    let folder = Folder::with_image(MIB);
    fs::write(folder.path("vm.toml"), VM).unwrap();
    for arguments in [
        &["disk", "info", "vm.toml", "0"][..],
        &["disk", "check", "vm.toml", "0"],
        &["disk", "snapshot", "list", "vm.toml", "0"],
        &["disk", "serve", "vm.toml", "0", "--socket", "other.sock"],
    ] {
        let (code, said) = refused(&folder, arguments);
        assert_eq!(code, 1, "{arguments:?}: {said}");
        assert!(
            said.contains("disk 0 is served by another process, at `disk.sock`"),
            "{arguments:?}: {said}"
        );
        assert!(said.contains("vm.toml:4:14"), "{arguments:?}: {said}");
    }
    let (code, said) = refused(&folder, &["disk", "resize", "vm.toml", "0", "2MiB"]);
    assert_eq!(code, 1);
    assert_eq!(
        said,
        "error: disk 0 is served by another process, at `disk.sock`\n\
         help: resize it there: `launcher disk serve` looks at the size again when it gets SIGHUP\n"
    );
    let listed = run(&folder, &["disk", "list", "vm.toml"]);
    assert_eq!(
        listed.out,
        "DISK  ID  FORMAT      SIZE  ON HOST  FLAGS  PATH\n\
         0         vhost-user  ?     served          disk.sock\n"
    );
    let reset = run(&folder, &["reset", "--yes", "vm.toml"]);
    assert_eq!(reset.code, 0, "{reset:?}");
    assert!(reset.out.contains("another process serves it"), "{reset:?}");
}

#[test]
fn check_asks_the_server_whether_it_has_such_a_disk() {
    let folder = Folder::with_image(MIB);
    fs::write(folder.path("vm.toml"), VM).unwrap();
    let expected = "error: nobody serves a disk at `disk.sock`\n --> vm.toml:4:14\n";
    let (code, said) = refused(&folder, &["check", "vm.toml"]);
    assert!(code == 2 && said.contains(expected), "{said}");
    let _server = folder.serve(&["--ro"]);
    let (code, said) = refused(&folder, &["check", "vm.toml"]);
    assert!(code == 2 && !said.contains(expected), "{said}");
    let expected = "error: `ro` is false, but what is served at `disk.sock` is read-only\n";
    assert!(said.contains(expected), "{said}");
    fs::write(folder.path("vm.toml"), format!("{VM}ro = true\n")).unwrap();
    let (_, said) = refused(&folder, &["check", "vm.toml"]);
    assert!(!said.contains("disk.sock"), "{said}");
}

#[test]
fn a_lock_says_that_the_disk_is_served() {
    let folder = Folder::with_image(MIB);
    fs::write(folder.path("vm.toml"), VM).unwrap();
    fs::write(folder.path("vmlinuz"), "kernel").unwrap();
    let locked = run(&folder, &["lock", "vm.toml"]);
    assert_eq!(locked.code, 0, "{locked:?}");
    let lock = fs::read_to_string(folder.path("vm.lock")).unwrap();
    assert!(lock.contains("format = \"vhost-user\"\n"), "{lock}");
    assert!(lock.contains("path = \"disk.sock\"\n"), "{lock}");
    assert!(!lock.contains("size ="), "{lock}");
    let checked = run(&folder, &["lock", "--check", "vm.toml"]);
    assert_eq!(checked.code, 0, "{checked:?}");
}

#[test]
fn what_another_process_keeps_is_not_ephemeral_here() {
    let folder = Folder::with_image(MIB);
    fs::write(folder.path("vm.toml"), VM).unwrap();
    fs::write(folder.path("vmlinuz"), "kernel").unwrap();
    let (code, said) = refused(&folder, &["up", "--ephemeral", "vm.toml"]);
    assert_eq!(code, 2);
    let expected = "`--ephemeral` is given, but what is written to disk 0 is kept by the process \
                    that serves it\n --> vm.toml:4:14\n";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn the_configuration_that_holds_can_be_read_again() {
    let folder = Folder::new();
    fs::write(folder.path("vm.toml"), VM).unwrap();
    let shown = run(&folder, &["config", "show", "vm.toml"]);
    assert_eq!(shown.code, 0, "{shown:?}");
    assert!(shown.out.contains("vhost_user = "), "{shown:?}");
    for other in ["path", "format", "block_size", "lock"] {
        assert!(!shown.out.contains(&format!("\n{other} =")), "{shown:?}");
    }
    fs::write(folder.path("again.toml"), &shown.out).unwrap();
    let again = run(&folder, &["config", "show", "again.toml"]);
    assert_eq!(again.code, 0, "{again:?}");
}
