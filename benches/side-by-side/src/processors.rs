//! Which processors a thread may run on.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Result;

/// Some of those that this process may run on.
pub struct Processors(CpuSet);

/// Has the current thread on its processors, and where it was when dropped.
pub struct Kept(CpuSet);

impl Processors {
    /// The first, and all others.
    fn apart() -> Result<(usize, CpuSet)> {
        let mut others = sched_getaffinity(None)?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| others.is_set(*cpu));
        let first = first.ok_or("no processor to run on")?;
        others.unset(first);
        match others.count() {
            0 => Err("a driver with a processor of its own needs two: leave such cases out".into()),
            _ => Ok((first, others)),
        }
    }

    /// The driver's: one of its own.
    pub fn own() -> Result<Processors> {
        let (first, _) = Processors::apart()?;
        let mut own = CpuSet::new();
        own.set(first);
        Ok(Processors(own))
    }

    /// The server's: those that are not the driver's.
    pub fn others() -> Result<Processors> {
        Ok(Processors(Processors::apart()?.1))
    }

    /// Has the current thread on them, and what it starts.
    pub fn take(&self) -> std::io::Result<()> {
        Ok(sched_setaffinity(None, &self.0)?)
    }

    /// The same for a while.
    pub fn keep(&self) -> Result<Kept> {
        let before = sched_getaffinity(None)?;
        self.take()?;
        Ok(Kept(before))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It was right before.
        let _ = sched_setaffinity(None, &self.0);
    }
}
