//! What tells from the guest's output that it is up.

/// Longest line that is looked at, in bytes; of a longer one only the end.
const LINE: usize = 1024;

/// Looks for the mark in what the guest prints.
pub(super) struct BootMark {
    /// The text to find; without it, what kernels and login prompts print.
    ready: Option<String>,
    line: Vec<u8>,
}

impl BootMark {
    pub(super) fn new(ready: Option<String>) -> BootMark {
        BootMark {
            ready,
            line: Vec::new(),
        }
    }

    /// Whether what the guest has printed contains the mark now.
    pub(super) fn found_in(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| match byte {
            b'\r' | b'\n' => {
                self.line.clear();
                false
            }
            byte => {
                if self.line.len() == LINE {
                    self.line.drain(..LINE / 2);
                }
                self.line.push(*byte);
                self.line_ends_in_mark()
            }
        })
    }

    fn line_ends_in_mark(&self) -> bool {
        const RUN: &[u8] = b"Run ";
        match &self.ready {
            Some(ready) => self.line.ends_with(ready.as_bytes()),
            None => {
                self.line.ends_with(b"login:")
                    // Linux: "Run /sbin/init as init process".
                    || (self.line.ends_with(b" as init process")
                        && self.line.windows(RUN.len()).any(|part| part == RUN))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(ready: Option<&str>, printed: &str) -> bool {
        let mut mark = BootMark::new(ready.map(str::to_owned));
        // A byte at a time, as a serial port sends.
        let mut bytes = printed.as_bytes().chunks(1);
        bytes.any(|byte| mark.found_in(byte))
    }

    #[test]
    fn a_login_prompt_or_the_start_of_init_says_that_a_guest_is_up() {
        assert!(found(None, "Debian 13 host ttyS0\r\n\r\nhost login: "));
        assert!(found(None, "[    0.5] Run /sbin/init as init process\r\n"));
        assert!(!found(None, "[    0.5] Run \r\n/sbin/init as init process"));
        assert!(!found(None, "no working init found, last login\r\n: never"));
    }

    #[test]
    fn a_mark_of_one_s_own_is_the_only_one() {
        assert!(found(Some("ready!"), "the service is ready!"));
        assert!(!found(Some("ready!"), "host login: "));
        assert!(!found(Some("ready!"), "rea\r\ndy!"));
        assert!(found(Some("ready"), &("x".repeat(5000) + "ready")));
    }
}
