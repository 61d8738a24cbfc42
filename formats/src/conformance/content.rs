//! What sectors hold: a sector's content follows from a small value and from where it lies, so
//! that a sector that is stale, or another's, or torn is told from the right one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(u32);

/// In a [`Value`]: all bytes are the same.
const SAME: u32 = 1 << 31;
/// In a [`Value`]: how many of the first bytes are there, the rest being zeroes; 0: all.
const KEPT_SHIFT: u32 = 20;
const KEPT: u32 = 0x1ff << KEPT_SHIFT;

impl Value {
    /// Zeroes.
    pub const ZERO: Value = Value(0);

    /// What the write with this number, from 1 to 2^20 - 1, leaves.
    pub fn version(number: u32) -> Value {
        debug_assert!((1..1 << KEPT_SHIFT).contains(&number));
        Value(number)
    }

    /// This byte all over.
    pub fn byte(byte: u8) -> Value {
        match byte {
            0 => Value::ZERO,
            _ => Value(SAME | u32::from(byte)),
        }
    }

    /// Only the first `len` bytes of it, and then zeroes.
    pub fn cut(self, len: u32) -> Value {
        match len {
            0 => Value::ZERO,
            1..512 => Value(self.0 & !KEPT | len << KEPT_SHIFT),
            _ => self,
        }
    }

    /// The bytes of a sector with this value.
    pub fn fill(self, sector: u64, to: &mut [u8]) {
        let what = self.0 & !(SAME | KEPT);
        if what == 0 {
            return to.fill(0);
        }
        match self.0 & SAME != 0 {
            true => to.fill(what as u8),
            false => {
                // Compresses well, and tells everything to who reads it.
                let words = [u64::from(what) << 8, sector << 8];
                let bytes = words.map(u64::to_be_bytes);
                for (i, pair) in to.chunks_exact_mut(16).enumerate() {
                    pair[..8].copy_from_slice(&bytes[0]);
                    pair[8..].copy_from_slice(&bytes[1]);
                    (pair[7], pair[15]) = (2 * i as u8, 2 * i as u8 + 1);
                }
            }
        }
        match (self.0 & KEPT) >> KEPT_SHIFT {
            0 => {}
            kept => to[kept as usize..].fill(0),
        }
    }

    /// What a sector seems to hold, in words.
    pub fn describe(bytes: &[u8]) -> String {
        if bytes.iter().all(|byte| *byte == bytes[0]) {
            return format!("bytes {:#04x}", bytes[0]);
        }
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap_or([0; 8]));
        let (version, sector) = (word(0) >> 8, word(8) >> 8);
        let mut whole = vec![0; bytes.len()];
        if (1..1 << KEPT_SHIFT).contains(&version) {
            Value(version as u32).fill(sector, &mut whole);
        }
        match whole == bytes {
            true => format!("version {version} of sector {sector}"),
            false => format!(
                "torn or foreign bytes ({:02x?}… {:02x?})",
                &bytes[..16],
                &bytes[bytes.len() - 8..]
            ),
        }
    }
}

/// The content of a whole image: its size in bytes and the sectors that were ever written.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Bytes.
    pub size: u64,
    /// Sectors that hold something; all others are transparent, or zeroes in the end.
    pub sectors: BTreeMap<u64, Value>,
}

impl Content {
    /// Nothing but zeroes.
    pub fn empty(size: u64) -> Content {
        Content {
            size,
            sectors: BTreeMap::new(),
        }
    }

    /// Sets a range of sectors.
    pub fn set(&mut self, sectors: Range<u64>, value: Value) {
        for sector in sectors {
            self.sectors.insert(sector, value);
        }
    }

    /// What is to be seen of it with `backing` below.
    pub fn over(mut self, backing: &Content) -> Content {
        let end = self.size.div_ceil(SECTOR);
        for (sector, value) in backing.sectors.range(..end) {
            self.sectors.entry(*sector).or_insert(*value);
        }
        self
    }

    /// The value of a sector.
    pub fn value(&self, sector: u64) -> Value {
        self.sectors.get(&sector).copied().unwrap_or(Value::ZERO)
    }

    /// Cuts off, or appends zeroes.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        let _ = self.sectors.split_off(&size.div_ceil(SECTOR));
        let tail = (size % SECTOR) as u32;
        if tail > 0
            && let Some(last) = self.sectors.get_mut(&(size / SECTOR))
        {
            *last = last.cut(tail);
        }
    }

    /// Writes it as a raw image with holes.
    pub fn write_raw(&self, path: &Path) -> io::Result<()> {
        self.write_window(path, 0..self.size)
    }

    /// Writes the part of it that lies in `window` as a raw image.
    pub fn write_window(&self, path: &Path, window: Range<u64>) -> io::Result<()> {
        let file = File::create(path)?;
        let (first, last) = (window.start / SECTOR, window.end.div_ceil(SECTOR));
        let mut run: Vec<u8> = Vec::new();
        let mut start = first;
        for (sector, value) in self.sectors.range(first..last) {
            let end = start + run.len() as u64 / SECTOR;
            if end != *sector || run.len() > 1 << 20 {
                file.write_all_at(&run, (start - first) * SECTOR)?;
                run.clear();
                start = *sector;
            }
            let at = run.len();
            run.resize(at + SECTOR as usize, 0);
            value.fill(*sector, &mut run[at..]);
        }
        file.write_all_at(&run, (start - first) * SECTOR)?;
        file.set_len(window.end - window.start)
    }

    /// Compares a raw image with what lies in `window`.
    pub fn compare_raw(&self, path: &Path, window: Range<u64>) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let file = File::open(path).map_err(failed)?;
        let (mut at, mut want) = (window.start, [0; SECTOR as usize]);
        let mut bytes = vec![0; 1 << 20];
        while at < window.end {
            let len = (window.end - at).min(1 << 20) as usize;
            file.read_exact_at(&mut bytes[..len], at - window.start)
                .map_err(failed)?;
            for found in bytes[..len].chunks(SECTOR as usize) {
                let sector = at / SECTOR;
                self.value(sector).fill(sector, &mut want);
                if *found != want[..found.len()] {
                    return Err(format!(
                        "{}: sector {sector} holds {}, expected {}",
                        path.display(),
                        Value::describe(found),
                        Value::describe(&want)
                    ));
                }
                at += found.len() as u64;
            }
        }
        Ok(())
    }
}
