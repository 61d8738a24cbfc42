//! The keys that are not for the guest.

use std::time::{Duration, Instant};

/// What the user's keys ask for, besides being the guest's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hotkey {
    /// Press the power button.
    PowerButton,
    /// End the VM.
    End,
}

/// Finds `Ctrl-]` among the keys: once it presses the power button, twice within three seconds
/// it ends the VM.
#[derive(Default)]
pub(crate) struct Hotkeys {
    pressed: Option<Instant>,
}

impl Hotkeys {
    const KEY: u8 = 0x1d;
    const TWICE_WITHIN: Duration = Duration::from_secs(3);

    /// Takes the hot key out of `input`, read at `now`.
    pub(crate) fn take(&mut self, input: &mut Vec<u8>, now: Instant) -> Option<Hotkey> {
        let before = input.len();
        input.retain(|&byte| byte != Self::KEY);
        let presses = before - input.len();
        if presses == 0 {
            return None;
        }
        let again = self
            .pressed
            .is_some_and(|then| now.duration_since(then) <= Self::TWICE_WITHIN);
        self.pressed = Some(now);
        Some(if again || presses > 1 {
            Hotkey::End
        } else {
            Hotkey::PowerButton
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_hot_key_presses_the_button_and_two_within_three_seconds_end_the_vm() {
        let (mut keys, start) = (Hotkeys::default(), Instant::now());
        let mut press = |after: u64, keys_typed: &[u8]| {
            let mut input = keys_typed.to_vec();
            let hotkey = keys.take(&mut input, start + Duration::from_secs(after));
            (hotkey, input)
        };
        assert_eq!(press(0, b"ls\r"), (None, b"ls\r".to_vec()));
        assert_eq!(
            press(0, b"a\x1db"),
            (Some(Hotkey::PowerButton), b"ab".to_vec())
        );
        assert_eq!(press(4, b"\x1d"), (Some(Hotkey::PowerButton), vec![]));
        assert_eq!(press(6, b"\x1d"), (Some(Hotkey::End), vec![]));
        assert_eq!(press(20, b"\x1d\x1d"), (Some(Hotkey::End), vec![]));
    }
}
