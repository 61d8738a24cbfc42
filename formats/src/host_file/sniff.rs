//! What an image's first bytes look like: only ever to contradict the configuration, never to
//! choose a format, for the bytes of a raw image are the guest's.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;

use super::HostFile;
use crate::{Buffer, Segments};

/// Where the magic of a format stands: name, offset, bytes.
const MAGICS: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vhdx", 0, b"vhdxfile"),
    ("vhd", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
];

/// How much of an image the magics are looked for in: a multiple of what O_DIRECT demands.
const HEAD: usize = 4096;

impl HostFile {
    /// The name of the format whose magic the file begins with, if it is a known one.
    pub async fn sniff(&self) -> io::Result<Option<&'static str>> {
        let whole = self.size().min(HEAD as u64) as usize;
        let len = whole - whole % self.alignment() as usize;
        let head = Segments::from_buffer(Buffer::zeroed(len, HEAD)?);
        self.read(0, head.clone()).await?;
        let mut bytes = [0; HEAD];
        head.copy_to(&mut bytes);
        Ok(known(&bytes[..len]))
    }
}

/// The name of the format whose magic a file begins with, if it is a known one. The file must
/// not be open with O_DIRECT.
pub fn sniff(file: impl AsFd) -> io::Result<Option<&'static str>> {
    let mut head = [0; HEAD];
    let mut len = 0;
    while len < HEAD {
        match rustix::io::pread(&file, &mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(known(&head[..len]))
}

/// The format whose magic stands in an image's first bytes.
fn known(head: &[u8]) -> Option<&'static str> {
    let found = MAGICS.iter().find(|(_, offset, magic)| {
        let rest = head.get(*offset..).unwrap_or_default();
        rest.starts_with(magic)
    });
    found.map(|(name, ..)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_magic_is_known_where_it_belongs_and_only_there() {
        for (name, offset, magic) in MAGICS {
            let mut head = vec![0; 512];
            head[*offset..][..magic.len()].copy_from_slice(magic);
            assert_eq!(known(&head), Some(*name));
            assert_eq!(known(&head[..offset + magic.len() - 1]), None);
            head.insert(0, 0);
            assert_eq!(known(&head), None);
        }
        assert_eq!(known(&[]), None);
    }
}
