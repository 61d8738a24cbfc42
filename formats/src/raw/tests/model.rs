//! Random operations, many at once, against a flat array of bytes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::SystemTime;

use crate::testing::{Random, bytes, directory, engines, image, open, run, segments};
use crate::{Buffer, Disk, Image, Ring, Segments};

/// One run of random operations against a flat model.
struct Model {
    ring: Ring,
    disk: Rc<Box<dyn Disk>>,
    content: Vec<u8>,
    random: Random,
    block: u64,
    discard: bool,
    /// What is in flight: first byte and the one after the last.
    flying: Rc<RefCell<BTreeMap<u64, u64>>>,
    waiting: Rc<Cell<Option<Waker>>>,
}

/// The largest image of the model.
const MOST: u64 = 4 << 20;

impl Model {
    /// Waits until fewer than `count` operations are in flight.
    async fn below(&self, count: usize) {
        std::future::poll_fn(|cx| {
            if self.flying.borrow().len() < count {
                return Poll::Ready(());
            }
            self.waiting.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// A range that nothing in flight touches, and claims it.
    fn claim(&mut self) -> Option<(u64, u64)> {
        let blocks = self.content.len() as u64 / self.block;
        if blocks == 0 {
            return None;
        }
        let start = self.random.below(blocks) * self.block;
        let most = self.random.of(&[self.block, 4096, 64 << 10, 300 << 10]);
        let most = (most / self.block).max(1).min(blocks - start / self.block);
        let end = start + (1 + self.random.below(most)) * self.block;
        let mut flying = self.flying.borrow_mut();
        let before = flying.range(..end).next_back();
        if before.is_some_and(|(_, other)| *other > start) {
            return None;
        }
        flying.insert(start, end);
        Some((start, end))
    }

    /// Memory in pieces of odd sizes at odd addresses, as a guest may choose to have it.
    fn memory(&mut self, len: u64) -> Segments {
        let skip = self.random.of(&[0, 0, 1, 4, 512]);
        let buffer = Buffer::zeroed(len as usize + skip, 4096).unwrap();
        let mut rest = Segments::from_buffer(buffer).slice(skip, len as usize);
        let piece = self.random.of(&[7, 512, 4096, 1 << 20]);
        if rest.len() / piece > 2000 {
            return rest;
        }
        let mut pieces = Vec::new();
        let keep = rest.keep();
        while !rest.is_empty() {
            let piece = rest.split_to(piece);
            pieces.push((piece.iovecs()[0].iov_base.cast(), piece.len()));
        }
        // SAFETY: the pieces are those of the buffer, which is kept.
        unsafe { Segments::new(pieces, keep) }
    }

    async fn step(&mut self) {
        match self.random.below(1000) {
            0 => {
                self.below(1).await;
                let size = self.random.below(MOST / self.block + 1) * self.block;
                self.disk.resize(size).await.unwrap();
                assert_eq!(self.disk.size(), size);
                self.content.resize(size as usize, 0);
            }
            1..5 => self.disk.flush().await.unwrap(),
            kind => {
                self.below(64).await;
                if let Some((start, end)) = self.claim() {
                    self.spawn(kind, start, end);
                }
            }
        }
    }

    fn spawn(&mut self, kind: u64, start: u64, end: u64) {
        let content = &mut self.content[start as usize..end as usize];
        let disk = Rc::clone(&self.disk);
        let (flying, waiting) = (Rc::clone(&self.flying), Rc::clone(&self.waiting));
        let len = end - start;
        let done = move || {
            flying.borrow_mut().remove(&start);
            if let Some(waker) = waiting.take() {
                waker.wake();
            }
        };
        match kind {
            0..450 => {
                let want = content.to_vec();
                let memory = self.memory(len);
                self.ring.spawn(async move {
                    disk.read(start, memory.clone()).await.unwrap();
                    assert!(bytes(&memory) == want, "read of {len} at {start}");
                    done();
                });
            }
            450..900 => {
                let byte = self.random.below(256) as u8;
                for (i, to) in content.iter_mut().enumerate() {
                    *to = byte.wrapping_add((i / 512) as u8);
                }
                let want = content.to_vec();
                let memory = self.memory(len);
                memory.copy_from(&want);
                self.ring.spawn(async move {
                    disk.write(start, memory).await.unwrap();
                    done();
                });
            }
            900..950 if self.discard => {
                content.fill(0);
                self.ring.spawn(async move {
                    disk.discard(start, len).await.unwrap();
                    done();
                });
            }
            _ => {
                content.fill(0);
                let unmap = self.random.below(2) == 0;
                self.ring.spawn(async move {
                    disk.write_zeroes(start, len, unmap).await.unwrap();
                    done();
                });
            }
        }
    }
}

/// Runs `count` random operations on a disk that holds `content`, and returns what it holds
/// afterwards.
fn run_model(ring: &Ring, disk: Box<dyn Disk>, content: Vec<u8>, case: &Case) -> Vec<u8> {
    let mut model = Model {
        ring: ring.clone(),
        discard: disk.limits().discard_granularity > 0,
        disk: Rc::new(disk),
        content,
        random: Random::new(case.seed),
        block: case.block_size.into(),
        flying: Rc::default(),
        waiting: Rc::default(),
    };
    run(ring, async {
        for _ in 0..case.count {
            model.step().await;
        }
        model.below(1).await;
        let memory = segments(&vec![9; model.content.len()]);
        model.disk.read(0, memory.clone()).await.unwrap();
        assert!(bytes(&memory) == model.content, "the whole disk");
    });
    let Ok(disk) = Rc::try_unwrap(model.disk) else {
        panic!("the disk is in use");
    };
    run(ring, disk.close()).unwrap();
    model.content
}

struct Case {
    o_direct: bool,
    block_size: u32,
    seed: u64,
    count: u32,
}

/// Runs a test in each engine, with each block size, with and without O_DIRECT.
fn cases(count: u32, test: impl Fn(&Ring, &Case)) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => now,
    };
    eprintln!("again with: SEED={seed} cargo test -p formats model");
    for engine in engines() {
        for o_direct in [false, true] {
            for block_size in [512, 4096] {
                let case = Case {
                    o_direct,
                    block_size,
                    seed,
                    count,
                };
                eprintln!("{engine:?}, o_direct {o_direct}, block_size {block_size}");
                test(&Ring::new(engine).unwrap(), &case);
            }
        }
    }
}

/// Runs the model on an image of each kind: 104,000 operations in all.
fn raw_model(format: &str) {
    cases(6500, |ring, case| {
        let directory = directory();
        let path = directory.path().join("a.img");
        let image = Image {
            o_direct: case.o_direct,
            block_size: case.block_size,
            size: Some(MOST / 2),
            ..image(&path)
        };
        let disk = open(ring, format, &image).unwrap();
        let content = run_model(ring, disk, vec![0; MOST as usize / 2], case);
        assert!(fs::read(&path).unwrap() == content, "the image");
    });
}

#[test]
fn a_raw_image_behaves_like_a_flat_array_of_bytes() {
    raw_model("raw");
}

#[test]
fn a_sparse_raw_image_behaves_like_a_flat_array_of_bytes() {
    raw_model("sparse-raw");
}

#[test]
fn an_ephemeral_disk_behaves_like_its_image_and_leaves_it_alone() {
    cases(2000, |ring, case| {
        let directory = directory();
        let path = directory.path().join("a.img");
        let content: Vec<u8> = (0..MOST as u32 / 2).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &content).unwrap();
        let image = Image {
            ro: true,
            o_direct: case.o_direct,
            block_size: case.block_size,
            ..image(&path)
        };
        let base = open(ring, "raw", &image).unwrap();
        let disk = crate::ephemeral(ring, &image, base).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        run_model(ring, disk, content.clone(), case);
        assert!(fs::read(&path).unwrap() == content, "the image");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    });
}
