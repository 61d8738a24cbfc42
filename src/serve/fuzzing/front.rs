//! A front end, with a guest in it, that does what a script says.

use rustix::event::PollFlags;

use super::Bench;
use super::connection::{Connection, GET_FEATURES, MAX_FILES, ready};
use super::guest::*;
use super::messages::*;
use super::script::Script;

/// Milliseconds that a guest waits for an answer that need not come.
const BRIEFLY: i64 = 2;

pub(super) struct Front<'a> {
    connection: Connection,
    guest: Guest,
    files: Files,
    bench: &'a Bench,
}

impl<'a> Front<'a> {
    pub(super) fn new(bench: &'a Bench) -> Front<'a> {
        let guest = Guest::new();
        Front {
            connection: Connection::new(&bench.address),
            files: Files::new(&guest),
            guest,
            bench,
        }
    }

    /// Plays a script to its end, or until the server hangs up.
    pub(super) fn play(mut self, script: &mut Script<'_>) {
        self.open(script);
        while !script.is_over() && !self.connection.gone {
            match script.byte() {
                0..0x60 => self.message(script),
                0x60..0xa0 => self.request(script),
                0xa0..0xc0 => {
                    let (how, queue) = (script.byte(), script.byte());
                    self.kick(how, queue);
                }
                0xc0..0xc8 => {
                    let table = at(script.byte().into(), u64::from(script.byte() & 3) << 10);
                    let index = u64::from(script.byte() % 64);
                    let descriptor = Descriptor {
                        address: script.number(),
                        len: script.number() as u32,
                        flags: u16::from(script.byte() & 7),
                        next: script.byte().into(),
                    };
                    self.guest.describe(table, index, descriptor);
                }
                0xc8..0xd0 => {
                    let queue = script.byte().into();
                    let area = script.choose(&areas(queue));
                    let (at, value) = (area + u64::from(script.byte()), script.number());
                    self.guest.write(at, &value.to_le_bytes()[..2]);
                }
                0xd0..0xd8 => {
                    let (queue, value) = (script.byte(), script.u16());
                    match queue & 2 {
                        0 => self.guest.publish(queue.into(), value),
                        _ => self.guest.jump(queue.into(), value),
                    }
                }
                0xd8..0xe0 => {
                    let (at, value) = (script.u16() % 2240, script.number());
                    let len = usize::from(script.byte() % 8) + 1;
                    let bytes = &value.to_le_bytes()[..len];
                    // Inside of what the server has made, and of ours.
                    let _ = rustix::io::pwrite(self.files.of(Sent::Record), bytes, at.into());
                }
                0xe0..0xe4 => {
                    // Whether it is read or filled: what the server waits for may be gone again.
                    let mut value = [0; 8];
                    let _ = rustix::io::read(&self.files.full, &mut value);
                    if script.byte() & 1 != 0 {
                        let full = (u64::MAX - 1).to_ne_bytes();
                        let _ = rustix::io::write(&self.files.full, &full);
                    }
                }
                0xe4..0xe8 => self.guest.truncate(u64::from(script.byte()) << 12),
                0xe8..0xec => {
                    let more = u64::from(script.byte() % 8) * 512;
                    self.bench.grow(more);
                }
                0xec..0xf0 => {
                    let mut bytes = [0; 64];
                    if ready(&self.files.channel[1], PollFlags::IN, 0) {
                        let _ = rustix::io::read(&self.files.channel[1], &mut bytes);
                    }
                }
                0xf0..0xfc => self.settle(),
                _ => {
                    let count = usize::from(script.byte() % 40);
                    let bytes: Vec<u8> = (0..count).map(|_| script.byte()).collect();
                    let files = [self.files.of(Sent::Call)];
                    let count = usize::from(script.byte() & 1);
                    self.connection.torn = true;
                    self.connection.send(&bytes, &files[..count]);
                }
            }
        }
        self.connection.end();
    }

    /// Most sessions begin as they should.
    fn open(&mut self, script: &mut Script<'_>) {
        let [how, options, declined, size] = [(); 4].map(|()| script.byte());
        self.guest.size = [64, 64, 64, 256, 32, 8, 1, 1024][usize::from(size % 8)];
        if how % 8 == 7 {
            return;
        }
        let protocol = PROTOCOL | (u64::from(options & 1) * REPLY_ACK);
        self.say(SET_PROTOCOL_FEATURES, &[protocol], &[]);
        self.connection.say(GET_FEATURES, 0, &[], &[]);
        let Some(answer) = self.connection.expect(GET_FEATURES) else {
            return;
        };
        let offered = u64::from_le_bytes(answer.body.try_into().unwrap());
        let declined = (0..)
            .zip(OPTIONAL)
            .filter(|(at, _)| declined >> at & 1 != 0)
            .fold(0, |all, (_, bit)| all | 1 << bit);
        self.say(SET_FEATURES, &[offered & !declined], &[]);
        if how % 8 == 6 {
            return;
        }
        if options & 2 != 0 {
            self.say(SET_INFLIGHT_FD, &record(), &[Sent::Record]);
        }
        let whole = [&[0], region(PARTS[0]).as_slice()].concat();
        let table = [&[2], region(PARTS[1]).as_slice(), &region(PARTS[2])].concat();
        match options & 4 {
            0 => self.say(ADD_MEM_REG, &whole, &[Sent::Memory]),
            _ => self.say(SET_MEM_TABLE, &table, &[Sent::Memory, Sent::Memory]),
        }
        for queue in 0..1 + u16::from(options >> 3 & 1) {
            let (index, size) = (u64::from(queue), u64::from(self.guest.size));
            let [table, used, available] = areas(queue).map(|area| USER + area);
            self.say(SET_VRING_NUM, &[pair(index, size)], &[]);
            let body = [index, table, used, available, 0];
            self.say(SET_VRING_ADDR, &body, &[]);
            self.say(SET_VRING_CALL, &[index], &[Sent::Call]);
            self.say(SET_VRING_KICK, &[index], &[Sent::Kick(index)]);
            self.say(SET_VRING_ENABLE, &[pair(index, 1)], &[]);
        }
        self.settle();
    }

    fn say(&mut self, request: u32, body: &[u64], files: &[Sent]) {
        self.post(request, 0, &words(body), files);
    }

    fn post(&mut self, request: u32, flags: u32, body: &[u8], files: &[Sent]) {
        let files: Vec<_> = files.iter().map(|sent| self.files.of(*sent)).collect();
        self.connection.say(request, flags, body, &files);
    }

    fn settle(&mut self) {
        self.connection.settle();
        if let Some(file) = self.connection.file.take() {
            self.files.theirs = Some(file);
        }
    }

    fn message(&mut self, script: &mut Script<'_>) {
        let mut message = Message::next(script, self.guest.size);
        message.files.truncate(MAX_FILES);
        self.post(
            message.request,
            message.flags,
            &message.body,
            &message.files,
        );
        if message.settled {
            self.settle();
        }
    }

    /// A request to the disk, of which now and then something is not as it should be.
    fn request(&mut self, script: &mut Script<'_>) {
        let (queue, how) = (u16::from(script.byte() & 1), script.byte());
        let slot = u64::from(how) % SLOTS;
        let kinds = [
            IN,
            IN,
            IN,
            OUT,
            OUT,
            OUT,
            FLUSH,
            GET_ID,
            DISCARD,
            WRITE_ZEROES,
            99,
        ];
        let kind = match script.choose(&kinds) {
            99 => script.number() as u32,
            kind => kind,
        };
        let sector = u64::from(script.byte() % 132);
        let sector = script.often(sector);
        let len = match kind {
            FLUSH => 0,
            GET_ID => 20,
            DISCARD | WRITE_ZEROES => {
                let count = 1 + u64::from(script.byte() & 1);
                for at in 0..count {
                    let sectors = u64::from(script.byte() % 16);
                    let range = [
                        sector.wrapping_add(at * 16),
                        pair(sectors, u64::from(how >> 7)),
                    ];
                    let place = data(queue, slot) + at * 16;
                    self.guest.write(place, &words(&range));
                }
                16 * count
            }
            _ => {
                let sectors = u64::from(script.byte() % 12);
                script.often(512 * sectors)
            }
        };
        let request = Request {
            slot,
            kind,
            sector,
            len: len as u32,
            indirect: how & 8 != 0,
        };
        let wild = script.rarely();
        let head = self.guest.request(queue, request, |chain| {
            if !wild {
                return;
            }
            let at = usize::from(script.byte()) % chain.len();
            let number = script.number();
            match script.byte() & 7 {
                0 | 1 => chain[at].address = number,
                2 | 3 => chain[at].len = number as u32,
                4 => chain[at].flags = number as u16,
                5 => chain[at].next = number as u16,
                6 => chain.truncate(at),
                _ => chain[at].flags ^= 2,
            }
        });
        self.guest.publish(queue, head);
        if how & 0x30 != 0 {
            self.kick(how >> 6, queue as u8);
        }
    }

    /// Notifies the server; waits for an answer, or not.
    fn kick(&mut self, how: u8, queue: u8) {
        let kick = &self.files.kicks[usize::from(queue) % self.files.kicks.len()];
        // What was signalled before is no answer.
        let _ = rustix::io::read(&self.files.call, &mut [0; 8]);
        // Nothing fills it: it does not wait.
        let _ = rustix::io::write(kick, &1u64.to_ne_bytes());
        if how & 1 != 0 {
            ready(&self.files.call, PollFlags::IN, BRIEFLY);
        }
    }
}
