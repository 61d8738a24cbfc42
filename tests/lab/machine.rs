//! The machine that a guest finds is the same wherever its VM's file lies, and on every host: that is
//! what a lock file promises.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use launcher::digest::Digest;

use crate::guest::{Folder, Vm};
use crate::runner::cases;

cases![machine:
    is_the_same_in_every_folder_and_on_every_host,
    forgets_what_is_written_where_all_disks_are_ephemeral,
];

/// Disks of each kind that a bus can tell from another.
const VM: &str = r#"
    cpus = 2
    memory = "512MiB"
    [boot]
    kernel = "vmlinuz"
    initrd = "guest.img"
    cmdline = "quiet lab.word=last"
    [[block]]
    path = "one.img"
    id = "ONE"
    [[block]]
    path = "two.img"
    ro = true
    queues = 2
    [[block]]
    path = "three.qcow2"
    id = "three of them"
    size = "8MiB"
    block_size = 4096
"#;

/// Environment variable: set to print what machine.golden is to have.
const GOLDEN: &str = "LAB_GOLDEN";

/// What prints all that is to be found in the guest, one line each: a title, and its value.
const LISTED: [&str; 7] = [
    "cd /sys/firmware/acpi/tables; for it in $(find . -type f | sort); do \
     echo acpi ${it#./} $(xxd -p $it | tr -d '\\n'); done",
    "cd /sys/bus/pci/devices; for it in *; do \
     echo pci $it config $(xxd -p $it/config | tr -d '\\n'); \
     for key in vendor device revision class subsystem_vendor subsystem_device irq resource; do \
     echo pci $it $key $(cat $it/$key); done; done",
    "cd /sys/bus/virtio/devices; for it in *; do \
     echo virtio $it $(cat $it/device) $(cat $it/features); done",
    "cd /sys/block; for it in vd*; do for key in serial size ro queue/logical_block_size; do \
     echo disk $it $key $(cat $it/$key); done; echo disk $it queues $(ls $it/mq | wc -l); done",
    "cd /sys/firmware/memmap; for it in *; do \
     echo memory $(cat $it/start) $(cat $it/end) $(cat $it/type); done",
    "for it in /sys/class/dmi/id/*; do [ ! -f $it ] || echo dmi ${it##*/} $(cat $it); done; \
     for it in /sys/class/net/*; do [ ! -e $it ] || echo net ${it##*/} $(cat $it/address); done",
    "echo cpus $(nproc); echo cmdline $(cat /proc/cmdline)",
];

/// A folder with the VM.
fn folder() -> Folder {
    let folder = Folder::new();
    folder.write("vm.toml", VM);
    folder.image("one.img", 1 << 20);
    folder.image("two.img", 2 << 20);
    folder
}

/// The machine as its guest sees it, once its drivers have bound: one line each.
fn seen(vm: &mut Vm) -> String {
    vm.ready();
    let parts = LISTED.map(|part| vm.run(part) + "\n");
    vm.power_off();
    let listed = parts.concat();
    listed
        .lines()
        .filter(|line| !line.is_empty())
        .fold(String::new(), |all, line| all + line + "\n")
}

/// The bytes that a line of [`seen`] has.
fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.bytes().collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// What is checked in of it: tables and configuration spaces by their digests.
fn golden(seen: &str) -> String {
    let mut golden = String::new();
    for line in seen.lines() {
        let (title, value) = line.rsplit_once(' ').unwrap();
        let raw = line.starts_with("acpi ") || title.ends_with(" config");
        match raw {
            true => writeln!(golden, "{title} {}", Digest::of_bytes(&bytes(value))).unwrap(),
            false => writeln!(golden, "{line}").unwrap(),
        }
    }
    golden
}

/// Nothing of it comes from the folder, the environment, or the host: another one has the same golden file.
/// The processor is the host's, and not looked at.
fn is_the_same_in_every_folder_and_on_every_host() {
    let (here, there) = (folder(), folder());
    // A slow machine says that it takes its time.
    let (code, _, said) = here.order(&["lock"]);
    assert_eq!(code, 0, "{said}");
    fs::copy(here.path("vm.lock"), there.path("vm.lock")).unwrap();
    let mut up = here.launcher(&["up", "--locked", "vm.toml"]);
    let first = seen(&mut Vm::start(&mut up));
    let mut up = there.launcher(&["up", "--locked"]);
    up.arg(there.path("vm.toml"))
        .current_dir("/")
        .env("HOME", there.path("home"))
        .env("TMPDIR", there.path(""))
        .env("TZ", "Asia/Tokyo")
        .env("LAUNCHER_IO", "threads");
    let second = seen(&mut Vm::start(&mut up));
    assert_eq!(first, second, "the same VM in two folders");

    // The tables that a lock has the digest of are those that the guest found.
    let config = launcher::config::load(&here.path("vm.toml"), &Default::default()).unwrap();
    let shape = launcher::vm::shape(&config).unwrap();
    let mut tables = BTreeMap::new();
    for line in first.lines().filter_map(|line| line.strip_prefix("acpi ")) {
        let (name, hex) = line.split_once(' ').unwrap();
        let table = bytes(hex);
        let mut places = shape.acpi.windows(table.len());
        assert!(places.any(|place| place == table), "the table {name}");
        tables.insert(name, table.len());
    }
    let names: Vec<_> = tables.into_keys().collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP"]);

    let golden = golden(&first);
    if std::env::var_os(GOLDEN).is_some() {
        golden.lines().for_each(|line| println!("golden: {line}"));
        return;
    }
    assert_eq!(
        golden,
        include_str!("machine.golden"),
        "this host's guest has another machine than machine.golden; if that is meant, renew it: \
         LAB_GOLDEN=1 cargo test --test lab -- machine::is | sed -n 's/^golden: //p' > \
         tests/lab/machine.golden"
    );
}

/// A read-only disk stays one, `sparse = false` is set aside, and a process of its own does the same.
fn forgets_what_is_written_where_all_disks_are_ephemeral() {
    let folder = folder();
    let toml = VM.replacen("id = \"ONE\"", "sparse = false", 1);
    folder.write("vm.toml", toml);
    folder.host(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "three.qcow2", "8M"],
    );
    let images = ["one.img", "two.img", "three.qcow2"];
    let before = images.map(|name| fs::read(folder.path(name)).unwrap());
    let blocks = |name| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(folder.path(name)).unwrap().blocks()
    };
    let allocated = blocks("one.img");
    let mut vm = Vm::start(&mut folder.launcher(&["up", "--ephemeral"]));
    vm.ready();
    for disk in ["vda", "vdc"] {
        vm.run(&format!(
            "echo written >/tmp/x; dd if=/tmp/x of=/dev/{disk} bs=4096 conv=sync,fsync"
        ));
        assert_eq!(vm.run(&format!("head -c 7 /dev/{disk}")), "written");
    }
    assert_eq!(vm.run("cat /sys/block/vdb/ro"), "1");
    vm.power_off();
    // Two at once: either has no more than read the images.
    for name in ["--name=one", "--name=two"] {
        folder.ordered(&["up", "--ephemeral", "--detach", name]);
    }
    folder.ordered(&["kill", "one", "two"]);
    let after = images.map(|name| fs::read(folder.path(name)).unwrap());
    assert!(before == after, "an image was written");
    assert_eq!(blocks("one.img"), allocated);
}
