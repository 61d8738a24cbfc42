//! Tests of the block device through virtqueues, by sections of virtio 1.3.

mod chains;
mod device;
mod fake;
mod faults;
mod lifecycle;
mod model;
mod normative;
mod polling;
mod qcow2;
mod requests;
mod unflushed;

use std::path::PathBuf;
use std::sync::Arc;

use formats::{Engine, Format, Image};
use tempfile::TempDir;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::GuestMemory;
use crate::devices::virtio::testing::*;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Size of a test's disk unless it says otherwise.
const SIZE: u64 = 1 << 20;

/// What no device writes into a status byte.
const UNTOUCHED: u8 = 0xa5;

/// How a test's disk is made.
#[derive(Clone)]
struct Setup {
    format: &'static Format,
    ephemeral: bool,
    engine: Engine,
    poll: Option<Duration>,
    size: u64,
    ro: bool,
    o_direct: bool,
    block_size: u32,
    queues: u16,
    queue_size: u16,
    id: Option<String>,
    /// Features that the driver declines.
    declined: u64,
}

impl Setup {
    fn new(format: &'static Format) -> Setup {
        Setup {
            format,
            ephemeral: false,
            engine: Engine::Auto,
            poll: None,
            size: SIZE,
            ro: false,
            o_direct: false,
            block_size: 512,
            queues: 1,
            queue_size: 256,
            id: None,
            declined: 0,
        }
    }

    fn raw() -> Setup {
        Setup::new(formats::find("raw").unwrap())
    }

    fn sparse_raw() -> Setup {
        Setup::new(formats::find("sparse-raw").unwrap())
    }

    fn decline(mut self, feature: u32) -> Setup {
        self.declined |= 1 << feature;
        self
    }

    /// How to open the image at `path`.
    fn options(&self, path: PathBuf) -> BlkOptions {
        BlkOptions {
            image: Image {
                ro: self.ro,
                sparse: self.format.name != "raw",
                o_direct: self.o_direct,
                block_size: self.block_size,
                ..Image::new(path)
            },
            format: self.format,
            ephemeral: self.ephemeral,
            id: self.id.clone(),
            queues: self.queues,
            engine: self.engine,
            poll: self.poll,
            cpus: Vec::new(),
        }
    }

    /// A disk of pseudorandom bytes, not plugged in.
    fn open(&self) -> (Blk, TempDir) {
        let dir = match self.o_direct {
            false => tempfile::tempdir(),
            // A directory for temporary files may be in memory, where there is no O_DIRECT.
            true => tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()),
        };
        let dir = dir.unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, pattern(0, self.size)).unwrap();
        (Blk::open(self.options(path)).unwrap(), dir)
    }

    /// A disk of pseudorandom bytes, plugged in and activated.
    fn boot(&self) -> Guest {
        let (blk, dir) = self.open();
        self.plug(blk, dir)
    }

    /// Plugs a disk in and activates it.
    fn plug(&self, blk: Blk, dir: TempDir) -> Guest {
        let mut guest = Guest {
            setup: self.clone(),
            memory: guest_memory(),
            line: Arc::default(),
            drivers: Vec::new(),
            features: 0,
            blk,
            dir,
        };
        guest.activate().unwrap();
        guest
    }
}

/// Runs a test on every format of raw images and every engine.
fn each_backend(test: impl Fn(Setup)) {
    for format in [Setup::raw(), Setup::sparse_raw()] {
        for engine in [Engine::IoUring, Engine::Threads] {
            let setup = Setup {
                engine,
                ..format.clone()
            };
            println!("{} {engine:?}", setup.format.name);
            test(setup);
        }
    }
}

/// The pseudorandom bytes that a fresh disk has at `offset`: no two sectors are alike.
fn pattern(offset: u64, len: u64) -> Vec<u8> {
    let byte = |at: u64| {
        let sector = (at / 512 + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes();
        sector[at as usize % 8] ^ (at / 8) as u8
    };
    (offset..offset + len).map(byte).collect()
}

/// Header of a request.
fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// One segment of a discard or write-zeroes request.
fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

/// What a request came to.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    /// The device-writable data.
    data: Vec<u8>,
    /// Used length.
    len: u32,
}

/// A disk in a machine that has no processor: the test is its driver.
struct Guest {
    setup: Setup,
    memory: Arc<GuestMemory>,
    line: Arc<Line>,
    drivers: Vec<Driver>,
    features: u64,
    blk: Blk,
    dir: TempDir,
}

impl Guest {
    /// Does what a transport does at DRIVER_OK.
    fn activate(&mut self) -> io::Result<()> {
        self.features = self.blk.features() & !self.setup.declined;
        self.blk.connect(Arc::clone(&self.line) as _);
        self.blk.negotiated(self.features);
        let max_sizes = self.blk.queue_max_sizes();
        self.drivers = (0..)
            .zip(max_sizes)
            .map(|(index, max_size)| {
                let size = self.setup.queue_size;
                let (memory, line) = (&self.memory, &self.line);
                Driver::new(memory, line, index, size, max_size, self.features)
            })
            .collect();
        self.blk.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: self.features,
            queues: self.drivers.iter().map(Driver::active).collect(),
            interrupt: Arc::clone(&self.line) as _,
        })
    }

    fn reset(&mut self) {
        self.blk.reset();
        self.line = Arc::default();
    }

    fn store(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn load(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Places a request at `at`: header, device-readable data, device-writable data, status.
    fn place(&self, at: u64, header: &[u8], out: &[u8], back: usize) -> Vec<Buf> {
        self.store(at, header);
        self.store(at + 0x100, out);
        let data = at + 0x100 + out.len() as u64;
        self.store(data, &vec![UNTOUCHED; back + 1]);
        let buffers = [
            readable(at, header.len() as u32),
            readable(at + 0x100, out.len() as u32),
            writable(data, back as u32),
            writable(data + back as u64, 1),
        ];
        buffers
            .into_iter()
            .filter(|buffer| buffer.len > 0)
            .collect()
    }

    /// Carries out one request on the first virtqueue.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], back: usize) -> Answer {
        self.raw_request(&header(kind, sector), out, back)
    }

    /// As `request`, with any bytes for a header.
    fn raw_request(&mut self, header: &[u8], out: &[u8], back: usize) -> Answer {
        let buffers = self.place(BUFFERS, header, out, back);
        self.chain_request(&buffers)
    }

    /// Carries out a request whose buffers are in place; its answer is their writable part.
    fn chain_request(&mut self, buffers: &[Buf]) -> Answer {
        let head = self.drivers[0].chain(buffers);
        self.drivers[0].submit(head);
        let (used, len) = self.drivers[0].wait_used();
        assert_eq!(used, head);
        self.answer(buffers, len)
    }

    fn answer(&self, buffers: &[Buf], len: u32) -> Answer {
        let mut data: Vec<u8> = buffers
            .iter()
            .filter(|buffer| buffer.writable)
            .flat_map(|buffer| self.load(buffer.address, buffer.len as usize))
            .collect();
        let status = data.pop().unwrap();
        Answer { status, data, len }
    }

    fn read(&mut self, sector: u64, len: usize) -> Answer {
        self.request(VIRTIO_BLK_T_IN, sector, &[], len)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> Answer {
        self.request(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    fn flush(&mut self) -> Answer {
        self.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0)
    }

    fn discard(&mut self, segments: &[[u8; 16]]) -> Answer {
        self.request(VIRTIO_BLK_T_DISCARD, 0, segments.as_flattened(), 0)
    }

    fn write_zeroes(&mut self, segments: &[[u8; 16]]) -> Answer {
        self.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, segments.as_flattened(), 0)
    }

    /// The configuration space.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0xff; 100];
        self.blk.read_config(0, &mut config);
        config
    }

    /// What the host has in the image.
    fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("disk.img")).unwrap()
    }

    /// The disk serves as before: after an error nothing may be stuck.
    fn still_serves(&mut self) {
        let answer = self.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
        assert_eq!((answer.status, answer.len), (OK, 21));
    }
}

/// Waits until the disk's thread has gone to sleep once more.
fn settle(guest: &Guest) {
    for _ in 0..2 {
        // It refuses a size that is not whole blocks, but it has answered.
        guest.blk.handle().resize(1).unwrap_err();
    }
}

/// An answer without data.
fn status(status: u8) -> Answer {
    let data = Vec::new();
    Answer {
        status,
        data,
        len: 1,
    }
}
