//! What each kind of value takes, and what it is told otherwise.

use std::time::Duration;

use super::*;

/// Whether a line at the top of the file is taken.
fn takes(line: &str) -> bool {
    let text = format!("{line}\n{BOOT}");
    read(&text).is_ok()
}

/// Whether a line in a `[[block]]` is taken.
fn disk_takes(line: &str) -> bool {
    takes(&format!("[[block]]\npath = 'a.img'\n{line}"))
}

#[test]
fn cpus_are_1_to_254() {
    assert!(takes("cpus = 1") && takes("cpus = 254") && takes("cpus = 0x10"));
    assert_eq!(
        booting_error("cpus = 0"),
        "error: `cpus` is 0, expected a whole number, 1 to 254"
    );
    for wrong in [
        "255",
        "-1",
        "1.0",
        "true",
        "[1]",
        "{}",
        "'2'",
        "18446744073709551616",
    ] {
        assert!(!takes(&format!("cpus = {wrong}")), "{wrong}");
    }
}

#[test]
fn memory_is_whole_pages_in_bytes_or_with_a_unit() {
    for right in [
        "2097152",
        "'2M'",
        "'2MiB'",
        "'512MiB'",
        "'1TiB'",
        "'2052KiB'",
        "1073741824",
    ] {
        assert!(takes(&format!("memory = {right}")), "{right}");
    }
    for wrong in [
        "0",
        "-2097152",
        "4096",
        "'2049KiB'",
        "'1025GiB'",
        "2097153",
        "'1.5GiB'",
        "1e9",
    ] {
        let error = booting_error(&format!("memory = {wrong}"));
        let expected = "expected a size from 2MiB to 1TiB, a multiple of 4KiB";
        assert_eq!(error, format!("error: `memory` is {wrong}, {expected}"));
    }
}

#[test]
fn a_name_is_a_file_name_and_a_word() {
    for right in ["a", "web-1", "A.b_c", "0", &"x".repeat(64)] {
        assert!(takes(&format!("name = '{right}'")), "{right}");
    }
    for wrong in ["", ".a", "-a", "a b", "a/b", "ä", "..", &"x".repeat(65)] {
        assert!(!takes(&format!("name = '{wrong}'")), "{wrong}");
    }
}

#[test]
fn the_name_defaults_to_the_stem_of_the_file_which_must_be_one() {
    let named = |file| {
        let source = Source {
            file: Path::new(file),
            ..source()
        };
        parse(BOOT.as_bytes(), &source, &Renderer::plain())
    };
    assert_eq!(named("web.toml").unwrap().name, "web");
    assert_eq!(named("a/web.vm.toml").unwrap().name, "web.vm");
    assert_eq!(
        named("my vm.toml").unwrap_err(),
        "error: `name` is \"my vm\" after the file, expected 1 to 64 letters, digits, `.`, `_` or \
         `-`, the first no `.` or `-`\n--> my vm.toml\n = help: add a line `name = \"web\"` at the \
         top"
    );
}

#[test]
fn paths_are_relative_to_the_folder_of_the_file() {
    let kernel = |path: &str| {
        let vm = vm(&format!("[boot]\nkernel = '{path}'"));
        vm.boot.kernel.unwrap().path
    };
    assert_eq!(kernel("k"), Path::new("vms/k"));
    assert_eq!(kernel("../k"), Path::new("vms/../k"));
    assert_eq!(kernel("/boot/k"), Path::new("/boot/k"));
    let source = Source {
        file: Path::new("vm.toml"),
        ..source()
    };
    let vm = parse(b"boot.kernel = 'k'", &source, &Renderer::plain()).unwrap();
    assert_eq!(vm.boot.kernel.unwrap().path, Path::new("k"));
}

#[test]
fn only_a_leading_tilde_and_slash_is_the_home_folder() {
    let kernel = |path: &str| {
        let vm = vm(&format!("[boot]\nkernel = '{path}'"));
        vm.boot.kernel.unwrap().path
    };
    assert_eq!(kernel("~/k"), Path::new("/home/ada/k"));
    assert_eq!(kernel("~//k"), Path::new("/home/ada/k"));
    assert_eq!(kernel("~k"), Path::new("vms/~k"));
    assert_eq!(kernel("a/~/k"), Path::new("vms/a/~/k"));
    assert_eq!(kernel("$HOME/k"), Path::new("vms/$HOME/k"));
    let homeless = Source {
        home: None,
        ..source()
    };
    let errors = parse(b"boot.kernel = '~/k'", &homeless, &Renderer::plain()).unwrap_err();
    assert!(
        errors.starts_with(
            "error: `kernel` is '~/k', expected a path, or a table with `path` or `url`\n"
        ),
        "{errors}"
    );
    assert!(
        errors.contains("help: HOME is not set: write the path out"),
        "{errors}"
    );
}

#[test]
fn a_path_is_not_empty_and_has_no_nul() {
    assert_eq!(
        error("boot.kernel = ''"),
        "error: `kernel` is '', expected a path, or a table with `path` or `url`"
    );
    let errors = errors("boot.kernel = \"a\\u0000b\"");
    assert!(errors.contains("help: '\\0' is not allowed"), "{errors}");
}

#[test]
fn kernel_parameters_are_one_line() {
    assert_eq!(
        vm("boot.kernel = 'k'\nboot.cmdline = 'a b'").boot.cmdline,
        "a b"
    );
    let errors = errors("boot.kernel = 'k'\nboot.cmdline = \"a\\nb\"");
    assert!(errors.starts_with("error: `cmdline` is \"a\\nb\", expected one line of text"));
}

#[test]
fn a_block_size_is_a_power_of_two() {
    for right in ["512", "4096", "65536", "'4KiB'"] {
        assert!(disk_takes(&format!("block_size = {right}")), "{right}");
    }
    for wrong in ["0", "1", "256", "513", "131072", "-512", "4294967808"] {
        assert!(!disk_takes(&format!("block_size = {wrong}")), "{wrong}");
    }
}

#[test]
fn an_id_is_1_to_20_printable_ascii_characters() {
    assert!(disk_takes("id = 'a'") && disk_takes("id = 'A b~c!d\"e#f$g%h&i(j)'"));
    for wrong in ["''", "'ä'", "\"a\\tb\"", "'123456789012345678901'", "7"] {
        assert!(!disk_takes(&format!("id = {wrong}")), "{wrong}");
    }
    let errors = errors(format!(
        "{BOOT}[[block]]\npath='a.img'\nid='{}'",
        "x".repeat(21)
    ));
    assert!(errors.contains("help: it has 21 characters"), "{errors}");
}

#[test]
fn queues_are_1_to_64() {
    assert!(disk_takes("queues = 1") && disk_takes("queues = 64"));
    assert!(!disk_takes("queues = 0") && !disk_takes("queues = 65"));
}

#[test]
fn a_disk_polls_for_up_to_a_millisecond() {
    assert!(disk_takes("poll_us = 0") && disk_takes("poll_us = 1000"));
    assert!(!disk_takes("poll_us = -1") && !disk_takes("poll_us = 1001"));
}

#[test]
fn cpus_of_a_disk_are_one_or_more_numbers() {
    assert!(disk_takes("cpus = 0") && disk_takes("cpus = [1023, 2]"));
    for wrong in ["-1", "1024", "[0, 1024]", "'0'", "['0-1']", "{}"] {
        assert!(!disk_takes(&format!("cpus = {wrong}")), "{wrong}");
    }
}

#[test]
fn a_disk_size_is_whole_sectors_and_whole_blocks() {
    assert!(disk_takes("size = 512") && disk_takes("size = '8GiB'"));
    assert!(disk_takes("size = 4096\nblock_size = 4096"));
    for wrong in ["0", "513", "'0K'", "'8388608TiB'", "512\nblock_size = 4096"] {
        assert!(!disk_takes(&format!("size = {wrong}")), "{wrong}");
    }
}

#[test]
fn a_time_span_has_a_unit_and_is_at_most_an_hour() {
    let timeout = |text: &str| {
        let vm = booting(&format!("lifecycle.stop_timeout = '{text}'"));
        vm.lifecycle.stop_timeout
    };
    assert_eq!(timeout("0s"), Duration::ZERO);
    assert_eq!(timeout("1500ms"), Duration::from_millis(1500));
    assert_eq!(timeout("2m"), Duration::from_secs(120));
    assert_eq!(timeout("1h"), timeout("3600s"));
    for wrong in [
        "'3601s'", "'2h'", "'-1s'", "'1.5s'", "'s'", "''", "'30'", "30", "'1d'", "1.5",
    ] {
        assert!(
            !takes(&format!("lifecycle.stop_timeout = {wrong}")),
            "{wrong}"
        );
    }
    assert!(!takes(&format!("lifecycle.stop_timeout = '{}h'", u64::MAX)));
}

#[test]
fn a_switch_is_true_or_false() {
    assert!(disk_takes("lock = false"));
    for wrong in ["0", "'true'", "1.0", "[]"] {
        assert!(!disk_takes(&format!("lock = {wrong}")), "{wrong}");
    }
}

#[test]
fn dates_and_numbers_past_all_limits_are_values_like_others() {
    for wrong in [
        "1979-05-27",
        "inf",
        "nan",
        "1e999",
        &"9".repeat(400),
        "-9223372036854775809",
    ] {
        let error = booting_error(&format!("cpus = {wrong}"));
        assert!(
            error.ends_with("expected a whole number, 1 to 254"),
            "{error}"
        );
    }
}

#[test]
fn a_disk_to_boot_from_is_named_by_index_or_id() {
    let disk = |name: &str| {
        let disks = "[[block]]\npath = 'a.img'\n[[block]]\npath = 'b.img'\nid = 'ROOT'";
        vm(&format!("boot.from_block = {name}\n{disks}")).boot_disk()
    };
    assert_eq!(disk("0"), Some(0));
    assert_eq!(disk("1"), Some(1));
    assert_eq!(disk("'ROOT'"), Some(1));
    assert_eq!(vm("boot.kernel = 'k'").boot_disk(), None);
}
