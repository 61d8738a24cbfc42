//! Where distributions keep their kernels: the one to boot is found by name.

use std::cmp::Ordering;

use ext4_view::{Ext4, Ext4Error};

/// A folder of more files than this is not searched to its end.
const ENTRIES_MOST: usize = 100_000;

/// A kernel and its initrd, by their paths in one file system.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) path: String,
    pub(super) initrd: Option<String>,
}

/// What is wrong, and with which path.
pub(super) type Failed = (String, Ext4Error);

/// The kernel to boot: the one that the distribution's links stand for, else the newest.
pub(super) fn find(fs: &Ext4) -> Result<Option<Kernel>, Failed> {
    for folder in ["/", "/boot/"] {
        let path = format!("{folder}vmlinuz");
        if is_file(fs, &path)? {
            let links = [format!("{folder}initrd.img"), format!("{folder}initrd")];
            let initrd = match first(fs, links)? {
                Some(initrd) => Some(initrd),
                None => initrd_of(fs, &resolved(fs, &path)?)?,
            };
            return Ok(Some(Kernel { path, initrd }));
        }
    }
    // A partition of its own for /boot has them at its top.
    for folder in ["/boot/", "/"] {
        if let Some(path) = newest(fs, folder)? {
            let initrd = initrd_of(fs, &path)?;
            return Ok(Some(Kernel { path, initrd }));
        }
    }
    Ok(None)
}

/// Whether it is the file system that has the others mounted in it.
pub(super) fn is_root(fs: &Ext4) -> bool {
    ["/etc", "/usr", "/sbin"]
        .iter()
        .any(|path| fs.exists(*path).unwrap_or(false))
}

/// The initrd that was made for a kernel, by any of the names that distributions give it.
fn initrd_of(fs: &Ext4, kernel: &str) -> Result<Option<String>, Failed> {
    let Some((folder, version)) = kernel.rsplit_once("/vmlinuz-") else {
        return Ok(None);
    };
    first(
        fs,
        [
            format!("{folder}/initrd.img-{version}"),
            format!("{folder}/initramfs-{version}.img"),
            format!("{folder}/initrd-{version}"),
            format!("{folder}/initramfs-{version}"),
        ],
    )
}

/// The newest kernel in a folder.
fn newest(fs: &Ext4, folder: &str) -> Result<Option<String>, Failed> {
    let failed = |error| (folder.to_owned(), error);
    let entries = match fs.read_dir(folder) {
        Ok(entries) => entries,
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut versions = Vec::new();
    for entry in entries.take(ENTRIES_MOST) {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let version = name
            .as_str()
            .ok()
            .and_then(|it| it.strip_prefix("vmlinuz-"));
        // What an upgrade put aside, and the rescue kernel of Fedora and its kin.
        let spare = |it: &&str| it.ends_with(".old") || it.ends_with('~') || it.contains("rescue");
        versions.extend(version.filter(|it| !spare(it)).map(str::to_owned));
    }
    versions.sort_by(|a, b| compare(b, a));
    let paths = versions.iter().map(|it| format!("{folder}vmlinuz-{it}"));
    first(fs, paths)
}

/// The first path that is a file.
fn first(fs: &Ext4, paths: impl IntoIterator<Item = String>) -> Result<Option<String>, Failed> {
    for path in paths {
        if is_file(fs, &path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether a path leads to a file: links are followed, inside of the file system.
fn is_file(fs: &Ext4, path: &str) -> Result<bool, Failed> {
    match fs.metadata(path) {
        Ok(metadata) => Ok(metadata.file_type().is_regular_file()),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => Ok(false),
        Err(error) => Err((path.to_owned(), error)),
    }
}

/// The path of what a link stands for.
fn resolved(fs: &Ext4, path: &str) -> Result<String, Failed> {
    match fs.canonicalize(path) {
        Ok(resolved) => Ok(resolved.display().to_string()),
        Err(error) => Err((path.to_owned(), error)),
    }
}

/// Orders versions: numbers by their value, and a release candidate before its release.
fn compare(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.replace("-rc", "~rc"), b.replace("-rc", "~rc"));
    let (mut a, mut b) = (a.as_str(), b.as_str());
    loop {
        let text = |it: &str| it.find(|c: char| c.is_ascii_digit()).unwrap_or(it.len());
        let ((text_a, rest_a), (text_b, rest_b)) = (a.split_at(text(a)), b.split_at(text(b)));
        let rank = |text: &str| match text.bytes().next() {
            Some(b'~') => 0,
            None => 1,
            Some(_) => 2,
        };
        let texts = rank(text_a).cmp(&rank(text_b)).then(text_a.cmp(text_b));
        let digits = |it: &str| it.find(|c: char| !c.is_ascii_digit()).unwrap_or(it.len());
        let (number_a, next_a) = rest_a.split_at(digits(rest_a));
        let (number_b, next_b) = rest_b.split_at(digits(rest_b));
        let value = |number: &str| number.trim_start_matches('0').to_owned();
        let (value_a, value_b) = (value(number_a), value(number_b));
        let numbers = (value_a.len(), value_a).cmp(&(value_b.len(), value_b));
        let order = texts.then(numbers);
        if order != Ordering::Equal || (next_a.is_empty() && next_b.is_empty()) {
            return order;
        }
        (a, b) = (next_a, next_b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_numbers_and_candidates_come_before_releases() {
        let sorted = [
            "5.10.0-9-amd64",
            "5.10.0-28-amd64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-10-cloud-amd64",
            "6.12.0-rc2",
            "6.12.0-rc10",
            "6.12.0",
            "6.12.0-1",
            "6.12.1",
            "10.0.0",
        ];
        for (at, version) in sorted.iter().enumerate() {
            for (other_at, other) in sorted.iter().enumerate() {
                assert_eq!(
                    compare(version, other),
                    at.cmp(&other_at),
                    "{version} {other}"
                );
            }
        }
        assert_eq!(compare("linux", "linux-lts"), Ordering::Less);
        assert_eq!(compare("", ""), Ordering::Equal);
    }
}
