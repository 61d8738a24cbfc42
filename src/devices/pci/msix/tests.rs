//! Sections are those of PCI 3.0, unless said otherwise.

use super::*;
use crate::devices::pci::fake::FakeHypervisor;

const ON: u16 = ENABLE;
const MASKED: u16 = ENABLE | FUNCTION_MASK;

fn msix(len: u16) -> (Msix, Arc<FakeHypervisor>) {
    let hypervisor = Arc::new(FakeHypervisor::default());
    (Msix::new(len, hypervisor.clone()), hypervisor)
}

/// Writes a whole entry, unmasked.
fn program(msix: &Msix, vector: u64, address: u64, data: u32) {
    msix.write_table(16 * vector, &address.to_le_bytes());
    msix.write_table(16 * vector + 8, &data.to_le_bytes());
    mask(msix, vector, false);
}

fn mask(msix: &Msix, vector: u64, masked: bool) {
    msix.write_table(16 * vector + 12, &u32::from(masked).to_le_bytes());
}

fn table(msix: &Msix, offset: u64) -> u32 {
    let mut data = [0x55; 4];
    msix.read_table(offset, &mut data);
    u32::from_le_bytes(data)
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0x55; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

/// Section 6.8.2.3: Table Size is the number of entries less one.
#[test]
fn the_capability_tells_table_size_and_offsets() {
    let (msix, _) = msix(65);
    let (registers, writable) = msix.capability(0x4000, 0x5000);
    assert_eq!(registers, [0x11, 0, 64, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    assert_eq!(writable, [0, 0, 0, 0xc0]);
}

/// Section 6.8.2.9: the mask bit is set after reset; the rest of vector control is reserved.
#[test]
fn entries_start_masked_and_keep_what_is_written() {
    let (msix, _) = msix(3);
    for vector in 0..3 {
        assert_eq!(table(&msix, 16 * vector + 12), 1);
    }
    msix.write_table(16, &0x1122_3344_fee0_1000u64.to_le_bytes());
    msix.write_table(24, &0xffff_fffe_0000_4041u64.to_le_bytes());
    assert_eq!(table(&msix, 16), 0xfee0_1000);
    assert_eq!(table(&msix, 20), 0x1122_3344);
    assert_eq!(table(&msix, 24), 0x4041);
    assert_eq!(table(&msix, 28), 0);
    assert_eq!(table(&msix, 0), 0);
    assert_eq!(table(&msix, 12), 1);
}

/// Section 6.8.2: software uses aligned dwords or quadwords; others are undefined, and dropped.
#[test]
fn odd_accesses_to_the_table_change_nothing() {
    let (msix, _) = msix(2);
    for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (1, 8), (32, 4), (64, 8)] {
        msix.write_table(offset, &vec![0xee; len]);
    }
    for offset in [0, 4, 8, 16, 20, 24, 32, 64] {
        assert_eq!(table(&msix, offset), 0, "offset {offset}");
    }
    program(&msix, 1, 0xfee0_1000, 0x41);
    let mut data = [0x55; 6];
    msix.read_table(0x16, &mut data);
    assert_eq!(data, [0, 0, 0x41, 0, 0, 0]);
}

#[test]
fn an_interrupt_is_taken_from_the_hypervisor_only_when_an_event_is_mapped() {
    let (msix, hypervisor) = msix(4);
    msix.set_control(ON);
    program(&msix, 2, 0xfee0_1000, 0x41);
    assert!(hypervisor.msis.lock().unwrap().is_empty());
    assert!(msix.claim(2));
    assert!(msix.claim(2));
    assert_eq!(hypervisor.msis.lock().unwrap().len(), 1);
    assert_eq!(hypervisor.msi_at(0).route(), Some((0xfee0_1000, 0x41)));
}

#[test]
fn a_signal_is_sent_while_the_vector_is_routed() {
    let (msix, hypervisor) = msix(2);
    msix.set_control(ON);
    assert!(msix.claim(1));
    program(&msix, 1, 0xfee0_1000, 0x41);
    msix.signal(1);
    msix.signal(1);
    assert_eq!(hypervisor.msi_at(0).signals(), 2);
    assert_eq!(pending(&msix), 0);
}

/// Section 6.8.3.5: a masked vector's message is kept in its pending bit, and sent once when it
/// is unmasked.
#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let (msix, hypervisor) = msix(2);
    msix.set_control(ON);
    assert!(msix.claim(1));
    msix.signal(1);
    msix.signal(1);
    let msi = hypervisor.msi_at(0);
    assert_eq!((msi.signals(), msi.route()), (0, None));
    assert_eq!(pending(&msix), 0b10);
    program(&msix, 1, 0xfee0_1000, 0x41);
    assert_eq!(msi.signals(), 1);
    assert_eq!(pending(&msix), 0);

    mask(&msix, 1, true);
    assert_eq!(msi.route(), None);
    msix.signal(1);
    assert_eq!((msi.signals(), pending(&msix)), (0, 0b10));
    mask(&msix, 1, false);
    assert_eq!((msi.signals(), pending(&msix)), (1, 0));
    assert_eq!(msi.route(), Some((0xfee0_1000, 0x41)));
}

/// Section 6.8.2.3: the function mask masks every vector, whatever its own mask says.
#[test]
fn the_function_mask_masks_all_vectors() {
    let (msix, hypervisor) = msix(2);
    msix.set_control(MASKED);
    for vector in 0..2 {
        assert!(msix.claim(vector));
        program(&msix, vector.into(), 0xfee0_1000, vector.into());
    }
    msix.signal(0);
    assert_eq!(hypervisor.msi_at(0).route(), None);
    assert_eq!(pending(&msix), 0b01);
    msix.set_control(ON);
    assert_eq!(hypervisor.msi_at(0).signals(), 1);
    assert_eq!(hypervisor.msi_at(1).route(), Some((0xfee0_1000, 1)));
    assert_eq!(hypervisor.msi_at(1).signals(), 0);
    msix.set_control(MASKED);
    assert_eq!(hypervisor.msi_at(1).route(), None);
}

/// Section 6.8.2.3: a function whose MSI-X is off sends no message.
#[test]
fn nothing_is_sent_while_msix_is_off() {
    let (msix, hypervisor) = msix(1);
    assert!(!msix.enabled());
    assert!(msix.claim(0));
    program(&msix, 0, 0xfee0_1000, 0x41);
    msix.signal(0);
    msix.set_control(ON);
    assert!(msix.enabled());
    assert_eq!(hypervisor.msi_at(0).signals(), 0);
    msix.set_control(0);
    assert_eq!(hypervisor.msi_at(0).route(), None);
}

#[test]
fn a_message_changed_while_unmasked_is_routed_anew() {
    let (msix, hypervisor) = msix(1);
    msix.set_control(ON);
    assert!(msix.claim(0));
    program(&msix, 0, 0xfee0_1000, 0x41);
    msix.write_table(8, &0x42u32.to_le_bytes());
    assert_eq!(hypervisor.msi_at(0).route(), Some((0xfee0_1000, 0x42)));
    let routings = *hypervisor.msi_at(0).routings.lock().unwrap();
    msix.write_table(8, &0x42u32.to_le_bytes());
    msix.set_control(ON);
    assert_eq!(*hypervisor.msi_at(0).routings.lock().unwrap(), routings);
}

#[test]
fn a_reset_forgets_what_is_pending() {
    let (msix, hypervisor) = msix(1);
    msix.set_control(ON);
    assert!(msix.claim(0));
    msix.signal(0);
    msix.clear_pending();
    assert_eq!(pending(&msix), 0);
    program(&msix, 0, 0xfee0_1000, 0x41);
    assert_eq!(hypervisor.msi_at(0).signals(), 0);
}

/// What somebody outside of the process signals goes the way of all other signals.
#[test]
fn an_eventfd_that_is_given_away_is_masked_and_pending_like_its_vector() {
    let (msix, hypervisor) = msix(2);
    assert!(msix.eventfd(0).is_none(), "MSI-X is off");
    msix.set_control(ON);
    assert!(msix.eventfd(0).is_none(), "no event is mapped to it");
    assert!(msix.claim(0) && msix.claim(1));
    let given = msix.eventfd(1).unwrap();
    given.write(1).unwrap();
    given.write(1).unwrap();
    assert_eq!(pending(&msix), 0b10);
    program(&msix, 1, 0xfee0_1000, 0x41);
    let msi = hypervisor.msi_at(1);
    assert_eq!((msi.signals(), pending(&msix)), (1, 0));
    given.write(1).unwrap();
    assert_eq!((msi.signals(), pending(&msix)), (1, 0));
    mask(&msix, 1, true);
    given.write(1).unwrap();
    assert_eq!((msi.signals(), pending(&msix)), (0, 0b10));
    mask(&msix, 1, false);
    assert_eq!((msi.signals(), pending(&msix)), (1, 0));

    mask(&msix, 1, true);
    given.write(1).unwrap();
    msix.clear_pending();
    assert_eq!(pending(&msix), 0);
    mask(&msix, 1, false);
    assert_eq!(msi.signals(), 0);
    msix.set_control(0);
    assert!(msix.eventfd(1).is_none());
}

/// Section 6.8.2.10: a bit a vector, in order; bits past the last vector are zero.
#[test]
fn pending_bits_are_in_the_order_of_the_vectors() {
    let (msix, _) = msix(65);
    msix.set_control(ON);
    for vector in [0, 9, 63, 64, 65, 0xffff] {
        msix.signal(vector);
    }
    assert_eq!(pending(&msix), 1 << 63 | 1 << 9 | 1);
    let mut data = [0x55; 16];
    msix.read_pending(8, &mut data);
    assert_eq!(data[0], 1);
    assert_eq!(data[1..], [0; 15]);
}

#[test]
fn a_hypervisor_without_interrupts_fails_the_claim() {
    let (msix, hypervisor) = msix(2);
    hypervisor.refuse_msi.store(true, Ordering::SeqCst);
    assert!(!msix.claim(0));
    hypervisor.refuse_msi.store(false, Ordering::SeqCst);
    assert!(msix.claim(0));
    assert!(!msix.claim(2), "there is no vector 2");
}

#[test]
fn a_route_that_is_refused_leaves_the_signal_pending() {
    let (msix, hypervisor) = msix(1);
    msix.set_control(ON);
    assert!(msix.claim(0));
    hypervisor.refuse_route.store(true, Ordering::SeqCst);
    program(&msix, 0, 0xfee0_1000, 0x41);
    msix.signal(0);
    assert_eq!((hypervisor.msi_at(0).signals(), pending(&msix)), (0, 1));
    assert!(!msix.claim(0));
    hypervisor.refuse_route.store(false, Ordering::SeqCst);
    msix.signal(0);
    assert_eq!((hypervisor.msi_at(0).signals(), pending(&msix)), (1, 0));
}

/// The driver masks the vector on another vCPU, in the middle of a signal: this hypervisor loses
/// what is signalled without a route, but the vector is pending.
#[test]
fn no_signal_is_lost_to_a_mask_at_the_same_time() {
    let (msix, hypervisor) = msix(1);
    let msix = Arc::new(msix);
    msix.set_control(ON);
    assert!(msix.claim(0));
    program(&msix, 0, 0xfee0_1000, 0x41);
    let msi = hypervisor.msi_at(0);
    let other = msix.clone();
    *msi.interfere.lock().unwrap() = Some(Box::new(move || mask(&other, 0, true)));
    msix.signal(0);
    assert_eq!((msi.signals(), pending(&msix)), (0, 1));
    mask(&msix, 0, false);
    assert_eq!((msi.signals(), pending(&msix)), (1, 0));

    let other = msix.clone();
    *msi.interfere.lock().unwrap() = Some(Box::new(move || {
        mask(&other, 0, true);
        mask(&other, 0, false);
    }));
    msix.signal(0);
    assert!(msi.signals() >= 1);
}
