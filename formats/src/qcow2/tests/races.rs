//! Many requests at once with hardly any memory and the smallest clusters, so that all that can
//! wait does; the power fails whenever the host is asked to make something durable.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;

use super::*;
use crate::qcow2::testing::{qemu_check, qemu_create, qemu_io};
use crate::testing::Random;
use crate::{Engine, What};

const UNIT: u64 = 512;
const SIZE: u64 = 6 * MIB;
const TASKS: u64 = 8;
/// Power cuts that are looked at, of all those of a storm.
const CUTS: u64 = 40;
/// Units that a request of a task has at most.
const MOST: u64 = 64;

/// What the units of the disk may hold, were the power to fail now: the oldest value first.
#[derive(Clone)]
struct Model(Vec<VecDeque<(u64, u8)>>);

struct State {
    model: Model,
    busy: Vec<bool>,
    next: u64,
}

impl State {
    fn begin(&mut self, units: std::ops::Range<u64>, value: u8) {
        for unit in units {
            self.model.0[unit as usize].push_back((self.next, value));
            self.busy[unit as usize] = true;
        }
        self.next += 1;
    }

    fn end(&mut self, units: std::ops::Range<u64>) {
        units.for_each(|unit| self.busy[unit as usize] = false);
    }

    /// The latest changes that a flush which begins now makes durable.
    fn completed(&self) -> Vec<Option<u64>> {
        let last = |(values, busy): (&VecDeque<(u64, u8)>, &bool)| match busy {
            true => None,
            false => values.back().map(|(number, _)| *number),
        };
        self.model.0.iter().zip(&self.busy).map(last).collect()
    }

    fn durable(&mut self, completed: &[Option<u64>]) {
        for (values, number) in self.model.0.iter_mut().zip(completed) {
            if let Some(number) = number {
                values.retain(|(at, _)| at >= number);
            }
        }
    }
}

/// A file as the power may have left it.
struct Cut {
    path: PathBuf,
    model: Model,
}

/// The file where some of the sectors that were written since `base` are lost.
fn torn(random: &mut Random, base: &[u8], now: &[u8]) -> Vec<u8> {
    let kept = random.of(&[0, 1, 5, 9, 10]);
    let mut bytes = now.to_vec();
    for (at, sector) in bytes.chunks_mut(512).enumerate() {
        let old = base.get(at * 512..).unwrap_or_default();
        let old = &old[..old.len().min(sector.len())];
        if random.below(10) >= kept {
            sector.fill(0);
            sector[..old.len()].copy_from_slice(old);
        }
    }
    bytes
}

fn verify(ring: &Ring, path: &Path, model: &Model) {
    let disk = open(ring, "qcow2", &image(path)).unwrap();
    let content = read(ring, &*disk, 0, SIZE as usize);
    let units = content.chunks(UNIT as usize);
    for ((unit, values), found) in model.0.iter().enumerate().zip(units) {
        assert!(
            values
                .iter()
                .any(|(_, value)| found == [*value; UNIT as usize]),
            "unit {unit}: {:?} is none of {values:?}",
            &found[..2]
        );
    }
    run(ring, disk.close()).unwrap();
    assert_eq!(qemu_check(path).get("corruptions"), None);
}

async fn guest(disk: Rc<Box<dyn Disk>>, state: Rc<RefCell<State>>, task: u64, seed: u64) {
    let mut random = Random::new(seed * 1000 + task * 77 + 1);
    let cluster_size = u64::from(disk.limits().discard_granularity);
    // The tasks' stripes lie between each other, so that they share tables.
    let stripe = |index: u64| (index * TASKS + task) * MOST;
    let stripes = SIZE / UNIT / MOST / TASKS;
    for _ in 0..60 {
        let first = stripe(random.below(stripes)) + random.below(MOST);
        let count = 1 + random.below(MOST - first % MOST);
        let (units, offset, len) = (first..first + count, first * UNIT, count * UNIT);
        match random.below(16) {
            0 => {
                let completed = state.borrow().completed();
                disk.flush().await.unwrap();
                state.borrow_mut().durable(&completed);
            }
            1..5 => {
                state.borrow_mut().begin(units.clone(), 0);
                match random.below(3) {
                    // What is no whole cluster stays as it is.
                    0 if cluster_size == UNIT => disk.discard(offset, len).await.unwrap(),
                    unmap => disk.write_zeroes(offset, len, unmap == 1).await.unwrap(),
                }
                state.borrow_mut().end(units);
            }
            5..7 => {
                let memory = segments(&vec![0xee; len as usize]);
                disk.read(offset, memory.clone()).await.unwrap();
                let found = bytes(&memory);
                for (unit, found) in units.zip(found.chunks(UNIT as usize)) {
                    let value = state.borrow().model.0[unit as usize].back().unwrap().1;
                    assert_eq!(found, [value; UNIT as usize], "unit {unit}");
                }
            }
            _ => {
                let value = 1 + random.below(255) as u8;
                state.borrow_mut().begin(units.clone(), value);
                let memory = segments(&vec![value; len as usize]);
                disk.write(offset, memory).await.unwrap();
                state.borrow_mut().end(units);
            }
        }
    }
}

fn storm(options: &str, seed: u64, cache: u64, engine: Engine) {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create(options, &path, "6M");
    qemu_io(&["write -P 9 0 1M"], &path);
    let ring = Ring::new(engine).unwrap();
    let options = vec![("cache_size", OptionValue::Number(cache))];
    let disk = Rc::new(
        open(
            &ring,
            "qcow2",
            &Image {
                options,
                ..image(&path)
            },
        )
        .unwrap(),
    );
    let first = |unit| VecDeque::from([(0, if unit * UNIT < MIB { 9 } else { 0 })]);
    let state = Rc::new(RefCell::new(State {
        model: Model((0..SIZE / UNIT).map(first).collect()),
        busy: vec![false; (SIZE / UNIT) as usize],
        next: 1,
    }));
    let cuts = Rc::new(RefCell::new(Vec::<Cut>::new()));
    let (seen, to, file) = (Rc::clone(&state), Rc::clone(&cuts), path.clone());
    let mut base = std::fs::read(&path).unwrap();
    let mut random = Random::new(seed);
    let mut syncs = 0;
    ring.inject(move |attempt| {
        if attempt.what == What::Sync {
            let now = std::fs::read(&file).unwrap();
            // Each is as likely as any other to be one of those that are kept.
            let place = random.below(syncs + 1);
            syncs += 1;
            if syncs <= CUTS || place < CUTS {
                let place = if syncs <= CUTS { syncs - 1 } else { place };
                let path = file.with_file_name(format!("cut-{place}.qcow2"));
                std::fs::write(&path, torn(&mut random, &base, &now)).unwrap();
                let model = seen.borrow().model.clone();
                let mut cuts = to.borrow_mut();
                match cuts.get_mut(place as usize) {
                    Some(cut) => cut.model = model,
                    None => cuts.push(Cut { path, model }),
                }
            }
            base = now;
        }
        None
    });
    run(&ring, async {
        for task in 0..TASKS {
            ring.spawn(guest(Rc::clone(&disk), Rc::clone(&state), task, seed));
        }
        while Rc::strong_count(&disk) > 1 {
            ring.yield_now().await;
        }
    });
    ring.inject(|_| None);
    run(&ring, Rc::into_inner(disk).unwrap().close()).unwrap();
    check(&path);
    let mut state = Rc::into_inner(state).map_or_else(|| panic!(), RefCell::into_inner);
    let completed = state.completed();
    state.durable(&completed);
    verify(&ring, &path, &state.model);
    let cuts = cuts.take();
    assert!(cuts.len() > 3, "{}", cuts.len());
    for (number, cut) in cuts.into_iter().enumerate() {
        let found = qemu_check(&cut.path);
        assert_eq!(found.get("corruptions"), None, "cut {number}: {found:?}");
        assert_eq!(
            found.get("check-errors"),
            Some(&0),
            "cut {number}: {found:?}"
        );
        verify(&ring, &cut.path, &cut.model);
    }
}

#[test]
fn nothing_is_lost_when_all_that_can_wait_does() {
    for seed in 1..=3 {
        eprintln!("seed {seed}");
        storm(
            "cluster_size=512,refcount_bits=64",
            seed,
            1024,
            Engine::Threads,
        );
    }
}

#[test]
fn nothing_is_lost_with_subclusters() {
    for seed in 1..=3 {
        eprintln!("seed {seed}");
        storm(
            "cluster_size=16k,extended_l2=on",
            seed,
            8192,
            Engine::Threads,
        );
    }
}
