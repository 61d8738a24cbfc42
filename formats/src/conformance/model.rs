//! The flat model of a disk on which operations are in flight: for each sector the values that
//! it may have.

use std::collections::BTreeMap;
use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::content::{Content, SECTOR, Value};

/// A value that a sector may have, and when the operation that gave it that value was over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    /// The value.
    pub(super) value: Value,
    /// `u64::MAX` as long as the operation is in flight.
    pub(super) ended: u64,
}

/// All values that a sector may have: at least one.
pub(super) type Cell = SmallVec<[Candidate; 2]>;

const CHUNK: u64 = 64;

/// What a disk holds, as far as that is decided.
pub(super) struct Model {
    size: u64,
    /// Sectors that are not there hold zeroes.
    chunks: BTreeMap<u64, Vec<Cell>>,
    versions: u32,
}

fn settled(value: Value) -> Cell {
    smallvec![Candidate { value, ended: 0 }]
}

impl Model {
    /// A disk that holds `content`. Versions of new values begin after `versions`.
    pub(super) fn new(content: &Content, versions: u32) -> Model {
        let mut model = Model {
            size: content.size,
            chunks: BTreeMap::new(),
            versions,
        };
        for (sector, value) in &content.sectors {
            *model.cell(*sector) = settled(*value);
        }
        model
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The number of the last value that was new.
    pub(super) fn versions(&self) -> u32 {
        self.versions
    }

    /// A value that no sector ever had.
    pub(super) fn fresh(&mut self) -> Value {
        self.versions += 1;
        Value::version(self.versions)
    }

    fn cell(&mut self, sector: u64) -> &mut Cell {
        let chunk = self
            .chunks
            .entry(sector / CHUNK)
            .or_insert_with(|| vec![settled(Value::ZERO); CHUNK as usize]);
        &mut chunk[(sector % CHUNK) as usize]
    }

    /// The values that a sector may have now.
    pub(super) fn allowed(&self, sector: u64) -> Cell {
        match self.chunks.get(&(sector / CHUNK)) {
            Some(chunk) => chunk[(sector % CHUNK) as usize].clone(),
            None => settled(Value::ZERO),
        }
    }

    /// An operation begins that gives the sectors this value.
    pub(super) fn begin(&mut self, sectors: Range<u64>, value: Value) {
        for sector in sectors {
            self.cell(sector).push(Candidate {
                value,
                ended: u64::MAX,
            });
        }
    }

    /// That operation, begun at `began`, is over. If it `decides`, unlike a discard, what the
    /// sectors were before it began is history.
    pub(super) fn end(
        &mut self,
        sectors: Range<u64>,
        value: Value,
        began: u64,
        now: u64,
        decides: bool,
    ) {
        for sector in sectors {
            let cell = self.cell(sector);
            let mut mine = None;
            let open = |it: &Candidate| it.value == value && it.ended == u64::MAX;
            if let Some(at) = cell.iter().position(open) {
                mine = Some(cell.remove(at));
            }
            cell.retain(|other| other.value != value || other.ended == u64::MAX);
            if decides {
                cell.retain(|other| other.ended > began);
            }
            if mine.is_some() || cell.is_empty() {
                cell.push(Candidate { value, ended: now });
            }
        }
    }

    /// A sector turned out to have this value, while nothing changed it.
    pub(super) fn settle(&mut self, sector: u64, value: Value) {
        let cell = self.cell(sector);
        if cell.len() > 1 {
            let ended = cell.iter().map(|it| it.ended).max().unwrap_or(0);
            *cell = smallvec![Candidate { value, ended }];
        }
    }

    /// The disk is smaller, or it is larger and the rest zeroes.
    pub(super) fn resize(&mut self, size: u64) {
        self.size = size;
        let end = size / SECTOR;
        let _ = self.chunks.split_off(&end.div_ceil(CHUNK));
        if let Some(last) = self.chunks.get_mut(&(end / CHUNK)) {
            for cell in &mut last[(end % CHUNK) as usize..] {
                *cell = settled(Value::ZERO);
            }
        }
    }

    /// The content, every sector of which was read since it was last changed.
    pub(super) fn content(&self) -> Result<Content, String> {
        let mut content = Content::empty(self.size);
        for (number, chunk) in &self.chunks {
            for (i, cell) in chunk.iter().enumerate() {
                let sector = number * CHUNK + i as u64;
                match cell[..] {
                    [Candidate { value, .. }] if value == Value::ZERO => {}
                    [Candidate { value, .. }] => content.set(sector..sector + 1, value),
                    _ => return Err(format!("sector {sector} is not decided: {cell:?}")),
                }
            }
        }
        Ok(content)
    }
}
