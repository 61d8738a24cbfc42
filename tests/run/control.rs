//! A running VM under control, through its socket.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::client::Client;
use crate::kernel::*;
use crate::vm::{Folder, Vm, eventually};

const DISK: &str = "[[block]]\npath = \"disk.raw\"\nsize = \"1MiB\"\nid = \"ROOT\"\n";

/// Prints a dot again and again, and does nothing else.
fn dots() -> Vec<u8> {
    forever(&[print("."), spin_for_a_while()].concat())
}

/// How much a VM has printed.
fn printed(vm: &Vm) -> usize {
    vm.out.so_far().len()
}

#[test]
fn a_paused_vm_stands_still_until_it_is_resumed() {
    let folder = Folder::new(&dots(), "cpus = 3");
    let vm = folder.up();
    vm.out.wait_for("...", 1);
    let mut client = Client::of(&folder);
    for _ in 0..5 {
        assert!(client.order("pause")["ok"].is_object());
        assert_eq!(client.status()["state"], "paused");
        // What was printed before is still on its way to us.
        thread::sleep(Duration::from_millis(30));
        let before = printed(&vm);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(printed(&vm), before);
        let twice = client.order("pause");
        assert_eq!(
            twice["error"]["message"], "the VM is paused already",
            "{twice}"
        );
        assert!(client.order("resume")["ok"].is_object());
        assert_eq!(client.status()["state"], "running");
        eventually("it prints again", || printed(&vm) > before);
        assert_eq!(client.order("resume")["error"]["kind"], "unsupported");
    }
}

#[test]
fn subscribers_are_told_what_happens() {
    let code = [print("up\r\nready"), read_key(), reset()].concat();
    let folder = Folder::new(&code, "console.ready = \"ready\"");
    let mut vm = folder.up();
    let mut events = Client::of(&folder);
    events.order("subscribe");
    vm.out.wait_for("ready", 1);
    let mut client = Client::of(&folder);
    eventually("it has booted", || client.status()["booted"] == true);
    client.order("pause");
    events.event("paused");
    client.order("resume");
    events.event("resumed");
    vm.type_in("x");
    events.event("rebooted");
    events.event("booted");
    client.send(r#"{"command":"kill"}"#);
    let stopped = events.event("stopped");
    assert_eq!(stopped["how"], "forced");
    assert_eq!(stopped["exit_code"], 1);
    assert_eq!(client.line()["ok"], {
        let mut answer = stopped.clone();
        answer.as_object_mut().unwrap().remove("event");
        answer
    });
    assert!(client.line().is_null(), "the connection ends");
    assert_eq!(vm.exit(), 1);
}

#[test]
fn a_stop_presses_the_button_and_says_that_the_guest_powered_off() {
    let folder = Folder::new(&[wait_for_button(), power_off()].concat(), DISK);
    let mut vm = folder.up();
    vm.out.wait_for("armed", 1);
    let stopped = Client::of(&folder).order("stop");
    assert_eq!(stopped["ok"]["how"], "guest", "{stopped}");
    assert_eq!(stopped["ok"]["exit_code"], 0);
    assert_eq!(vm.exit(), 0);
}

#[test]
fn a_stop_uses_force_when_its_time_is_up() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), DISK);
    let mut vm = folder.up();
    vm.out.wait_for("up", 1);
    let mut client = Client::of(&folder);
    let asked = Instant::now();
    client.send(r#"{"command":"stop","arguments":{"timeout_ms":400}}"#);
    let mut other = Client::of(&folder);
    eventually("it is stopping", || other.status()["state"] == "stopping");
    assert_eq!(other.order("pause")["error"]["kind"], "ending");
    assert_eq!(other.order("reboot")["error"]["kind"], "ending");
    let stopped = client.line();
    assert!(asked.elapsed() >= Duration::from_millis(400));
    assert_eq!(stopped["ok"]["how"], "forced", "{stopped}");
    assert_eq!(stopped["ok"]["why"], "it did not power off within 400ms");
    assert_eq!(vm.exit(), 1);
}

#[test]
fn a_paused_vm_can_be_stopped_and_killed() {
    let folder = Folder::new(&[wait_for_button(), power_off()].concat(), "");
    for (order, code) in [("stop", 0), ("kill", 1)] {
        let mut vm = folder.up();
        vm.out.wait_for("armed", 1);
        let mut client = Client::of(&folder);
        client.order("pause");
        assert_eq!(client.order(order)["ok"]["exit_code"], code);
        assert_eq!(vm.exit(), code);
    }
}

#[test]
fn a_reboot_starts_the_guest_anew_in_the_same_process() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), DISK);
    let mut vm = folder.up();
    let mut client = Client::of(&folder);
    for count in 1..20 {
        vm.out.wait_for("up\r\n", count);
        assert!(client.order("reboot")["ok"].is_object());
    }
    // Whatever the guest's own reboots do.
    assert_eq!(client.status()["pid"], vm.id());
    // A paused one stays so.
    vm.out.wait_for("up\r\n", 20);
    client.order("pause");
    assert!(client.order("reboot")["ok"].is_object());
    assert_eq!(client.status()["state"], "paused");
    thread::sleep(Duration::from_millis(100));
    vm.out.wait_for("up\r\n", 20);
    assert_eq!(vm.out.so_far().matches("up").count(), 20);
    client.order("resume");
    vm.out.wait_for("up\r\n", 21);
    assert!(vm.alive());
}

/// Another kernel in the place of the one that runs, in a folder whose VM knows which it is to be:
/// what `up` says at the guest's reboot.
fn rebooted_into_another_kernel(folder: &Folder, mut up: Command) -> String {
    up.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut vm = Vm::spawn(up.stderr(Stdio::piped()));
    let mut client = Client::of(folder);
    vm.out.wait_for("up\r\n", 1);
    assert!(client.order("reboot")["ok"].is_object());
    vm.out.wait_for("up\r\n", 2);
    let other = bzimage(&[print("other\r\n"), spin()].concat());
    fs::write(folder.path("kernel"), other).unwrap();
    client.order("reboot");
    assert_eq!(vm.exit(), 2);
    assert!(!vm.out.so_far().contains("other"));
    vm.err.wait_for(" --> vm.toml:2:", 1);
    vm.err.so_far()
}

#[test]
fn a_reboot_boots_no_other_kernel_than_its_digest_says() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), "");
    let digest = launcher::digest::of(&folder.path("kernel")).unwrap();
    let toml = fs::read_to_string(folder.path("vm.toml")).unwrap();
    let table = format!("boot.kernel = {{ path = \"kernel\", sha256 = \"{digest}\" }}");
    let toml = toml.replace("boot.kernel = \"kernel\"", &table);
    fs::write(folder.path("vm.toml"), toml).unwrap();
    let said = rebooted_into_another_kernel(&folder, folder.command());
    let expected = format!(" now, expected {digest}\n --> vm.toml:2:");
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn a_reboot_of_a_locked_vm_boots_no_other_kernel_than_the_lock_has() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), "");
    let mut lock = Command::new(env!("CARGO_BIN_EXE_launcher"));
    let lock = lock.arg("lock").current_dir(folder.path("")).output();
    assert!(lock.unwrap().status.success());
    let mut up = folder.command();
    up.arg("--locked");
    let said = rebooted_into_another_kernel(&folder, up);
    assert!(
        said.contains("error: the kernel kernel has the SHA-256 "),
        "{said}"
    );
}

#[test]
fn the_status_tells_how_vm_vcpus_memory_and_disks_are() {
    let folder = Folder::new(
        &[print("up\r\n"), spin()].concat(),
        &format!("cpus = 2\n{DISK}"),
    );
    let vm = folder.up();
    vm.out.wait_for("up", 1);
    let mut client = Client::of(&folder);
    eventually("the first vCPU has taken time", || {
        client.status()["vcpus"][0]["time_ms"].as_u64().unwrap() > 20
    });
    let status = client.status();
    assert_eq!(status["name"], "vm");
    assert_eq!(
        status["file"],
        folder
            .path("vm.toml")
            .canonicalize()
            .unwrap()
            .to_str()
            .unwrap()
    );
    assert_eq!(status["pid"], vm.id());
    assert_eq!(status["state"], "running");
    assert_eq!(status["booted"], false);
    assert!(status["uptime_ms"].as_u64().unwrap() >= 20);
    assert_eq!(status["vcpus"].as_array().unwrap().len(), 2);
    assert_eq!(status["memory"]["size"], 16 << 20);
    assert!(status["memory"]["resident"].as_u64().unwrap() > 1 << 20);
    let disk = &status["disks"][0];
    assert_eq!(disk["id"], "ROOT");
    assert_eq!(disk["format"], "sparse-raw");
    assert_eq!(disk["size"], 1 << 20);
    assert_eq!(disk["host_size"], 0);
    assert_eq!(disk["read_latency"]["max"], 0.0);
}

#[test]
fn a_disk_grows_live_before_any_driver_is_there() {
    let folder = Folder::new(
        &[print("up\r\n"), spin()].concat(),
        &format!("{DISK}sparse = false"),
    );
    let vm = folder.up();
    vm.out.wait_for("up", 1);
    let (mut client, mut events) = (Client::of(&folder), Client::of(&folder));
    events.order("subscribe");
    let mut resize = |arguments: &str| {
        client.ask(&format!(
            "{{\"command\":\"resize\",\"arguments\":{{{arguments}}}}}"
        ))
    };
    let resized = resize(r#""disk":"0","size":"+1MiB""#);
    assert_eq!(
        resized["ok"],
        serde_json::json!({"disk": 0, "from": 1 << 20, "to": 2 << 20})
    );
    assert_eq!(events.event("resized")["to"], 2 << 20);
    assert_eq!(
        resize(r#""disk":"ROOT","size":4194304"#)["ok"]["from"],
        2 << 20
    );
    let meta = fs::metadata(folder.path("disk.raw")).unwrap();
    assert_eq!(meta.len(), 4 << 20);
    assert!(meta.blocks() * 512 >= 4 << 20, "it is not allocated");

    for (arguments, kind, words) in [
        (
            r#""disk":"1","size":"8MiB""#,
            "no-such-disk",
            "has no disk \"1\"",
        ),
        (
            r#""disk":"root","size":"8MiB""#,
            "no-such-disk",
            "has no disk",
        ),
        (
            r#""disk":"0","size":"8MB""#,
            "invalid",
            "the size is \"8MB\"",
        ),
        (
            r#""disk":"0","size":1000"#,
            "invalid",
            "expected a multiple of 512",
        ),
        (
            r#""disk":"0","size":0"#,
            "invalid",
            "expected a multiple of 512",
        ),
        (
            r#""disk":"0","size":"+16777215TiB""#,
            "invalid",
            "past 2^63",
        ),
        (r#""disk":"0""#, "invalid", "no host block device"),
        (
            r#""disk":"0","size":"1MiB""#,
            "refused",
            "its last 3MiB would be lost",
        ),
        (
            r#""disk":"0","size":"1MiB","shrink":true"#,
            "refused",
            "the guest runs",
        ),
        (r#""disk":"0","size":"4096TiB""#, "host", "stays as it is"),
    ] {
        let failed = resize(arguments);
        assert_eq!(failed["error"]["kind"], kind, "{failed}");
        let message = failed["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
        assert_eq!(
            failed["error"]["errno"].is_null(),
            kind != "host",
            "{failed}"
        );
        assert_eq!(
            fs::metadata(folder.path("disk.raw")).unwrap().len(),
            4 << 20
        );
    }
    let shrunk = resize(r#""disk":"0","size":"1MiB","shrink":true,"force":true"#);
    assert_eq!(shrunk["ok"]["to"], 1 << 20, "{shrunk}");
    assert_eq!(
        fs::metadata(folder.path("disk.raw")).unwrap().len(),
        1 << 20
    );
}

#[test]
fn the_end_of_a_vm_does_not_wait_for_a_resize_and_undoes_it() {
    let toml = "[[block]]\npath = \"disk.qcow2\"\nsize = \"1MiB\"\nsparse = false\n\
                [block.qcow2]\ncluster_size = 512";
    let folder = Folder::new(&halt(), toml);
    let vm = folder.up();
    let mut client = Client::of(&folder);
    // One L2 table after the other: many seconds.
    let order = r#"{"id":1,"command":"resize","arguments":{"disk":"0","size":"2GiB"}}"#;
    client.send(order);
    assert!(client.line()["progress"]["done"].is_u64());
    let killed = Instant::now();
    assert_eq!(Client::of(&folder).order("kill")["ok"]["how"], "forced");
    let took = killed.elapsed();
    let refused = loop {
        let answer = client.line();
        if answer["progress"].is_null() {
            break answer;
        }
    };
    assert_eq!(refused["error"]["kind"], "ending", "{refused}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    vm.end();
    let header = fs::read(folder.path("disk.qcow2")).unwrap();
    assert_eq!(header[24..32], (1_u64 << 20).to_be_bytes());
}

#[test]
fn a_resize_past_the_file_size_limit_changes_nothing() {
    for sparse in [true, false] {
        let toml = format!("{DISK}sparse = {sparse}");
        let folder = Folder::new(&[print("up\r\n"), spin()].concat(), &toml);
        let launcher = env!("CARGO_BIN_EXE_launcher");
        let mut shell = std::process::Command::new("sh");
        shell
            .args(["-c", &format!("ulimit -f 4096; exec {launcher} up --force")])
            .current_dir(folder.path(""))
            .env("XDG_RUNTIME_DIR", folder.path(""));
        let vm = Vm::spawn(shell.stdin(Stdio::null()).stdout(Stdio::piped()));
        vm.out.wait_for("up", 1);
        let mut client = Client::of(&folder);
        let before = fs::metadata(folder.path("disk.raw")).unwrap();
        let order = r#"{"command":"resize","arguments":{"disk":"0","size":"64MiB"}}"#;
        let failed = client.ask(order);
        assert_eq!(failed["error"]["errno"], libc::EFBIG, "{failed}");
        let after = fs::metadata(folder.path("disk.raw")).unwrap();
        assert_eq!(
            (after.len(), after.blocks()),
            (before.len(), before.blocks())
        );
        assert_eq!(client.status()["disks"][0]["size"], 1 << 20);
        // It goes on.
        let order = r#"{"command":"resize","arguments":{"disk":"0","size":"2MiB"}}"#;
        assert_eq!(client.ask(order)["ok"]["to"], 2 << 20);
    }
}

#[test]
fn disks_that_do_not_resize_say_so() {
    let disks =
        "[[block]]\npath = \"a.raw\"\nro = true\n[[block]]\npath = \"b.raw\"\nephemeral = true\n";
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), disks);
    for name in ["a.raw", "b.raw"] {
        fs::write(folder.path(name), [7; 4096]).unwrap();
    }
    let vm = folder.up();
    vm.out.wait_for("up", 1);
    let mut client = Client::of(&folder);
    for (disk, why) in [(0, "is read-only"), (1, "is ephemeral")] {
        let order = format!(
            "{{\"command\":\"resize\",\"arguments\":{{\"disk\":\"{disk}\",\"size\":8192}}}}"
        );
        let failed = client.ask(&order);
        assert_eq!(failed["error"]["kind"], "unsupported");
        assert!(
            failed["error"]["message"].as_str().unwrap().ends_with(why),
            "{failed}"
        );
    }
}

#[test]
fn the_console_is_at_the_socket_for_many_and_at_standard_output_as_well() {
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let mut vm = folder.up();
    vm.out.wait_for("up\r\n", 1);
    let mut with = Client::of(&folder).console(true);
    let mut without = Client::of(&folder).console(false);
    // The answer comes before the connection is the console's: what is typed there is read when
    // it is, and from then on nothing is missed.
    without.write_all(b"from two").unwrap();
    vm.out.wait_for("from two", 1);
    with.write_all(b" from one").unwrap();
    vm.out.wait_for(" from one", 1);
    vm.type_in(" from here");
    vm.out.wait_for(" from here", 1);
    let all = "from two from one from here";
    let mut text = vec![0; 4 + all.len()];
    with.read_exact(&mut text).unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), format!("up\r\n{all}"));
    let mut text = vec![0; all.len()];
    without.read_exact(&mut text).unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), all);
    Client::of(&folder).send(r#"{"command":"kill"}"#);
    assert_eq!(
        with.read(&mut [0]).unwrap(),
        0,
        "the console ends with the VM"
    );
}

#[test]
fn a_console_at_the_socket_alone_is_kept_in_the_folder() {
    let folder = Folder::new(
        &[print("hello\r\n"), echo()].concat(),
        "console.mode = \"socket\"",
    );
    let vm = folder.up();
    let mut console = Client::of(&folder).console(true);
    let mut text = [0; 7];
    console.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello\r\n");
    let log = folder.place().unwrap().join("console.log");
    eventually("it is logged", || {
        fs::read(&log).is_ok_and(|log| log == b"hello\r\n")
    });
    assert_eq!(printed(&vm), 0);
}

#[test]
fn a_vm_without_a_console_says_so() {
    let folder = Folder::new(&spin(), "console.mode = \"off\"");
    let _vm = folder.up();
    let failed = Client::of(&folder).order("console");
    assert_eq!(
        failed["error"]["message"], "the VM has no console",
        "{failed}"
    );
}

#[test]
fn a_second_up_is_refused_with_the_process_of_the_first_and_works_after_its_sigkill() {
    let folder = Folder::new(&[print("up\r\n"), halt()].concat(), DISK);
    for _ in 0..3 {
        let mut vm = folder.up();
        vm.out.wait_for("up", 1);
        Client::of(&folder).status();
        let (code, said) = folder.up().end();
        assert_eq!(code, 4, "{said}");
        assert!(said.contains(&format!("process {}", vm.id())), "{said}");
        vm.signal(Signal::KILL);
        assert_eq!(vm.exit(), -9);
    }
}

#[test]
fn a_name_of_its_own_tells_a_second_vm_of_the_file_apart() {
    let folder = Folder::new(&[print("up\r\n"), halt()].concat(), "");
    let first = folder.up();
    first.out.wait_for("up", 1);
    let mut command = folder.command();
    command
        .args(["--name", "second", "vm.toml"])
        .stdout(Stdio::piped());
    let second = Vm::spawn(&mut command);
    second.out.wait_for("up", 1);
    let socket = folder.path("launcher/second/control.sock");
    eventually("it listens", || Client::at(&socket).is_some());
    assert_eq!(Client::at(&socket).unwrap().status()["name"], "second");
}

#[test]
fn another_socket_serves_as_well() {
    let folder = Folder::new(&[print("up\r\n"), halt()].concat(), "");
    let mut command = folder.command();
    command.args(["--socket", "my.sock"]).stdout(Stdio::piped());
    let vm = Vm::spawn(&mut command);
    vm.out.wait_for("up", 1);
    let socket = folder.path("my.sock");
    eventually("it listens", || Client::at(&socket).is_some());
    assert_eq!(Client::at(&socket).unwrap().status()["pid"], vm.id());
    assert_eq!(Client::of(&folder).status()["pid"], vm.id());
}

/// A loop device over a file; it goes with this.
struct Loop(String);

impl Loop {
    /// Only root may have one.
    fn over(file: &std::path::Path) -> Option<Loop> {
        let mut losetup = std::process::Command::new("losetup");
        let output = losetup.args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        output.status.success().then_some(Loop(name))
    }

    fn losetup(&self, option: &str) {
        let mut losetup = std::process::Command::new("losetup");
        assert!(losetup.args([option, &self.0]).status().unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.losetup("--detach");
    }
}

#[test]
fn a_host_block_device_that_has_grown_is_read_again_without_a_size() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), "");
    let behind = folder.path("behind");
    fs::write(&behind, [0; 1 << 20]).unwrap();
    let Some(device) = Loop::over(&behind) else {
        return;
    };
    let toml = fs::read_to_string(folder.path("vm.toml")).unwrap();
    let toml = format!(
        "{toml}[[block]]\npath = \"{}\"\nformat = \"raw\"\n",
        device.0
    );
    fs::write(folder.path("vm.toml"), toml).unwrap();
    let mut vm = folder.up();
    vm.out.wait_for("up", 1);
    let mut client = Client::of(&folder);
    let reread = r#"{"command":"resize","arguments":{"disk":"0"}}"#;
    assert_eq!(client.ask(reread)["ok"]["to"], 1 << 20);
    fs::File::options()
        .write(true)
        .open(&behind)
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    device.losetup("--set-capacity");
    let other = r#"{"command":"resize","arguments":{"disk":"0","size":"2MiB"}}"#;
    let failed = client.ask(other);
    assert_eq!(failed["error"]["kind"], "unsupported", "{failed}");
    assert_eq!(client.ask(reread)["ok"]["to"], 3 << 20);
    assert_eq!(client.status()["disks"][0]["size"], 3 << 20);
    assert!(client.status()["disks"][0]["host_size"].is_null());
    client.order("kill");
    vm.exit();
}
