//! Which ranges of the disk have data, told without reading it.

use std::io;

use super::Qcow2;
use super::entry::OFFSET_MASK;
use super::map::{self, Place};
use crate::Extent;

impl Qcow2 {
    /// What lies at `offset`, through the whole chain of backing files.
    pub(super) async fn content(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let found = match self.without_tables(offset).min(len) {
            // Not cluster by cluster through what no table describes, either.
            0 => {
                self.extent_of(offset, len.min(self.left_in_table(offset)))
                    .await?
            }
            len => map::Extent {
                place: Place::Backing,
                len,
            },
        };
        let len = found.len;
        match found.place {
            // A cluster that is allocated in advance may be a hole of the file.
            Place::Data { host, .. } => self.data_file().extent(host, len),
            Place::Zero => Ok(Extent { data: false, len }),
            Place::Compressed { .. } => Ok(Extent { data: true, len }),
            Place::Backing => {
                let backing = self.backing.as_ref();
                let there = backing.map_or(0, |it| it.size().saturating_sub(offset));
                match backing {
                    Some(backing) if there > 0 => backing.extent(offset, len.min(there)).await,
                    _ => Ok(Extent { data: false, len }),
                }
            }
        }
    }

    /// log2 of the bytes that an L2 table describes.
    fn table_bits(&self) -> u32 {
        self.geometry.l2_bits() + self.geometry.cluster_bits
    }

    /// How many bytes from `offset` on the same L2 table describes.
    fn left_in_table(&self, offset: u64) -> u64 {
        let bits = self.table_bits();
        (((offset >> bits) + 1) << bits) - offset
    }

    /// How many bytes from `offset` on are described by no L2 table: a disk may have many
    /// tebibytes of these.
    fn without_tables(&self, offset: u64) -> u64 {
        let bits = self.table_bits();
        let l1 = self.l1.borrow();
        let first = offset >> bits;
        let end = ((self.size.get() >> bits) + 1).min(first + 1024);
        let empty = (first..end).take_while(|index| l1.at(*index) & OFFSET_MASK == 0);
        let tables = empty.count() as u64;
        match tables {
            0 => 0,
            _ => ((first + tables) << bits) - offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use crate::testing::directory;
    use crate::{Engine, Image, Ring};

    fn tool(name: &str, arguments: &[&str], directory: &Path) {
        let status = Command::new(name)
            .args(arguments)
            .current_dir(directory)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{name} {arguments:?}");
    }

    /// The extents of a disk, in units of 64 KiB, as d3 z1 …
    fn extents(path: &Path, backing: &[&Path]) -> String {
        let image = Image {
            ro: true,
            backing: backing.iter().map(|path| (*path).into()).collect(),
            ..Image::new(path)
        };
        let format = crate::find("qcow2").unwrap();
        let ring = Ring::new(Engine::Auto).unwrap();
        let mut found: Vec<(bool, u64)> = Vec::new();
        ring.block_on(
            async {
                let disk = (format.open)(&ring, &image).await.unwrap();
                let mut at = 0;
                while at < disk.size() {
                    let extent = disk.extent(at, disk.size() - at).await.unwrap();
                    assert!((1..=disk.size() - at).contains(&extent.len));
                    match found.last_mut() {
                        Some(last) if last.0 == extent.data => last.1 += extent.len,
                        _ => found.push((extent.data, extent.len)),
                    }
                    at += extent.len;
                }
            },
            || {},
        );
        let words = found.iter().map(|(data, len)| {
            assert!(len.is_multiple_of(65536));
            format!("{}{}", if *data { 'd' } else { 'z' }, len >> 16)
        });
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn extents_are_those_of_the_whole_chain() {
        let directory = directory();
        let at = |name: &str| directory.path().join(name);
        let run = |name, arguments: &[&str]| tool(name, arguments, directory.path());
        run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"]);
        run("qemu-io", &["-f", "raw", "-c", "write 0 256k", "base.raw"]);
        let top = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "top.qcow2",
            "2M",
        ];
        run("qemu-img", &top);
        run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -z 64k 64k",
                "-c",
                "write 1M 128k",
                "top.qcow2",
            ],
        );
        let found = extents(&at("top.qcow2"), &[&at("base.raw")]);
        assert_eq!(found, "d1 z1 d2 z12 d2 z14");
    }

    #[test]
    fn what_is_allocated_in_advance_and_never_written_is_known_to_be_zeroes() {
        let directory = directory();
        let run = |name, arguments: &[&str]| tool(name, arguments, directory.path());
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
            "a.qcow2",
            "1M",
        ];
        run("qemu-img", &create);
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", "write 128k 64k", "a.qcow2"],
        );
        let found = extents(&directory.path().join("a.qcow2"), &[]);
        // Where the file ends, QEMU has written a block.
        assert!(found.starts_with("z2 d1 z"), "{found}");
    }
}
