//! The serial port: a 16550A at COM1, by vm-superio.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::BusDevice;

/// Number of I/O ports.
pub const PORTS: u8 = 8;

/// The serial port. What the guest sends goes to a writer that must never block.
///
/// Input is taken once somebody in the guest listens: a driver that starts empties the FIFO, and
/// what was typed or piped in before would be lost.
pub struct Serial<W: Write + Send> {
    port: Mutex<Port<W>>,
    room: Arc<EventFd>,
}

struct Port<W: Write + Send> {
    uart: Uart<Interrupt, RoomForInput, W>,
    listener: Listener,
}

/// Tells from the guest's accesses whether it waits for input.
#[derive(Default)]
struct Listener {
    /// The divisor latch is selected in place of the first two registers.
    divisor: bool,
    /// The interrupt for received data is enabled.
    interrupt: bool,
    /// Line status reads since something else was done: a driver that sends looks once for each
    /// byte, one that polls for input looks again and again.
    looks: u8,
}

impl Listener {
    /// Looks that tell of polling.
    const POLLS: u8 = 16;

    fn listens(&self) -> bool {
        self.interrupt || self.looks >= Self::POLLS
    }

    fn on_read(&mut self, offset: u64) {
        match offset {
            LINE_STATUS => self.looks = self.looks.saturating_add(1),
            DATA => {}
            _ => self.looks = 0,
        }
    }

    fn on_write(&mut self, offset: u64, value: u8) {
        const RECEIVED_DATA: u8 = 1 << 0;
        const DIVISOR_LATCH: u8 = 1 << 7;
        self.looks = 0;
        match offset {
            INTERRUPT_ENABLE if !self.divisor => self.interrupt = value & RECEIVED_DATA != 0,
            LINE_CONTROL => self.divisor = value & DIVISOR_LATCH != 0,
            _ => {}
        }
    }
}

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const LINE_CONTROL: u64 = 3;
const LINE_STATUS: u64 = 5;

impl<W: Write + Send> Serial<W> {
    /// A serial port that raises `interrupt` and sends to `output`.
    pub fn new(interrupt: EventFd, output: W) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let events = RoomForInput(Arc::clone(&room));
        let uart = Uart::with_events(Interrupt(interrupt), events, output);
        let port = Port {
            uart,
            listener: Listener::default(),
        };
        Ok(Serial {
            port: Mutex::new(port),
            room,
        })
    }

    /// How many bytes of input it takes at this moment.
    pub fn capacity(&self) -> usize {
        self.port().capacity()
    }

    /// Gives the guest input; returns how much of it there was room for.
    pub fn input(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut port = self.port();
        let room = port.capacity().min(bytes.len());
        if room == 0 {
            return Ok(0);
        }
        let taken = port.uart.enqueue_raw_bytes(&bytes[..room]);
        taken.map_err(|error| io::Error::other(error.to_string()))
    }

    /// Readable when there may be room for input again.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// A panic elsewhere may have left a half-done register access behind at worst: the port
    /// goes on.
    fn port(&self) -> MutexGuard<'_, Port<W>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the listener see an access, and tells of input that is wanted from now on.
    fn observe(&self, listener: &mut Listener, access: impl FnOnce(&mut Listener)) {
        let before = listener.listens();
        access(listener);
        if listener.listens() && !before {
            // A full counter is signalled already.
            let _ = self.room.write(1);
        }
    }
}

impl<W: Write + Send> Port<W> {
    fn capacity(&self) -> usize {
        match self.listener.listens() {
            true => self.uart.fifo_capacity(),
            false => 0,
        }
    }
}

impl<W: Write + Send> BusDevice for Serial<W> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Registers are bytes; a wider access reads the first one, as on the bus it was made for.
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            let mut port = self.port();
            *byte = port.uart.read(offset as u8);
            self.observe(&mut port.listener, |listener| listener.on_read(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        let mut port = self.port();
        if let Err(error) = port.uart.write(offset as u8, byte) {
            tracing::debug!("serial port: {error}");
        }
        self.observe(&mut port.listener, |listener| {
            listener.on_write(offset, byte)
        });
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells that the guest has emptied the receive FIFO.
struct RoomForInput(Arc<EventFd>);

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // A full counter is signalled already.
        let _ = self.0.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sent(Arc<Mutex<Vec<u8>>>);

    impl Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial<Sent>, Sent) {
        let sent = Sent::default();
        (
            Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), sent.clone()).unwrap(),
            sent,
        )
    }

    fn read(serial: &Serial<Sent>, offset: u64) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn what_the_guest_sends_reaches_the_writer() {
        let (serial, sent) = port();
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(*sent.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let (serial, _) = port();
        assert_eq!((serial.capacity(), serial.input(b"x").unwrap()), (0, 0));
        // The divisor latch is no interrupt enable register.
        serial.write(LINE_CONTROL, &[0x80]);
        serial.write(INTERRUPT_ENABLE, &[1]);
        serial.write(LINE_CONTROL, &[0x03]);
        assert_eq!(serial.capacity(), 0);
        serial.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(serial.room().read().unwrap(), 1);
        assert!(serial.capacity() > 0);
    }

    #[test]
    fn a_guest_that_polls_for_input_gets_it_and_one_that_only_sends_does_not() {
        let (serial, _) = port();
        for byte in b"a line that a driver sends without interrupts" {
            read(&serial, LINE_STATUS);
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(serial.capacity(), 0);
        for _ in 0..Listener::POLLS {
            read(&serial, LINE_STATUS);
        }
        assert_eq!(serial.input(b"x").unwrap(), 1);
        read(&serial, LINE_STATUS);
        assert_eq!(read(&serial, DATA), b'x');
        assert!(serial.capacity() > 0, "it still listens");
    }

    #[test]
    fn input_beyond_the_fifo_waits_until_the_guest_has_read() {
        let (serial, _) = port();
        serial.write(INTERRUPT_ENABLE, &[1]);
        serial.room().read().unwrap();
        let input = [b'x'; 100];
        let taken = serial.input(&input).unwrap();
        assert!(taken < input.len() && serial.capacity() == 0);
        assert!(
            serial.room().read().is_err(),
            "no room is reported while the FIFO is full"
        );
        for _ in 0..taken {
            assert_eq!(read(&serial, LINE_STATUS) & 1, 1);
            assert_eq!(read(&serial, DATA), b'x');
        }
        assert_eq!(serial.room().read().unwrap(), 1);
        assert_eq!(serial.capacity(), taken);
    }
}
