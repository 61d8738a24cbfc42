//! `launcher up --detach`: what the one who starts it sees, and what goes on without them.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::kernel::*;
use crate::vm::{Folder, Vm, eventually};

/// The end of `up --detach`, with what it said.
fn detach(folder: &Folder, arguments: &[&str]) -> (i32, String) {
    let mut command = folder.command();
    command
        .arg("--detach")
        .args(arguments)
        .stderr(Stdio::piped());
    Vm::spawn(&mut command).end()
}

/// Whatever becomes of the test, no VM is left.
struct Left<'a>(&'a Folder);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        let place = self.0.place();
        let client = place.and_then(|place| Client::at(&place.join("control.sock")));
        if let Some(mut client) = client {
            client.order("kill");
        }
    }
}

#[test]
fn it_returns_when_the_vm_runs_which_goes_on_alone() {
    let folder = Folder::new(&[print("hello\r\n"), echo()].concat(), "");
    let _left = Left(&folder);
    assert_eq!(detach(&folder, &[]), (0, String::new()));
    let mut client = Client::of(&folder);
    let status = client.status();
    let pid = status["pid"].as_u64().unwrap();
    assert_eq!(
        fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(),
        "launcher\n"
    );
    // A session of its own, without a terminal and without our pipes.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: u64 = stat
        .rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(3)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(session, pid);
    for fd in [0, 1] {
        let file = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(file.to_str(), Some("/dev/null"));
    }
    let messages = fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
    assert!(messages.ends_with("launcher.log"), "{messages:?}");
    let mut console = Client::of(&folder).console(true);
    let mut text = [0; 7];
    console.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello\r\n");
    let place = folder.place().unwrap();
    eventually("it is logged", || {
        fs::read(place.join("console.log")).is_ok_and(|log| log == b"hello\r\n")
    });
    let (code, said) = detach(&folder, &[]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains(&format!("process {pid}")), "{said}");
    assert_eq!(client.order("kill")["ok"]["how"], "forced");
    eventually("its last words are kept", || {
        fs::read_to_string(place.join("launcher.log")).is_ok_and(|log| log.contains("by force"))
    });
}

#[test]
fn it_keeps_no_file_open_that_whoever_starts_it_has() {
    let folder = Folder::new(&halt(), "");
    let _left = Left(&folder);
    let launcher = folder.command();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec \"$0\" up --force --detach 7>held"])
        .arg(launcher.get_program())
        .current_dir(folder.path(""))
        .env("XDG_RUNTIME_DIR", folder.path(""));
    assert!(shell.status().unwrap().success());
    let pid = Client::of(&folder).status()["pid"].as_u64().unwrap();
    for file in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let to = fs::read_link(file.unwrap().path()).unwrap_or_default();
        assert!(!to.ends_with("held"), "{to:?}");
    }
}

#[test]
fn an_error_of_the_start_is_shown_and_is_the_exit_code() {
    let folder = Folder::new(&halt(), "cpus = 1000");
    let (code, said) = detach(&folder, &[]);
    assert_eq!(code, 2);
    assert!(said.contains("`cpus` is 1000"), "{said}");
    let folder = Folder::new(&halt(), "[[block]]\npath = \"missing.raw\"");
    let (code, said) = detach(&folder, &[]);
    assert_eq!(code, 2);
    assert!(said.contains("cannot open `"), "{said}");
    let code = [print("I ran"), halt()].concat();
    let folder = Folder::new(&code, "[console]\nlog = \"console.txt\"");
    let (code, said) = detach(&folder, &["--socket", "missing/folder/control.sock"]);
    assert_eq!(code, 1);
    assert!(said.contains("missing/folder"), "{said}");
    // The guest has not.
    assert_eq!(fs::read_to_string(folder.path("console.txt")).unwrap(), "");
}

#[test]
fn wait_boot_returns_when_the_guest_is_up() {
    let folder = Folder::new(&[print("host login: "), halt()].concat(), "");
    let _left = Left(&folder);
    assert_eq!(detach(&folder, &["--wait", "boot"]), (0, String::new()));
    assert_eq!(Client::of(&folder).status()["booted"], true);
}

#[test]
fn wait_boot_tells_of_a_guest_that_ends_before() {
    for (end, code) in [(power_off(), 0), (triple_fault(), 33), (panic(), 34)] {
        let folder = Folder::new(&[print("no prompt\r\n"), end].concat(), "");
        let (exit, said) = detach(&folder, &["--wait", "boot"]);
        assert!(said.contains(&format!("with exit code {code}")), "{said}");
        assert_eq!(exit, code.max(1));
    }
}

#[test]
fn wait_boot_has_an_end_and_the_guest_runs_on() {
    let folder = Folder::new(&[print("no prompt\r\n"), halt()].concat(), "");
    let _left = Left(&folder);
    let began = Instant::now();
    let (exit, said) = detach(&folder, &["--wait", "boot", "--wait-timeout", "300ms"]);
    assert_eq!(exit, 1);
    assert!(said.contains("is not up after 300ms; it runs on"), "{said}");
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(Client::of(&folder).status()["state"], "running");
}
