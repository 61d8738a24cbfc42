//! What QEMU does to a whole image, and what we make of it.

use std::fs;

use formats::conformance::qemu;

use super::desk::{Desk, SIZE};

#[test]
fn compressed_clusters_of_qemu_are_read_and_written_over() {
    for (seed, options) in (0..).zip([
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=2M,extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ]) {
        let mut desk = Desk::new(seed);
        desk.base("source.raw", SIZE);
        desk.backing.clear();
        // What does not become smaller stays as it is.
        for at in 0..100_000 {
            desk.content[1_000_000 + at] = desk.random.number() as u8;
        }
        fs::write(desk.at("source.raw"), &desk.content).unwrap();
        desk.qemu_img(&format!(
            "convert -c -f raw -O qcow2 -o {options} source.raw top.qcow2"
        ));
        desk.agreed(&format!("{options}: converted"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: used by us"));
        desk.used_by_qemu(2 << 20);
        desk.agreed(&format!("{options}: used by QEMU"));
        // From ours to theirs, compressed again.
        desk.qemu_img(&format!(
            "convert -c -f qcow2 -O qcow2 -o {options} top.qcow2 new.qcow2"
        ));
        fs::rename(desk.at("new.qcow2"), desk.at("top.qcow2")).unwrap();
        desk.agreed(&format!("{options}: converted again"));
    }
}

#[test]
fn qemu_writes_compressed_clusters_into_an_image_of_ours() {
    let mut desk = Desk::new(1);
    desk.create_by_us(&[]);
    let command = "write -c -P 0x77 131072 65536".to_owned();
    desk.qemu_io(
        "top.qcow2",
        &[command, "write -c -P 0x78 1048576 65536".into()],
    );
    desk.content[131_072..196_608].fill(0x77);
    desk.content[1_048_576..1_114_112].fill(0x78);
    desk.agreed("compressed by QEMU");
    desk.used_by_us();
    desk.agreed("used by us");
}

#[test]
fn snapshots_that_qemu_takes_applies_and_deletes_keep_what_they_hold() {
    for (seed, options) in (0..).zip([
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
    ]) {
        let mut desk = Desk::new(seed);
        desk.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {SIZE}"));
        desk.used_by_us();
        desk.qemu_img("snapshot -c a top.qcow2");
        let a = desk.content.clone();
        desk.used_by_us();
        desk.agreed(&format!("{options}: after a"));
        desk.qemu_img("snapshot -c b top.qcow2");
        let b = desk.content.clone();
        desk.used_by_us();
        desk.used_by_qemu(2 << 20);
        desk.used_by_us();
        desk.agreed(&format!("{options}: after b"));
        let now = std::mem::replace(&mut desk.content, a.clone());
        for (name, content) in [("a", &a), ("b", &b)] {
            let line = format!("convert -f qcow2 -l snapshot.name={name} -O raw top.qcow2 out");
            desk.qemu_img(&line);
            assert!(
                fs::read(desk.at("out")).unwrap() == *content,
                "{options}: snapshot {name}"
            );
        }
        desk.qemu_img("snapshot -c c top.qcow2");
        desk.qemu_img("snapshot -a a top.qcow2");
        desk.agreed(&format!("{options}: a applied"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: a applied and used by us"));
        desk.qemu_img("snapshot -d a top.qcow2");
        desk.agreed(&format!("{options}: a deleted"));
        desk.used_by_us();
        desk.qemu_img("snapshot -a c top.qcow2");
        desk.content = now;
        desk.agreed(&format!("{options}: c applied"));
        for name in ["b", "c"] {
            desk.qemu_img(&format!("snapshot -d {name} top.qcow2"));
        }
        desk.used_by_us();
        desk.agreed(&format!("{options}: no snapshot left"));
    }
}

#[test]
fn qemu_commits_what_we_wrote() {
    for seed in 0..3 {
        let mut desk = Desk::new(seed);
        desk.base("base.raw", SIZE);
        desk.qemu_img("convert -f raw -O qcow2 base.raw base.qcow2");
        desk.qemu_img("create -q -f qcow2 -F qcow2 -b base.qcow2 mid.qcow2");
        desk.qemu_img("create -q -f qcow2 -o cluster_size=4k -F qcow2 -b mid.qcow2 top.qcow2");
        desk.backing = vec!["mid.qcow2", "base.qcow2"];
        desk.used_by_us();
        desk.agreed("over two");
        desk.qemu_img("commit -q top.qcow2");
        let mid = desk.ours("mid.qcow2", &["base.qcow2"]);
        desk.same(&mid, "committed to the middle");
        desk.agreed("committed");
        desk.used_by_us();
        desk.qemu_img("commit -q -b base.qcow2 top.qcow2");
        let base = desk.ours("base.qcow2", &[]);
        desk.same(&base, "committed to the base");
    }
}

#[test]
fn an_image_that_qemu_amends_is_used_in_turn() {
    let mut desk = Desk::new(5);
    desk.base("base.raw", SIZE);
    desk.qemu_img(&format!(
        "create -q -f qcow2 -o compat=0.10,cluster_size=4k -F raw -b base.raw top.qcow2 {SIZE}"
    ));
    desk.used_by_us();
    for amended in [
        "compat=1.1",
        "lazy_refcounts=on",
        "refcount_bits=64",
        "refcount_bits=16,lazy_refcounts=off",
        "compat=0.10",
        "compat=1.1",
    ] {
        desk.qemu_img(&format!("amend -q -f qcow2 -o {amended} top.qcow2"));
        desk.agreed(&format!("amended, {amended}"));
        desk.used_by_us();
        desk.agreed(&format!("{amended}: used by us"));
    }
}

#[test]
fn an_image_that_qemu_rebases_is_used_in_turn() {
    let mut desk = Desk::new(6);
    desk.base("base.raw", SIZE);
    desk.qemu_img("convert -f raw -O qcow2 base.raw other.qcow2");
    desk.qemu_io("other.qcow2", &["write -P 9 0 1M".into()]);
    desk.qemu_img(&format!(
        "create -q -f qcow2 -F raw -b base.raw top.qcow2 {SIZE}"
    ));
    desk.used_by_us();
    desk.qemu_img("rebase -q -f qcow2 -F qcow2 -b other.qcow2 top.qcow2");
    desk.backing = vec!["other.qcow2"];
    desk.agreed("rebased");
    desk.used_by_us();
    desk.agreed("rebased and used by us");
    let line = ["rebase", "-q", "-f", "qcow2", "-b", "", "top.qcow2"];
    qemu::done(desk.folder.path(), "qemu-img", line).unwrap();
    desk.backing.clear();
    desk.agreed("alone");
    desk.used_by_us();
    desk.agreed("alone and used by us");
}

#[test]
fn each_of_us_resizes_what_the_other_made() {
    for (seed, options) in (0..).zip([
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
    ]) {
        let mut desk = Desk::new(seed);
        // In version 2 QEMU cannot hide what lies below new space.
        let below = if options == "compat=0.10" { 0 } else { 4 << 20 };
        desk.base("base.raw", SIZE + below);
        let backing = "-F raw -b base.raw";
        desk.qemu_img(&format!(
            "create -q -f qcow2 -o {options} {backing} top.qcow2 {SIZE}"
        ));
        for size in [5 << 20, (4 << 20) + 512, 7 << 20] {
            desk.used_by_us();
            desk.qemu_img(&format!("resize -q -f qcow2 --shrink top.qcow2 {size}"));
            desk.content.resize(size, 0);
            desk.agreed(&format!("{options}: resized by QEMU to {size}"));
        }
        for size in [8 << 20, (2 << 20) + 1024, 6 << 20] {
            desk.resized_by_us(size);
            desk.agreed(&format!("{options}: resized by us to {size}"));
            desk.used_by_us();
            desk.agreed(&format!("{options}: used by us at {size}"));
        }
    }
}

#[test]
fn persistent_bitmaps_are_no_longer_valid_after_we_wrote() {
    let mut desk = Desk::new(8);
    desk.qemu_img(&format!("create -q -f qcow2 top.qcow2 {SIZE}"));
    desk.used_by_qemu(65536);
    desk.qemu_img("bitmap --add -f qcow2 top.qcow2 dirty");
    desk.agreed("with a bitmap");
    let autoclear = |desk: &Desk| fs::read(desk.at("top.qcow2")).unwrap()[95] & 1;
    assert_eq!(autoclear(&desk), 1);
    desk.used_by_us();
    assert_eq!(autoclear(&desk), 0);
    // QEMU finds that nothing refers to the bitmap any more.
    desk.leaks = true;
    desk.agreed("used by us");
}
