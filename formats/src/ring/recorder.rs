//! A witness of what a ring does to files, for tests: it notes every operation with its bytes,
//! its beginning and its end, and may hold operations back so that they begin and end in any
//! order.
//!
//! It stands at the one place that all operations pass, so nothing that is written goes past it.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::op::{Kind, Request};
use super::operation::Operation;
use crate::random::Random;

/// A file, whatever its name: its device and its inode.
pub type FileId = (u64, u64);

/// What an operation does to what a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// These bytes are written at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What is written.
        bytes: Vec<u8>,
    },
    /// A range becomes zeroes, by whatever way.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Whether the file grows if it ends before the range does.
        grows: bool,
    },
    /// The file gets this size.
    Resize(u64),
    /// What completed before is durable.
    Sync,
    /// Nothing that can be seen.
    None,
}

/// One operation. Times are those of [`Recorder::now`].
#[derive(Clone, Debug)]
pub struct Step {
    /// Of which file.
    pub file: FileId,
    /// What it does.
    pub effect: Effect,
    /// When it was given to the kernel.
    pub began: u64,
    /// When its success was told; never if it failed or nobody waited for it.
    pub ended: Option<u64>,
}

/// The witness. Clones share what it noted.
#[derive(Clone)]
pub struct Recorder(Rc<RefCell<Notes>>);

struct Notes {
    clock: u64,
    keeps: bool,
    steps: Vec<Step>,
    delays: Option<Random>,
    /// One of so many operations is held back for long; 0: none.
    long: u64,
    /// Operations that have begun and are not over.
    flying: u32,
}

impl Recorder {
    /// Notes every step if `keeps`; with `delays`, a seed, operations are held back at random.
    pub fn new(keeps: bool, delays: Option<u64>) -> Recorder {
        Recorder(Rc::new(RefCell::new(Notes {
            clock: 0,
            keeps,
            steps: Vec::new(),
            delays: delays.map(Random::new),
            long: [0, 80, 15][delays.unwrap_or(0) as usize % 3],
            flying: 0,
        })))
    }

    /// A time later than all before it.
    pub fn now(&self) -> u64 {
        let mut notes = self.0.borrow_mut();
        notes.clock += 1;
        notes.clock
    }

    /// All that was noted so far, in the order in which it began.
    pub fn take(&self) -> Vec<Step> {
        std::mem::take(&mut self.0.borrow_mut().steps)
    }

    /// How long something is held back.
    fn hold(&self) -> Hold {
        let mut notes = self.0.borrow_mut();
        let (clock, long) = (notes.clock, notes.long);
        let Some(random) = &mut notes.delays else {
            return Hold::default();
        };
        if long > 0 && random.below(long) == 0 {
            // Long enough for others to be flushed, freed and written elsewhere meanwhile.
            return Hold {
                turns: Cell::new(100),
                until: clock + random.of(&[20, 60, 200]),
            };
        }
        let most = random.of(&[1, 1, 1, 2, 4, 8, 8, 30]);
        Hold {
            turns: Cell::new(random.below(most) as u32),
            until: u64::MAX,
        }
    }

    /// Lets a turn pass, if something is to be held back any more.
    fn holds(&self, hold: &Hold) -> bool {
        let notes = self.0.borrow();
        if hold.turns.get() == 0 || notes.clock >= hold.until {
            return false;
        }
        // Who waits for others does so as long as there are any.
        if hold.until == u64::MAX || notes.flying == 0 {
            hold.turns.set(hold.turns.get() - 1);
        }
        true
    }

    fn begin(&self, request: &Request) -> Option<usize> {
        let began = self.now();
        self.0.borrow_mut().flying += 1;
        let mut notes = self.0.borrow_mut();
        if !notes.keeps || matches!(request.kind, Kind::Read) {
            return None;
        }
        let effect = match request.kind {
            Kind::Write => {
                let segments = request.segments.as_ref()?;
                let mut bytes = vec![0; segments.len()];
                segments.copy_to(&mut bytes);
                let offset = request.offset;
                Effect::Write { offset, bytes }
            }
            Kind::Fallocate { mode, len } => zeroed(mode, request.offset, len),
            Kind::Sync => Effect::Sync,
            // What it was to do is seen when it is over.
            _ => Effect::None,
        };
        let stat = rustix::fs::fstat(&request.file).ok()?;
        notes.steps.push(Step {
            file: (stat.st_dev, stat.st_ino),
            effect,
            began,
            ended: None,
        });
        Some(notes.steps.len() - 1)
    }

    fn end(&self, step: usize, resized: Option<u64>, result: &io::Result<usize>) {
        let now = self.now();
        let mut notes = self.0.borrow_mut();
        let Some(step) = notes.steps.get_mut(step) else {
            return;
        };
        match (result, &step.effect) {
            (Ok(_), _) => step.ended = Some(now),
            // The kernel refuses such a call before it does anything.
            (Err(_), Effect::Zero { .. }) => step.effect = Effect::None,
            (Err(_), _) => {}
        }
        if let (Ok(_), Some(size)) = (result, resized) {
            step.effect = Effect::Resize(size);
        }
    }
}

fn zeroed(mode: i32, offset: u64, len: u64) -> Effect {
    let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0;
    match mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) {
        0 if grows => Effect::Zero {
            offset: offset + len,
            len: 0,
            grows,
        },
        0 => Effect::None,
        _ => Effect::Zero { offset, len, grows },
    }
}

/// How long an operation is held back: so many turns of the executor, at most until that time; where
/// there is one, only turns in which nothing is in flight count.
#[derive(Debug, Default)]
pub(super) struct Hold {
    turns: Cell<u32>,
    until: u64,
}

/// How far a witnessed operation is.
#[derive(Default)]
pub(super) enum Watch {
    #[default]
    New,
    /// Nobody witnesses it.
    Alone,
    Held(Hold),
    Flying(Flight),
    /// Over, but this is not told for some more turns.
    Over(Flight, Option<io::Result<usize>>, Hold),
}

/// A witnessed operation in flight: the step that was noted, and the file if it may be resized.
#[derive(Default)]
pub(super) struct Flight(Option<usize>, Option<super::File>);

/// Polls an operation before the eyes of the ring's recorder, if it has one.
pub(super) fn poll(operation: &mut Operation, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let recorder = operation.ring.0.recorder.borrow().clone();
    loop {
        let Some(recorder) = &recorder else {
            return operation.advance(cx);
        };
        match &mut operation.watch {
            Watch::Alone => return operation.advance(cx),
            Watch::New => {
                let waits = operation.with_request(Request::is_wait);
                operation.watch = match waits {
                    Some(false) => Watch::Held(recorder.hold()),
                    _ => Watch::Alone,
                };
            }
            Watch::Held(hold) | Watch::Over(_, _, hold) if recorder.holds(hold) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Watch::Held(_) => {
                let flight = operation.with_request(|request| {
                    let file = matches!(request.kind, Kind::Call(_)).then(|| request.file.clone());
                    Flight(recorder.begin(request), file)
                });
                operation.watch = Watch::Flying(flight.unwrap_or_default());
            }
            Watch::Flying(flight) => {
                let flight = std::mem::take(flight);
                match operation.advance(cx) {
                    Poll::Pending => {
                        operation.watch = Watch::Flying(flight);
                        return Poll::Pending;
                    }
                    Poll::Ready(result) => {
                        let mut notes = recorder.0.borrow_mut();
                        notes.flying = notes.flying.saturating_sub(1);
                        drop(notes);
                        operation.watch = Watch::Over(flight, Some(result), recorder.hold());
                    }
                }
            }
            Watch::Over(Flight(step, file), result, _) => {
                let Some(result) = result.take() else {
                    return operation.advance(cx);
                };
                if let Some(step) = *step {
                    recorder.end(step, file.as_ref().and_then(size), &result);
                }
                return Poll::Ready(result);
            }
        }
    }
}

/// The size of a regular file.
fn size(file: impl AsFd) -> Option<u64> {
    let stat = rustix::fs::fstat(file).ok()?;
    let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
    u64::try_from(stat.st_size).ok().filter(|_| regular)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{engines, run, segments};
    use crate::{File, Ring};

    #[test]
    fn what_is_done_to_a_file_is_noted_in_its_order() {
        for engine in engines() {
            let ring = Ring::new(engine).unwrap();
            let recorder = Recorder::new(true, Some(1));
            ring.record(&recorder);
            let file = File::from(tempfile::tempfile().unwrap());
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            run(&ring, async {
                let bytes = segments(&[7; 1000]);
                ring.write_all_at(&file, 100, bytes.clone()).await.unwrap();
                ring.read_exact_at(&file, 100, bytes).await.unwrap();
                ring.fallocate(&file, punch, 512, 512).await.unwrap();
                ring.fdatasync(&file).await.unwrap();
                let cut = |file: std::os::fd::BorrowedFd<'_>| Ok(rustix::fs::ftruncate(file, 9)?);
                ring.call(&file, cut).await.unwrap();
            });
            let steps = recorder.take();
            let effects: Vec<_> = steps.iter().map(|step| step.effect.clone()).collect();
            let bytes = vec![7; 1000];
            let (offset, len, grows) = (512, 512, false);
            let wanted = [
                Effect::Write { offset: 100, bytes },
                Effect::Zero { offset, len, grows },
                Effect::Sync,
                Effect::Resize(9),
            ];
            assert_eq!(effects, wanted);
            let mut last = 0;
            for step in steps {
                assert!(step.began > last);
                last = step.ended.unwrap();
                assert!(last > step.began);
            }
            assert!(recorder.take().is_empty());
        }
    }

    #[test]
    fn what_fails_never_ends() {
        let ring = Ring::new(crate::Engine::Auto).unwrap();
        let recorder = Recorder::new(true, None);
        ring.record(&recorder);
        ring.inject(|_| Some(crate::Fault::Errno(libc::EIO)));
        let file = File::from(tempfile::tempfile().unwrap());
        run(&ring, async {
            ring.write_all_at(&file, 0, segments(&[1]))
                .await
                .unwrap_err();
            ring.fallocate(&file, 0, 0, 512).await.unwrap_err();
        });
        let steps = recorder.take();
        let bytes = vec![1];
        assert_eq!(steps[0].effect, Effect::Write { offset: 0, bytes });
        assert_eq!(steps[1].effect, Effect::None);
        assert!(steps.iter().all(|step| step.ended.is_none()));
    }

    #[test]
    fn delays_change_the_order_in_which_operations_end() {
        let ring = Ring::new(crate::Engine::Auto).unwrap();
        ring.record(&Recorder::new(false, Some(3)));
        let file = File::from(tempfile::tempfile().unwrap());
        let ended = Rc::new(RefCell::new(Vec::new()));
        run(&ring, async {
            for number in 0..32 {
                let (ring, file, ended) = (ring.clone(), file.clone(), Rc::clone(&ended));
                ring.clone().spawn(async move {
                    let bytes = segments(&[1; 512]);
                    ring.write_all_at(&file, number * 512, bytes).await.unwrap();
                    ended.borrow_mut().push(number);
                });
            }
            while ended.borrow().len() < 32 {
                ring.yield_now().await;
            }
        });
        assert!(!ended.borrow().is_sorted());
    }
}
