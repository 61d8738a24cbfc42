//! The JSON schema, judged by a validator as TOML language servers use them.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

use super::*;

static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| {
    let schema = schema(&FORMATS);
    jsonschema::draft7::meta::validate(&schema).unwrap();
    jsonschema::draft7::new(&schema).unwrap()
});

fn json(text: &str) -> Value {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let table: toml::Table = text.parse().unwrap();
    serde_json::to_value(table).unwrap()
}

/// Checks that the schema takes what the reader has taken: every right text of these tests.
#[track_caller]
pub(super) fn takes(text: &str) {
    let json = json(text);
    let errors: Vec<_> = VALIDATOR.iter_errors(&json).collect();
    assert!(errors.is_empty(), "{text}: {errors:?}");
}

/// Whether the schema refuses a text with `[boot]`, which the reader refuses too.
#[track_caller]
fn refuses(text: &str) {
    errors(text);
    assert!(!VALIDATOR.is_valid(&json(text)), "{text}");
}

#[test]
fn what_a_value_is_not_is_refused() {
    for line in [
        "cpus = 0",
        "cpus = 255",
        "cpus = '2'",
        "name = '-a'",
        "name = ''",
        "name = 'a b'",
        "memory = 4096",
        "memory = 2097153",
        "memory = '1 GB'",
        "memory = true",
        "block = 1",
        "console.mode = 'stdo'",
        "console.log = ''",
        "console.ready = ''",
        "console.ready = \"two\\nlines\"",
        "lifecycle.on_reboot = true",
        "lifecycle.stop_timeout = 30",
        "lifecycle.stop_timeout = '30'",
        "lifecycle = 'restart'",
    ] {
        refuses(&format!("{line}\n{BOOT}"));
    }
    for line in [
        "ro = 'true'",
        "format = 'qcow'",
        "block_size = 1000",
        "block_size = 131072",
        "queues = 65",
        "poll_us = 1001",
        "cpus = [1024]",
        "size = 511",
        "id = ''",
        "id = 'more than twenty characters'",
        "backing = [1]",
        "qcow2.refcount_bits = '16'",
        "qcow2.compression = 'lz4'",
        "qcow2.lazy_refcounts = 1",
        "qcow2.data_file = true",
    ] {
        refuses(&format!("{BOOT}[[block]]\npath = 'a.qcow2'\n{line}"));
    }
}

#[test]
fn an_unknown_key_is_refused_in_every_table() {
    for text in [
        "boot.kernel = 'k'\ncpu = 2",
        "boot.kernel = 'k'\nboot.initramfs = 'i'",
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\no-direct = true",
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nqcow2.clusters = 1",
        "boot.kernel = 'k'\nconsole.logs = 'l'",
    ] {
        refuses(text);
    }
}

#[test]
fn a_key_that_must_be_there_is_missed() {
    for text in [
        "cpus = 2",
        "[boot]\ninitrd = 'i'",
        "boot.kernel = 'k'\n[[block]]\nro = true",
    ] {
        refuses(text);
    }
}

#[test]
fn an_editor_is_told_what_a_key_does_and_is_by_default() {
    let schema = schema(&FORMATS);
    let console = &schema["properties"]["console"]["properties"]["mode"];
    assert_eq!(console["default"], "stdio");
    assert_eq!(
        console["description"],
        "Where the console goes.\n\n\"stdio\": Standard input and output.\n\n\"socket\": The control \
         socket alone: see `launcher console` and `launcher logs`.\n\n\"off\": The guest has no \
         serial port."
    );
    let block = &schema["properties"]["block"]["items"]["properties"];
    assert_eq!(block["format"]["enum"][0], "qcow2");
    assert_eq!(
        block["qcow2"]["properties"]["cluster_size"]["default"],
        "64KiB"
    );
    assert_eq!(block["id"]["examples"][0], "ROOT");
}

#[test]
fn a_file_is_a_path_or_a_table_with_a_path_or_a_url() {
    let digest = "0".repeat(64);
    vm("boot.kernel = { path = 'k', build = ['make'] }");
    vm(&format!(
        "boot.kernel = {{ path = 'k', sha256 = '{digest}' }}"
    ));
    for wrong in [
        "boot.kernel = 1",
        "boot.kernel = {}",
        "boot.kernel = { path = 'k', digest = '0' }",
        "boot.kernel = { path = 'k', sha256 = '0' }",
        "boot.kernel = { path = 'k', url = 'ftp://example.org/k' }",
        "boot.kernel = 'k'\nboot.initrd = ['i']",
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nbacking = [{ ro = true }]",
    ] {
        refuses(wrong);
    }
}

/// The example of each key, alone in a file with what else it needs.
#[test]
fn every_example_is_a_value_that_its_key_takes() {
    fn each(keys: &[Key], parents: &str, all: &mut Vec<String>) {
        for key in keys {
            match key.takes {
                Takes::Value(..) | Takes::File(_) | Takes::Files(_) | Takes::Profiles => {
                    all.push(format!("{parents}{} = {}", key.name, key.example))
                }
                Takes::Table(keys) => each(keys, &format!("{}.", key.name), all),
                Takes::Tables(keys) => each(keys, &format!("{}.", key.name), all),
            }
        }
    }
    let mut all = Vec::new();
    each(KEYS, "", &mut all);
    for line in all {
        let needed = "boot.kernel = 'k'\n";
        let text = match (line.strip_prefix("block."), line.starts_with("boot.kernel")) {
            (Some(line), _) if line.starts_with("sha256") => {
                format!("{needed}[[block]]\npath = 'a.qcow2'\nro = true\n{line}")
            }
            (Some(line), _) if line.starts_with("url") => {
                let digest = "0".repeat(64);
                format!("{needed}[[block]]\n{line}\nro = true\nsha256 = '{digest}'")
            }
            (Some(line), _) if line.starts_with("path") || line.starts_with("vhost_user") => {
                format!("{needed}[[block]]\n{line}")
            }
            (Some(line), _) => format!("{needed}[[block]]\npath = 'a.qcow2'\n{line}"),
            (None, _) if line.starts_with("boot.from_block") => {
                format!("{line}\n[[block]]\npath = 'a.img'")
            }
            (None, true) => line,
            (None, false) => format!("{needed}{line}"),
        };
        vm(&text);
    }
}
