//! Images made by either of us, with each option.

use std::fs;

use formats::OptionValue;

use super::desk::{Desk, SIZE};

/// Options of `qemu-img create`, and the size of a cluster.
const CREATED_BY_QEMU: [(&str, u64); 28] = [
    ("compat=0.10", 65536),
    ("compat=1.1", 65536),
    ("compat=0.10,cluster_size=512", 512),
    ("cluster_size=512", 512),
    ("cluster_size=1k", 1024),
    ("cluster_size=2k", 2048),
    ("cluster_size=4k", 4096),
    ("cluster_size=8k", 8192),
    ("cluster_size=32k", 32768),
    ("cluster_size=256k", 262_144),
    ("cluster_size=2M", 2_097_152),
    ("preallocation=metadata", 65536),
    ("preallocation=falloc", 65536),
    ("preallocation=full,cluster_size=4k", 4096),
    ("lazy_refcounts=on", 65536),
    ("refcount_bits=1", 65536),
    ("refcount_bits=2,cluster_size=4k", 4096),
    ("refcount_bits=4", 65536),
    ("refcount_bits=8", 65536),
    ("refcount_bits=32", 65536),
    ("refcount_bits=64,cluster_size=512", 512),
    ("compression_type=zstd", 65536),
    ("extended_l2=on", 65536),
    ("extended_l2=on,cluster_size=16k", 16384),
    ("extended_l2=on,preallocation=metadata", 65536),
    ("data_file=top.data", 65536),
    ("data_file=top.data,data_file_raw=on", 65536),
    ("data_file=top.data,cluster_size=4k,extended_l2=off", 4096),
];

#[test]
fn an_image_that_qemu_created_with_each_option_is_used_in_turn() {
    for (seed, (options, cluster)) in (0..).zip(CREATED_BY_QEMU) {
        let mut desk = Desk::new(seed);
        desk.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {SIZE}"));
        if options.contains("data_file") {
            let path = desk.at("top.data");
            desk.options.push(("data_file", OptionValue::Path(path)));
        }
        desk.used_by_qemu(cluster);
        desk.agreed(&format!("{options}: used by QEMU"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: used by us"));
        desk.used_by_qemu(cluster);
        desk.agreed(&format!("{options}: used by QEMU again"));
    }
}

#[test]
fn an_image_with_a_backing_file_is_used_in_turn() {
    let bases = [
        ("qcow2", SIZE - 512),
        ("raw", SIZE + 4096),
        ("raw", (2 << 20) + 777),
    ];
    for (seed, options) in (0..).zip([
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "extended_l2=on",
        "cluster_size=2M",
        "lazy_refcounts=on,refcount_bits=1",
    ]) {
        let (format, len) = bases[seed as usize % 3];
        let mut desk = Desk::new(seed);
        desk.base("base.raw", len);
        if format == "qcow2" {
            desk.qemu_img("convert -c -f raw -O qcow2 base.raw base.qcow2");
            desk.backing = vec!["base.qcow2"];
        }
        let create = format!("create -q -f qcow2 -o {options} -F {format} -b base.{format}");
        desk.qemu_img(&format!("{create} top.qcow2 {SIZE}"));
        desk.agreed(&format!("{options}: new"));
        for round in 0..2 {
            desk.used_by_us();
            desk.agreed(&format!("{options}: used by us, {round}"));
            // A discard in version 2 may show the backing file again: not with QEMU's own.
            if !options.contains("0.10") {
                desk.used_by_qemu(2 << 20);
                desk.agreed(&format!("{options}: used by QEMU, {round}"));
            }
        }
    }
}

#[test]
fn a_file_that_ends_within_a_cluster_is_used_like_any_other() {
    for (cluster, len) in [
        (65536, 40_000),
        (65536, 512),
        (2 << 20, 777_777),
        (512, 100),
    ] {
        let mut desk = Desk::new(1);
        let create = format!("create -q -f qcow2 -o cluster_size={cluster}");
        desk.qemu_img(&format!("{create} top.qcow2 {SIZE}"));
        desk.qemu_io("top.qcow2", &["write -P 5 0 1k".into()]);
        desk.content[..1024].fill(5);
        // Nothing refers to this, so it is where the next cluster goes.
        let mut bytes = fs::read(desk.at("top.qcow2")).unwrap();
        let whole = bytes.len().next_multiple_of(cluster as usize);
        bytes.resize(whole, 0);
        bytes.extend(std::iter::repeat_n(0xff, len));
        fs::write(desk.at("top.qcow2"), bytes).unwrap();
        let (start, end) = (cluster as usize + 1024, cluster as usize + 1024 + 200_000);
        desk.content[start..end].fill(0x66);
        desk.written_by_us(start as u64, 0x66, 200_000);
        desk.agreed(&format!("{cluster}"));
        desk.used_by_us();
        desk.agreed(&format!("{cluster}: used by us"));
    }
}

#[test]
fn an_image_that_we_created_with_each_option_is_used_in_turn() {
    let number = OptionValue::Number;
    let word = |word: &str| OptionValue::Word(word.into());
    let size = |bytes| vec![("cluster_size", number(bytes))];
    let with = |mut options: Vec<_>, name, value| {
        options.push((name, value));
        options
    };
    let mut cases = vec![
        vec![],
        vec![("version", number(2))],
        with(size(512), "version", number(2)),
        vec![("lazy_refcounts", OptionValue::Bool(true))],
        vec![("compression_type", word("zstd"))],
        vec![("extended_l2", OptionValue::Bool(true))],
        with(size(16 << 10), "extended_l2", OptionValue::Bool(true)),
        with(size(4096), "preallocation", word("metadata")),
        vec![("preallocation", word("falloc"))],
        with(size(512), "preallocation", word("full")),
    ];
    cases.extend([512, 1024, 4096, 32 << 10, 2 << 20].map(size));
    let bits = [1, 2, 4, 8, 32, 64];
    cases.extend(bits.map(|bits| vec![("refcount_bits", number(bits))]));
    for backing in [false, true] {
        for (seed, options) in (0..).zip(&cases) {
            let preallocated = options.iter().any(|(name, _)| *name == "preallocation");
            // Not each of them again.
            if backing && (preallocated || seed % 3 != 1) {
                continue;
            }
            let mut desk = Desk::new(seed);
            if backing {
                desk.base("base.raw", SIZE - 1000);
            }
            desk.create_by_us(options);
            desk.agreed(&format!("{options:?}: created by us"));
            let version_2 = options.contains(&("version", number(2)));
            if !(backing && version_2) {
                desk.used_by_qemu(2 << 20);
                desk.agreed(&format!("{options:?}: used by QEMU"));
            }
            desk.used_by_us();
            desk.agreed(&format!("{options:?}: used by us"));
        }
    }
}

#[test]
fn a_data_file_of_an_image_of_ours_is_used_in_turn() {
    for raw in [false, true] {
        let mut desk = Desk::new(u64::from(raw));
        let data = desk.at("top.data");
        let mut options = vec![("data_file", OptionValue::Path(data.clone()))];
        if raw {
            options.push(("data_file_raw", OptionValue::Bool(true)));
        }
        desk.create_by_us(&options);
        desk.agreed("created by us");
        desk.used_by_qemu(65536);
        desk.agreed("used by QEMU");
        desk.used_by_us();
        desk.agreed("used by us");
        if raw {
            desk.same(&fs::read(data).unwrap()[..SIZE as usize], "the data file");
        }
    }
}
