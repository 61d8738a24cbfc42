//! The files, which are used for one image after another, and a watch over them.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::fs::{MemfdFlags, SeekFrom, fstat, ftruncate, inotify, memfd_create, seek};
use rustix::io::{pwrite, read};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Fault, Ring, What};

/// Most operations on the host for one image.
pub(super) const MAX_OPERATIONS: u64 = 20_000;

/// The most bytes past the end of a file that one operation may write.
const MAX_GROWTH: u64 = 4 << 20;

/// File names that stand in headers.
pub(super) struct Names {
    pub(super) backing: String,
    pub(super) data: String,
    /// A file that no configuration approves.
    pub(super) bait: String,
}

pub(super) struct Files {
    pub(super) image: OwnedFd,
    pub(super) backing: OwnedFd,
    pub(super) data: OwnedFd,
    _bait: OwnedFd,
    /// Tells of everything that happens to the bait.
    watch: OwnedFd,
    pub(super) names: Names,
    /// Operations since the image was opened.
    pub(super) operations: Rc<Cell<u64>>,
    /// The first write that went too far.
    pub(super) stray: Rc<RefCell<Option<String>>>,
}

impl Files {
    pub(super) fn new() -> Files {
        let [image, backing, data, bait] = ["image", "backing", "data", "bait"]
            .map(|name| memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
        let names = Names {
            backing: path(&backing),
            data: path(&data),
            bait: path(&bait),
        };
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watch = inotify::init(flags).unwrap();
        let seen = inotify::WatchFlags::OPEN | inotify::WatchFlags::ACCESS;
        inotify::add_watch(&watch, &names.bait, seen).unwrap();
        drop(std::fs::read(&names.bait).unwrap());
        let files = Files {
            image,
            backing,
            data,
            _bait: bait,
            watch,
            names,
            operations: Rc::default(),
            stray: Rc::default(),
        };
        let noticed = files.bait_was_taken();
        assert!(noticed, "nobody notices when the bait is taken");
        files
    }

    pub(super) fn bait_was_taken(&self) -> bool {
        read(&self.watch, &mut [0; 4096]).is_ok()
    }

    /// From now on operations are counted, and none writes past the end of its file.
    pub(super) fn watch_operations(&self, ring: &Ring) {
        let (operations, stray) = (Rc::clone(&self.operations), Rc::clone(&self.stray));
        let [image, data] = [&self.image, &self.data].map(|fd| fd.try_clone().unwrap());
        ring.inject(move |attempt| {
            operations.set(operations.get() + 1);
            let writes = matches!(attempt.what, What::Write | What::Fallocate);
            if writes && attempt.len > 0 {
                // The last cluster of a file may be cut short, and a disk that grows is made longer
                // by what is written there, if it is not to have holes.
                let end = size(&image).max(size(&data));
                if attempt.offset.saturating_add(attempt.len) > end + MAX_GROWTH {
                    let mut stray = stray.borrow_mut();
                    stray.get_or_insert(format!("{attempt:?} in a file of {end} bytes"));
                }
            }
            let too_many = operations.get() > MAX_OPERATIONS;
            too_many.then_some(Fault::Errno(libc::EIO))
        });
    }

    /// The image as a file of its own.
    pub(super) fn plain(&self) -> File {
        let options = &mut File::options();
        let options = options.read(true).write(true);
        options.open(path(&self.image)).unwrap()
    }
}

pub(super) fn path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

pub(super) fn set(fd: &OwnedFd, bytes: &[u8]) {
    ftruncate(fd, 0).unwrap();
    ftruncate(fd, bytes.len() as u64).unwrap();
    assert_eq!(pwrite(fd, bytes, 0), Ok(bytes.len()));
}

pub(super) fn size(fd: &OwnedFd) -> u64 {
    fstat(fd).unwrap().st_size as u64
}

/// All bytes of a file, without the hole at its end. There may be larger ones within it.
pub(super) struct Content {
    start: NonNull<u8>,
    len: usize,
}

impl Content {
    /// Nobody may write to the file, or cut it off, as long as this is there.
    pub(super) fn of(fd: &OwnedFd) -> Content {
        let mut end = 0;
        while let Ok(data) = seek(fd, SeekFrom::Data(end)) {
            end = seek(fd, SeekFrom::Hole(data)).unwrap();
        }
        let len = end as usize;
        if len == 0 {
            let start = NonNull::dangling();
            return Content { start, len };
        }
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: the mapping is new, at a place that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        Content { start, len }
    }
}

impl Deref for Content {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped, or there are none; nobody changes them, as `of` says.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped in `of`; what was borrowed from here is gone.
            unsafe { munmap(self.start.as_ptr().cast(), self.len) }.unwrap();
        }
    }
}
