//! The kernel command line that launcher generates.

use crate::config::{ConsoleMode, Vm};

/// The command line: the console if there is one, the root disk if one is marked, then the
/// user's own, which wins because the kernel takes the last of two settings.
///
/// `root_partition`: what the disk that is booted from has its root file system in.
pub(crate) fn generate(vm: &Vm, root_partition: Option<u32>) -> String {
    let mut words = Vec::new();
    if vm.console.mode != ConsoleMode::Off {
        words.push("console=ttyS0".to_owned());
    }
    if let Some((index, root)) = vm.block.iter().enumerate().find(|(_, block)| block.root) {
        let access = if root.ro { "ro" } else { "rw" };
        let partition = root_partition.filter(|_| vm.boot_disk() == Some(index));
        let partition = partition.map(|number| number.to_string());
        let partition = partition.unwrap_or_default();
        let disk = disk_name(index);
        words.push(format!("root=/dev/{disk}{partition} {access}"));
    }
    if !vm.boot.cmdline.is_empty() {
        words.push(vm.boot.cmdline.clone());
    }
    words.join(" ")
}

/// Name that Linux gives to virtio disk `index`: vda to vdz, then vdaa, as
/// `virtblk_name_format` in drivers/block/virtio_blk.c counts.
pub(crate) fn disk_name(index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = index;
    loop {
        letters.push(char::from(b'a' + (rest % 26) as u8));
        match (rest / 26).checked_sub(1) {
            Some(next) => rest = next,
            None => break,
        }
    }
    letters.push('d');
    letters.push('v');
    letters.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_as_linux_counts_them() {
        let names = [0, 25, 26, 29, 51, 52, 701, 702].map(disk_name);
        assert_eq!(
            names,
            [
                "vda", "vdz", "vdaa", "vdad", "vdaz", "vdba", "vdzz", "vdaaa"
            ]
        );
    }

    #[test]
    fn the_partition_is_that_of_the_disk_that_is_booted_from() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        let line = |from: &str, partition| {
            let disks = "[[block]]\npath = 'a.img'\n[[block]]\npath = 'b.img'\nroot = true\n";
            std::fs::write(&file, format!("boot.from_block = {from}\n{disks}")).unwrap();
            generate(
                &crate::config::load(&file, &Default::default()).unwrap(),
                partition,
            )
        };
        assert_eq!(line("1", Some(3)), "console=ttyS0 root=/dev/vdb3 rw");
        assert_eq!(line("1", None), "console=ttyS0 root=/dev/vdb rw");
        assert_eq!(line("0", Some(3)), "console=ttyS0 root=/dev/vdb rw");
    }
}
