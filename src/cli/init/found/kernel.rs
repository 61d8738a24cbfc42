//! Which files of a folder are a kernel and its initrd, by their names.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use super::{bootable, inside};

const KERNELS: [&str; 3] = ["vmlinuz", "vmlinux", "bzImage"];
const INITRDS: [&str; 2] = ["initrd", "initramfs"];

/// Whether a file is called as a kernel or an initrd is.
pub(super) fn is_kernel_or_initrd(name: &str) -> bool {
    starts_with(name, &KERNELS) || starts_with(name, &INITRDS)
}

fn starts_with(name: &str, any: &[&str]) -> bool {
    any.iter().any(|start| name.starts_with(start))
}

/// The kernel of a folder: the one without a version, or else the latest.
pub(super) fn kernel_of(
    dir: &Path,
    names: &[String],
    passed_over: &mut Vec<(PathBuf, String)>,
) -> Option<PathBuf> {
    let mut kernels: Vec<_> = names
        .iter()
        .filter(|name| starts_with(name, &KERNELS))
        .collect();
    kernels.sort_by_key(|name| {
        let rank = KERNELS.iter().position(|kernel| kernel == name);
        (rank.unwrap_or(KERNELS.len()), Reverse(natural(name)))
    });
    for name in kernels {
        let path = inside(dir, name);
        match bootable(&path) {
            Ok(()) => return Some(path),
            Err(error) => {
                let message = error.message();
                let shown = format!("the kernel {} ", path.display());
                let why = message.strip_prefix(&shown).unwrap_or(message).to_owned();
                passed_over.push((path, why));
            }
        }
    }
    None
}

/// The initrd that belongs to a kernel: that of its version, or else one without.
pub(super) fn initrd_of(dir: &Path, names: &[String], kernel: &Path) -> Option<PathBuf> {
    let kernel = kernel.file_name().unwrap_or_default().to_string_lossy();
    let version = KERNELS
        .iter()
        .find_map(|start| kernel.strip_prefix(start))
        .unwrap_or_default();
    let mut initrds: Vec<_> = names
        .iter()
        .filter(|name| starts_with(name, &INITRDS))
        .collect();
    initrds.sort_by_key(|name| Reverse(natural(name)));
    let of_version = |name: &&&String| !version.is_empty() && name.contains(version);
    let without = |name: &&&String| !name.contains(|c: char| c.is_ascii_digit());
    let found = initrds
        .iter()
        .find(of_version)
        .or_else(|| initrds.iter().find(without))
        .or_else(|| initrds.first().filter(|_| version.is_empty()));
    found.map(|name| inside(dir, name))
}

/// A name with its numbers as numbers: 6.10 is after 6.9.
fn natural(name: &str) -> Vec<(u64, &[u8])> {
    let digits = |a: &u8, b: &u8| a.is_ascii_digit() == b.is_ascii_digit();
    let parts = name.as_bytes().chunk_by(digits);
    let number = |part: &[u8]| std::str::from_utf8(part).ok()?.parse().ok();
    parts
        .map(|part| (number(part).unwrap_or(0), part))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(names: [&str; 3]) -> Vec<String> {
        let mut names = names.map(str::to_owned).to_vec();
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        names
    }

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        assert_eq!(
            order(["vmlinuz-6.10.0", "vmlinuz-6.9.1", "vmlinuz-6.9"]),
            ["vmlinuz-6.9", "vmlinuz-6.9.1", "vmlinuz-6.10.0"]
        );
    }

    fn initrd(names: &[&str], kernel: &str) -> Option<String> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let found = initrd_of(Path::new("."), &names, Path::new(kernel))?;
        Some(found.to_str().unwrap().to_owned())
    }

    #[test]
    fn an_initrd_is_that_of_the_kernels_version_or_one_without() {
        let both = ["initrd.img-6.1.0-9", "initrd.img-6.1.0-13"];
        let found = |names: &[&str], kernel| initrd(names, kernel).unwrap_or_default();
        assert_eq!(found(&both, "vmlinuz-6.1.0-9"), "initrd.img-6.1.0-9");
        assert_eq!(found(&both, "vmlinuz"), "initrd.img-6.1.0-13");
        assert_eq!(found(&both, "vmlinuz-5.10"), "");
        let plain = ["initramfs-6.1.img", "initrd.img"];
        assert_eq!(found(&plain, "vmlinuz"), "initrd.img");
        assert_eq!(found(&plain, "vmlinuz-6.1"), "initramfs-6.1.img");
        assert_eq!(found(&plain, "vmlinuz-6.2"), "initrd.img");
    }
}
