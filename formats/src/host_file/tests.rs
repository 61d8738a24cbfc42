use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use super::*;
use crate::testing::{bytes, directory, image, is_root, run, segments};
use crate::{Engine, Image, OpenError};

fn ring() -> Ring {
    Ring::new(Engine::Auto).unwrap()
}

fn try_open(image: &Image) -> Result<HostFile, OpenError> {
    HostFile::open(&ring(), image)
}

/// The error of a file that must not open.
fn refused(image: &Image) -> OpenError {
    try_open(image).err().expect("should have been refused")
}

#[test]
fn a_path_that_is_no_file_is_an_error_that_says_what_it_is() {
    let directory = directory();
    let at = |name| directory.path().join(name);
    let make = Command::new("mkfifo").arg(at("fifo")).status().unwrap();
    assert!(make.success());
    let _socket = UnixListener::bind(at("socket")).unwrap();
    symlink("loop", at("loop")).unwrap();
    for (path, what) in [
        (at("missing"), "No such file or directory"),
        (at("missing/a.img"), "No such file or directory"),
        (
            directory.path().into(),
            "is a directory, expected a file or a block device",
        ),
        (at("fifo"), "is a FIFO, expected"),
        (at("socket"), "is a socket, expected"),
        (at("loop"), "Too many levels of symbolic links"),
        ("/dev/null".into(), "is a character device, expected"),
    ] {
        let error = refused(&image(&path));
        assert!(error.message.contains(what), "{error}");
        assert!(error.message.contains(path.to_str().unwrap()), "{error}");
        assert!(!error.message.contains("os error"), "{error}");
        assert_eq!(error.key, "path");
    }
}

#[test]
fn a_file_that_may_not_be_opened_is_an_error_that_says_who_may() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [0; 512]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let writable = image(&path);
    // Permissions hold for the thread whose identity they are checked against; root has to
    // become someone else, and may then not even read it.
    let error = std::thread::spawn(move || {
        if is_root() {
            // SAFETY: changes this thread's identity for file access, and nothing else.
            unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
        }
        refused(&writable)
    })
    .join()
    .unwrap();
    assert!(error.message.ends_with(": Permission denied"), "{error}");
    let help = error.help.unwrap();
    let owner = rustix::process::geteuid().as_raw();
    assert!(
        help.starts_with(&format!("it belongs to user {owner} ")),
        "{help}"
    );
    assert!(help.contains("with mode 400;"), "{help}");
}

#[test]
fn o_direct_is_refused_where_the_file_system_has_none() {
    let error = refused(&Image {
        ro: true,
        lock: false,
        o_direct: true,
        ..image("/proc/version".as_ref())
    });
    assert_eq!(error.key, "o_direct");
    assert!(error.message.ends_with("has no O_DIRECT"), "{error}");
}

#[test]
fn an_alignment_larger_than_the_block_size_is_an_error_that_names_the_value() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [0; 8192]).unwrap();
    let direct = |block_size| Image {
        o_direct: true,
        block_size,
        ..image(&path)
    };
    let needed = try_open(&direct(65536)).unwrap().alignment();
    assert!(needed >= 512 && needed.is_power_of_two());
    let error = refused(&direct(needed / 2));
    assert_eq!(error.key, "block_size");
    let help = error.help.unwrap();
    assert_eq!(
        help,
        format!("set `block_size = {needed}`, or `o_direct = false`")
    );
    assert_eq!(try_open(&image(&path)).unwrap().alignment(), 1);
}

#[test]
fn memory_that_o_direct_cannot_take_is_bounced() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let content: Vec<u8> = (0..1u32 << 20).map(|i| (i % 253) as u8).collect();
    fs::write(&path, &content).unwrap();
    let ring = ring();
    let direct = Image {
        o_direct: true,
        block_size: 4096,
        ..image(&path)
    };
    let file = HostFile::open(&ring, &direct).unwrap();
    // One byte off, and longer than what is bounced at once.
    let memory = segments(&vec![0; content.len() + 1]);
    let odd = memory.slice(1, content.len());
    run(&ring, file.read(0, odd.clone())).unwrap();
    assert!(bytes(&odd) == content);
    odd.fill(7);
    run(&ring, file.write(4096, odd.slice(0, content.len() - 8192))).unwrap();
    let written = fs::read(&path).unwrap();
    let end = content.len() - 4096;
    assert!(written[..4096] == content[..4096] && written[end..] == content[end..]);
    assert!(written[4096..end].iter().all(|byte| *byte == 7));
}

#[test]
fn a_file_is_created_whole_or_not_at_all() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let failed = create_file(&path, |_| Err(io::Error::from_raw_os_error(libc::ENOSPC)));
    let error = failed.unwrap_err();
    assert!(
        error.message.ends_with(": No space left on device"),
        "{error}"
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    create_file(&path, |file| {
        assert!(!path.exists());
        Ok(rustix::fs::ftruncate(file, 512)?)
    })
    .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 512);
    let error = create_file(&path, |_| Ok(())).unwrap_err();
    assert!(error.message.ends_with(": File exists"), "{error}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 512);
    let nowhere = directory.path().join("no/a.img");
    let help = create_file(&nowhere, |_| Ok(())).unwrap_err().help;
    assert_eq!(help.as_deref(), Some("create its directory first"));
}

#[test]
fn allocation_fills_the_holes_and_leaves_the_data() {
    // The same with a host that has no fallocate, where zeroes have to be written.
    for fallocate in [true, false] {
        for o_direct in [false, true] {
            let directory = directory();
            let path = directory.path().join("a.img");
            let file = fs::File::create(&path).unwrap();
            file.set_len(3 << 20).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[5; 8192], 1 << 20).unwrap();
            let ring = ring();
            if !fallocate {
                let refuse = |attempt: &crate::Attempt| attempt.what == crate::What::Fallocate;
                ring.inject(move |attempt| {
                    refuse(attempt).then_some(crate::Fault::Errno(libc::EOPNOTSUPP))
                });
            }
            let image = Image {
                o_direct,
                block_size: 4096,
                ..image(&path)
            };
            let host = HostFile::open(&ring, &image).unwrap();
            let steps = std::cell::RefCell::new(Vec::new());
            let allocate = host.allocate(5 << 20, |done| steps.borrow_mut().push(done));
            run(&ring, allocate).unwrap();
            let steps = steps.into_inner();
            assert!(steps.is_sorted() && steps.last() == Some(&(5 << 20)));
            assert_eq!(host.size(), 5 << 20);
            let meta = fs::metadata(&path).unwrap();
            assert_eq!(meta.len(), 5 << 20);
            assert!(meta.blocks() * 512 >= 5 << 20);
            let mut want = vec![0; 5 << 20];
            want[1 << 20..][..8192].fill(5);
            assert!(fs::read(&path).unwrap() == want);
        }
    }
}

#[test]
fn an_allocation_that_cannot_fit_takes_nothing() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [1; 4096]).unwrap();
    let ring = ring();
    let host = HostFile::open(&ring, &image(&path)).unwrap();
    let before = fs::metadata(&path).unwrap().blocks();
    let error = run(&ring, host.allocate(1 << 60, |_| {})).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    // And one that fails on the way, for someone else takes the space.
    let mut calls = 0;
    ring.inject(move |attempt| {
        calls += usize::from(attempt.what == crate::What::Fallocate);
        (calls == 2).then_some(crate::Fault::Errno(libc::ENOSPC))
    });
    let error = run(&ring, host.allocate((1 << 30) + 4096, |_| {})).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(host.size(), 4096);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), 4096);
    // A file system may keep a block of its own bookkeeping.
    assert!(meta.blocks() <= before + 16);
    assert_eq!(fs::read(&path).unwrap(), [1; 4096]);
}

/// An open file whose flushes fail with EIO as long as the cell says so, and how many were tried.
fn failing_flushes(
    ring: &Ring,
    path: &Path,
    o_direct: bool,
) -> (HostFile, Rc<Cell<bool>>, Rc<Cell<u32>>) {
    fs::write(path, vec![1; 1 << 20]).unwrap();
    let image = Image {
        o_direct,
        block_size: 4096,
        ..image(path)
    };
    let host = HostFile::open(ring, &image).unwrap();
    let (fails, tried) = (Rc::new(Cell::new(true)), Rc::new(Cell::new(0)));
    let (failing, count) = (Rc::clone(&fails), Rc::clone(&tried));
    ring.inject(move |attempt| {
        let sync = attempt.what == crate::What::Sync;
        count.set(count.get() + u32::from(sync));
        (sync && failing.get()).then_some(crate::Fault::Errno(libc::EIO))
    });
    (host, fails, tried)
}

#[test]
fn a_failed_flush_is_the_last_word_about_a_file_that_the_host_caches() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = ring();
    let (host, fails, tried) = failing_flushes(&ring, &path, false);
    let first = run(&ring, host.flush()).unwrap_err();
    fails.set(false);
    let next = run(&ring, host.flush()).unwrap_err();
    assert_eq!(tried.get(), 1);
    for error in [first, next] {
        let text = error.to_string();
        assert!(text.contains("Input/output error"), "{text}");
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(text.ends_with("restart the VM"), "{text}");
    }
}

#[test]
fn with_o_direct_a_flush_that_failed_may_be_tried_again_unless_the_cache_came_into_play() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = ring();
    let (host, fails, _) = failing_flushes(&ring, &path, true);
    run(&ring, host.write_zeroes(8192, 65536, true)).unwrap();
    let error = run(&ring, host.flush()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    fails.set(false);
    run(&ring, host.flush()).unwrap();
    // The start of a block, which the file system zeroes as it likes.
    run(&ring, host.write_zeroes(8192, 512, false)).unwrap();
    fails.set(true);
    run(&ring, host.flush()).unwrap_err();
    fails.set(false);
    run(&ring, host.flush()).unwrap_err();
}

#[test]
fn of_flushes_at_once_none_succeeds_after_one_that_failed() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = ring();
    let (host, _fails, tried) = failing_flushes(&ring, &path, false);
    let host = Rc::new(host);
    let failed = Rc::new(Cell::new(0));
    run(&ring, async {
        for _ in 0..8 {
            let (host, failed) = (Rc::clone(&host), Rc::clone(&failed));
            ring.spawn(async move {
                host.flush().await.unwrap_err();
                failed.set(failed.get() + 1);
            });
        }
        while Rc::strong_count(&host) > 1 {
            ring.yield_now().await;
        }
    });
    assert_eq!((failed.get(), tried.get()), (8, 1));
}

#[test]
fn flushes_at_once_share_the_one_that_begins_after_they_came() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = ring();
    let (host, fails, tried) = failing_flushes(&ring, &path, false);
    fails.set(false);
    let host = Rc::new(host);
    run(&ring, async {
        for _ in 0..8 {
            let host = Rc::clone(&host);
            ring.spawn(async move { host.flush().await.unwrap() });
        }
        while Rc::strong_count(&host) > 1 {
            ring.yield_now().await;
        }
    });
    assert_eq!(tried.get(), 2);
}

#[test]
fn a_flush_that_is_given_up_half_way_may_have_been_told_of_a_failure() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = Ring::new(crate::Engine::Threads).unwrap();
    let (host, fails, _) = failing_flushes(&ring, &path, false);
    fails.set(false);
    run(&ring, async {
        let mut flush = Box::pin(host.flush());
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(flush.as_mut().poll(&mut cx).is_pending());
        drop(flush);
        host.flush().await.unwrap_err();
    });
}

/// A QEMU process that has an image open until it is dropped.
struct Qemu(Child);

impl Qemu {
    /// Opens the image as QEMU does for a guest. The image is a qcow2 one: for a raw one
    /// qemu-io, unlike a guest, lets everyone else do as they please.
    fn open(path: &Path, ro: bool) -> Result<Qemu, String> {
        let mut command = Command::new("qemu-io");
        command
            .args(ro.then_some("-r"))
            .args(["-f", "qcow2"])
            .arg(path);
        let mut child = command
            .env("LANG", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("qemu-io (package qemu-utils) is needed");
        // It answers once the image is open; if that fails, it ends without an answer.
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        let mut answer = [0; 8];
        match child.stdout.as_mut().unwrap().read_exact(&mut answer) {
            Ok(()) => Ok(Qemu(child)),
            Err(_) => {
                let mut text = String::new();
                child
                    .stderr
                    .take()
                    .unwrap()
                    .read_to_string(&mut text)
                    .unwrap();
                child.wait().unwrap();
                Err(text)
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image that both QEMU and this crate can open.
fn shared_image() -> (tempfile::TempDir, PathBuf) {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status()
        .expect("qemu-img (package qemu-utils) is needed");
    assert!(made.success());
    (directory, path)
}

const PAIRS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn readers_share_an_image_and_a_writer_has_it_alone() {
    let (_directory, path) = shared_image();
    let open = |ro| try_open(&Image { ro, ..image(&path) });
    for (first, second) in PAIRS {
        let held = open(first).unwrap();
        match open(second) {
            Ok(_) => assert!(first && second),
            Err(error) => {
                assert!(!(first && second), "{error}");
                assert_eq!(error.key, OpenError::HOST);
                let me = format!("process {}", std::process::id());
                assert!(error.message.contains(&me), "{error}");
            }
        }
        drop(held);
    }
    open(false).unwrap();
}

#[test]
fn without_lock_nobody_is_asked() {
    let (_directory, path) = shared_image();
    let free = Image {
        lock: false,
        ..image(&path)
    };
    let _held = try_open(&image(&path)).unwrap();
    let _other = try_open(&free).unwrap();
}

#[test]
fn qemu_honours_our_locks() {
    let (_directory, path) = shared_image();
    for (ours, qemus) in PAIRS {
        let held = try_open(&Image {
            ro: ours,
            ..image(&path)
        })
        .unwrap();
        match Qemu::open(&path, qemus) {
            Ok(_) => assert!(ours && qemus, "ours {ours} qemus {qemus}"),
            Err(text) => {
                assert!(!(ours && qemus), "{text}");
                assert!(text.contains("lock"), "{text}");
            }
        }
        drop(held);
        drop(Qemu::open(&path, qemus).unwrap());
    }
}

#[test]
fn we_honour_the_locks_of_qemu_and_name_its_process() {
    let (_directory, path) = shared_image();
    for (qemus, ours) in PAIRS {
        let qemu = Qemu::open(&path, qemus).unwrap();
        match try_open(&Image {
            ro: ours,
            ..image(&path)
        }) {
            Ok(_) => assert!(ours && qemus, "ours {ours} qemus {qemus}"),
            Err(error) => {
                assert!(!(ours && qemus), "{error}");
                let holder = format!("process {} (`qemu-io`)", qemu.0.id());
                assert!(error.message.contains(&holder), "{error}");
                let how = if qemus {
                    "is in use by"
                } else {
                    "is being written by"
                };
                assert!(error.message.contains(how), "{error}");
            }
        }
    }
}

#[test]
fn qemu_img_does_not_write_to_an_image_that_we_have_open() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [0; 4096]).unwrap();
    let resize = || {
        Command::new("qemu-img")
            .args(["resize", "-q", "-f", "raw"])
            .arg(&path)
            .arg("1M")
            .stderr(Stdio::null())
            .status()
            .expect("qemu-img (package qemu-utils) is needed")
            .success()
    };
    for ro in [false, true] {
        let held = try_open(&Image { ro, ..image(&path) }).unwrap();
        assert!(!resize());
        assert_eq!(held.size(), fs::metadata(&path).unwrap().size());
    }
    assert!(resize());
}

#[test]
fn of_an_image_that_is_replaced_under_its_lock_the_new_one_is_opened() {
    const TIMES: usize = 300;
    let (directory, path) = shared_image();
    let (fresh, replaced) = (directory.path().join("fresh"), path.clone());
    let replacing = std::thread::spawn(move || {
        let ring = ring();
        for _ in 0..TIMES {
            fs::write(&fresh, [0; 4096]).unwrap();
            let Ok(held) = HostFile::open(&ring, &image(&replaced)) else {
                continue;
            };
            fs::rename(&fresh, &replaced).unwrap();
            drop(held);
        }
    });
    let ring = ring();
    let mut opened = 0;
    while !replacing.is_finished() || opened == 0 {
        // It is locked most of the time.
        let Ok(file) = HostFile::open(&ring, &image(&path)) else {
            continue;
        };
        let own = rustix::fs::fstat(file.file()).unwrap().st_ino;
        assert_eq!(own, fs::metadata(&path).unwrap().ino());
        opened += 1;
    }
    replacing.join().unwrap();
}
