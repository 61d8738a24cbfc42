//! `launcher ps`, `status`, `stop`, `kill`, `reboot`, `pause`, `resume` and `wait`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use launcher::control::messages::{Event, How, Order};
use serde_json::Value;

use super::vm::Folder;

#[test]
fn ps_lists_what_runs() {
    let folder = Folder::new();
    assert_eq!(folder.does(&["ps"]), "no VM is running\n");
    assert_eq!(folder.does(&["ps", "--json"]), "[]\n");
    let mut web = folder.start("web", "vm.toml");
    let _db = folder.start("db", "db.toml");
    let list = folder.does(&["ps"]);
    let rows: Vec<_> = list.lines().collect();
    assert!(rows[0].starts_with("NAME  STATE    UPTIME"), "{list}");
    assert!(
        rows[1].starts_with("db    booting  1m 1s   1      512MiB  1"),
        "{list}"
    );
    assert!(rows[2].starts_with("web   booting"), "{list}");
    let json: Value = serde_json::from_str(&folder.does(&["ps", "--json"])).unwrap();
    assert_eq!(json[1]["name"], "web");
    assert_eq!(json[1]["pid"], std::process::id());
    assert_eq!(json[1]["status"]["state"], "running");
    web.end(How::Guest, None, 0);
    let json: Value = serde_json::from_str(&folder.does(&["ps", "--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 1);
}

#[test]
fn a_vm_is_its_name_or_its_file_and_one_that_does_not_run_exits_3() {
    let folder = Folder::new();
    let _web = folder.start("web", "vm.toml");
    for vm in [&["web"][..], &["vm.toml"], &["./vm.toml"], &["."], &[]] {
        let said = folder.does(&[&["status"], vm].concat());
        assert!(
            said.starts_with("web is booting for 1m 1s\n"),
            "{vm:?}: {said}"
        );
    }
    let absolute = folder.path("vm.toml");
    folder.does(&["status", absolute.to_str().unwrap()]);
    folder.write("db.toml", "[boot]\nkernel = \"k\"\n");
    for command in [
        "status", "stop", "kill", "reboot", "pause", "resume", "console",
    ] {
        for vm in ["db", "db.toml"] {
            let done = folder.launcher(&[command, vm]);
            assert_eq!((done.code, &*done.out), (3, ""), "{command}: {done:?}");
            assert!(done.err.contains("running"), "{done:?}");
        }
    }
}

#[test]
fn status_is_the_vm_s_own_as_json() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    let json: Value = serde_json::from_str(&folder.does(&["status", "web", "--json"])).unwrap();
    assert_eq!(
        json,
        serde_json::to_value(&*web.fake.status.lock().unwrap()).unwrap()
    );
    let text = folder.does(&["status", "web"]);
    assert!(text.contains("0 ROOT  reads       80us"), "{text}");
}

#[test]
fn status_watches_until_the_vm_ends() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let mut command = folder.command(&["status", "web", "--watch", "--json"]);
    let mut watch = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = lines.next().unwrap().unwrap();
        let json: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["name"], "web");
    }
    web.end(How::Guest, None, 0);
    assert_eq!(watch.wait().unwrap().code(), Some(0));
}

#[test]
fn pause_resume_and_reboot_are_one_order_each() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    for (command, order, said) in [
        ("pause", Order::Pause, "web is paused\n"),
        ("resume", Order::Resume, "web runs again\n"),
        ("reboot", Order::Reboot, "web reboots\n"),
    ] {
        assert_eq!(folder.does(&[command, "web"]), said);
        assert_eq!(web.obeyed.recv().unwrap(), order);
    }
}

#[test]
fn what_a_vm_refuses_is_told_in_its_words() {
    let folder = Folder::new();
    let _web = folder.start("web", "vm.toml");
    folder.does(&["pause", "web"]);
    let done = folder.launcher(&["pause", "web"]);
    assert_eq!(
        (done.code, &*done.err),
        (1, "error: it is paused already\n")
    );
}

#[test]
fn stop_says_whether_the_guest_or_force_has_ended_it() {
    for (how, why, said) in [
        (How::Guest, None, "web has powered off\n"),
        (
            How::Forced,
            Some("it did not power off within 2m"),
            "web was ended by force: it did not power off within 2m\n",
        ),
    ] {
        let folder = Folder::new();
        let mut web = folder.start("web", "vm.toml");
        let done = thread::scope(|scope| {
            let stop = scope.spawn(|| folder.does(&["stop", "web", "--timeout", "2m"]));
            let order = web.obeyed.recv().unwrap();
            let timeout_ms = Some(120_000);
            assert_eq!(order, Order::Stop { timeout_ms });
            web.end(how, why, 0);
            stop.join().unwrap()
        });
        assert_eq!(done, said);
        assert_eq!(folder.launcher(&["stop", "web"]).code, 3);
    }
}

#[test]
fn a_disk_that_could_not_be_flushed_is_a_failure_of_kill() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let done = thread::scope(|scope| {
        let kill = scope.spawn(|| folder.launcher(&["kill", "web"]));
        assert_eq!(web.obeyed.recv().unwrap(), Order::Kill);
        web.end(How::Failed, Some("a.img: Input/output error"), 1);
        kill.join().unwrap()
    });
    assert_eq!(
        (done.code, &*done.err),
        (
            1,
            "error: `web` has ended badly: a.img: Input/output error\n"
        )
    );
}

#[test]
fn several_vms_are_stopped_at_once_and_the_first_failure_is_the_exit_code() {
    let folder = Folder::new();
    let (mut a, mut b) = (folder.start("a", "a.toml"), folder.start("b", "b.toml"));
    let done = thread::scope(|scope| {
        let stop = scope.spawn(|| folder.launcher(&["stop", "a", "none", "b"]));
        // Both have the order before either has ended.
        b.obeyed.recv().unwrap();
        a.obeyed.recv().unwrap();
        b.end(How::Guest, None, 0);
        a.end(How::Guest, None, 0);
        stop.join().unwrap()
    });
    assert_eq!(
        (done.code, &*done.out),
        (3, "a has powered off\nb has powered off\n")
    );
    assert!(
        done.err.starts_with("error: no VM of the name `none`"),
        "{done:?}"
    );
}

#[test]
fn a_wrong_timeout_is_a_usage_error() {
    let folder = Folder::new();
    let done = folder.launcher(&["stop", "web", "--timeout", "30"]);
    assert_eq!(done.code, 2);
    assert!(done.err.contains("write \"30s\" for seconds"), "{done:?}");
}

/// Starts `launcher wait`, and has `then` happen once it listens.
fn wait(arguments: &[&str], then: impl FnOnce(&mut super::vm::Vm)) -> super::program::Done {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    thread::scope(|scope| {
        let wait = scope.spawn(|| folder.launcher(&[&["wait", "web"], arguments].concat()));
        thread::sleep(Duration::from_millis(500));
        then(&mut web);
        wait.join().unwrap()
    })
}

#[test]
fn wait_exits_with_what_the_vm_ends_with() {
    for code in [0, 33] {
        let done = wait(&[], |web| web.end(How::Guest, None, code));
        assert_eq!((done.code, &*done.err), (i32::from(code), ""), "{done:?}");
    }
}

#[test]
fn wait_for_booted_ends_with_the_event_or_at_once_if_it_has_been() {
    let done = wait(&["--for", "booted"], |web| {
        web.publisher.publish(Event::Booted)
    });
    assert_eq!((done.code, &*done.err), (0, ""), "{done:?}");
    let done = wait(&["--for", "booted"], |web| {
        web.end(How::Crashed, Some("a triple fault"), 33);
    });
    assert_eq!(done.code, 1);
    assert!(
        done.err
            .contains("`web` has ended before it was up: a triple fault"),
        "{done:?}"
    );
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    web.fake.status.lock().unwrap().booted = true;
    folder.does(&["wait", "web", "--for", "booted"]);
}

#[test]
fn wait_ends_in_time_and_at_once_where_nothing_runs() {
    let folder = Folder::new();
    folder.does(&["wait", "vm.toml"]);
    assert_eq!(
        folder
            .launcher(&["wait", "vm.toml", "--for", "booted"])
            .code,
        3
    );
    let _web = folder.start("web", "vm.toml");
    let start = Instant::now();
    let done = folder.launcher(&["wait", "web", "--timeout", "300ms"]);
    assert_eq!(
        (done.code, &*done.err),
        (1, "error: `web` has not ended within 300ms\n")
    );
    assert!(start.elapsed() >= Duration::from_millis(300));
}
