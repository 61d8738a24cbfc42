//! A bus of port I/O or memory-mapped I/O: ranges of addresses, each with the device behind it.

use std::ops::Range;
use std::sync::Arc;

use crate::devices::BusDevice;
use crate::{Error, Result};

/// The devices of one address space, found by binary search.
///
/// Built before the vCPUs start and not changed after: a lookup takes no lock.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start, without overlap.
    mappings: Vec<Mapping>,
}

struct Mapping {
    range: Range<u64>,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// A bus with no device.
    pub fn new() -> Self {
        Bus::default()
    }

    /// Puts `device` at the addresses `range`.
    ///
    /// Fails if the range is empty or overlaps one that is taken: two devices at one address are
    /// a mistake of the machine's layout.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<()> {
        if range.is_empty() {
            return Err(Error::failed(format!(
                "bus range {:#x}..{:#x} is empty",
                range.start, range.end
            )));
        }
        let position = self
            .mappings
            .partition_point(|mapping| mapping.range.end <= range.start);
        if let Some(Mapping { range: taken, .. }) = self.mappings.get(position)
            && taken.start < range.end
        {
            return Err(Error::failed(format!(
                "bus range {:#x}..{:#x} overlaps {:#x}..{:#x}",
                range.start, range.end, taken.start, taken.end
            )));
        }
        self.mappings.insert(position, Mapping { range, device });
        Ok(())
    }

    /// The guest reads at `address`. Where there is nothing, all bits are ones: nobody drives
    /// the lines of the bus. An access that leaves its device's range finds nothing.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes at `address`. Where there is nothing, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device that holds all `len` bytes at `address`, and the offset in its range.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let after = self
            .mappings
            .partition_point(|mapping| mapping.range.start <= address);
        let mapping = self.mappings.get(after.checked_sub(1)?)?;
        let end = address.checked_add(len as u64)?;
        (end <= mapping.range.end).then(|| (mapping.device.as_ref(), address - mapping.range.start))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Reads as its offset, remembers writes.
    #[derive(Default)]
    struct Probe {
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut data = [0x55];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn an_access_reaches_the_device_of_its_range_with_the_offset_in_it() {
        let mut bus = Bus::new();
        let devices: Vec<_> = (0..5).map(|_| Arc::new(Probe::default())).collect();
        // Not in the order of their addresses.
        for index in [3u64, 0, 4, 1, 2] {
            let start = 0x100 * index;
            bus.insert(start..start + 0x20, devices[index as usize].clone())
                .unwrap();
        }
        for index in 0..5u64 {
            assert_eq!(read(&bus, 0x100 * index + 7), 7);
            bus.write(0x100 * index + 9, &[index as u8, 1]);
            let written = devices[index as usize].written.lock().unwrap();
            assert_eq!(*written, [(9, vec![index as u8, 1])]);
        }
    }

    #[test]
    fn a_read_of_nothing_gives_all_ones() {
        let mut bus = Bus::new();
        assert_eq!(read(&bus, 0), 0xff);
        bus.insert(0x10..0x20, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xf, 0x20, u64::MAX] {
            assert_eq!(read(&bus, address), 0xff, "{address:#x}");
        }
        assert_eq!(read(&bus, 0x1f), 0xf);
    }

    #[test]
    fn an_access_across_the_end_of_a_range_finds_nothing() {
        let mut bus = Bus::new();
        let probe = Arc::new(Probe::default());
        bus.insert(0x10..0x20, probe.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x1e, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(0x1e, &data);
        bus.write(0xe, &data);
        assert!(probe.written.lock().unwrap().is_empty());
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn a_range_that_overlaps_another_is_refused() {
        let mut bus = Bus::new();
        bus.insert(0x10..0x20, Arc::new(Probe::default())).unwrap();
        for range in [0x10..0x20, 0x0..0x11, 0x1f..0x30, 0x12..0x14, 0x0..0x100] {
            let error = bus
                .insert(range.clone(), Arc::new(Probe::default()))
                .unwrap_err();
            assert!(error.to_string().contains("overlaps 0x10..0x20"), "{error}");
        }
        bus.insert(0x0..0x10, Arc::new(Probe::default())).unwrap();
        bus.insert(0x20..0x21, Arc::new(Probe::default())).unwrap();
    }

    #[test]
    fn an_empty_range_is_refused() {
        let error = Bus::new()
            .insert(0x10..0x10, Arc::new(Probe::default()))
            .unwrap_err();
        assert!(error.to_string().contains("empty"), "{error}");
    }
}
