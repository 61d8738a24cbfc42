//! `launcher logs`.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use launcher::control::messages::How;

use super::vm::Folder;

#[test]
fn logs_show_the_older_part_first_also_of_a_vm_that_has_ended() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let log = web.place.console_log();
    fs::write(log.with_extension("log.1"), "one\n").unwrap();
    fs::write(&log, b"two \xff\n").unwrap();
    fs::write(web.place.launcher_log(), "warning: three\n").unwrap();
    for _ in ["running", "ended"] {
        let output = folder.command(&["logs", "web"]).output().unwrap();
        assert_eq!(output.stdout, b"one\ntwo \xff\n");
        assert_eq!(
            folder.does(&["logs", "--launcher", "vm.toml"]),
            "warning: three\n"
        );
        if folder.launcher(&["status", "web"]).code == 0 {
            web.end(How::Guest, None, 0);
        }
    }
    let output = folder.command(&["logs", "-f", "web"]).output().unwrap();
    assert_eq!(output.stdout, b"one\ntwo \xff\n");
}

#[test]
fn a_vm_that_has_left_no_log_exits_3() {
    let folder = Folder::new();
    let done = folder.launcher(&["logs", "vm.toml"]);
    assert_eq!((done.code, &*done.out), (3, ""));
    assert!(done.err.contains("no log of it is left at"), "{done:?}");
}

#[test]
fn follow_goes_on_over_a_rotation_and_ends_with_the_vm() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let log = web.place.console_log();
    let rotated = log.with_extension("log.1");
    let mut file = fs::File::create(&log).unwrap();
    file.write_all(b"a").unwrap();
    let mut command = folder.command(&["logs", "-f", "web"]);
    let mut follow = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = follow.stdout.take().unwrap();
    let mut expect = |text: &[u8]| {
        let mut read = vec![0; text.len()];
        out.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
    };
    expect(b"a");
    file.write_all(b"bc").unwrap();
    expect(b"bc");
    file.write_all(b"d").unwrap();
    fs::rename(&log, &rotated).unwrap();
    fs::write(&log, "e").unwrap();
    expect(b"de");
    // Twice between two looks.
    fs::rename(&log, &rotated).unwrap();
    fs::write(&log, "f").unwrap();
    expect(b"f");
    fs::write(&log, "fgh").unwrap();
    web.end(How::Guest, None, 0);
    expect(b"gh");
    assert_eq!(follow.wait().unwrap().code(), Some(0));
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn follow_waits_for_a_log_that_is_not_there_yet() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let log = web.place.console_log();
    thread::scope(|scope| {
        let follow = scope.spawn(|| folder.does(&["logs", "-f", "web"]));
        thread::sleep(Duration::from_millis(300));
        fs::write(&log, "late\n").unwrap();
        web.end(How::Guest, None, 0);
        assert_eq!(follow.join().unwrap(), "late\n");
    });
}
