use std::path::Path;

use super::*;

const GIB: u64 = 1 << 30;

fn disk() -> Subject<'static> {
    Subject {
        disk: "0",
        path: Path::new("a.img"),
        ro: false,
        ephemeral: false,
        fixed: None,
        block_size: 512,
        size: 8 * GIB,
        device: None,
        running: false,
    }
}

const SHRINK: Consent = Consent {
    shrink: true,
    force: false,
};

fn refused(subject: &Subject<'_>, wanted: Option<Wanted>, consent: Consent) -> Failure {
    decide(subject, wanted, consent).unwrap_err()
}

#[test]
fn a_size_is_bytes_or_a_text_and_a_plus_is_on_top() {
    assert_eq!(Wanted::parse("4096").unwrap(), Wanted::To(4096));
    assert_eq!(Wanted::parse("8GiB").unwrap(), Wanted::To(8 * GIB));
    assert_eq!(Wanted::parse("+1G").unwrap(), Wanted::By(GIB));
    assert_eq!(Wanted::try_from(&Size::Bytes(7)).unwrap(), Wanted::To(7));
    let text = Size::Text("+512".into());
    assert_eq!(Wanted::try_from(&text).unwrap(), Wanted::By(512));
}

#[test]
fn what_is_no_size_is_shown_with_what_helps() {
    for (text, help) in [
        ("8gb", "write \"8GiB\""),
        (
            "",
            "write bytes, or a whole number with KiB, MiB, GiB or TiB",
        ),
        (
            "++1",
            "write bytes, or a whole number with KiB, MiB, GiB or TiB",
        ),
        (
            "1.5GiB",
            "write bytes, or a whole number with KiB, MiB, GiB or TiB",
        ),
        ("16777216TiB", "it does not fit in 64 bits"),
        (
            "-1GiB",
            "name the size that is to be left, and add `--shrink`",
        ),
    ] {
        let failure = Wanted::parse(text).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Invalid);
        assert_eq!(failure.help.as_deref(), Some(help), "{text}");
    }
}

#[test]
fn a_disk_grows_to_a_size_or_by_one() {
    let to = |wanted| decide(&disk(), Some(wanted), Consent::default()).unwrap();
    assert_eq!(to(Wanted::To(9 * GIB)), 9 * GIB);
    assert_eq!(to(Wanted::By(512)), 8 * GIB + 512);
    assert_eq!(to(Wanted::By(0)), 8 * GIB);
}

#[test]
fn a_size_is_whole_blocks_and_fits_in_a_file() {
    let wide = Subject {
        block_size: 4096,
        ..disk()
    };
    let failure = refused(&wide, Some(Wanted::By(512)), SHRINK);
    assert_eq!(
        failure.message,
        "the size is 8589935104, expected a multiple of 4096, and not 0"
    );
    assert_eq!(
        failure.help.as_deref(),
        Some("`block_size` is 4096: the next size that fits is 8589938688")
    );
    for wanted in [
        Wanted::To(0),
        Wanted::To(1 << 63),
        Wanted::To(u64::MAX),
        Wanted::By(u64::MAX),
        Wanted::By(u64::MAX - 8 * GIB),
    ] {
        let failure = refused(&disk(), Some(wanted), SHRINK);
        assert_eq!(failure.kind, FailureKind::Invalid, "{wanted:?}");
    }
}

#[test]
fn a_disk_that_never_changes_is_refused_with_the_reason() {
    for (subject, why) in [
        (Subject { ro: true, ..disk() }, "is read-only"),
        (
            Subject {
                ephemeral: true,
                ..disk()
            },
            "is ephemeral",
        ),
        (
            Subject {
                fixed: Some("x"),
                ..disk()
            },
            "has the format `x`",
        ),
    ] {
        let failure = refused(&subject, Some(Wanted::By(512)), SHRINK);
        assert_eq!(failure.kind, FailureKind::Unsupported);
        assert!(failure.message.contains(why), "{}", failure.message);
    }
}

#[test]
fn a_smaller_size_needs_shrink_and_says_what_is_lost() {
    let failure = refused(&disk(), Some(Wanted::To(3 * GIB)), Consent::default());
    assert_eq!(failure.kind, FailureKind::Refused);
    assert_eq!(
        failure.message,
        "disk 0 (`a.img`) has 8GiB: with 3GiB, its last 5GiB would be lost"
    );
    assert_eq!(decide(&disk(), Some(Wanted::To(GIB)), SHRINK).unwrap(), GIB);
}

#[test]
fn a_running_guest_s_disk_shrinks_by_force_only() {
    let live = Subject {
        running: true,
        ..disk()
    };
    let failure = refused(&live, Some(Wanted::To(GIB)), SHRINK);
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(
        failure
            .message
            .contains("the guest runs and may use the last 7GiB of disk 0 (`a.img`)")
    );
    let force = Consent {
        shrink: true,
        force: true,
    };
    assert_eq!(decide(&live, Some(Wanted::To(GIB)), force).unwrap(), GIB);
    let alone = Consent {
        shrink: false,
        force: true,
    };
    assert_eq!(
        refused(&live, Some(Wanted::To(GIB)), alone).kind,
        FailureKind::Refused
    );
}

#[test]
fn a_block_device_has_the_size_that_it_has() {
    let device = Subject {
        device: Some(9 * GIB),
        ..disk()
    };
    assert_eq!(decide(&device, None, SHRINK).unwrap(), 9 * GIB);
    assert_eq!(
        decide(&device, Some(Wanted::By(GIB)), Consent::default()).unwrap(),
        9 * GIB
    );
    let failure = refused(&device, Some(Wanted::To(10 * GIB)), SHRINK);
    assert_eq!(failure.kind, FailureKind::Unsupported);
    let failure = refused(&disk(), None, SHRINK);
    assert_eq!(failure.kind, FailureKind::Invalid);
    let smaller = Subject {
        device: Some(GIB),
        ..disk()
    };
    let failure = refused(&smaller, None, Consent::default());
    assert_eq!(failure.kind, FailureKind::Refused);
}

#[test]
fn the_host_s_error_comes_with_its_number_and_what_to_do() {
    let error = std::io::Error::from_raw_os_error(libc::ENOSPC);
    let failure = failed(&disk(), 9 * GIB, &error);
    assert_eq!(failure.errno, Some(libc::ENOSPC));
    assert_eq!(
        failure.message,
        "disk 0 (`a.img`) cannot have 9GiB, and stays as it is: No space left on device"
    );
    assert!(failure.help.unwrap().starts_with("free some space"));
    let closed = std::io::ErrorKind::NotConnected.into();
    assert_eq!(failed(&disk(), GIB, &closed).kind, FailureKind::Ending);
}
