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
pub struct Serial<W: Write + Send> {
    uart: Mutex<Uart<Interrupt, RoomForInput, W>>,
    room: Arc<EventFd>,
}

impl<W: Write + Send> Serial<W> {
    /// A serial port that raises `interrupt` and sends to `output`.
    pub fn new(interrupt: EventFd, output: W) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let events = RoomForInput(Arc::clone(&room));
        let uart = Uart::with_events(Interrupt(interrupt), events, output);
        Ok(Serial {
            uart: Mutex::new(uart),
            room,
        })
    }

    /// How many bytes of input it takes at this moment.
    pub fn capacity(&self) -> usize {
        self.uart().fifo_capacity()
    }

    /// Gives the guest input; returns how much of it there was room for.
    pub fn input(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut uart = self.uart();
        let room = uart.fifo_capacity().min(bytes.len());
        uart.enqueue_raw_bytes(&bytes[..room])
            .map_err(|error| io::Error::other(error.to_string()))
    }

    /// Readable when the guest has taken all input.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// A panic elsewhere may have left a half-done register access behind at worst: the port
    /// goes on.
    fn uart(&self) -> MutexGuard<'_, Uart<Interrupt, RoomForInput, W>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write + Send> BusDevice for Serial<W> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Registers are bytes; a wider access reads the first one, as on the bus it was made for.
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = self.uart().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        if let Err(error) = self.uart().write(offset as u8, byte) {
            tracing::debug!("serial port: {error}");
        }
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

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;

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
    fn input_beyond_the_fifo_waits_until_the_guest_has_read() {
        let (serial, _) = port();
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
