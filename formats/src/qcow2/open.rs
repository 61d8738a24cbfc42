//! Opening an image, with an answer to everything that can be wrong with it.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use super::alloc::Alloc;
use super::backing::{open_backing, open_data_file};
use super::compressed::Decoder;
use super::create::{CreateOptions, create};
use super::entry::{Geometry, OFFSET_MASK};
use super::epochs::Epochs;
use super::header::{Header, MAX_HEADER, autoclear, incompatible};
use super::map::number_at;
use super::places::Places;
use super::read::{Decoded, owned};
use super::slices::Slices;
use super::table::Table;
use super::{Head, Qcow2, Refusal, Snapshot, snapshot};
use crate::host_file::{Size, text};
use crate::{
    Buffer, Disk, HostFile, Image, Limits, OpenError, OptionValue, Progress, Ring, Segments,
};

/// Memory for L2 tables, if the configuration does not say: enough for 256 GiB in clusters of
/// 64 KiB.
const L2_CACHE: u64 = 32 << 20;
/// Memory for refcounts.
const REFCOUNT_CACHE: u64 = 4 << 20;
/// log2 of the size of a slice, unless clusters are smaller.
const SLICE_BITS: u32 = 12;
/// Tables are read so many bytes at a time.
const CHUNK: u64 = 1 << 20;

/// Opens an image; creates it if it is absent and has a size, and grows it to that size.
pub(super) async fn open(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let missing =
        std::fs::metadata(&image.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let created = missing && !image.ro && (image.size.is_some() || !image.backing.is_empty());
    if created {
        create(&image.path, &CreateOptions::from_image(image)?)?;
    }
    let opened = open_existing(ring, image).await;
    if opened.is_err() && created {
        // It has not been there, and under the lock nobody else has come to use it.
        let _ = std::fs::remove_file(&image.path);
    }
    opened
}

async fn open_existing(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let file = HostFile::open(ring, image)?;
    let disk = load(ring, image, file).await?;
    let size = disk.size();
    if let Some(wanted) = image.size.filter(|wanted| *wanted > size) {
        disk.resize_to(wanted).await.map_err(|error| OpenError {
            message: format!(
                "cannot grow `{}` to {}: {}",
                image.path.display(),
                Size(wanted),
                text(&error)
            ),
            help: None,
            key: match error.raw_os_error() {
                Some(libc::EFBIG) => "size",
                _ => OpenError::HOST,
            },
        })?;
    }
    if !image.sparse && !image.ro {
        allocate(&disk).await?;
    }
    Ok(Box::new(disk))
}

/// Allocates all of the image, and tells how far it is.
async fn allocate(disk: &Qcow2) -> Result<(), OpenError> {
    let path = disk.file.path();
    let start = Instant::now();
    let progress = |done, total| {
        disk.file.ring().report(&Progress {
            path,
            done,
            total,
            elapsed: start.elapsed(),
        });
    };
    let size = disk.size();
    let result = match disk.allocate_range(0..size, progress).await {
        Ok(()) => disk.commit().await,
        failed => failed,
    };
    result.map_err(|error| OpenError {
        message: format!(
            "cannot allocate {} for `{}`: {}",
            Size(size),
            path.display(),
            text(&error)
        ),
        help: Some("free some space, or set `sparse = true`".into()),
        key: OpenError::HOST,
    })
}

async fn load(ring: &Ring, image: &Image, file: HostFile) -> Result<Qcow2, OpenError> {
    let path = image.path.display();
    let unreadable = |error: io::Error| OpenError {
        message: format!("cannot read `{path}`: {}", text(&error)),
        help: None,
        key: OpenError::HOST,
    };
    let refused = |refusal: Refusal| OpenError {
        message: format!("`{path}` cannot be used: {}", refusal.message),
        help: refusal.help,
        key: "path",
    };
    let bytes = head(&file).await.map_err(unreadable)?;
    let mut header = Header::parse(&bytes).map_err(refused)?;
    if header.has(incompatible::CORRUPT) {
        return Err(refused(damaged()));
    }
    check_alignment(image, file.alignment().into(), &header)?;
    check_size(image, &header)?;
    let data = open_data_file(ring, image, &header)?;
    let backing = open_backing(ring, image, &header).await?;
    if header.has(incompatible::DIRTY) && !image.ro {
        let (counted, len) = recount(&file).map_err(refused)?;
        header = counted;
        // Takes notice of what was added for new refcounts.
        let len = len.next_multiple_of(file.alignment().into());
        if len > file.size() && !file.is_device() {
            file.resize(len).await.map_err(unreadable)?;
        }
    }
    // With O_DIRECT a file does not grow from within a page while requests are in flight there:
    // the host zeroes the rest of that page in its cache, and what it finds there afterwards is
    // an error of the next fdatasync(2).
    let whole = file
        .size()
        .next_multiple_of(u64::from(file.block()).max(4096));
    if image.o_direct && !image.ro && !file.is_device() && whole > file.size() {
        file.resize(whole).await.map_err(unreadable)?;
    }
    let (l1, refcount_table, places) = tables(&file, &header)
        .await
        .map_err(unreadable)?
        .map_err(refused)?;

    let cache_size = image.options.iter().find_map(|option| match option {
        ("cache_size", OptionValue::Number(size)) if *size > 0 => Some(*size),
        _ => None,
    });
    let geometry = Geometry::of(&header);
    let slice_bits = SLICE_BITS.min(geometry.cluster_bits);
    let slices = |bytes: u64| Slices::new(1 << slice_bits, (bytes >> slice_bits) as usize);
    let unit = file.alignment().max(512) as usize;
    let end = file.size().div_ceil(geometry.cluster_size());
    let decoder = Decoder::new(header.compression).map_err(unreadable)?;
    let disk = Qcow2 {
        data,
        backing,
        geometry,
        slice_bits,
        ro: image.ro,
        sparse: image.sparse,
        block_size: image.block_size,
        size: Cell::new(header.size),
        l1: RefCell::new(Table::new(l1, header.l1_table_offset, 1 << slice_bits)),
        refcount_table: RefCell::new(Table::new(
            refcount_table,
            header.refcount_table_offset,
            1 << slice_bits,
        )),
        l2: RefCell::new(slices(cache_size.unwrap_or(L2_CACHE))),
        refcounts: RefCell::new(slices(cache_size.unwrap_or(REFCOUNT_CACHE))),
        alloc: RefCell::new(Alloc::new(end, geometry.cluster_bits, file.is_device())),
        places: RefCell::new(places),
        decoded: RefCell::new(Decoded::new(decoder)),
        epochs: Epochs::default(),
        head: RefCell::new(Head {
            bytes: bytes.get(..unit).unwrap_or(&bytes).to_vec(),
            header,
        }),
        clusters: Default::default(),
        tables: Default::default(),
        loading_l2: Default::default(),
        loading_refcounts: Default::default(),
        writing_refcounts: Default::default(),
        allocating: Default::default(),
        retiring: Default::default(),
        committing: Default::default(),
        changing_header: Default::default(),
        resizing: Default::default(),
        giving_back: Default::default(),
        commits_begun: Cell::new(0),
        committed: Cell::new(0),
        writing_tables: Cell::default(),
        condemned: Cell::new(false),
        retire_failed: Cell::new(false),
        file,
    };
    let prepared = match disk.complete_files().await {
        Ok(()) => disk.clear_features().await,
        failed => failed,
    };
    prepared.map_err(|error| OpenError {
        message: format!("cannot write `{path}`: {}", text(&error)),
        help: None,
        key: OpenError::HOST,
    })?;
    Ok(disk)
}

/// The first bytes of the file.
async fn head(file: &HostFile) -> io::Result<Buffer> {
    let len = file.size().clamp(512, MAX_HEADER as u64);
    let len = len.next_multiple_of(4096) as usize;
    let memory = Segments::from_buffer(Buffer::zeroed(len, 4096)?);
    file.read_zero_filled(0, memory.clone()).await?;
    owned(memory)
}

fn damaged() -> Refusal {
    Refusal::new("it is marked as damaged")
        .help("make a copy, and repair it with `qemu-img check -r all`")
}

/// Counts all references anew where the last writer had postponed that.
/// Returns the header as it is then, and the length of the file.
fn recount(file: &HostFile) -> Result<(Header, u64), Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        Refusal::new(format!("its refcounts could not be counted anew: {error}"))
            .help("make a copy, and repair it with `qemu-img check -r all`")
    };
    // The same file, under the same lock, but without O_DIRECT.
    let same = format!("/proc/self/fd/{}", file.file().as_fd().as_raw_fd());
    let plain = std::fs::File::options().read(true).write(true).open(same);
    let plain = plain.map_err(|error| failed(&error))?;
    super::repair::repair(&plain, super::repair::Repair::All, &mut |_, _| {})
        .map_err(|error| failed(&error))?;
    let mut bytes = vec![0; MAX_HEADER];
    let len = std::os::unix::fs::FileExt::read_at(&plain, &mut bytes, 0)
        .map_err(|error| failed(&error))?;
    let header = Header::parse(&bytes[..len])?;
    match header.has(incompatible::DIRTY) || header.has(incompatible::CORRUPT) {
        true => Err(damaged()),
        false => {
            let len = plain.metadata().map_err(|error| failed(&error))?.len();
            Ok((header, len))
        }
    }
}

/// Checks that tables can be read and written in slices where O_DIRECT takes no less than
/// `alignment`.
fn check_alignment(image: &Image, alignment: u64, header: &Header) -> Result<(), OpenError> {
    let path = image.path.display();
    let cluster_size = header.cluster_size();
    let message = if cluster_size < alignment {
        format!(
            "`o_direct` is true, but the clusters of `{path}` have {}, and O_DIRECT there takes no \
             less than {alignment}",
            Size(cluster_size),
        )
    } else if alignment > 1 << SLICE_BITS {
        format!(
            "`o_direct` is true, but O_DIRECT on `{path}` takes no less than {alignment}, and the \
             tables of a qcow2 image are read and written {} at a time",
            Size(1 << SLICE_BITS),
        )
    } else {
        return Ok(());
    };
    Err(OpenError {
        message,
        help: Some("set `o_direct = false`".into()),
        key: "o_direct",
    })
}

/// Checks the disk's size against what the configuration asks for.
fn check_size(image: &Image, header: &Header) -> Result<(), OpenError> {
    let path = image.path.display();
    let (has, block_size) = (header.size, u64::from(image.block_size));
    if let Some(size) = image.size {
        if !size.is_multiple_of(block_size) {
            return Err(OpenError {
                message: format!(
                    "`size` is {size}, expected a multiple of `block_size`, {block_size}"
                ),
                help: None,
                key: "size",
            });
        }
        let refused = |why: &str, help: &str| {
            Err(OpenError {
                message: format!(
                    "`size` is {}, but `{path}` has {}{why}",
                    Size(size),
                    Size(has)
                ),
                help: Some(help.into()),
                key: "size",
            })
        };
        return match size.cmp(&has) {
            std::cmp::Ordering::Less => refused(
                "",
                "leave `size` out to use all of it; an image is never shrunk by opening it",
            ),
            std::cmp::Ordering::Greater if image.ro => refused(
                ", and a read-only image does not grow",
                "leave `size` out, or set `ro = false`",
            ),
            _ => Ok(()),
        };
    }
    if has.is_multiple_of(block_size) {
        return Ok(());
    }
    let next = has.next_multiple_of(block_size);
    Err(OpenError {
        message: format!(
            "`block_size` is {block_size}, but `{path}` has {has} bytes, no multiple of it"
        ),
        help: (!image.ro).then(|| format!("add `size = {next}` to grow it to whole blocks")),
        key: "block_size",
    })
}

type Tables = (Vec<u64>, Vec<u64>, Places);

/// Reads the tables of the first level, and finds out where all tables are.
async fn tables(file: &HostFile, header: &Header) -> io::Result<Result<Tables, Refusal>> {
    let bits = header.cluster_bits;
    let refcount_table_len = u64::from(header.refcount_table_clusters) << bits;
    let l1_len = u64::from(header.l1_size) * 8;
    let file_clusters = file.size().div_ceil(header.cluster_size());
    // First of all: what they are called is forgotten before the large tables take memory.
    let of_snapshots: Vec<_> = match snapshots(file, header).await? {
        Ok((snapshots, len)) => {
            let table = ("snapshot table", header.snapshots_offset, len);
            let l1_tables = snapshots.iter().map(|snapshot| {
                let len = u64::from(snapshot.l1_size) * 8;
                ("snapshot's L1 table", snapshot.l1_table_offset, len)
            });
            [table].into_iter().chain(l1_tables).collect()
        }
        Err(refusal) => return Ok(Err(refusal)),
    };
    let mut places = Places::default();
    let mut add = |what: &str, offset: u64, len: u64| {
        // An offset may be any number: that of a snapshot's table is read as it is.
        let clusters = offset >> bits..offset.saturating_add(len).div_ceil(1 << bits);
        if clusters.end > file_clusters {
            return Err(Refusal::new(format!(
                "its {what} at {offset:#x} is past the end of the file"
            )));
        }
        match places.add(clusters) && offset.is_multiple_of(1 << bits) {
            true => Ok(()),
            false => Err(Refusal::new(format!(
                "its {what} at {offset:#x} overlaps another structure, or does not begin with a \
                 cluster"
            ))
            .help("make a copy, and see what `qemu-img check` says")),
        }
    };
    let first = [
        ("header", 0, 1),
        (
            "refcount table",
            header.refcount_table_offset,
            refcount_table_len,
        ),
        ("L1 table", header.l1_table_offset, l1_len),
    ];
    for (what, offset, len) in first {
        if let Err(refusal) = if len > 0 {
            add(what, offset, len)
        } else {
            Ok(())
        } {
            return Ok(Err(refusal));
        }
    }
    let l1 = numbers(file, header.l1_table_offset, u64::from(header.l1_size)).await?;
    let offset = header.refcount_table_offset;
    let refcount_table = numbers(file, offset, refcount_table_len / 8).await?;
    // Unlike entries of L1 tables, those of the refcount table have no flags.
    let blocks = [
        ("L2 table", &l1, OFFSET_MASK),
        ("refcount block", &refcount_table, !511),
    ];
    for (what, table, mask) in blocks {
        for entry in table.iter().map(|entry| entry & mask) {
            if entry != 0
                && let Err(refusal) = add(what, entry, header.cluster_size())
            {
                return Ok(Err(refusal));
            }
        }
    }
    for (what, offset, len) in of_snapshots {
        if len > 0
            && let Err(refusal) = add(what, offset, len)
        {
            return Ok(Err(refusal));
        }
    }
    Ok(Ok((l1, refcount_table, places)))
}

/// Reads big-endian numbers, `count` of them: as many as the header may say. Where the file ends
/// in the table's last cluster they are 0.
async fn numbers(file: &HostFile, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::with_capacity(count as usize);
    while (numbers.len() as u64) < count {
        let left = (count - numbers.len() as u64) * 8;
        let len = left.min(CHUNK).next_multiple_of(4096);
        let memory = Segments::from_buffer(Buffer::zeroed(len as usize, 4096)?);
        let at = offset + numbers.len() as u64 * 8;
        file.read_zero_filled(at, memory.clone()).await?;
        let bytes = owned(memory)?;
        let all = (0..left.min(CHUNK) as usize / 8).map(|at| number_at(&bytes, at * 8));
        numbers.extend(all);
    }
    Ok(numbers)
}

/// Reads the snapshot table; also returns its length in bytes.
async fn snapshots(
    file: &HostFile,
    header: &Header,
) -> io::Result<Result<(Vec<Snapshot>, u64), Refusal>> {
    let count = header.nb_snapshots;
    if count == 0 {
        return Ok(Ok((Vec::new(), 0)));
    }
    let there = file.size().saturating_sub(header.snapshots_offset);
    let most = there.min(snapshot::MAX_TABLE_BYTES as u64);
    let mut want = (64 << 10).min(most);
    loop {
        let len = want.next_multiple_of(4096) as usize;
        let memory = Segments::from_buffer(Buffer::zeroed(len, 4096)?);
        let offset = header.snapshots_offset;
        file.read_zero_filled(offset, memory.clone()).await?;
        let bytes = owned(memory)?;
        match snapshot::parse(&bytes[..want as usize], count) {
            Err(_) if want < most => want = (want * 8).min(most),
            result => return Ok(result.map(|(snapshots, len)| (snapshots, len as u64))),
        }
    }
}

impl Qcow2 {
    /// Makes the files as long as what is written in place may reach: the last cluster of an
    /// image may be cut short, and a data file may end anywhere. What lies past a file's known
    /// end is not read.
    async fn complete_files(&self) -> io::Result<()> {
        if self.ro {
            return Ok(());
        }
        let end = self.alloc.borrow().end() << self.geometry.cluster_bits;
        if self.file.size() < end && !self.file.is_device() {
            self.file.resize(end).await?;
        }
        match &self.data {
            Some(data) if data.size() < self.size.get() && !data.is_device() => {
                let size = self.size.get().next_multiple_of(data.alignment().into());
                data.resize(size).await
            }
            _ => Ok(()),
        }
    }

    /// Clears what a writer who does not keep it up must clear: bits for features that are
    /// unknown here.
    async fn clear_features(&self) -> io::Result<()> {
        let keep = match self.data {
            Some(_) => autoclear::RAW_DATA_FILE,
            None => 0,
        };
        let set = self.head.borrow().header.autoclear_features;
        if self.ro || set & !keep == 0 {
            return Ok(());
        }
        self.change_header(|header| header.autoclear_features &= keep)
            .await
    }

    pub(super) fn limits_now(&self) -> Limits {
        let writable = !self.ro;
        Limits {
            alignment: self.data_file().alignment().max(self.file.alignment()),
            memory_alignment: self.data_file().memory_alignment(),
            optimal_io: self.geometry.cluster_size() as u32,
            discard_granularity: match writable && self.sparse {
                true => self.geometry.cluster_size() as u32,
                false => 0,
            },
            write_zeroes: writable,
            resize: writable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::qemu_create;
    use crate::testing::{directory, image};

    #[test]
    fn o_direct_that_takes_more_than_a_slice_or_a_cluster_is_refused() {
        let directory = directory();
        let path = directory.path().join("a.qcow2");
        let image = image(&path);
        for (cluster_size, most) in [(512, 512), (4096, 4096), (65536, 4096)] {
            qemu_create(&format!("cluster_size={cluster_size}"), &path, "1M");
            let header = Header::parse(&std::fs::read(&path).unwrap()).unwrap();
            check_alignment(&image, 1, &header).unwrap();
            check_alignment(&image, most, &header).unwrap();
            let error = check_alignment(&image, 2 * most, &header).unwrap_err();
            assert_eq!(error.key, "o_direct");
            assert!(error.message.contains(&(2 * most).to_string()), "{error}");
        }
    }
}
