//! A hypervisor for tests: remembers what it was asked, and can be told to refuse.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::{Hypervisor, Msi};

/// One interrupt, as its user left it. What is signalled without a route is lost, which is the
/// worst that a hypervisor may do.
pub(crate) struct FakeMsi {
    eventfd: EventFd,
    /// What was signalled before the route was last taken away.
    delivered: AtomicU64,
    pub(crate) route: Mutex<Option<(u64, u32)>>,
    /// Number of calls of `route`.
    pub(crate) routings: Mutex<usize>,
    refuse: Arc<AtomicBool>,
    /// Run once, just before the next signal.
    pub(crate) interfere: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl FakeMsi {
    /// How many signals arrived since the last call.
    pub(crate) fn signals(&self) -> u64 {
        let route = self.route.lock().unwrap();
        let new = if route.is_some() { self.drain() } else { 0 };
        self.delivered.swap(0, Ordering::SeqCst) + new
    }

    fn drain(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }

    pub(crate) fn route(&self) -> Option<(u64, u32)> {
        *self.route.lock().unwrap()
    }
}

struct Handle(Arc<FakeMsi>);

impl Msi for Handle {
    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        if self.0.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut route = self.0.route.lock().unwrap();
        if route.is_none() {
            self.0.drain();
        }
        *route = Some((address, data));
        *self.0.routings.lock().unwrap() += 1;
        Ok(())
    }

    fn unroute(&self) -> io::Result<()> {
        let mut route = self.0.route.lock().unwrap();
        if route.take().is_some() {
            self.0.delivered.fetch_add(self.0.drain(), Ordering::SeqCst);
        }
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        let interfere = self.0.interfere.lock().unwrap().take();
        if let Some(interfere) = interfere {
            interfere();
        }
        &self.0.eventfd
    }
}

/// A hypervisor that records.
#[derive(Default)]
pub(crate) struct FakeHypervisor {
    pub(crate) msis: Mutex<Vec<Arc<FakeMsi>>>,
    /// Address and descriptor, in the order they were added.
    pub(crate) doorbells: Mutex<Vec<(u64, i32)>>,
    pub(crate) refuse_msi: AtomicBool,
    pub(crate) refuse_route: Arc<AtomicBool>,
    pub(crate) refuse_doorbell: AtomicBool,
}

impl FakeHypervisor {
    pub(crate) fn msi_at(&self, index: usize) -> Arc<FakeMsi> {
        self.msis.lock().unwrap()[index].clone()
    }

    pub(crate) fn doorbell_addresses(&self) -> Vec<u64> {
        let doorbells = self.doorbells.lock().unwrap();
        doorbells.iter().map(|(address, _)| *address).collect()
    }
}

impl Hypervisor for FakeHypervisor {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        if self.refuse_msi.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let msi = Arc::new(FakeMsi {
            eventfd: EventFd::new(EFD_NONBLOCK)?,
            delivered: AtomicU64::new(0),
            route: Mutex::default(),
            routings: Mutex::default(),
            refuse: self.refuse_route.clone(),
            interfere: Mutex::default(),
        });
        self.msis.lock().unwrap().push(msi.clone());
        Ok(Box::new(Handle(msi)))
    }

    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let taken = doorbells.iter().any(|(taken, _)| *taken == address);
        if taken || self.refuse_doorbell.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.push((address, fd.as_raw_fd()));
        Ok(())
    }

    fn remove_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let doorbell = (address, fd.as_raw_fd());
        let position = doorbells.iter().position(|found| *found == doorbell);
        let position = position.expect("removes only what it added");
        doorbells.remove(position);
        Ok(())
    }
}
