//! Disks: their formats, the formats' tables, and what two disks cannot both be.

use super::*;

/// The disks of a file with `[boot]` above.
pub(super) fn disks(text: &str) -> Vec<Block> {
    vm(&format!("{BOOT}{text}")).block
}

/// The format of one disk.
pub(super) fn format(lines: &str) -> String {
    disks(&format!("[[block]]\n{lines}")).remove(0).format
}

/// The first line that is said of wrong disks.
fn disk_error(text: &str) -> String {
    error(&format!("{BOOT}{text}"))
}

#[test]
fn the_extension_tells_the_format() {
    assert_eq!(format("path = 'a.qcow2'"), "qcow2");
    assert_eq!(format("path = 'a.b.QCOW2'"), "qcow2");
    assert_eq!(format("path = 'a.img'\nsparse = false"), "raw");
}

#[test]
fn a_written_format_goes_before_the_extension() {
    let disk = disks("[[block]]\npath = 'a.img'\nformat = 'qcow2'").remove(0);
    assert_eq!((&*disk.format, disk.format_written), ("qcow2", true));
}

#[test]
fn sparse_picks_between_the_two_backends_of_a_raw_image() {
    assert_eq!(format("path = 'a.img'"), "sparse-raw");
    assert_eq!(format("path = 'a'\nformat = 'raw'"), "sparse-raw");
    assert_eq!(
        format("path = 'a'\nformat = 'raw'\nsparse = true"),
        "sparse-raw"
    );
    assert_eq!(format("path = 'a'\nformat = 'raw'\nsparse = false"), "raw");
    assert_eq!(format("path = 'a'\nformat = 'sparse-raw'"), "sparse-raw");
}

#[test]
fn without_the_thin_backend_a_raw_image_is_raw() {
    let source = Source {
        formats: &FORMATS[1..2],
        ..source()
    };
    let text = format!("{BOOT}[[block]]\npath = 'a.img'");
    let vm = parse(text.as_bytes(), &source, &Renderer::plain()).unwrap();
    assert_eq!(vm.block[0].format, "raw");
}

#[test]
fn a_build_without_formats_says_so() {
    let source = Source {
        formats: &[],
        ..source()
    };
    let text = format!("{BOOT}[[block]]\npath = 'a.img'\nformat = 'raw'");
    let errors = parse(text.as_bytes(), &source, &Renderer::plain()).unwrap_err();
    assert!(errors.starts_with("error: `format` is \"raw\", expected a format, of which"));
}

#[test]
fn one_image_may_be_read_by_many_disks() {
    for reader in ["ro", "ephemeral"] {
        let text = format!("[[block]]\npath = 'a.img'\n{reader} = true\n");
        assert_eq!(disks(&text.repeat(2)).len(), 2);
    }
}

#[test]
fn all_disks_are_made_ephemeral_but_the_read_only_ones() {
    let mut vm = vm(&format!(
        "{BOOT}[[block]]\npath = 'a.img'\nsparse = false\n[[block]]\npath = 'b.img'\nro = true\n\
         [[block]]\npath = 'c.qcow2'\nsparse = false\n[[block]]\npath = 'd.img'\nephemeral = true\n"
    ));
    vm.drop_what_is_written().unwrap();
    let made: Vec<_> = vm
        .block
        .iter()
        .map(|disk| (&*disk.format, disk.ro, disk.ephemeral, disk.sparse))
        .collect();
    assert_eq!(
        made,
        [
            ("sparse-raw", false, true, true),
            ("sparse-raw", true, false, true),
            ("qcow2", false, true, true),
            ("sparse-raw", false, true, true),
        ]
    );
}

#[test]
fn a_path_written_in_two_ways_is_one_image() {
    let error = disk_error("[[block]]\npath = 'a.img'\n[[block]]\npath = './/a.img'");
    assert_eq!(
        error,
        "error: `path` is vms/.//a.img on two writable disks, expected one"
    );
}

#[test]
fn thirty_disks_keep_their_order() {
    let text: String = (0..30)
        .map(|n| format!("[[block]]\npath = '{n}.img'\n"))
        .collect();
    let disks = disks(&text);
    assert_eq!(disks.len(), 30);
    assert_eq!(disks[27].path, Path::new("vms/27.img"));
}

#[test]
fn disks_may_be_an_array_of_inline_tables() {
    let disks = vm("boot.kernel = 'k'\nblock = [{ path = 'a.img', ro = true }]").block;
    assert!(disks[0].ro);
}

#[test]
fn each_kind_of_format_option_says_what_it_expects() {
    let said = |line: &str| {
        disk_error(&format!(
            "[[block]]\npath = 'a.qcow2'\n[block.qcow2]\n{line}"
        ))
    };
    assert_eq!(
        said("cluster_size = true"),
        "error: `cluster_size` is true, expected a size such as 65536 or \"64KiB\""
    );
    assert_eq!(
        said("lazy_refcounts = 1"),
        "error: `lazy_refcounts` is 1, expected true or false"
    );
    assert_eq!(
        said("refcount_bits = -1"),
        "error: `refcount_bits` is -1, expected a whole number"
    );
    assert_eq!(
        said("compression = 'gzip'"),
        "error: `compression` is \"gzip\", expected \"zlib\" or \"zstd\""
    );
    assert_eq!(
        said("compression = 1"),
        "error: `compression` is 1, expected \"zlib\" or \"zstd\""
    );
    assert_eq!(
        said("data_file = ''"),
        "error: `data_file` is '', expected a path"
    );
    assert_eq!(
        said("data_file = ['a']"),
        "error: `data_file` is an array, expected a path"
    );
}

#[test]
fn either_raw_name_heads_the_table_of_a_raw_image() {
    assert_eq!(format("path = 'a.img'\n[block.raw]"), "sparse-raw");
    assert_eq!(
        format("path = 'a.img'\nsparse = false\n[block.sparse-raw]"),
        "raw"
    );
}

#[test]
fn a_format_s_table_must_be_a_table() {
    assert_eq!(
        disk_error("[[block]]\npath = 'a.qcow2'\nqcow2 = 1"),
        "error: `qcow2` is 1, expected a table `[block.qcow2]`"
    );
}

#[test]
fn a_misspelled_table_of_a_format_gets_the_nearest() {
    let errors = errors(format!("{BOOT}[[block]]\npath = 'a.qcow2'\n[block.qcow]"));
    assert!(
        errors.starts_with("error: unknown key `qcow` in `[[block]]`\n"),
        "{errors}"
    );
    assert!(
        errors.contains("help: did you mean `[block.qcow2]`?"),
        "{errors}"
    );
}
