//! What is built by a command.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use launcher::control::{Owner, Place};
use rustix::process::{Pid, Signal, kill_process_group};

use super::Folder;

#[test]
fn a_file_is_built_if_it_is_not_there_and_what_the_command_prints_is_passed_on() {
    let folder =
        Folder::new("[boot.kernel]\npath = \"out/k\"\nbuild = [\"./prepare.sh\", \"a b\"]\n");
    folder.script(
        "prepare.sh",
        "echo \"making $1\"; echo loudly >&2; mkdir -p out; echo once >> out/k",
    );
    let done = folder.launcher(&["prepare"]);
    assert_eq!((done.code, &*done.out), (0, "boot.kernel  built  out/k\n"));
    assert_eq!(
        done.err,
        "launcher: building: `./prepare.sh \"a b\"` (in .)\nmaking a b\nloudly\n"
    );
    let done = folder.launcher(&["prepare"]);
    assert_eq!((done.code, &*done.err), (0, ""));
    assert_eq!(done.out, "boot.kernel  present  out/k\n");
    assert_eq!(folder.text("out/k"), "once\n");
}

#[test]
fn with_rebuild_it_is_built_again() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script("prepare.sh", "echo more >> k");
    for _ in 0..2 {
        let done = folder.launcher(&["prepare", "--rebuild"]);
        assert_eq!(
            (done.code, &*done.out),
            (0, "boot.kernel  built  k\n"),
            "{done:?}"
        );
    }
    assert_eq!(folder.text("k"), "more\nmore\n");
}

#[test]
fn the_files_of_a_vm_that_runs_are_not_built_again() {
    let folder =
        Folder::new("name = \"web\"\n[boot.kernel]\npath = \"k\"\nbuild = [\"touch\", \"k\"]\n");
    let runtime = folder.path("launcher");
    let place = Place::under(&runtime, Some("web"), Path::new("-")).unwrap();
    let owner = Owner {
        pid: std::process::id(),
        name: "web".into(),
        file: folder.path("vm.toml"),
        started_ms: 1_700_000_000_000,
        laid: Default::default(),
    };
    let claim = place.claim(&owner).unwrap();
    let done = folder.launcher(&["prepare", "--rebuild"]);
    assert_eq!(done.code, 4);
    assert_eq!(
        done.err,
        "error: `web` is running: its files are not built again\nhelp: stop it with `launcher stop \
         web`\n"
    );
    drop(claim);
    assert_eq!(folder.launcher(&["prepare", "--rebuild"]).code, 0);
}

#[test]
fn a_command_runs_in_the_folder_of_the_file_that_names_it() {
    let folder = Folder::new("");
    folder.write(
        "vms/web.toml",
        "[boot.kernel]\npath = \"../k\"\nbuild = [\"sh\", \"-c\", \"pwd > ../k\"]\n",
    );
    let done = folder.launcher(&["prepare", "vms/web.toml"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.err.ends_with("(in vms)\n"), "{}", done.err);
    assert_eq!(
        folder.text("k").trim(),
        folder.path("vms").to_str().unwrap()
    );
}

#[test]
fn of_files_over_files_the_one_that_says_the_command_has_its_folder() {
    let folder = Folder::new(
        "extends = [\"base/base.toml\"]\n[boot.initrd]\npath = \"i\"\nbuild = \"./here.sh\"\n",
    );
    folder.script("here.sh", "touch i");
    folder.write(
        "base/base.toml",
        "[boot.kernel]\npath = \"k\"\nbuild = \"./base.sh\"\n",
    );
    folder.script("base/base.sh", "touch k");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(folder.path("base/k").exists() && folder.path("i").exists());
    let set = &[
        "prepare",
        "--set",
        "boot.initrd.path=l",
        "--set",
        "boot.initrd.build=[\"touch\", \"l\"]",
    ];
    let done = folder.launcher(set);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(folder.path("l").exists());
}

#[test]
fn what_a_profile_names_is_prepared_with_it() {
    let folder = Folder::new(
        "[boot]\nkernel = \"k\"\n[profile.built.boot]\n\
         kernel = { path = \"b\", build = [\"touch\", \"b\"] }\n",
    );
    folder.write("k", "");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.out, "boot.kernel  present  k\n", "{done:?}");
    let done = folder.launcher(&["prepare", "-p", "built"]);
    assert_eq!(done.out, "boot.kernel  built  b\n", "{done:?}");
}

#[test]
fn one_command_of_several_files_is_run_once() {
    let folder = Folder::new(
        "[boot]\nkernel = { path = \"k\", build = \"./all.sh\" }\n\
         initrd = { path = \"i\", build = [\"./all.sh\"] }\n\
         [[block]]\npath = \"a.img\"\nbuild = [\"./all.sh\", \"disk\"]\n",
    );
    folder.script(
        "all.sh",
        "echo run >> runs; touch k i; test $# = 0 || touch a.img",
    );
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(
        folder.text("runs"),
        "run\nrun\n",
        "the disk's is another command"
    );
    // One of its files is gone: it is run for that one.
    std::fs::remove_file(folder.path("i")).unwrap();
    let done = folder.launcher(&["prepare"]);
    assert_eq!(
        done.out,
        "boot.kernel  present  k\nboot.initrd  built    i\nblock.0      present  a.img\n"
    );
    assert_eq!(folder.text("runs"), "run\nrun\nrun\n");
}

#[test]
fn a_command_that_fails_is_shown_with_its_exit_code_and_leaves_no_half_a_file() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script("prepare.sh", "echo half > k; exit 7");
    for command in [&["prepare"][..], &["up"], &["up", "--detach"]] {
        let done = folder.launcher(command);
        assert_eq!(done.code, 1);
        assert_eq!(
            done.err,
            "launcher: building: `./prepare.sh` (in .)\n\
             error: `build` has failed: `./prepare.sh` exits with 7\n --> vm.toml:3:9\n  |\n\
             3 | build = \"./prepare.sh\"\n  |         ^^^^^^^^^^^^^^\n  |\n  = help: what it had \
             begun is removed: k\n"
        );
        assert!(!folder.path("k").exists());
    }
}

#[test]
fn a_command_that_makes_no_file_is_an_error() {
    let folder = Folder::new(
        "boot.kernel = \"k\"\n[[block]]\npath = \"a.img\"\nbuild = [\"true\"]\nro = true\n",
    );
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 1);
    assert_eq!(
        done.err,
        "launcher: building: `true` (in .)\n\
         error: `build` has not made a.img: `true` has ended well, but there is no such file\n \
         --> vm.toml:4:9\n  |\n4 | build = [\"true\"]\n  |         ^^^^^^^^\n  |\n  = help: `path` \
         and `build` must mean the same file, from the folder of the file that names them\n"
    );
}

#[test]
fn a_command_that_cannot_be_run_is_an_error_that_names_its_folder() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./none.sh\"\n");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 1);
    let error = "error: cannot run `build`, `./none.sh`: No such file or directory";
    assert!(done.err.contains(error), "{}", done.err);
    assert!(done.err.contains("help: it is run in .; "), "{}", done.err);
    folder.write("none.sh", "touch k");
    let done = folder.launcher(&["prepare"]);
    assert!(done.err.contains("Permission denied"), "{}", done.err);
}

#[test]
fn an_interrupted_command_leaves_no_half_a_file() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script("prepare.sh", "echo half > k; sleep 60");
    let mut command = folder.command(&["up"]);
    let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.process_group(0).spawn().unwrap();
    let begin = Instant::now();
    while !folder.path("k").exists() {
        assert!(begin.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(10));
    }
    // As a terminal does for Ctrl-C.
    kill_process_group(Pid::from_child(&child), Signal::INT).unwrap();
    let done = folder.told(child.wait_with_output().unwrap());
    assert_eq!(done.code, 1);
    assert!(
        done.err.contains("`./prepare.sh` was ended by signal 2"),
        "{}",
        done.err
    );
    assert!(begin.elapsed() < Duration::from_secs(50) && !folder.path("k").exists());
}

/// Waits until the command has begun the file.
fn begun(folder: &Folder, name: &str) {
    let begin = Instant::now();
    while !folder.path(name).exists() {
        assert!(begin.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn half_a_file_of_a_launcher_that_was_killed_is_built_again() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script("prepare.sh", "echo half > k; exec sleep 60");
    let mut command = folder.command(&["prepare"]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    begun(&folder, "k");
    child.kill().unwrap();
    child.wait().unwrap();
    // As make(1) does, which would take half a file for a whole one.
    folder.script("prepare.sh", "[ -e k ] || echo whole > k");
    let done = folder.launcher(&["prepare"]);
    assert_eq!((done.code, &*done.out), (0, "boot.kernel  built  k\n"));
    let said = "launcher: a command that was interrupted had begun k: it is k.half now\n";
    assert!(done.err.starts_with(said), "{}", done.err);
    assert_eq!(folder.text("k.half"), "half\n");
    assert_eq!(folder.text("k"), "whole\n");
    let done = folder.launcher(&["prepare"]);
    assert_eq!((&*done.out, &*done.err), ("boot.kernel  present  k\n", ""));
}

#[test]
fn half_a_file_that_another_launcher_builds_is_waited_for() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script(
        "prepare.sh",
        "echo run >> runs; echo half > k; while [ ! -e go ]; do sleep 0.1; done; echo whole > k",
    );
    let mut first = folder.command(&["prepare"]);
    let mut first = first.stderr(Stdio::null()).spawn().unwrap();
    begun(&folder, "k");
    let mut second = folder.command(&["prepare"]);
    second.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut second = second.spawn().unwrap();
    let mut said = String::new();
    let mut errors = BufReader::new(second.stderr.take().unwrap());
    errors.read_line(&mut said).unwrap();
    let expected = "launcher: waiting for another launcher that builds: `./prepare.sh`\n";
    assert_eq!(said, expected);
    folder.write("go", "");
    assert!(first.wait().unwrap().success());
    let done = folder.told(second.wait_with_output().unwrap());
    assert_eq!((done.code, &*done.out), (0, "boot.kernel  present  k\n"));
    assert_eq!(
        (&*folder.text("k"), &*folder.text("runs")),
        ("whole\n", "run\n")
    );
}

#[test]
fn a_file_that_a_failed_command_has_overwritten_is_removed_and_one_that_it_left_alone_stays() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.write("k", "whole\n");
    folder.script("prepare.sh", "exit 3");
    assert_eq!(folder.launcher(&["prepare", "--rebuild"]).code, 1);
    assert_eq!(folder.text("k"), "whole\n");
    folder.script("prepare.sh", "echo half > k; exit 3");
    let done = folder.launcher(&["prepare", "--rebuild"]);
    assert!(
        done.err.contains("what it had begun is removed: "),
        "{}",
        done.err
    );
    assert!(!folder.path("k").exists());
}

#[test]
fn a_folder_that_an_interrupted_command_has_begun_is_left_to_the_command() {
    let folder = Folder::new(
        "[boot]\nkernel = \"vmlinuz\"\ninitrd = { path = \"tree\", build = \"./prepare.sh\" }\n",
    );
    folder.write("vmlinuz", "kernel");
    folder.script("prepare.sh", "mkdir -p tree; touch tree/half; exit 3");
    for _ in 0..2 {
        assert_eq!(folder.launcher(&["prepare"]).code, 1);
    }
    folder.script("prepare.sh", "mkdir -p tree; touch tree/whole");
    let done = folder.launcher(&["prepare"]);
    assert!(done.out.contains("boot.initrd  built "), "{}", done.out);
    assert!(folder.path("tree/half").exists() && folder.path("tree/whole").exists());
}

#[test]
fn a_cache_that_cannot_be_written_is_no_obstacle() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = [\"touch\", \"k\"]\n");
    folder.write("cache", "no folder");
    let done = folder.launcher(&["prepare"]);
    assert_eq!((done.code, &*done.out), (0, "boot.kernel  built  k\n"));
    assert!(done.err.contains("warning: cannot lock "), "{}", done.err);
}

#[test]
fn a_command_does_not_outlive_the_launcher() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n");
    folder.script("prepare.sh", "echo $$ > pid; exec sleep 60");
    let mut command = folder.command(&["up", "--detach"]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    let running = || {
        let pid = std::fs::read_to_string(folder.path("pid")).unwrap_or_default();
        !pid.is_empty()
            && std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .is_ok_and(|stat| !stat.contains(") Z "))
    };
    while !running() {
        assert!(begin.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    while running() {
        assert!(begin.elapsed() < Duration::from_secs(50));
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn commands_that_only_look_run_nothing() {
    let folder = Folder::new(
        "[boot.kernel]\npath = \"k\"\nbuild = \"./prepare.sh\"\n\
         [[block]]\npath = \"a.img\"\nbuild = \"./prepare.sh\"\n",
    );
    folder.script("prepare.sh", "touch k a.img");
    folder.is_looked_at();
    assert!(!folder.path("k").exists() && !folder.path("a.img").exists());
}

#[test]
fn up_builds_what_it_boots() {
    let folder = Folder::new("[boot.kernel]\npath = \"k\"\nbuild = [\"cp\", \"made\", \"k\"]\n");
    folder.write("made", super::bare::kernel(super::bare::POWER_OFF));
    let up = folder.command(&["up", "--force"]).output().unwrap();
    if let Some((code, errors)) = super::bare::ended(up) {
        assert_eq!(
            (code, &*errors),
            (0, "launcher: building: `cp made k` (in .)\n")
        );
    }
    assert!(folder.path("k").exists());
}
