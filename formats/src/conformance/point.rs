//! The matrix: what kind of image, and how it is used.

use crate::Engine;
use crate::random::Random;

/// How large a backing file is, compared with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// As large.
    Equal,
    /// Smaller.
    Shorter,
    /// Larger.
    Longer,
    /// Smaller, and it ends within a cluster.
    Unaligned,
    /// Smaller, and it ends within a sector: only a raw one does.
    Odd,
}

/// What lies below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nothing.
    None,
    /// A raw image.
    Raw(Fit),
    /// One in the format itself.
    Qcow2(Fit),
    /// One that has a backing file too: three in all.
    Chain(Fit),
}

/// Where the data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// In the image.
    None,
    /// In a file of its own.
    External,
    /// In a file of its own that is a raw image too.
    Raw,
}

/// One point of the matrix.
#[derive(Clone, Debug)]
pub struct Point {
    /// It follows from this number.
    pub seed: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes.
    pub cluster_size: u64,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// Whether refcounts may be behind while it is open.
    pub lazy_refcounts: bool,
    /// "off", "metadata", "falloc", "full".
    pub preallocation: &'static str,
    /// What lies below.
    pub backing: Backing,
    /// "zlib" or "zstd".
    pub compression: &'static str,
    /// Whether what it holds at first is compressed.
    pub compressed: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where the data lies.
    pub data_file: DataFile,
    /// How many clusters of metadata are cached; 0: as many as there are.
    pub cache_clusters: u64,
    /// O_DIRECT.
    pub o_direct: bool,
    /// False: everything is allocated.
    pub sparse: bool,
    /// Whether our engine creates it, and not qemu-img.
    pub ours: bool,
    /// What does the I/O.
    pub engine: Engine,
    /// Bytes.
    pub size: u64,
    /// Bytes: the least that is read and written.
    pub block_size: u32,
    /// Whether it is so large that most of it stays untouched.
    pub huge: bool,
    /// Whether it is made smaller at times.
    pub shrinks: bool,
    /// Whether writes in flight overlap.
    pub overlap: bool,
    /// How many operations are in flight at most.
    pub in_flight: usize,
    /// Whether I/O begins and ends in random order.
    pub delays: bool,
}

impl Point {
    /// The point that a seed stands for.
    pub fn of(seed: u64) -> Point {
        let mut random = Random::new(seed);
        let random = &mut random;
        let version = if random.chance(20) { 2 } else { 3 };
        let three = version == 3;
        let cluster_size =
            random.of(&[512, 512, 4096, 4096, 64 << 10, 64 << 10, 64 << 10, 2 << 20]);
        let huge = random.chance(8) && cluster_size >= 64 << 10;
        let fits = [Fit::Equal, Fit::Shorter, Fit::Longer, Fit::Unaligned];
        let raw = [
            Fit::Equal,
            Fit::Shorter,
            Fit::Longer,
            Fit::Unaligned,
            Fit::Odd,
        ];
        let mut backing = match random.below(8) {
            0..3 => Backing::None,
            3..5 => Backing::Raw(random.of(&raw)),
            5..7 => Backing::Qcow2(random.of(&fits)),
            _ => Backing::Chain(random.of(&fits)),
        };
        // Data lies in such a file where it lies on the disk: a file is not that large.
        let data_file = match random.below(12) {
            0 if three && !huge => DataFile::External,
            1 if three && !huge => DataFile::Raw,
            _ => DataFile::None,
        };
        let sparse = !random.chance(8) || huge || data_file != DataFile::None;
        if data_file == DataFile::Raw || !sparse {
            backing = Backing::None;
        }
        if huge {
            // Nothing that is as large can lie below.
            backing = match backing {
                Backing::Raw(_) => Backing::Raw(Fit::Shorter),
                Backing::Qcow2(_) => Backing::Qcow2(Fit::Shorter),
                other => other,
            };
        }
        let within = data_file == DataFile::None;
        let refcount_bits = match three {
            true => random.of(&[1, 2, 4, 8, 16, 16, 16, 32, 64]),
            false => 16,
        };
        let compressed = random.chance(30) && within && sparse;
        // Each snapshot refers once more to every cluster; compressed ones share a cluster.
        let counted = refcount_bits >= if compressed { 16 } else { 2 };
        let snapshots = match within && sparse && !huge && counted {
            true => random.of(&[0, 0, 1, 2]),
            false => 0,
        };
        let ours = random.chance(35) && !compressed;
        let plain = backing == Backing::None && !huge && !compressed;
        let preallocation = match plain && random.chance(25) {
            true => random.of(&["metadata", "falloc", "full"]),
            false => "off",
        };
        let o_direct = random.chance(15);
        let block_size = match cluster_size >= 4096 && random.chance(25) {
            true => 4096,
            false => 512,
        };
        let size = size(random, cluster_size, block_size, huge);
        Point {
            seed,
            version,
            cluster_size,
            refcount_bits,
            extended_l2: three && cluster_size >= 16 << 10 && random.chance(45),
            lazy_refcounts: three && random.chance(15),
            preallocation,
            backing,
            compression: match three && random.chance(45) {
                true => "zstd",
                false => "zlib",
            },
            compressed,
            snapshots,
            data_file,
            cache_clusters: random.of(&[0, 0, 1, 2]),
            o_direct,
            sparse,
            ours,
            engine: random.of(&[Engine::IoUring, Engine::IoUring, Engine::Threads]),
            size,
            block_size,
            huge,
            shrinks: random.chance(40) && snapshots == 0,
            overlap: random.chance(50),
            in_flight: random.of(&[1, 4, 16, 32, 32]),
            delays: random.chance(75),
        }
    }

    /// Whether its size may change: version 2 does not say how large a snapshot is.
    pub fn resizes(&self) -> bool {
        self.version == 3 || self.snapshots == 0
    }

    /// A value for each dimension of the matrix, in words.
    pub fn values(&self) -> Vec<String> {
        let backing = match self.backing {
            Backing::None => "none".into(),
            Backing::Raw(fit) => format!("raw {fit:?}"),
            Backing::Qcow2(fit) => format!("qcow2 {fit:?}"),
            Backing::Chain(_) => "chain".into(),
        };
        let compressed = match self.compressed {
            true => self.compression,
            false => "no",
        };
        vec![
            format!("version {}", self.version),
            format!("cluster_size {}", self.cluster_size),
            format!("refcount_bits {}", self.refcount_bits),
            format!("extended_l2 {}", self.extended_l2),
            format!("lazy_refcounts {}", self.lazy_refcounts),
            format!("preallocation {}", self.preallocation),
            format!("backing {backing}"),
            format!("compressed {compressed}"),
            format!("snapshots {}", self.snapshots),
            format!("data_file {:?}", self.data_file),
            format!("cache_clusters {}", self.cache_clusters),
            format!("o_direct {}", self.o_direct),
            format!("sparse {}", self.sparse),
            format!("ours {}", self.ours),
            format!("engine {:?}", self.engine),
            format!("huge {}", self.huge),
            format!("shrinks {}", self.shrinks),
            format!("overlap {}", self.overlap),
            format!("in_flight {}", self.in_flight),
            format!("delays {}", self.delays),
        ]
    }

    /// All values of all dimensions.
    pub fn matrix() -> Vec<String> {
        const MATRIX: [(&str, &str); 20] = [
            ("version", "2,3"),
            ("cluster_size", "512,4096,65536,2097152"),
            ("refcount_bits", "1,2,4,8,16,32,64"),
            ("extended_l2", "false,true"),
            ("lazy_refcounts", "false,true"),
            ("preallocation", "off,metadata,falloc,full"),
            (
                "backing",
                "none,raw Equal,raw Shorter,raw Longer,raw Unaligned,raw Odd,qcow2 Equal,\
                 qcow2 Shorter,qcow2 Longer,qcow2 Unaligned,chain",
            ),
            ("compressed", "no,zlib,zstd"),
            ("snapshots", "0,1,2"),
            ("data_file", "None,External,Raw"),
            ("cache_clusters", "0,1,2"),
            ("o_direct", "false,true"),
            ("sparse", "false,true"),
            ("ours", "false,true"),
            ("engine", "IoUring,Threads"),
            ("huge", "false,true"),
            ("shrinks", "false,true"),
            ("overlap", "false,true"),
            ("in_flight", "1,4,16,32"),
            ("delays", "false,true"),
        ];
        let row = |(name, values): (&str, &str)| {
            let values = values.split(',').map(|value| format!("{name} {value}"));
            values.collect::<Vec<_>>()
        };
        MATRIX.into_iter().flat_map(row).collect()
    }
}

fn size(random: &mut Random, cluster_size: u64, block_size: u32, huge: bool) -> u64 {
    let clusters = match cluster_size {
        _ if huge => (20 << 40) / cluster_size,
        512 => 2048 + random.below(10_000),
        4096 => 256 + random.below(2048),
        0x1_0000 => 16 + random.below(120),
        _ => 1 + random.below(15),
    };
    let tail = match random.chance(50) {
        true => random.below(cluster_size) / u64::from(block_size) * u64::from(block_size),
        false => 0,
    };
    clusters * cluster_size + tail
}
