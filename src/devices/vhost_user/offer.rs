//! What a back end offers, and what of it the guest is shown.

use formats::OpenError;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Length of the configuration space, up to the last field of the features that are passed on
/// (virtio 1.3 section 5.2.4).
pub(super) const CONFIG_LEN: usize = 60;
/// Offsets of its fields.
const BLK_SIZE: usize = 20;
pub(super) const WRITEBACK: usize = 32;
const NUM_QUEUES: usize = 34;

const SECTOR_SIZE: u64 = 512;

/// Features that a driver may use with the back end as if there were nobody between them. Others
/// would need something of the transport, or fields behind the configuration space's end.
const PASSED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Whether feature bit `bit` is in `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// A configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config(pub(super) [u8; CONFIG_LEN]);

impl Config {
    /// The field `capacity`, in sectors.
    fn capacity(&self) -> u64 {
        let [c0, c1, c2, c3, c4, c5, c6, c7, ..] = self.0;
        u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7])
    }

    fn blk_size(&self) -> u32 {
        let mut field = [0; 4];
        field.copy_from_slice(&self.0[BLK_SIZE..BLK_SIZE + 4]);
        u32::from_le_bytes(field)
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.capacity().saturating_mul(SECTOR_SIZE)
    }

    /// Says what in it no disk can be.
    fn nonsense(&self, features: u64) -> Option<String> {
        let (capacity, blk_size) = (self.capacity(), self.blk_size());
        let sane = blk_size.is_power_of_two() && (512..=65536).contains(&blk_size);
        if capacity > i64::MAX as u64 / SECTOR_SIZE {
            return Some(format!("a disk of {capacity} sectors"));
        }
        if has(features, VIRTIO_BLK_F_BLK_SIZE) && !sane {
            return Some(format!("logical blocks of {blk_size} bytes"));
        }
        None
    }

    /// Without what may change while the disk is served, or is ours to fill in.
    fn fixed(&self) -> [u8; CONFIG_LEN] {
        let mut config = self.0;
        config[..8].fill(0);
        config[WRITEBACK] = 0;
        config[NUM_QUEUES..NUM_QUEUES + 2].fill(0);
        config
    }

    /// As the guest sees it, with so many virtqueues.
    pub(super) fn shown(mut self, queues: u16, writeback: u8) -> Config {
        let queues = if queues > 1 { queues } else { 0 };
        self.0[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
        self.0[WRITEBACK] = writeback;
        self
    }
}

/// What a back end offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// Virtio's feature bits.
    pub(super) features: u64,
    /// Most virtqueues.
    pub(super) queues: u64,
    /// Whether it keeps a record of the requests in flight.
    pub(super) in_flight: bool,
    pub(super) config: Config,
}

impl Offer {
    /// The features that a driver is offered.
    pub(super) fn passed(&self, queues: u16) -> u64 {
        match queues {
            1 => self.features & PASSED & !(1 << VIRTIO_BLK_F_MQ),
            _ => self.features & PASSED,
        }
    }

    /// Says what is wrong with it, whatever it is for.
    pub(super) fn check(&self) -> Result<(), String> {
        if !has(self.features, VIRTIO_F_VERSION_1) {
            return Err("it offers no device of virtio 1".into());
        }
        match self.config.nonsense(self.features) {
            Some(what) => Err(format!("it offers {what}")),
            None => Ok(()),
        }
    }

    /// Whether it is the disk that is asked for. `shown` is its socket.
    pub(super) fn fits(&self, queues: u16, ro: bool, shown: &str) -> Result<(), OpenError> {
        let refused = |key, message, help: &str| {
            Err(OpenError {
                message,
                help: Some(help.into()),
                key,
            })
        };
        match (ro, has(self.features, VIRTIO_BLK_F_RO)) {
            (true, false) => {
                return refused(
                    "ro",
                    format!("`ro` is true, but what is served at `{shown}` can be written"),
                    "serve it read-only: `launcher disk serve --ro …`; or remove `ro`",
                );
            }
            (false, true) => {
                return refused(
                    "ro",
                    format!("`ro` is false, but what is served at `{shown}` is read-only"),
                    "add `ro = true`, or serve it to be written",
                );
            }
            _ => {}
        }
        let multiqueue = has(self.features, VIRTIO_BLK_F_MQ);
        let most = if multiqueue { self.queues } else { 1 };
        if u64::from(queues) > most {
            return refused(
                "queues",
                format!("`queues` is {queues}, but `{shown}` is served with {most}"),
                &format!(
                    "serve it with more: `launcher disk serve --queues {queues} …`; or lower `queues`"
                ),
            );
        }
        Ok(())
    }

    /// What a guest that was shown `before` would miss, or would not expect.
    pub(super) fn differs(&self, before: &Offer, queues: u16) -> Option<String> {
        let (now, then) = (self.passed(queues), before.passed(queues));
        if then & !now != 0 {
            return Some(format!("it lacks the features {:#x}", then & !now));
        }
        if has(now & !then, VIRTIO_BLK_F_RO) {
            return Some("it is read-only now".into());
        }
        if u64::from(queues) > self.queues {
            return Some(format!("it has {} virtqueues, not {queues}", self.queues));
        }
        if before.in_flight && !self.in_flight {
            return Some("it does not know what requests are in flight".into());
        }
        let (now, then) = (self.config.size(), before.config.size());
        if now < then {
            return Some(format!("it has {now} bytes, and had {then}"));
        }
        (self.config.fixed() != before.config.fixed()).then(|| "it is another disk".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        let mut config = Config([0; CONFIG_LEN]);
        config.0[..8].copy_from_slice(&2048u64.to_le_bytes());
        config.0[BLK_SIZE..BLK_SIZE + 4].copy_from_slice(&4096u32.to_le_bytes());
        Offer {
            features: 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_MQ,
            queues: 4,
            in_flight: true,
            config,
        }
    }

    #[test]
    fn features_that_need_more_than_a_back_end_are_not_passed_on() {
        let mut offer = offer();
        offer.features = u64::MAX;
        let passed = offer.passed(4);
        for bit in [17, 26, 30, 33, 34, 38, 40] {
            assert!(!has(passed, bit), "{bit}");
        }
        assert!(has(passed, VIRTIO_BLK_F_MQ));
        assert!(!has(offer.passed(1), VIRTIO_BLK_F_MQ));
    }

    #[test]
    fn a_disk_that_cannot_be_is_refused() {
        assert_eq!(offer().check(), Ok(()));
        let wrong = |change: fn(&mut Offer)| {
            let mut offer = offer();
            change(&mut offer);
            offer.check().unwrap_err()
        };
        assert_eq!(
            wrong(|it| it.features = 0),
            "it offers no device of virtio 1"
        );
        assert_eq!(
            wrong(|it| it.config.0[..8].fill(0xff)),
            "it offers a disk of 18446744073709551615 sectors"
        );
        assert_eq!(
            wrong(|it| it.config.0[BLK_SIZE] = 1),
            "it offers logical blocks of 4097 bytes"
        );
        assert_eq!(
            wrong(|it| it.config.0[BLK_SIZE..BLK_SIZE + 4].fill(0)),
            "it offers logical blocks of 0 bytes"
        );
    }

    #[test]
    fn what_the_file_says_and_what_is_served_agree() {
        let refused = |offer: &Offer, queues, ro| {
            let error = offer.fits(queues, ro, "a.sock").unwrap_err();
            (error.key, error.message)
        };
        let mut served = offer();
        assert!(served.fits(4, false, "a.sock").is_ok());
        let (key, message) = refused(&served, 5, false);
        assert_eq!(key, "queues");
        assert_eq!(message, "`queues` is 5, but `a.sock` is served with 4");
        let (key, message) = refused(&served, 1, true);
        assert_eq!(key, "ro");
        assert!(message.ends_with("can be written"), "{message}");
        served.features |= 1 << VIRTIO_BLK_F_RO;
        assert!(served.fits(1, true, "a.sock").is_ok());
        assert!(refused(&served, 1, false).1.ends_with("is read-only"));
        served.features = 1 << VIRTIO_F_VERSION_1;
        assert_eq!(refused(&served, 2, false).0, "queues");
        assert!(served.fits(1, false, "a.sock").is_ok());
    }

    #[test]
    fn a_larger_disk_with_more_features_takes_the_place_of_the_one_before() {
        let before = offer();
        let mut after = offer();
        after.features |= 1 << VIRTIO_BLK_F_FLUSH;
        after.config.0[1] += 1;
        after.config.0[WRITEBACK] = 1;
        assert_eq!(after.differs(&before, 4), None);
    }

    #[test]
    fn what_the_guest_would_miss_is_no_substitute() {
        let before = offer();
        let differs = |change: fn(&mut Offer)| {
            let mut after = offer();
            change(&mut after);
            after.differs(&before, 4).unwrap()
        };
        assert_eq!(
            differs(|it| it.features &= !(1 << VIRTIO_BLK_F_MQ)),
            "it lacks the features 0x1000"
        );
        assert_eq!(
            differs(|it| it.features |= 1 << VIRTIO_BLK_F_RO),
            "it is read-only now"
        );
        assert_eq!(differs(|it| it.queues = 3), "it has 3 virtqueues, not 4");
        assert_eq!(
            differs(|it| it.in_flight = false),
            "it does not know what requests are in flight"
        );
        assert_eq!(
            differs(|it| it.config.0[1] -= 1),
            "it has 917504 bytes, and had 1048576"
        );
        assert_eq!(
            differs(|it| it.config.0[BLK_SIZE + 1] = 2),
            "it is another disk"
        );
    }

    #[test]
    fn the_guest_sees_its_own_virtqueues_and_cache() {
        let config = offer().config;
        let shown = config.shown(3, 1);
        assert_eq!(shown.0[NUM_QUEUES..NUM_QUEUES + 2], [3, 0]);
        assert_eq!(shown.0[WRITEBACK], 1);
        assert_eq!(config.shown(1, 0), config);
        assert_eq!(config.size(), 1 << 20);
    }
}
