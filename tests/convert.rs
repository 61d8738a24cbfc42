//! `launcher disk convert`: every format to every other, and what may go wrong.

#![allow(clippy::unwrap_used, clippy::panic)]

mod names;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A folder with images.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw disk with data of all kinds, and holes.
    fn disk(&self, name: &str, len: usize) {
        let file = File::create(self.path(name)).unwrap();
        file.set_len(len as u64).unwrap();
        let mut number = 1u64;
        let mut next = || {
            number = number
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            number >> 33
        };
        let mut at = 0;
        while at < len {
            let run = (((next() % 40) as usize + 1) << 14).min(len - at);
            let bytes: Option<Vec<u8>> = match next() % 5 {
                // A hole.
                0 | 1 => None,
                2 => Some(vec![0; run]),
                // To be compressed, or not.
                3 => Some((0..run).map(|_| b'a' + (next() % 7) as u8).collect()),
                _ => Some((0..run).map(|_| next() as u8).collect()),
            };
            if let Some(bytes) = bytes {
                file.write_all_at(&bytes, at as u64).unwrap();
            }
            at += run;
        }
        // The last byte counts.
        file.write_all_at(b"!", len as u64 - 1).unwrap();
    }

    fn tool(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        let output = command
            .args(words)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {text}");
        output
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command
            .args(["disk", "convert"])
            .args(line.split_whitespace())
            .current_dir(self.0.path())
            .env_remove("LAUNCHER_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Exit code, standard output and standard error.
    fn run(&self, line: &str) -> (i32, String, String) {
        told(self.command(line).output().unwrap())
    }

    fn converts(&self, line: &str) {
        let (code, _, err) = self.run(line);
        // It tells what it does if that takes long.
        let quiet = err.lines().all(|line| line.starts_with("launcher: "));
        assert!(code == 0 && quiet, "{line}: {err}");
    }

    /// The error of a conversion that is refused with this exit code.
    fn refuses(&self, line: &str, code: i32) -> String {
        let (exit, out, err) = self.run(line);
        assert_eq!((exit, &*out), (code, ""), "{line}: {err}");
        assert!(err.starts_with("error: "), "{err}");
        err
    }

    /// Checks an image, and that it is the same disk as another.
    fn same(&self, one: &str, format: &str, other: &str, other_format: &str) {
        if other_format == "qcow2" {
            self.tool(&format!("qemu-img check -q -f qcow2 {other}"));
        }
        let line = format!("qemu-img compare -f {format} -F {other_format} {one} {other}");
        self.tool(&line);
    }

    fn names(&self) -> Vec<String> {
        names::names(self.0.path())
    }

    /// Starts a conversion, and waits until there is something of its target.
    fn begun(&self, line: &str, partial: &str) -> Child {
        let child = self.command(line).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let written = || fs::metadata(self.path(partial)).is_ok_and(|meta| meta.len() > MIB as u64);
        while !written() {
            assert!(Instant::now() < deadline, "{:?}", self.names());
            thread::sleep(Duration::from_millis(5));
        }
        child
    }
}

fn told(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Every target that is made from each source of the matrix: name, options.
const TARGETS: &[(&str, &str)] = &[
    ("t.raw", ""),
    ("t.raw", "--allocate"),
    ("t.raw", "--no-verify --no-sync"),
    ("t.qcow2", ""),
    ("t.qcow2", "--allocate"),
    ("t.qcow2", "-o cluster_size=512,version=2"),
    ("t.qcow2", "-o cluster_size=2MiB,refcount_bits=64"),
    ("t.qcow2", "-o extended_l2=true,refcount_bits=1"),
    ("t.qcow2", "-o preallocation=metadata"),
    ("t.qcow2", "-o lazy_refcounts=true,preallocation=full"),
    ("t.qcow2", "--compress"),
    ("t.qcow2", "-c -o compression_type=zstd,cluster_size=2MiB"),
    ("t.qcow2", "-c -o cluster_size=512,refcount_bits=1"),
    ("t.qcow2", "-c -o cluster_size=4096,version=2"),
    ("t.qcow2", "-c -o extended_l2=on,refcount_bits=2"),
];

/// Converts an image to each of [`TARGETS`].
fn to_every_target(folder: &Folder, source: &str, format: &str, options: &str) {
    for (target, asked) in TARGETS {
        folder.converts(&format!("{source} {target} {options} {asked}"));
        let other = if target.ends_with("raw") {
            "raw"
        } else {
            "qcow2"
        };
        folder.same(source, format, target, other);
        fs::remove_file(folder.path(target)).unwrap();
    }
}

#[test]
fn a_raw_image_becomes_every_other() {
    let folder = Folder::new();
    folder.disk("s.raw", 12 * MIB + 512);
    to_every_target(&folder, "s.raw", "raw", "");
}

#[test]
fn a_qcow2_image_becomes_every_other() {
    let folder = Folder::new();
    folder.disk("s.raw", 12 * MIB + 512);
    folder.tool("qemu-img convert -f raw -O qcow2 -o extended_l2=on s.raw s.qcow2");
    to_every_target(&folder, "s.qcow2", "qcow2", "");
}

#[test]
fn qcow2_images_of_all_kinds_are_read() {
    let folder = Folder::new();
    folder.disk("s.raw", 12 * MIB + 512);
    for options in [
        "-o compat=0.10",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-c",
        "-c -o compression_type=zstd,cluster_size=4k",
        "-o preallocation=metadata",
        "-S 0",
    ] {
        folder.tool(&format!(
            "qemu-img convert -f raw -O qcow2 {options} s.raw s.qcow2"
        ));
        for target in ["t.raw", "t.qcow2"] {
            folder.converts(&format!("s.qcow2 {target} --force"));
            folder.same("s.raw", "raw", target, target.split_once('.').unwrap().1);
        }
    }
}

#[test]
fn a_chain_of_backing_files_becomes_one_image() {
    let folder = Folder::new();
    folder.disk("base.raw", 8 * MIB);
    folder.tool("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 10M");
    folder.tool("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 12M");
    let mut io = Command::new("qemu-io");
    io.args([
        "-f",
        "qcow2",
        "-c",
        "write -P 5 1M 1M",
        "-c",
        "write -z 3M 2M",
    ]);
    let done = io
        .arg("top.qcow2")
        .current_dir(folder.0.path())
        .output()
        .unwrap();
    assert!(done.status.success());
    to_every_target(
        &folder,
        "top.qcow2",
        "qcow2",
        "--from-backing mid.qcow2 --from-backing base.raw",
    );
    let error = folder.refuses("top.qcow2 t.raw", 2);
    assert!(error.contains("has the backing file"), "{error}");
    assert!(error.contains("--from-backing"), "{error}");
}

#[test]
fn an_overlay_has_only_what_differs_from_its_backing_file() {
    let folder = Folder::new();
    folder.disk("base.raw", 8 * MIB);
    fs::copy(folder.path("base.raw"), folder.path("s.raw")).unwrap();
    let file = File::options()
        .write(true)
        .open(folder.path("s.raw"))
        .unwrap();
    file.write_all_at(&[9; 100_000], 3 * MIB as u64 + 17)
        .unwrap();
    // Zeroes where the backing file may have data, and a longer disk.
    file.write_all_at(&vec![0; MIB], 5 * MIB as u64).unwrap();
    file.set_len(9 * MIB as u64).unwrap();
    for options in [
        "",
        "-c",
        "-o version=2",
        "-o extended_l2=on",
        "-o preallocation=metadata,extended_l2=on",
    ] {
        folder.converts(&format!(
            "s.raw t.qcow2 --backing base.raw {options} --force"
        ));
        folder.same("s.raw", "raw", "t.qcow2", "qcow2");
        let info = folder.tool("qemu-img info --output=json t.qcow2").stdout;
        let info = String::from_utf8(info).unwrap();
        assert!(
            info.contains("\"full-backing-filename\": \"base.raw\""),
            "{info}"
        );
        if !options.contains("preallocation") && !options.contains("version") {
            let len = fs::metadata(folder.path("t.qcow2")).unwrap().len();
            assert!(len < MIB as u64, "{options}: {len}");
        }
    }
    let error = folder.refuses("s.raw u.raw --backing base.raw", 2);
    assert!(error.contains("has no backing file"), "{error}");
}

#[test]
fn an_external_data_file_is_made_and_read_and_goes_after_an_error() {
    let folder = Folder::new();
    folder.disk("s.raw", 5 * MIB);
    folder.converts("s.raw t.qcow2 -o data_file=t.data");
    folder.same("s.raw", "raw", "t.qcow2", "qcow2");
    folder.converts("t.qcow2 back.raw --from-option data_file=t.data");
    folder.same("s.raw", "raw", "back.raw", "raw");
    let error = folder.refuses("s.raw u.qcow2 -o data_file=t.data", 2);
    assert!(error.contains("`data_file` `t.data` exists"), "{error}");
    let error = folder.refuses("s.raw u.qcow2 -c -o data_file=u.data", 2);
    assert!(error.contains("cannot be compressed"), "{error}");
    assert_eq!(folder.names(), ["back.raw", "s.raw", "t.data", "t.qcow2"]);
}

#[test]
fn a_disk_that_ends_amid_a_sector_is_filled_up_with_zeroes() {
    let folder = Folder::new();
    folder.disk("s.raw", 70_001);
    folder.converts("s.raw t.raw");
    let (source, target) = (folder.path("s.raw"), folder.path("t.raw"));
    let mut wanted = fs::read(source).unwrap();
    wanted.resize(70_144, 0);
    assert!(fs::read(target).unwrap() == wanted);
    folder.converts("s.raw t.qcow2 -c");
    folder.same("t.raw", "raw", "t.qcow2", "qcow2");
}

#[test]
fn an_empty_disk_has_no_data() {
    let folder = Folder::new();
    File::create(folder.path("s.raw"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    folder.converts("s.raw t.qcow2");
    folder.converts("t.qcow2 u.qcow2 -c");
    folder.same("t.qcow2", "qcow2", "u.qcow2", "qcow2");
    assert!(fs::metadata(folder.path("u.qcow2")).unwrap().len() < MIB as u64);
}

#[test]
fn where_there_is_no_io_uring_threads_do_it() {
    let folder = Folder::new();
    folder.disk("s.raw", 5 * MIB);
    let mut command = folder.command("s.raw t.qcow2");
    let (code, out, err) = told(command.env("LAUNCHER_IO", "threads").output().unwrap());
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(out, "converted s.raw to t.qcow2 (qcow2, 5MiB, verified)\n");
    folder.same("s.raw", "raw", "t.qcow2", "qcow2");
}

#[test]
fn a_target_that_exists_is_kept_unless_it_is_to_be_replaced() {
    let folder = Folder::new();
    folder.disk("s.raw", 3 * MIB);
    fs::write(folder.path("t.raw"), "mine").unwrap();
    let error = folder.refuses("s.raw t.raw", 2);
    assert!(error.contains("`t.raw` exists"), "{error}");
    assert!(error.contains("--force"), "{error}");
    assert_eq!(fs::read(folder.path("t.raw")).unwrap(), b"mine");
    folder.converts("s.raw t.raw --force");
    folder.same("s.raw", "raw", "t.raw", "raw");
    // What a symbolic link leads to is replaced, not the link.
    std::os::unix::fs::symlink("t.raw", folder.path("link.raw")).unwrap();
    folder.converts("s.raw link.raw --force");
    assert!(
        fs::symlink_metadata(folder.path("link.raw"))
            .unwrap()
            .is_symlink()
    );
    for special in ["/dev/null", "/"] {
        let error = folder.refuses(&format!("s.raw {special} -O raw --force"), 2);
        assert!(
            error.contains("is no file") || error.contains("no file's name"),
            "{error}"
        );
    }
}

#[test]
fn no_image_becomes_itself() {
    let folder = Folder::new();
    folder.disk("s.raw", 3 * MIB);
    let before = fs::read(folder.path("s.raw")).unwrap();
    fs::hard_link(folder.path("s.raw"), folder.path("hard.qcow2")).unwrap();
    std::os::unix::fs::symlink("s.raw", folder.path("soft.qcow2")).unwrap();
    for target in ["s.raw", "./s.raw", "hard.qcow2", "soft.qcow2"] {
        let error = folder.refuses(&format!("s.raw {target} --force"), 2);
        assert!(error.contains("cannot be the target"), "{error}");
    }
    let error = folder.refuses("hard.qcow2 s.raw --force -f raw", 2);
    assert!(error.contains("cannot be the target"), "{error}");
    assert!(fs::read(folder.path("s.raw")).unwrap() == before);
}

/// QEMU's lock of a writer on a file, held until dropped.
struct Writer(Child);

impl Writer {
    fn of(folder: &Folder, name: &str) -> Writer {
        let mut command = Command::new("qemu-io");
        command
            .args(["-f", "raw", name])
            .current_dir(folder.0.path());
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let locked = || {
            let fds = fs::read_dir(format!("/proc/{}/fdinfo", child.id())).unwrap();
            fds.flatten()
                .any(|fd| fs::read_to_string(fd.path()).is_ok_and(|info| info.contains("OFDLCK")))
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !locked() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        // All of its locks, one after the other.
        thread::sleep(Duration::from_millis(200));
        Writer(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_somebody_writes_to_is_neither_read_nor_replaced() {
    let folder = Folder::new();
    folder.disk("s.raw", 3 * MIB);
    folder.disk("busy.raw", 3 * MIB);
    let _writer = Writer::of(&folder, "busy.raw");
    let error = folder.refuses("busy.raw t.qcow2", 1);
    assert!(
        error.contains("`busy.raw` is being written by process"),
        "{error}"
    );
    let error = folder.refuses("s.raw busy.raw --force", 1);
    assert!(error.contains("`busy.raw` is"), "{error}");
    assert_eq!(folder.names(), ["busy.raw", "s.raw"]);
}

#[test]
fn a_format_is_never_told_by_content() {
    let folder = Folder::new();
    folder.disk("s.raw", 3 * MIB);
    folder.tool("qemu-img convert -f raw -O qcow2 s.raw q.img");
    let error = folder.refuses("q.img t.raw", 2);
    assert!(error.contains("begins like a qcow2 image"), "{error}");
    assert!(error.contains("--from-format"), "{error}");
    folder.converts("q.img t.raw --from-format qcow2");
    folder.same("s.raw", "raw", "t.raw", "raw");
    // Its bytes, if that is what is asked for.
    folder.converts("q.img u.qcow2 -f raw");
    folder.same("q.img", "raw", "u.qcow2", "qcow2");
    let error = folder.refuses("q.img t", 2);
    assert!(error.contains("add `--to-format`"), "{error}");
    let error = folder.refuses("s.raw t.qcow2 -O raw -o cluster_size=64K", 2);
    assert!(error.contains("has no option \"cluster_size\""), "{error}");
    let error = folder.refuses("s.raw v.raw -c", 2);
    assert!(error.contains("cannot be compressed"), "{error}");
    assert_eq!(
        folder.names(),
        ["q.img", "s.raw", "t.raw", "u.qcow2"].map(str::to_owned)
    );
}

/// A disk that takes some seconds to be compressed.
fn slow(folder: &Folder) {
    folder.disk("s.raw", 192 * MIB);
}

const SLOWLY: &str = "s.raw t.qcow2 -c -o cluster_size=2MiB";

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let folder = Folder::new();
    slow(&folder);
    for signal in [Signal::INT, Signal::TERM] {
        let child = folder.begun(SLOWLY, ".t.qcow2.partial");
        assert!(!folder.path("t.qcow2").exists());
        kill_process(pid(&child), signal).unwrap();
        let (code, out, err) = told(child.wait_with_output().unwrap());
        assert_eq!((code, &*out), (1, ""));
        assert!(err.contains("error: interrupted"), "{err}");
        assert_eq!(folder.names(), ["s.raw"]);
    }
}

#[test]
fn a_killed_conversion_leaves_nothing_under_the_final_name_and_the_next_one_cleans_up() {
    let folder = Folder::new();
    slow(&folder);
    fs::write(folder.path("t.qcow2"), "old").unwrap();
    let line = format!("{SLOWLY} --force");
    let mut child = folder.begun(&line, ".t.qcow2.partial");
    // While it is under way, nobody else makes the same.
    let error = folder.refuses(&line, 1);
    assert!(error.contains(".t.qcow2.partial` is "), "{error}");
    kill_process(pid(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read(folder.path("t.qcow2")).unwrap(), b"old");
    assert_eq!(folder.names(), [".t.qcow2.partial", "s.raw", "t.qcow2"]);
    folder.converts("s.raw t.qcow2 --force");
    folder.same("s.raw", "raw", "t.qcow2", "qcow2");
    assert_eq!(folder.names(), ["s.raw", "t.qcow2"]);
}

#[test]
fn what_takes_long_is_told_once_where_there_is_no_terminal() {
    let folder = Folder::new();
    slow(&folder);
    let (code, out, err) = folder.run(SLOWLY);
    assert_eq!((code, out.lines().count()), (0, 1));
    let told: Vec<_> = err.lines().collect();
    let both = [
        "launcher: converting to t.qcow2",
        "launcher: verifying t.qcow2",
    ];
    assert!(both.starts_with(&told) || both[1..] == told, "{err}");
}

#[test]
fn a_host_that_takes_no_more_bytes_is_an_error_and_leaves_nothing() {
    let folder = Folder::new();
    folder.disk("s.raw", 24 * MIB);
    for options in [
        "t.qcow2",
        "t.qcow2 -c",
        "t.qcow2 -o preallocation=metadata",
        "t.raw",
    ] {
        let mut command = folder.command(&format!("s.raw {options}"));
        let limit = Rlimit {
            current: Some(2 * MIB as u64),
            maximum: Some(2 * MIB as u64),
        };
        // SAFETY: setrlimit is safe between fork and exec.
        unsafe {
            command.pre_exec(move || Ok(setrlimit(Resource::Fsize, limit)?));
        }
        let (code, out, err) = told(command.output().unwrap());
        assert!((1..=2).contains(&code), "{err}");
        assert!(out.is_empty());
        assert!(err.contains("File too large"), "{options}: {err}");
        assert_eq!(folder.names(), ["s.raw"], "{options}");
    }
}

#[test]
fn a_full_file_system_is_an_error_and_leaves_nothing() {
    // A small file system of one's own needs a user namespace.
    let folder = Folder::new();
    folder.disk("s.raw", 24 * MIB);
    fs::create_dir(folder.path("small")).unwrap();
    let script = "mount -t tmpfs -o size=4M none small || exit 77\n\
                  \"$0\" disk convert s.raw small/t.qcow2; code=$?\n\
                  ls -A small; exit $code";
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_launcher")])
        .current_dir(folder.0.path())
        .output()
        .unwrap();
    let (code, out, err) = told(output);
    assert_eq!((code, &*out), (1, ""), "{err}");
    assert!(err.contains("No space left on device"), "{err}");
    assert!(err.contains("free some space"), "{err}");
}

#[test]
fn a_damaged_source_is_an_error_and_leaves_nothing() {
    let folder = Folder::new();
    folder.disk("s.raw", 6 * MIB);
    folder.tool("qemu-img convert -f raw -O qcow2 -c s.raw s.qcow2");
    let file = File::options()
        .write(true)
        .open(folder.path("s.qcow2"))
        .unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(&vec![0xff; 300_000], len / 2).unwrap();
    let error = folder.refuses("s.qcow2 t.raw", 1);
    assert!(error.contains("cannot read `s.qcow2`"), "{error}");
    assert_eq!(folder.names(), ["s.qcow2", "s.raw"]);
}

#[test]
fn a_missing_source_or_folder_is_an_error() {
    let folder = Folder::new();
    folder.disk("s.raw", MIB);
    assert!(
        folder
            .refuses("missing.raw t.qcow2", 2)
            .contains("cannot open `missing.raw`")
    );
    let error = folder.refuses("s.raw no/such/t.qcow2", 2);
    assert!(error.contains("No such file or directory"), "{error}");
    assert!(folder.path("").join("s.raw").exists());
    assert!(!Path::new("no").exists());
}
