use std::fs::{self, FileTimes};
use std::os::unix::fs::PermissionsExt;

use super::*;

const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

/// A folder with a file, and a cache beside it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(content: &[u8]) -> Place {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), content).unwrap();
        Place { folder }
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("file")
    }

    fn cached(&self) -> std::path::PathBuf {
        self.folder.path().join("cache/digests")
    }

    /// The digest, as it is found an hour later.
    fn later(&self) -> Result<String> {
        self.at(|| SystemTime::now() + Duration::from_secs(3600))
    }

    fn at(&self, now: fn() -> SystemTime) -> Result<String> {
        let cache = Cache::in_folder(&self.cached());
        of_with(&self.file(), &cache, now, read).map(|digest| digest.to_string())
    }

    /// The digest, with something that happens each time that the file has been read.
    fn read_with(&self, mut then: impl FnMut()) -> Result<Digest> {
        of_with(
            &self.file(),
            &Cache::none(),
            SystemTime::now,
            |file, path| {
                let digest = read(file, path);
                then();
                digest
            },
        )
    }

    /// The files of the cache.
    fn slots(&self) -> Vec<std::path::PathBuf> {
        let Ok(entries) = fs::read_dir(self.cached()) else {
            return Vec::new();
        };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Has the cache say another digest, with everything else as it should be.
    fn forge(&self) {
        let file = File::open(self.file()).unwrap();
        let identity = Identity::of(&file).unwrap().unwrap();
        Cache::in_folder(&self.cached()).keep(&identity, Digest([7; 32]));
    }
}

fn forged() -> String {
    "07".repeat(32)
}

#[test]
fn a_digest_is_the_standard_s() {
    assert_eq!(Digest::of_bytes(b"").to_string(), EMPTY);
    assert_eq!(Digest::of_bytes(b"abc").to_string(), ABC);
    for (content, digest) in [(&b""[..], EMPTY), (b"abc", ABC)] {
        assert_eq!(Place::new(content).later().unwrap(), digest);
    }
}

#[test]
fn a_file_longer_than_what_is_read_at_once_has_the_digest_of_all_its_bytes() {
    let content: Vec<u8> = (0..3_000_001_u32).map(|i| (i % 251) as u8).collect();
    let expected = Digest::of_bytes(&content).to_string();
    assert_eq!(Place::new(&content).later().unwrap(), expected);
}

#[test]
fn hex_digits_of_either_case_are_a_digest() {
    let digest: Digest = ABC.parse().unwrap();
    assert_eq!(ABC.to_uppercase().parse::<Digest>().unwrap(), digest);
    assert_eq!(digest.to_string(), ABC);
}

#[test]
fn what_is_no_digest_says_why() {
    let why = |text: &str| text.parse::<Digest>().unwrap_err().to_string();
    assert_eq!(why(""), "it has 0 characters, expected 64 hex digits");
    assert_eq!(
        why(&ABC[1..]),
        "it has 63 characters, expected 64 hex digits"
    );
    assert_eq!(
        why(&format!("{}g", &ABC[1..])),
        "it has 'g' in it, expected 64 hex digits"
    );
    assert_eq!(
        why(&format!("{}é", &ABC[2..])),
        "it has 'é' in it, expected 64 hex digits"
    );
}

#[test]
fn a_digest_that_is_known_is_not_computed_again() {
    let place = Place::new(b"abc");
    assert_eq!(place.later().unwrap(), ABC);
    assert_eq!(place.slots().len(), 1);
    place.forge();
    assert_eq!(place.later().unwrap(), forged());
}

#[test]
fn a_file_that_has_changed_just_now_is_not_kept() {
    let place = Place::new(b"abc");
    for now in [
        SystemTime::now,
        || SystemTime::now() + Duration::from_secs(1),
        // A clock that is behind the file system's.
        || SystemTime::now() - Duration::from_secs(3600),
        || SystemTime::UNIX_EPOCH,
    ] {
        assert_eq!(place.at(now).unwrap(), ABC);
        assert!(place.slots().is_empty());
    }
}

#[test]
fn another_content_is_found_though_size_and_time_are_set_back() {
    let place = Place::new(b"abc");
    let modified = fs::metadata(place.file()).unwrap().modified().unwrap();
    place.later().unwrap();
    place.forge();
    fs::write(place.file(), "xyz").unwrap();
    let file = File::options().write(true).open(place.file()).unwrap();
    file.set_times(FileTimes::new().set_modified(modified))
        .unwrap();
    assert_eq!(place.later().unwrap(), Digest::of_bytes(b"xyz").to_string());
    assert_eq!(place.slots().len(), 1);
}

#[test]
fn another_file_in_its_place_is_read() {
    let place = Place::new(b"abc");
    place.later().unwrap();
    place.forge();
    fs::write(place.folder.path().join("new"), "").unwrap();
    fs::rename(place.folder.path().join("new"), place.file()).unwrap();
    assert_eq!(place.later().unwrap(), EMPTY);
}

#[test]
fn a_damaged_cache_counts_for_nothing_and_is_mended() {
    let place = Place::new(b"abc");
    place.later().unwrap();
    place.forge();
    let slot = place.slots().remove(0);
    let good = fs::read(&slot).unwrap();
    let forged = forged();
    for at in 0..good.len() - 1 {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&slot, bad).unwrap();
        assert_eq!(place.later().unwrap(), ABC, "byte {at}");
        assert_ne!(fs::read(&slot).unwrap(), good);
        fs::write(&slot, &good[..at]).unwrap();
        assert_eq!(place.later().unwrap(), ABC, "{at} bytes");
    }
    for bad in [vec![0; 1 << 20], b"\xff\xfe".to_vec(), b"\n\n \n".to_vec()] {
        fs::write(&slot, bad).unwrap();
        assert_eq!(place.later().unwrap(), ABC);
    }
    fs::write(&slot, &good).unwrap();
    assert_eq!(place.later().unwrap(), forged);
}

#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    let place = Place::new(b"abc");
    fs::write(place.folder.path().join("cache"), "a file").unwrap();
    assert_eq!(place.later().unwrap(), ABC);
    fs::remove_file(place.folder.path().join("cache")).unwrap();
    place.later().unwrap();
    // A folder where a file should be.
    let slot = place.slots().remove(0);
    fs::remove_file(&slot).unwrap();
    fs::create_dir(&slot).unwrap();
    assert_eq!(place.later().unwrap(), ABC);
    assert_eq!(place.slots(), [slot]);
}

#[test]
fn a_cache_that_others_can_write_counts_for_nothing() {
    let place = Place::new(b"abc");
    place.later().unwrap();
    place.forge();
    let mode = fs::Permissions::from_mode(0o777);
    fs::set_permissions(place.cached(), mode).unwrap();
    assert_eq!(place.later().unwrap(), ABC);
    fs::set_permissions(place.cached(), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(place.later().unwrap(), forged());
}

#[test]
fn without_a_home_folder_there_is_no_cache() {
    let place = Place::new(b"abc");
    let digest = of_with(&place.file(), &Cache::none(), SystemTime::now, read).unwrap();
    assert_eq!(digest.to_string(), ABC);
}

#[test]
fn the_cache_stays_small() {
    let place = Place::new(b"abc");
    let file = File::open(place.file()).unwrap();
    let identity = Identity::of(&file).unwrap().unwrap();
    let cache = Cache::in_folder(&place.cached());
    // Of all that there are, those that share a file of the cache.
    let all = (0..10_000).map(|inode| identity.with_inode(inode));
    let same: Vec<_> = all.filter(|it| cache::slot(it) == "7f").collect();
    assert!(same.len() > 20);
    same.iter().for_each(|it| cache.keep(it, Digest([3; 32])));
    let slots = place.slots();
    let [slot] = &slots[..] else {
        panic!("{slots:?}")
    };
    assert!(fs::metadata(slot).unwrap().len() < 4096);
    // The newest are still known, the oldest made room.
    let known: Vec<_> = same.iter().map(|it| cache.find(it).is_some()).collect();
    let (old, new) = known.split_at(same.len() - 16);
    assert!(!old.contains(&true) && !new.contains(&false));
}

#[test]
fn a_file_that_changes_while_it_is_read_is_read_again_and_then_refused() {
    let place = Place::new(b"abc");
    let mut count = 0;
    let writer = |content: String| fs::write(place.file(), content).unwrap();
    let once = place.read_with(|| {
        count += 1;
        if count == 1 {
            writer("wxyz".into());
        }
    });
    assert_eq!((once.unwrap(), count), (Digest::of_bytes(b"wxyz"), 2));
    let always = place.read_with(|| {
        count += 1;
        writer("x".repeat(count));
    });
    let said = always.unwrap_err().to_string();
    assert_eq!(count, 2 + ATTEMPTS);
    assert_eq!(
        said,
        format!(
            "error: {} changes while it is read\nhelp: stop what writes it, or wait until it is \
             complete",
            place.file().display()
        )
    );
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let said = |path: &Path| of(path).unwrap_err().to_string();
    let shown = folder.path().display();
    assert_eq!(
        said(folder.path()),
        format!("error: {shown} is a directory, expected a regular file")
    );
    assert_eq!(
        said(Path::new("/dev/null")),
        "error: /dev/null is a special file, expected a regular file"
    );
    let absent = folder.path().join("absent");
    assert_eq!(
        said(&absent),
        format!(
            "error: cannot open {}: No such file or directory\nhelp: paths in a VM's file are \
             relative to that file",
            absent.display()
        )
    );
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(said(&fifo).contains("is a special file"));
}
