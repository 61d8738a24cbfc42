//! What a disk may hold after a power cut: what was durable, or anything that came after it.

use super::content::{Content, SECTOR, Value};
use super::traffic::{Act, What};

/// A value that something got at some time.
#[derive(Clone, Copy, Debug)]
struct Set<T> {
    value: T,
    began: u64,
    ended: u64,
    /// Whether nothing older is left when it is durable.
    decides: bool,
}

/// All that was done to a disk.
pub struct History {
    size: u64,
    /// What each sector held at first, and what it got. Past the end there are zeroes.
    sectors: Vec<(Value, Vec<Set<Value>>)>,
    sizes: Vec<Set<u64>>,
    /// Flushes: when they began and were over.
    flushes: Vec<(u64, u64)>,
    flushed: Vec<u64>,
}

impl History {
    /// A disk that held `content` durably before `acts`.
    pub(super) fn new(content: &Content, acts: Vec<Act>) -> History {
        let mut history = History {
            size: content.size,
            sectors: Vec::new(),
            sizes: Vec::new(),
            flushes: Vec::new(),
            flushed: Vec::new(),
        };
        for (sector, value) in &content.sectors {
            history.sector(*sector).0 = *value;
        }
        for Act { what, began, ended } in acts {
            let (sectors, value, decides) = match what {
                What::Change {
                    sectors,
                    value,
                    decides,
                } => (sectors, value, decides),
                What::Flush => {
                    if ended != u64::MAX {
                        history.flushes.push((began, ended));
                        history.flushed.push(ended);
                    }
                    continue;
                }
                What::Resize { from, to } => {
                    history.sizes.push(Set {
                        value: to,
                        began,
                        ended,
                        decides: true,
                    });
                    // Cut off, and zeroes when it is there again.
                    (to / SECTOR..from / SECTOR, Value::ZERO, true)
                }
            };
            for sector in sectors {
                history.sector(sector).1.push(Set {
                    value,
                    began,
                    ended,
                    decides,
                });
            }
        }
        history
    }

    fn sector(&mut self, sector: u64) -> &mut (Value, Vec<Set<Value>>) {
        let at = sector as usize;
        if at >= self.sectors.len() {
            self.sectors.resize(at + 1, (Value::ZERO, Vec::new()));
        }
        &mut self.sectors[at]
    }

    /// When each flush was over.
    pub(super) fn flushed(&self) -> &[u64] {
        &self.flushed
    }

    /// What the last flush that was over before `time` made durable was over before this.
    fn horizon(&self, time: u64) -> u64 {
        let over = self.flushes.iter().filter(|flush| flush.1 < time);
        over.map(|flush| flush.0).max().unwrap_or(0)
    }

    /// Whether a disk that was cut off at `time` may have this size.
    pub fn allows_size(&self, time: u64, size: u64) -> bool {
        allowed(self.size, &self.sizes, time, self.horizon(time)).any(|value| value == size)
    }

    /// Compares what is found at a sector, and on, after a power cut at `time`.
    pub fn check(&self, time: u64, first: u64, found: &[u8]) -> Result<(), String> {
        let horizon = self.horizon(time);
        let never = (Value::ZERO, Vec::new());
        let mut want = [0; SECTOR as usize];
        for (sector, bytes) in (first..).zip(found.chunks(SECTOR as usize)) {
            let (old, changes) = self.sectors.get(sector as usize).unwrap_or(&never);
            let old = *old;
            let right = |value: Value| {
                value.fill(sector, &mut want);
                want == *bytes
            };
            if !allowed(old, changes, time, horizon).any(right) {
                let values: Vec<_> = allowed(old, changes, time, horizon).collect();
                return Err(format!(
                    "sector {sector} holds {}, expected one of {values:?}; durable is what was \
                     over at {horizon} of {changes:?}",
                    Value::describe(bytes)
                ));
            }
        }
        Ok(())
    }
}

/// The values that may be there: `old`, and those of `changes` that began before `time`, but not
/// what a durable change came after.
fn allowed<T: Copy>(
    old: T,
    changes: &[Set<T>],
    time: u64,
    horizon: u64,
) -> impl Iterator<Item = T> + '_ {
    let durable = move |it: &&Set<T>| it.decides && it.ended < horizon;
    let last = changes.iter().filter(durable).map(|it| it.began).max();
    let old = last.is_none().then_some(old);
    let since = changes
        .iter()
        .filter(move |it| it.began < time && last.is_none_or(|last| it.ended >= last));
    old.into_iter().chain(since.map(|it| it.value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(number: u32, began: u64, ended: u64, decides: bool) -> Act {
        let value = match number {
            0 => Value::ZERO,
            number => Value::version(number),
        };
        Act {
            what: What::Change {
                sectors: 4..5,
                value,
                decides,
            },
            began,
            ended,
        }
    }

    fn flush(began: u64, ended: u64) -> Act {
        Act {
            what: What::Flush,
            began,
            ended,
        }
    }

    /// The versions, of 0 to 4, that sector 4 may have at a time.
    fn versions(history: &History, time: u64) -> Vec<u32> {
        let mut bytes = [0; SECTOR as usize];
        let is_allowed = |number: &u32| {
            match number {
                0 => Value::ZERO.fill(4, &mut bytes),
                number => Value::version(*number).fill(4, &mut bytes),
            }
            history.check(time, 4, &bytes).is_ok()
        };
        (0..5).filter(is_allowed).collect()
    }

    fn history(acts: Vec<Act>) -> History {
        let mut content = Content::empty(8 * SECTOR);
        content.set(4..5, Value::version(1));
        History::new(&content, acts)
    }

    #[test]
    fn what_was_over_when_a_flush_began_is_there_once_the_flush_is_over() {
        let history = history(vec![change(2, 10, 20, true), flush(30, 40)]);
        assert_eq!(versions(&history, 10), [1]);
        assert_eq!(versions(&history, 11), [1, 2]);
        assert_eq!(versions(&history, 40), [1, 2]);
        assert_eq!(versions(&history, 41), [2]);
    }

    #[test]
    fn what_was_in_flight_when_a_flush_began_may_be_there_or_not() {
        let acts = vec![
            change(2, 10, 20, true),
            change(3, 25, 35, true),
            flush(30, 40),
        ];
        assert_eq!(versions(&history(acts), 50), [2, 3]);
    }

    #[test]
    fn of_durable_changes_that_overlapped_either_may_have_been_the_last() {
        let acts = vec![
            change(2, 10, 20, true),
            change(3, 15, 25, true),
            flush(30, 40),
        ];
        assert_eq!(versions(&history(acts), 50), [2, 3]);
    }

    #[test]
    fn a_discard_may_have_left_what_was_there_but_nothing_older() {
        let acts = vec![
            change(2, 10, 20, true),
            change(0, 22, 24, false),
            flush(30, 40),
        ];
        assert_eq!(versions(&history(acts), 50), [0, 2]);
    }

    #[test]
    fn a_size_is_the_last_durable_one_or_a_later_one_and_what_was_cut_off_is_zero() {
        let resize = |from: u64, to: u64, began, ended| Act {
            what: What::Resize {
                from: from * SECTOR,
                to: to * SECTOR,
            },
            began,
            ended,
        };
        let acts = vec![resize(8, 4, 10, 20), flush(30, 40), resize(4, 16, 50, 60)];
        let history = history(acts);
        let sizes = |time| {
            let allows = |size: &u64| history.allows_size(time, size * SECTOR);
            [4, 8, 16].into_iter().filter(allows).collect::<Vec<u64>>()
        };
        assert_eq!(sizes(25), [4, 8]);
        assert_eq!(sizes(45), [4]);
        assert_eq!(sizes(65), [4, 16]);
        assert_eq!(versions(&history, 25), [0, 1]);
        assert_eq!(versions(&history, 65), [0]);
    }
}
