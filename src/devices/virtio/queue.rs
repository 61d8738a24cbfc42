//! A virtqueue as a device serves it (virtio 1.3 section 2.7).

use std::fmt;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{BrokenChain, Chain, DescriptorTable, Scratch};
use super::{ActiveQueue, Interrupt, Record};
use crate::devices::GuestMemory;

/// A virtqueue that is being served, by one thread.
///
/// Every head that [`Virtqueue::take`] hands out is given back once, with
/// [`Virtqueue::give_back`].
pub(crate) struct Virtqueue {
    index: u16,
    queue: Queue,
    table: DescriptorTable,
    /// Heads taken and not given back.
    in_flight: u16,
    /// Whether the driver notifies of the next available buffer.
    notified: bool,
    /// Whether used buffers wait for [`Virtqueue::signal`].
    unsignalled: bool,
    interrupt: Arc<dyn Interrupt>,
    record: Option<Box<dyn Record>>,
    /// Heads that an earlier device had in flight, and that nobody has been given yet.
    resumed: Vec<u16>,
}

/// A virtqueue whose rings make no sense: nothing can be taken from it any more.
#[derive(Debug)]
pub(crate) struct BrokenRing(String);

impl fmt::Display for BrokenRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<BrokenRing> for io::Error {
    fn from(broken: BrokenRing) -> Self {
        io::Error::other(broken.0)
    }
}

impl From<virtio_queue::Error> for BrokenRing {
    fn from(error: virtio_queue::Error) -> Self {
        BrokenRing(error.to_string())
    }
}

impl Virtqueue {
    /// Serves the rings of `active`, with the features that were negotiated. The second value is
    /// the eventfd that the driver's notifications signal. Fails if the rings are not inside
    /// guest memory.
    pub(crate) fn new(
        active: ActiveQueue,
        memory: &Rc<GuestMemory>,
        features: u64,
        interrupt: &Arc<dyn Interrupt>,
    ) -> io::Result<(Self, OwnedFd)> {
        let ActiveQueue {
            index,
            mut queue,
            kick,
            mut record,
        } = active;
        if !queue.is_valid::<GuestMemory>(memory) {
            let message = format!("the rings of virtqueue {index} lie outside guest memory");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let table = DescriptorTable {
            memory: Rc::clone(memory),
            address: GuestAddress(queue.desc_table()),
            size: queue.size(),
            longest: queue.max_size(),
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        };
        let resumed = record.as_mut().map(|record| record.resume());
        let resumed = resumed.unwrap_or_default();
        let size = queue.size();
        if resumed.len() > usize::from(size) || resumed.iter().any(|head| *head >= size) {
            let message = format!("the record of virtqueue {index} names heads that it has not");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let virtqueue = Virtqueue {
            index,
            queue,
            table,
            in_flight: 0,
            notified: false,
            unsignalled: false,
            interrupt: Arc::clone(interrupt),
            record,
            resumed,
        };
        // SAFETY: `into_raw_fd` gives the descriptor away, and nobody else has it.
        let kick = unsafe { OwnedFd::from_raw_fd(kick.into_raw_fd()) };
        Ok((virtqueue, kick))
    }

    /// Takes up to `most` chains, as [`Virtqueue::take_available`] does; if there is none, the
    /// driver notifies of the next.
    ///
    /// While chains come, notifications stay off: the caller comes back before it sleeps.
    pub(crate) fn take(
        &mut self,
        most: usize,
        mut take: impl FnMut(u16),
    ) -> Result<bool, BrokenRing> {
        loop {
            if self.take_available(most, &mut take)? {
                return Ok(true);
            }
            if self.notified {
                return Ok(false);
            }
            self.notified = true;
            if !self.queue.enable_notification(&*self.table.memory)? {
                return Ok(false);
            }
        }
    }

    /// Takes up to `most` chains that the driver has made available, or, before any of those, all
    /// that a record names; passes their heads to `take`, and returns whether there was one. If
    /// there was none, whether the driver notifies of the next stays as it is.
    ///
    /// Bounded by the queue size, whatever the driver does meanwhile.
    pub(crate) fn take_available(
        &mut self,
        most: usize,
        mut take: impl FnMut(u16),
    ) -> Result<bool, BrokenRing> {
        let memory: &GuestMemory = &self.table.memory;
        let before = self.queue.next_avail();
        if !self.resumed.is_empty() {
            for head in std::mem::take(&mut self.resumed) {
                self.in_flight += 1;
                take(head);
            }
            return Ok(true);
        }
        let (size, in_flight) = (self.table.size, &mut self.in_flight);
        for chain in self.queue.iter(memory)?.take(most) {
            let head = chain.head_index();
            if head >= size {
                return Err(BrokenRing(format!(
                    "the available ring names descriptor {head} of {size}"
                )));
            }
            if *in_flight == size {
                return Err(BrokenRing(format!(
                    "more than {size} chains are in flight, the size of the virtqueue"
                )));
            }
            *in_flight += 1;
            if let Some(record) = &mut self.record {
                record.taken(head);
            }
            take(head);
        }
        if self.queue.next_avail() == before {
            return Ok(false);
        }
        if std::mem::take(&mut self.notified) {
            self.queue.disable_notification(memory)?;
        }
        Ok(true)
    }

    /// Whether there is something to take, or to find out about.
    pub(crate) fn has_available(&self) -> bool {
        let memory: &GuestMemory = &self.table.memory;
        let available = self.queue.avail_idx(memory, Ordering::Acquire);
        !self.resumed.is_empty()
            || available.map_or(true, |index| index.0 != self.queue.next_avail())
    }

    /// Walks the chain of a head that was taken.
    pub(crate) fn chain(&self, head: u16, scratch: &mut Scratch) -> Result<Chain, BrokenChain> {
        self.table.walk(head, scratch)
    }

    /// Puts a head into the used ring. `len` is the number of bytes that were written from the
    /// first device-writable byte on.
    pub(crate) fn give_back(&mut self, head: u16, len: u32) -> Result<(), BrokenRing> {
        let memory: &GuestMemory = &self.table.memory;
        if let Some(record) = &mut self.record {
            record.returning(head);
        }
        self.queue.add_used(memory, head, len)?;
        if let Some(record) = &mut self.record {
            record.returned(head, self.queue.next_used());
        }
        self.in_flight -= 1;
        self.unsignalled = true;
        Ok(())
    }

    /// Interrupts the driver if buffers were used since the last call and it wants to know.
    /// Returns whether it was interrupted.
    pub(crate) fn signal(&mut self) -> Result<bool, BrokenRing> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        let memory: &GuestMemory = &self.table.memory;
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(memory)?
        } else {
            // The used index must be visible before the flags are read: a driver that has just
            // cleared them looks at the index next (section 2.7.7).
            fence(Ordering::SeqCst);
            let flags: u16 = memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(virtio_queue::Error::GuestMemory)?;
            u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::devices::virtio::testing::{Driver, Line, guest_memory};

    /// A record that writes down what it is told.
    #[derive(Clone, Default)]
    struct Told {
        resume: Vec<u16>,
        words: Arc<Mutex<Vec<String>>>,
    }

    impl Told {
        fn tell(&self, word: String) {
            self.words.lock().unwrap().push(word);
        }
    }

    impl Record for Told {
        fn resume(&mut self) -> Vec<u16> {
            std::mem::take(&mut self.resume)
        }

        fn taken(&mut self, head: u16) {
            self.tell(format!("taken {head}"));
        }

        fn returning(&mut self, head: u16) {
            self.tell(format!("returning {head}"));
        }

        fn returned(&mut self, head: u16, used: u16) {
            self.tell(format!("returned {head}, used {used}"));
        }
    }

    fn virtqueue(driver: &Driver, record: Told) -> io::Result<Virtqueue> {
        let memory = Rc::new(GuestMemory::clone(&driver.memory));
        let mut active = driver.active();
        active.queue.set_next_avail(record.resume.len() as u16);
        active.record = Some(Box::new(record));
        let line: Arc<dyn Interrupt> = Arc::new(Line::default());
        Ok(Virtqueue::new(active, &memory, 0, &line)?.0)
    }

    fn driver() -> Driver {
        Driver::new(&guest_memory(), &Arc::default(), 0, 8, 8, 0)
    }

    fn driver_offering(heads: [u16; 3]) -> Driver {
        let mut driver = driver();
        heads.iter().for_each(|head| driver.offer(*head));
        driver.publish();
        driver
    }

    fn take(queue: &mut Virtqueue) -> Vec<u16> {
        let mut heads = Vec::new();
        queue.take(usize::MAX, |head| heads.push(head)).unwrap();
        heads
    }

    #[test]
    fn heads_of_an_earlier_device_are_taken_first_and_recorded_once() {
        let driver = driver_offering([4, 2, 6]);
        let told = Told {
            resume: vec![2, 4],
            ..Told::default()
        };
        let mut queue = virtqueue(&driver, told.clone()).unwrap();
        assert_eq!(take(&mut queue), [2, 4]);
        assert_eq!(take(&mut queue), [6]);
        queue.give_back(4, 0).unwrap();
        assert_eq!(driver.used_index(), 1);
        let words = told.words.lock().unwrap();
        assert_eq!(*words, ["taken 6", "returning 4", "returned 4, used 1"]);
    }

    #[test]
    fn no_more_heads_are_taken_than_asked_for_and_the_next_call_goes_on() {
        let driver = driver_offering([4, 2, 6]);
        let mut queue = virtqueue(&driver, Told::default()).unwrap();
        for expected in [vec![4, 2], vec![6], vec![]] {
            let mut heads = Vec::new();
            let any = queue.take(2, |head| heads.push(head)).unwrap();
            assert_eq!(heads, expected);
            assert_eq!(any, !expected.is_empty());
        }
    }

    #[test]
    fn a_record_of_heads_that_a_virtqueue_has_not_is_refused() {
        for resume in [vec![8], vec![0; 9]] {
            let told = Told {
                resume,
                ..Told::default()
            };
            assert!(virtqueue(&driver(), told).is_err());
        }
    }
}
