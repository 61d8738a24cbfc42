//! A disk without its image.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::features::QUEUE_SIZE;
use crate::devices::virtio::{Activation, Device, Interrupt};

/// What the bus sees of a disk whose image is not opened: it can be plugged in, and no more.
#[derive(Debug)]
pub struct Unopened {
    queues: u16,
}

impl Unopened {
    /// A disk with so many virtqueues.
    pub fn new(queues: u16) -> Self {
        Unopened { queues }
    }
}

impl Device for Unopened {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _activation: Activation) -> io::Result<()> {
        Err(io::Error::other("the disk's image is not open"))
    }

    fn reset(&mut self) {}

    fn connect(&mut self, _interrupt: Arc<dyn Interrupt>) {}
}
