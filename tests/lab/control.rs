//! Detached VMs, and the commands that control them.

use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::console::{CTRL_BRACKET, Terminal};
use crate::guest::{Folder, GUEST, PATIENCE, Vm};
use crate::runner::cases;

cases![control:
    detached_vm_is_up_when_boot_was_waited_for_and_runs_once,
    console_attaches_with_scrollback_and_detaches,
    paused_guest_stands_still,
    reboot_keeps_the_disks_and_stop_says_who_ended_it,
    vm_whose_process_was_killed_starts_again,
];

/// A VM that `launcher up --detach` has started; killed at the end if it still runs.
struct Detached<'a> {
    folder: &'a Folder,
    id: Pid,
}

impl<'a> Detached<'a> {
    /// Starts it with these options of `up`.
    fn up(folder: &'a Folder, toml: &str, options: &[&str]) -> Self {
        // Writes the file; what it would start is not this.
        drop(folder.command(toml));
        let all = [&["up", "vm.toml", "--detach"], options].concat();
        let (code, printed, errors) = folder.order(&all);
        assert_eq!(code, 0, "{errors}");
        let id = status(folder)["pid"].as_i64().unwrap();
        let id = Pid::from_raw(id.try_into().unwrap()).unwrap();
        let vm = Detached { folder, id };
        assert_eq!((&*printed, &*errors), ("", ""));
        vm
    }

    /// The guest's console by `launcher console`, from what is kept of it on.
    fn console(&self) -> Vm {
        Vm::start(&mut self.folder.launcher(&["console", "vm.toml"]))
    }

    /// Checks that it has ended.
    fn has_ended(self) {
        let (code, _, errors) = self.folder.order(&["status", "vm.toml"]);
        assert_eq!(code, 3, "{errors}");
        std::mem::forget(self);
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let _ = kill_process(self.id, Signal::KILL);
    }
}

/// What `launcher status --json` says.
fn status(folder: &Folder) -> Value {
    let printed = folder.ordered(&["status", "vm.toml", "--json"]);
    serde_json::from_str(&printed).unwrap()
}

/// The test guest with what says that it is up, and a disk.
fn guest() -> String {
    format!(
        "{GUEST}\n[console]\nready = \"lab: ready\"\n[[block]]\npath = \"data.img\"\nsize = \"1MiB\"\n"
    )
}

fn detached_vm_is_up_when_boot_was_waited_for_and_runs_once() {
    let folder = Folder::new();
    let vm = Detached::up(&folder, &guest(), &["--wait", "boot"]);
    let logs = folder.ordered(&["logs", "vm.toml"]);
    assert!(logs.contains("lab: ready"), "{logs}");
    let status = status(&folder);
    assert_eq!(status["state"], "running");
    assert_eq!(status["booted"], true);
    assert!(status["uptime_ms"].as_u64().unwrap() > 0, "{status}");
    assert!(
        status["vcpus"][0]["time_ms"].as_u64().unwrap() > 0,
        "{status}"
    );
    assert_eq!(status["disks"][0]["size"], 1 << 20);
    assert!(
        status["disks"][0]["reads"].as_u64().unwrap() > 0,
        "{status}"
    );
    let id = vm.id.as_raw_nonzero().to_string();
    assert!(folder.ordered(&["ps"]).contains(&id));
    assert_eq!(folder.ordered(&["wait", "vm.toml", "--for", "booted"]), "");

    for up in [&["up", "vm.toml"][..], &["up", "vm.toml", "--detach"]] {
        let (code, _, errors) = folder.order(up);
        assert_eq!(code, 4, "{errors}");
        assert!(errors.contains(&id), "{errors}");
    }

    let mut waiting = Vm::start(&mut folder.launcher(&["wait", "vm.toml"]));
    let said = folder.ordered(&["stop", "vm.toml"]);
    assert!(said.contains("has powered off"), "{said}");
    assert_eq!(waiting.exit(), 0, "{}", waiting.errors());
    vm.has_ended();
    let logs = folder.ordered(&["logs", "vm.toml"]);
    assert!(logs.contains("lab: power button"), "{logs}");
}

fn console_attaches_with_scrollback_and_detaches() {
    let folder = Folder::new();
    let vm = Detached::up(&folder, &guest(), &[]);
    for shown in ["lab: ready", "typed once"] {
        let terminal = Terminal::new();
        let before = terminal.settings();
        let mut console = terminal.start(folder.launcher(&["console", "vm.toml"]));
        // The second time out of what was kept.
        console.wait_for(shown);
        console.wait_for("lab# ");
        console.send("echo typed' 'once\n");
        console.wait_for("typed once\r\n");
        console.send(CTRL_BRACKET);
        console.wait_for("detached from");
        assert_eq!(console.exit(), 0);
        terminal.is_restored(&before);
    }
    let new = ["console", "vm.toml", "--no-scrollback"];
    let mut console = Vm::start(&mut folder.launcher(&new));
    assert_eq!(console.run("echo $((6 * 7))"), "42");
    assert!(!console.console.text().contains("lab: ready"));
    // Another one sees the same, and what either types goes to the same shell.
    let mut other = vm.console();
    other.wait_for("lab: ready");
    other.send("echo from' the 'other\n");
    console.wait_for("from the other\r\n");
    other.wait_for("from the other\r\n");
    console.signal(Signal::TERM);
    console.exit();
    assert_eq!(other.run("echo $((7 * 7))"), "49");
    other.send("poweroff -f\n");
    assert_eq!(other.exit(), 0, "{}", other.errors());
    vm.has_ended();
}

fn paused_guest_stands_still() {
    let folder = Folder::new();
    let vm = Detached::up(&folder, &guest(), &["--wait", "boot"]);
    let mut console = vm.console();
    console.ready();
    console.send("n=0; while :; do n=$((n + 1)); echo tick $n; usleep 100000; done\n");
    console.wait_for("tick 3\r\n");
    for _ in 0..2 {
        assert!(folder.ordered(&["pause", "vm.toml"]).contains("is paused"));
        let paused = status(&folder);
        assert_eq!(paused["state"], "paused");
        // What was printed before may still be on its way.
        thread::sleep(Duration::from_millis(500));
        let printed = console.console.text().len();
        thread::sleep(Duration::from_secs(1));
        let later = status(&folder);
        assert_eq!(console.console.text().len(), printed, "it prints");
        assert_eq!(later["vcpus"], paused["vcpus"], "it takes processor time");
        // A disk takes its new size all the same.
        folder.order(&["disk", "resize", "vm.toml", "0", "+1MiB"]);
        assert!(
            folder
                .ordered(&["resume", "vm.toml"])
                .contains("runs again")
        );
        let text = console.console.text();
        // It may have been stopped in the midst of a line.
        let (whole, _) = text.rsplit_once("\r\n").unwrap();
        let (_, last) = whole.rsplit_once("tick ").unwrap();
        let last: u32 = last.parse().unwrap();
        // It goes on where it was: no tick is missing, none was made up for.
        console.wait_for(&format!("tick {}\r\n", last + 1));
        console.wait_for(&format!("tick {}\r\n", last + 2));
    }
    console.send([3]); // Ctrl-C
    assert_eq!(
        console.run("blockdev --getsize64 /dev/vda"),
        (3 << 20).to_string()
    );
    let (_, lockups) = console.attempt("dmesg | grep -iE 'lockup|stall|hung'");
    assert_eq!(lockups, "");
    let (code, _, errors) = folder.order(&["pause", "vm.toml"]);
    assert_eq!(code, 0, "{errors}");
    let said = folder.ordered(&["kill", "vm.toml"]);
    assert!(said.contains("was ended by force"), "{said}");
    vm.has_ended();
}

fn reboot_keeps_the_disks_and_stop_says_who_ended_it() {
    let folder = Folder::new();
    let vm = Detached::up(&folder, &guest(), &[]);
    let mut console = vm.console();
    console.ready();
    console.run("echo kept | dd of=/dev/vda conv=sync,fsync 2>/dev/null; touch /tmp/lost");
    let said = folder.ordered(&["reboot", "vm.toml"]);
    assert!(said.contains("reboots"), "{said}");
    // The console stays attached.
    console.ready();
    assert_eq!(console.run("head -n 1 /dev/vda"), "kept");
    assert_ne!(console.attempt("test -e /tmp/lost").0, 0);
    assert_eq!(status(&folder)["pid"], vm.id.as_raw_nonzero().get());
    console.run("kill $(cat /run/button)");
    let said = folder.ordered(&["stop", "vm.toml", "--timeout", "2s"]);
    assert!(
        said.contains("was ended by force: it did not power off within 2s"),
        "{said}"
    );
    assert!(console.console.wait_for_end(PATIENCE));
    vm.has_ended();
}

fn vm_whose_process_was_killed_starts_again() {
    let folder = Folder::new();
    let vm = Detached::up(&folder, &guest(), &["--wait", "boot"]);
    let mut waiting = Vm::start(&mut folder.launcher(&["wait", "vm.toml"]));
    let mut console = vm.console();
    console.ready();
    console.run("echo kept | dd of=/dev/vda conv=sync,fsync 2>/dev/null");
    kill_process(vm.id, Signal::KILL).unwrap();
    // Whoever was connected is told.
    assert_eq!(console.exit(), 0, "{}", console.errors());
    assert_eq!(waiting.exit(), 1);
    assert!(!folder.ordered(&["ps"]).contains("vm.toml"));
    vm.has_ended();

    let vm = Detached::up(&folder, &guest(), &["--wait", "boot"]);
    let mut console = vm.console();
    console.ready();
    assert_eq!(console.run("head -n 1 /dev/vda"), "kept");
    let said = folder.ordered(&["stop", "vm.toml"]);
    assert!(said.contains("has powered off"), "{said}");
    vm.has_ended();
}
