//! The exit codes of `launcher`.

macro_rules! exit_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal;)+) => {
        $($(#[doc = $doc])+ pub const $name: u8 = $code;)+

        /// Every exit code with its meaning, as `launcher --help` lists them.
        pub const ALL: &[(u8, &str)] = &[$(($name, concat!($($doc),+).trim_ascii())),+];
    };
}

exit_codes! {
    /// done
    DONE = 0;
    /// failed
    FAILED = 1;
    /// wrong usage or configuration
    USAGE = 2;
    /// the VM is not running
    NOT_RUNNING = 3;
    /// the VM is already running
    ALREADY_RUNNING = 4;
    /// the guest crashed (triple fault)
    GUEST_CRASH = 33;
    /// the guest's kernel panicked
    GUEST_PANIC = 34;
}
