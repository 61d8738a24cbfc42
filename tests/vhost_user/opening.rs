//! What is at the socket when a VM starts.

use std::os::unix::net::UnixListener;
use std::time::Instant;

use formats::OpenError;

use crate::{Folder, MIB, exists};

fn refused(folder: &Folder, queues: u16, ro: bool) -> (&'static str, String, String) {
    let OpenError { key, message, help } = folder.open(queues, ro).unwrap_err();
    (key, message, help.unwrap_or_default())
}

#[test]
fn nobody_at_the_socket_is_an_error_that_says_what_starts_a_server() {
    let folder = Folder::with_image(MIB);
    let expected = (
        "vhost_user",
        "nobody serves a disk at `disk.sock`".to_owned(),
        "start its server first: `launcher disk serve IMAGE --socket disk.sock`".to_owned(),
    );
    assert_eq!(refused(&folder, 1, false), expected);
    folder.serve(&[]).kill();
    assert!(
        exists(&folder.socket()),
        "what a server leaves that is killed"
    );
    assert_eq!(refused(&folder, 1, false), expected);
}

#[test]
fn what_is_served_is_what_the_file_says() {
    let folder = Folder::with_image(MIB);
    let server = folder.serve(&[]);
    let (key, message, _) = refused(&folder, 1, true);
    let expected = "`ro` is true, but what is served at `disk.sock` can be written";
    assert_eq!((key, &*message), ("ro", expected));
    let (key, message, _) = refused(&folder, 2, false);
    let expected = "`queues` is 2, but `disk.sock` is served with 1";
    assert_eq!((key, &*message), ("queues", expected));
    server.kill();
    let _server = folder.serve(&["--ro", "--queues", "2"]);
    let (key, message, _) = refused(&folder, 1, false);
    let expected = "`ro` is false, but what is served at `disk.sock` is read-only";
    assert_eq!((key, &*message), ("ro", expected));
    assert!(folder.open(2, true).is_ok());
}

#[test]
fn a_server_that_another_vm_has_is_not_waited_for_long() {
    let folder = Folder::with_image(MIB);
    let _server = folder.serve(&[]);
    let first = folder.open(1, false).unwrap();
    let start = Instant::now();
    let (key, message, help) = refused(&folder, 1, false);
    assert_eq!(key, "vhost_user");
    assert!(message.contains("does not answer within"), "{message}");
    assert!(help.contains("another VM may have the disk"), "{help}");
    assert!(start.elapsed() < crate::driver::PATIENCE);
    drop(first);
    assert!(folder.open(1, false).is_ok());
}

#[test]
fn what_is_no_server_is_refused() {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.socket()).unwrap();
    let closing = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let (key, message, _) = refused(&folder, 1, false);
    assert_eq!(key, "vhost_user");
    assert!(message.ends_with("has closed the connection"), "{message}");
    closing.join().unwrap();
}
