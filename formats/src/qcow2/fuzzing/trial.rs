//! One image: it is spoiled, checked, repaired, opened, used, closed, and read once more.

use super::super::{Header, ProblemKind, Repair, check, repair};
use super::files::{Content, Files, MAX_OPERATIONS, path, set, size};
use super::input::Input;
use super::seed::{Backing, Seed, seeds};
use super::session::{Session, bytes, memory};
use super::view::{Below, View, be64};
use super::{Story, Tally, mutate};
use crate::counting::Held;
use crate::{Disk, Engine, Image, OpenError, OptionValue, Ring, find};

/// Most memory for one image, in bytes.
const MAX_MEMORY: u64 = 256 << 20;
/// Most that a repair may add to a file: new refcounts for what is in it, or said to be.
const MAX_ADDED: u64 = 64 << 20;

pub(super) struct Bench {
    ring: Ring,
    files: Files,
    pub(super) seeds: Vec<Seed>,
}

fn base<'a>(seed: &Seed, bytes: &'a [u8]) -> Below<'a> {
    match &seed.backing {
        Some(Backing::Raw(_)) => Below::Raw(bytes),
        Some(Backing::Qcow2(_)) => Below::Qcow2(Box::new(View::new(bytes, None, Below::Nothing))),
        None => Below::Nothing,
    }
}

/// The header's bit that says that refcounts are to be counted anew.
fn is_dirty(image: &[u8]) -> bool {
    image[7] > 2 && be64(image, 72) & 1 != 0
}

/// The header's bit that says that something is wrong.
fn is_corrupt(image: &[u8]) -> bool {
    image[7] > 2 && be64(image, 72) & 2 != 0
}

impl Bench {
    pub(super) fn new() -> Bench {
        let (ring, files) = (Ring::new(Engine::Auto).unwrap(), Files::new());
        files.watch_operations(&ring);
        Bench {
            seeds: seeds(&files.names),
            ring,
            files,
        }
    }

    pub(super) fn run(&self, data: &[u8], hostile: bool) -> Tally {
        let mut input = Input(data);
        let seed = &self.seeds[input.byte() as usize % self.seeds.len()];
        let [options, how] = [input.byte(), input.byte()];
        let mut story = Story(vec![format!("an image of the kind {:?}", seed.name)]);
        let mut image = seed.image.clone();
        let mut below = match &seed.backing {
            Some(Backing::Raw(bytes)) => bytes.clone(),
            Some(Backing::Qcow2(seed)) => seed.image.clone(),
            None => Vec::new(),
        };
        if hostile {
            let names = &self.files.names;
            let what = match &seed.backing {
                Some(Backing::Qcow2(base)) if how & 7 == 7 => {
                    story.0.push("of its backing file:".into());
                    mutate::mutate(base, names, &mut below, &mut input)
                }
                _ => mutate::mutate(seed, names, &mut image, &mut input),
            };
            story.0.extend(what);
        }
        set(&self.files.image, &image);
        set(&self.files.backing, &below);
        set(&self.files.data, seed.data.as_deref().unwrap_or_default());
        let mut tally = Tally {
            images: 1,
            ..Tally::default()
        };
        if how & 0x38 == 0x38 {
            self.repair([&image, &below], seed, &mut tally, &mut story);
            image = Content::of(&self.files.image).to_vec();
        }
        let approved = self.approved(seed, options, &image);
        story.0.push(format!(
            "read-only: {}, sparse: {}, cache: {}",
            approved.ro,
            approved.sparse,
            options & 0x40 == 0
        ));
        self.files.operations.set(0);
        let sound = tally.sound > 0;
        let held = Held::now();
        let opened = find("qcow2").unwrap().open;
        match self.ring.block_on(opened(&self.ring, &approved), || {}) {
            Ok(disk) => self.use_disk(
                disk,
                &approved,
                [&image, &below],
                seed,
                &mut input,
                &mut tally,
                &mut story,
                &held,
            ),
            Err(error) => {
                tally.memory = tally.memory.max(held.peak());
                story.0.push(format!("refused: {error}"));
                assert_clean(&error);
                let changed = *Content::of(&self.files.image) != image[..];
                // Space may have been allocated, or refcounts counted, before that failed.
                assert!(
                    !changed || !approved.sparse || is_dirty(&image),
                    "refused, but changed"
                );
            }
        }
        tally.operations = self.files.operations.get();
        let (memory, operations) = (tally.memory, tally.operations);
        assert!(memory <= MAX_MEMORY, "{memory} bytes of memory");
        assert!(operations <= MAX_OPERATIONS, "too many operations");
        let taken = self.files.bait_was_taken();
        assert!(!taken, "a file was opened that nobody approved");
        if !hostile {
            assert_eq!((tally.opened, tally.failed, tally.condemned), (1, 0, 0));
            assert_eq!(tally.unjudged, 0);
        }
        if sound && tally.opened > 0 && tally.condemned == 0 {
            let checked = check(&self.files.plain(), &mut |_, _| {}).unwrap();
            // Of two entries with one cluster the one that is written lets go of it.
            let mut problems = checked.problems.iter();
            let good = problems.all(|problem| {
                problem.kind != ProblemKind::Corruption || problem.what.contains("lacks the flag")
            });
            assert!(good, "{checked:?}");
        }
        tally
    }

    fn approved(&self, seed: &Seed, options: u8, image: &[u8]) -> Image {
        // To allocate all of a disk that is said to be huge is to do as one is told, and refcounts
        // may say that much of the file is in use.
        let huge = be64(image, 24) > 16 << 20 || image[23] > 13;
        let names = &self.files.names;
        let data_file = seed.data.iter().map(|_| {
            let path = OptionValue::Path(names.data.clone().into());
            ("data_file", path)
        });
        let small_cache = (options & 0x40 != 0).then_some(("cache_size", OptionValue::Number(1)));
        let backing = seed.backing.iter().map(|_| names.backing.clone().into());
        Image {
            ro: options & 7 == 7,
            sparse: options & 0x38 != 0x38 || huge,
            lock: false,
            backing: backing.collect(),
            options: data_file.chain(small_cache).collect(),
            ..Image::new(path(&self.files.image))
        }
    }

    /// Checks and repairs the image: what it holds stays what it was.
    fn repair(&self, was: [&[u8]; 2], seed: &Seed, tally: &mut Tally, story: &mut Story) {
        let [image, below] = was;
        tally.repaired = 1;
        let file = self.files.plain();
        let held = Held::now();
        let found = check(&file, &mut |_, _| {}).map(|report| report.is_sound());
        assert!(
            *Content::of(&self.files.image) == *image,
            "changed by a check"
        );
        story.0.push(format!("checked: {found:?}"));
        let report = repair(&file, Repair::All, &mut |_, _| {});
        tally.memory = tally.memory.max(held.peak());
        story.0.push(format!("repaired: {report:?}"));
        let len = size(&self.files.image);
        let most = image.len() as u64 + MAX_ADDED;
        assert!(len <= most, "the file has grown to {len} bytes");
        let Ok(report) = report else { return };
        tally.sound = report.is_sound().into();
        if Header::parse(image).is_err() {
            return;
        }
        let bytes = Content::of(&self.files.image);
        let [before, after] =
            [image, &bytes].map(|bytes| View::new(bytes, seed.data.as_deref(), base(seed, below)));
        let audit = before.audit(&Default::default());
        for cluster in before.described(64) {
            if before.is_in_doubt(cluster, &audit) {
                continue;
            }
            if let (Some(old), Some(new)) = (before.content(cluster), after.content(cluster)) {
                assert!(old == new, "cluster {cluster:#x} holds something else");
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what there is to know")]
    fn use_disk(
        &self,
        disk: Box<dyn Disk>,
        approved: &Image,
        was: [&[u8]; 2],
        seed: &Seed,
        input: &mut Input<'_>,
        tally: &mut Tally,
        story: &mut Story,
        held: &Held,
    ) {
        let [image, below] = was;
        tally.opened = 1;
        assert_eq!(disk.size(), be64(image, 24));
        // Refcounts that were postponed have been counted.
        let counted = is_dirty(image) && !approved.ro;
        let counted = counted.then(|| Content::of(&self.files.image).to_vec());
        let image = counted.as_deref().unwrap_or(image);
        let before = View::new(image, seed.data.as_deref(), base(seed, below));
        let mut session = Session::new(disk, &before, approved, tally, story);
        let closed = self.ring.block_on(
            async {
                session.play(input).await;
                session.close().await
            },
            || {},
        );
        let memory = held.peak();
        assert_eq!(self.files.stray.take(), None);
        let files = [&self.files.image, &self.files.data].map(Content::of);
        let external = seed.data.as_ref().map(|_| &*files[1]);
        let after = View::new(&files[0], external, base(seed, below));
        session.judge(&after, closed.is_ok());
        let marked = is_corrupt(&files[0]);
        let condemned = marked || session.condemned;
        let most = session.most_bytes(image.len() as u64, closed.is_ok() && !condemned);
        let len = size(&self.files.image);
        assert!(
            len <= most,
            "the file has grown to {len} bytes, expected {most} at most"
        );
        drop(session);
        tally.memory = tally.memory.max(memory);
        tally.condemned += u64::from(condemned);
        if closed.is_ok() && !marked && self.files.operations.get() < MAX_OPERATIONS / 2 {
            let again = self.read_again(approved, &after, story);
            self.ring.block_on(again, || {});
        }
    }

    /// What was left opens again, and is read as it stands there.
    async fn read_again(&self, approved: &Image, after: &View<'_>, story: &mut Story) {
        let approved = Image {
            ro: true,
            ..approved.clone()
        };
        let disk = match (find("qcow2").unwrap().open)(&self.ring, &approved).await {
            Ok(disk) => disk,
            Err(error) => panic!("it was closed, and is now refused: {error}"),
        };
        for cluster in after.described(24) {
            let Some(expected) = after.content(cluster) else {
                continue;
            };
            let start = cluster << after.bits;
            let len = disk.size().saturating_sub(start).min(expected.len() as u64);
            let memory = memory(&vec![0xee; len as usize]);
            if disk.read(start, memory.clone()).await.is_ok() {
                let found = bytes(&memory);
                story.0.push(format!("read again: {start:#x}"));
                assert!(found == expected[..len as usize], "something else is read");
                story.0.pop();
            }
        }
        disk.close().await.unwrap();
    }
}

fn assert_clean(error: &OpenError) {
    let text = error.to_string();
    assert!(!text.is_empty() && text.len() < 8 << 10, "{text}");
}
