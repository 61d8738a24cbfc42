//! A disk that another process serves, in a VM that runs.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::client::Client;
use crate::kernel::*;
use crate::vm::{Folder, PATIENCE, eventually};

const DISK: &str = "[[block]]\nvhost_user = \"disk.sock\"\n";

/// `launcher disk serve`, killed at its end.
struct Server(Child);

impl Server {
    fn start(folder: &Folder) -> Server {
        let image = std::fs::File::create(folder.path("disk.img")).unwrap();
        image.set_len(1 << 20).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command
            .args(["disk", "serve", "disk.img", "--socket", "disk.sock"])
            .current_dir(folder.path(""))
            .env("XDG_STATE_HOME", folder.path(""))
            .stderr(Stdio::null());
        Server(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn served(code: &[u8]) -> (Folder, Server) {
    let folder = Folder::new(code, DISK);
    let server = Server::start(&folder);
    eventually("it is served", || folder.path("disk.sock").exists());
    (folder, server)
}

#[test]
fn without_its_server_a_vm_does_not_start() {
    let (code, said) = Folder::new(&power_off(), DISK).up().end();
    assert_eq!(code, 2);
    assert_eq!(
        said,
        "error: nobody serves a disk at `disk.sock`\n --> vm.toml:4:14\n  |\n\
         4 | vhost_user = \"disk.sock\"\n  |              ^^^^^^^^^^^\n  |\n  = help: start its \
         server first: `launcher disk serve IMAGE --socket disk.sock`\n"
    );
}

#[test]
fn its_end_is_not_the_servers() {
    let (folder, mut server) = served(&power_off());
    for _ in 0..2 {
        assert_eq!(folder.up().end(), (0, String::new()));
    }
    assert!(server.0.try_wait().unwrap().is_none());
}

#[test]
fn orders_are_carried_out_while_the_server_is_away() {
    let (folder, server) = served(&forever(&[print("."), spin_for_a_while()].concat()));
    let mut vm = folder.up();
    vm.out.wait_for("...", 1);
    let mut client = Client::of(&folder);
    let disk = client.status()["disks"][0].clone();
    assert_eq!(disk["connected"], true, "{disk}");
    assert_eq!(
        (&disk["format"], &disk["size"]),
        (&"vhost-user".into(), &(1 << 20).into())
    );
    drop(server);
    let connected = |client: &mut Client| {
        let disk = client.status()["disks"][0].clone();
        disk["connected"].as_bool().unwrap()
    };
    eventually("it is gone", || !connected(&mut client));
    for order in ["pause", "resume", "reboot", "pause", "resume"] {
        assert!(client.order(order)["ok"].is_object(), "{order}");
    }
    let resize = client.ask(r#"{"command":"resize","arguments":{"disk":"0","size":"2MiB"}}"#);
    let why = resize["error"]["message"].as_str().unwrap();
    assert!(why.contains("is served by another process"), "{resize}");
    let server = Server::start(&folder);
    eventually("it is there again", || connected(&mut client));
    // One that hangs holds nobody up.
    server.signal(Signal::STOP);
    assert!(client.order("reboot")["ok"].is_object());
    let start = Instant::now();
    assert!(client.order("kill")["ok"].is_object());
    assert_eq!(vm.exit(), 1);
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn a_disk_that_grows_at_its_server_is_an_event() {
    let (folder, server) = served(&forever(&[print("."), spin_for_a_while()].concat()));
    let vm = folder.up();
    vm.out.wait_for("...", 1);
    let mut events = Client::of(&folder);
    events.order("subscribe");
    let path = folder.path("disk.img");
    let image = std::fs::File::options().write(true).open(path).unwrap();
    image.set_len(3 << 20).unwrap();
    server.signal(Signal::HUP);
    let event = events.line();
    assert_eq!(event["event"], "resized", "{event}");
    assert_eq!(
        (&event["from"], &event["to"]),
        (&(1 << 20).into(), &(3 << 20).into())
    );
    assert_eq!(Client::of(&folder).status()["disks"][0]["size"], 3 << 20);
}
