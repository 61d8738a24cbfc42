use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::*;

struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Host { dir }
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("launcher")
    }

    fn file(&self, path: &str) -> PathBuf {
        let file = self.dir.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        file
    }

    fn place(&self, name: Option<&str>, file: &Path) -> Place {
        Place::under(&self.base(), name, file).unwrap()
    }
}

fn owner(name: &str, file: &Path) -> Owner {
    Owner {
        pid: std::process::id(),
        name: name.to_owned(),
        file: file.to_owned(),
        started_ms: 1_700_000_000_000,
        laid: Laid::default(),
    }
}

#[test]
fn what_was_laid_over_the_file_is_known_unless_it_is_too_much() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("web.toml");
    let place = Place::under(&dir.path().join("launcher"), Some("web"), &file).unwrap();
    let laid = |set: String| Laid {
        profiles: vec!["ci".into()],
        set: vec![set],
        folder: "/vms".into(),
    };
    let web = Owner {
        laid: laid("cpus=2".into()),
        ..owner("web", &file)
    };
    drop(place.claim(&web).unwrap());
    assert_eq!(place.last_owner(), Some(web));
    let web = Owner {
        laid: laid("x".repeat(100_000)),
        ..owner("web", &file)
    };
    drop(place.claim(&web).unwrap());
    assert_eq!(place.last_owner(), Some(owner("web", &file)));
}

#[test]
fn an_older_launcher_says_nothing_of_what_was_laid_over_the_file() {
    let text = r#"{"pid":1,"name":"web","file":"/web.toml","started_ms":0}"#;
    let owner: Owner = serde_json::from_str(text).unwrap();
    assert_eq!(owner.laid, Laid::default());
}

#[test]
fn the_folder_is_in_that_of_the_session_if_that_is_the_users() {
    let dir = tempfile::tempdir().unwrap();
    let us = rustix::process::geteuid().as_raw();
    let runtime = |path: &Path| base_in(Some(path.to_owned()), us);
    assert_eq!(runtime(dir.path()), dir.path().join("launcher"));

    let private = PathBuf::from(format!("/tmp/launcher-{us}"));
    assert_eq!(base_in(None, us), private);
    assert_eq!(runtime(Path::new("")), private);
    // The specification has a relative one ignored.
    assert_eq!(runtime(Path::new(".")), private);
    assert_eq!(runtime(&dir.path().join("gone")), private);
    let others = base_in(Some(dir.path().to_owned()), us + 1);
    assert_eq!(others, PathBuf::from(format!("/tmp/launcher-{}", us + 1)));
}

#[test]
fn a_vm_with_a_name_has_a_folder_of_that_name() {
    let host = Host::new();
    let place = host.place(Some("web"), Path::new("/nowhere/vm.toml"));
    assert_eq!(place.folder(), host.base().join("web"));
    assert_eq!(place.socket(), host.base().join("web/control.sock"));
}

#[test]
fn files_without_a_name_are_told_apart_by_their_paths() {
    let host = Host::new();
    let a = host.place(None, &host.file("a/vm.toml"));
    let b = host.place(None, &host.file("b/vm.toml"));
    assert_ne!(a, b);
    assert_eq!(a.key().len(), "vm-01234567".len());
    assert!(a.key().starts_with("vm-"), "{}", a.key());
}

#[test]
fn every_path_to_a_file_leads_to_the_same_place() {
    let host = Host::new();
    let file = host.file("a/vm.toml");
    symlink(&file, host.dir.path().join("vm.toml")).unwrap();
    let place = host.place(None, &file);
    for path in ["vm.toml", "a/../a/vm.toml", "./vm.toml"] {
        assert_eq!(host.place(None, &host.dir.path().join(path)), place);
    }
    // Also when the file is gone.
    fs::remove_file(&file).unwrap();
    let gone = host.dir.path().join("a/../a/vm.toml");
    assert_eq!(host.place(None, &gone), place);
}

#[test]
fn a_name_never_leads_out_of_the_folder_and_none_to_anothers() {
    let names = [
        "web",
        "..",
        ".",
        "",
        "a/b",
        "a_b",
        "a b",
        "ä",
        ".hidden",
        "_",
        "x/../../y",
    ];
    let keys: Vec<_> = names.iter().map(|name| key(name, None)).collect();
    for key in &keys {
        assert!(
            !key.is_empty() && !key.starts_with('.') && !key.contains('/'),
            "{key}"
        );
    }
    let mut different = keys.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), keys.len(), "{keys:?}");
    assert!(key(&"x".repeat(1000), None).len() < 80);
}

#[test]
fn a_claim_tells_who_runs_a_vm_until_it_ends() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    assert_eq!(place.owner().unwrap(), None);
    assert_eq!(place.last_owner(), None);

    let web = owner("web", &file);
    let claim = place.claim(&web).unwrap();
    assert_eq!(place.owner().unwrap(), Some(web.clone()));
    fs::write(place.console_log(), "hello").unwrap();
    drop(claim);

    assert_eq!(place.owner().unwrap(), None);
    assert_eq!(place.last_owner(), Some(web));
    assert_eq!(fs::read(place.console_log()).unwrap(), b"hello");
    assert_eq!(Place::all_under(&host.base()).unwrap(), [place]);
}

#[test]
fn a_shorter_owner_leaves_nothing_of_a_longer_one() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    drop(place.claim(&owner(&"long".repeat(100), &file)).unwrap());
    let web = owner("web", &file);
    let _claim = place.claim(&web).unwrap();
    assert_eq!(place.owner().unwrap(), Some(web));
}

#[test]
fn a_lock_that_is_taken_over_is_empty_at_no_time() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    drop(place.claim(&owner("web", &file)).unwrap());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let lock = place.folder().join(LOCK);
            let mut least = u64::MAX;
            while !done.load(Ordering::Relaxed) {
                least = least.min(fs::metadata(&lock).unwrap().len());
            }
            least
        });
        for _ in 0..2000 {
            drop(place.claim(&owner("web", &file)).unwrap());
        }
        done.store(true, Ordering::Relaxed);
        assert_ne!(reader.join().unwrap(), 0);
    });
}

#[test]
fn a_second_claim_names_the_process_that_has_the_first() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    let web = owner("web", &file);
    let _claim = place.claim(&web).unwrap();

    let error = place.claim(&web).err().unwrap();
    assert_eq!(error.exit, exit::ALREADY_RUNNING);
    let expected = format!(
        "error: `web` is already running: process {}, from {}\n\
         help: end it with `launcher stop web`",
        std::process::id(),
        file.display()
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn two_files_of_one_name_are_told_to_differ() {
    let host = Host::new();
    let (a, b) = (host.file("a/vm.toml"), host.file("b/vm.toml"));
    let _claim = host
        .place(Some("web"), &a)
        .claim(&owner("web", &a))
        .unwrap();
    let error = host.place(Some("web"), &b).claim(&owner("web", &b));
    let error = error.err().unwrap();
    assert_eq!(error.exit, exit::ALREADY_RUNNING);
    let text = error.to_string();
    assert!(text.contains(&format!("from {}", a.display())), "{text}");
    assert!(
        text.ends_with("help: give one of the two files another `name`"),
        "{text}"
    );
}

#[test]
fn what_was_left_by_one_who_was_killed_is_no_obstacle() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    drop(place.claim(&owner("web", &file)).unwrap());
    // The name of a socket outlives who listened there.
    drop(UnixListener::bind(place.socket()).unwrap());
    assert!(place.socket().exists());
    let claim = place.claim(&owner("web", &file)).unwrap();
    assert!(!place.socket().exists());
    drop(claim);
}

#[test]
fn the_end_of_a_claim_removes_the_socket() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    let claim = place.claim(&owner("web", &file)).unwrap();
    let _socket = UnixListener::bind(place.socket()).unwrap();
    drop(claim);
    assert!(!place.socket().exists());
}

#[test]
fn a_link_in_the_folders_place_is_an_error_and_its_target_untouched() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    let target = host.dir.path().join("target");
    fs::create_dir(&target).unwrap();
    drop(Folder::create(&host.base()).unwrap());
    symlink(&target, place.folder()).unwrap();

    let error = place.claim(&owner("web", &file)).err().unwrap().to_string();
    assert!(
        error.contains("is no folder, or a symbolic link"),
        "{error}"
    );
    assert!(place.owner().is_err());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn a_link_in_the_locks_place_is_an_error_and_its_target_untouched() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    drop(place.claim(&owner("web", &file)).unwrap());
    let target = host.file("target");
    fs::write(&target, "precious").unwrap();
    fs::remove_file(place.folder().join(LOCK)).unwrap();
    symlink(&target, place.folder().join(LOCK)).unwrap();
    assert!(place.claim(&owner("web", &file)).is_err());
    assert_eq!(fs::read(&target).unwrap(), b"precious");
}

#[test]
fn a_link_in_the_sockets_place_is_removed_and_its_target_untouched() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    drop(place.claim(&owner("web", &file)).unwrap());
    let target = host.file("target");
    symlink(&target, place.socket()).unwrap();
    let _claim = place.claim(&owner("web", &file)).unwrap();
    assert!(target.exists() && !place.socket().is_symlink());
}

#[test]
fn a_lock_that_is_no_owner_is_an_error_while_it_is_held() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    let claim = place.claim(&owner("web", &file)).unwrap();
    fs::write(place.folder().join(LOCK), "{").unwrap();
    let error = place.owner().unwrap_err().to_string();
    assert!(
        error.contains("it is locked, and does not say by whom"),
        "{error}"
    );
    drop(claim);
    assert_eq!(place.owner().unwrap(), None);
    assert_eq!(place.last_owner(), None);
}

#[test]
fn to_look_whether_a_vm_runs_never_keeps_it_from_starting() {
    let host = Host::new();
    let file = host.file("vm.toml");
    let place = host.place(Some("web"), &file);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                place.owner().unwrap();
                thread::sleep(Duration::from_micros(200));
            }
        });
        for _ in 0..100 {
            let claimed = place.claim(&owner("web", &file));
            if claimed.is_err() {
                done.store(true, Ordering::Relaxed);
            }
            claimed.unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}
