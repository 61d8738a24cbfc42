//! Disks of running guests change their size: what a stock kernel, the host and QEMU's tools see of it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::client::Client;
use crate::guest::{Folder, GUEST, Vm};
use crate::qcow2::{clean, random, script};
use crate::runner::cases;

cases![resize:
    disks_of_a_running_guest_grow_at_once,
    shrinking_needs_consent_and_under_a_guest_force,
    two_hundred_grows_of_each_disk_amid_verified_writes,
    sizes_changed_before_the_driver_is_loaded_are_found,
];

const MIB: u64 = 1 << 20;

/// Bytes that the host has allocated for a file.
fn allocated(folder: &Folder, name: &str) -> u64 {
    fs::metadata(folder.path(name)).unwrap().blocks() * 512
}

/// Resizes a disk by a `launcher` of its own; what it prints.
fn resize(folder: &Folder, disk: &str, size: &str) -> String {
    folder.ordered(&["disk", "resize", "vm.toml", disk, size])
}

/// Waits for the guest's kernel to log that a disk has so many bytes, and asks for its size. Of the two lines that
/// it logs only this one is a notice: `dmesg -n 6` keeps the other out of what the guest's commands print.
pub(crate) fn is_now(vm: &mut Vm, device: &str, bytes: u64) {
    vm.wait_for(&format!(
        "[{device}] new size: {} 512-byte logical blocks",
        bytes / 512
    ));
    vm.wait_for("\n");
    assert_eq!(size(vm, device), bytes);
}

/// Bytes of a disk as its guest sees it.
fn size(vm: &mut Vm, device: &str) -> u64 {
    let printed = vm.run(&format!("blockdev --getsize64 /dev/{device}"));
    printed.parse().unwrap()
}

/// Checks that an image holds what `expected.img` holds, for QEMU.
fn is_as_expected(folder: &Folder, image: &str, format: &str) {
    let arguments = ["compare", "-f", "raw", "-F", format, "expected.img", image];
    folder.host("/usr/bin/qemu-img", &arguments);
}

/// The document's own example in the outer machine's memory: of 64 MiB where it has a GiB. A raw disk and a qcow2
/// one stay fully allocated; one over a longer base shows nothing of what the base has in the new part.
fn disks_of_a_running_guest_grow_at_once() {
    let folder = Folder::new();
    let (source, base) = (random(MIB), random(MIB).repeat(72));
    folder.write("source.img", &source);
    folder.write("base.img", &base);
    folder.image("raw.img", 64 * MIB);
    let overlay = [
        "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "c.qcow2", "64M",
    ];
    folder.host("/usr/bin/qemu-img", &overlay);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"raw.img\"\nsparse = false\n\
         [[block]]\npath = \"b.qcow2\"\nsize = \"64MiB\"\nsparse = false\nid = \"SECOND\"\n\
         [[block]]\npath = \"c.qcow2\"\nbacking = \"base.img\"\n[[block]]\npath = \"source.img\"\nro = true\n"
    ));
    vm.ready();
    vm.run("dmesg -n 6");
    // MiB of the disk that get what the source has.
    let write = |vm: &mut Vm, device: &str, places: &str| {
        vm.run(&format!(
            "(for at in {places}; do dd if=/dev/vdd of=/dev/{device} bs=1M count=1 seek=$at \
             conv=notrunc,fsync status=none || exit 1; done)"
        ));
    };
    let disks = [("0", "vda"), ("SECOND", "vdb"), ("2", "vdc")];
    for (disk, device) in disks {
        let (code, said, note) =
            folder.order(&["disk", "resize", "vm.toml", disk, &(128 * MIB).to_string()]);
        assert_eq!(code, 0, "{note}");
        assert_eq!(
            said,
            format!("disk {disk} has grown from 64MiB to 128MiB\n")
        );
        // Its file has a `size`, which the next start would find too small.
        assert_eq!(note.contains("--save"), disk == "SECOND", "{note}");
        is_now(&mut vm, device, 128 * MIB);
        // The end of the old part, the beginning of the new one, its end.
        write(&mut vm, device, "63 64 127");
    }
    assert!(allocated(&folder, "raw.img") >= 128 * MIB);
    assert!(allocated(&folder, "b.qcow2") >= 128 * MIB);
    assert!(allocated(&folder, "c.qcow2") < 8 * MIB);
    for (disk, device) in disks {
        let (code, said, note) =
            folder.order(&["disk", "resize", "vm.toml", disk, "+16MiB", "--save"]);
        assert_eq!((code, &*note), (0, ""));
        assert!(said.contains("128MiB to 144MiB"), "{said}");
        is_now(&mut vm, device, 144 * MIB);
        write(&mut vm, device, "143");
    }
    assert!(allocated(&folder, "raw.img") >= 144 * MIB);
    assert!(allocated(&folder, "b.qcow2") >= 144 * MIB);
    let toml = fs::read_to_string(folder.path("vm.toml")).unwrap();
    assert_eq!(toml.matches("size = \"144MiB\"").count(), 3, "{toml}");
    vm.power_off();

    folder.image("expected.img", 144 * MIB);
    let expected = File::options()
        .write(true)
        .open(folder.path("expected.img"))
        .unwrap();
    for at in [63, 64, 127, 143] {
        expected.write_all_at(&source, at * MIB).unwrap();
    }
    is_as_expected(&folder, "raw.img", "raw");
    clean(&folder, "b.qcow2");
    is_as_expected(&folder, "b.qcow2", "qcow2");
    expected.write_all_at(&base[..63 << 20], 0).unwrap();
    clean(&folder, "c.qcow2");
    is_as_expected(&folder, "c.qcow2", "qcow2");
    assert!(
        fs::read(folder.path("base.img")).unwrap() == base,
        "the base has changed"
    );
}

fn shrinking_needs_consent_and_under_a_guest_force() {
    let folder = Folder::new();
    let content = random(16 * MIB);
    folder.write("raw.img", &content);
    folder.write("ro.img", &content[..4096]);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"raw.img\"\n[[block]]\npath = \"b.qcow2\"\nsize = \"16MiB\"\n\
         [[block]]\npath = \"ro.img\"\nro = true\n"
    ));
    vm.ready();
    vm.run("dmesg -n 6");
    for (arguments, says) in [
        (&["0", "8MiB"][..], "its last 8MiB would be lost"),
        (&["0", "8MiB", "--shrink"], "the guest runs"),
        (&["1", "8MiB"], "its last 8MiB would be lost"),
        (&["1", "8MiB", "--shrink"], "the guest runs"),
        (&["0", "17000000"], "expected a multiple of 512"),
        (&["0", "9223372036854775808"], "2^63"),
        (&["3", "32MiB"], "has no disk \"3\""),
    ] {
        let all = [&["disk", "resize", "vm.toml"], arguments].concat();
        let (code, said, errors) = folder.order(&all);
        assert_eq!((code, &*said), (2, ""), "{arguments:?}: {errors}");
        assert!(errors.contains(says), "{arguments:?}: {errors}");
    }
    let (code, _, errors) = folder.order(&["disk", "resize", "vm.toml", "2", "8KiB"]);
    assert_ne!(code, 0);
    assert!(errors.contains("read-only"), "{errors}");
    for (device, bytes) in [("vda", 16 * MIB), ("vdb", 16 * MIB), ("vdc", 4096)] {
        assert_eq!(size(&mut vm, device), bytes);
    }
    assert!(fs::read(folder.path("raw.img")).unwrap() == content);

    for (disk, device) in [("0", "vda"), ("1", "vdb")] {
        let forced = [
            "disk", "resize", "vm.toml", disk, "8MiB", "--shrink", "--force",
        ];
        let (code, said, errors) = folder.order(&forced);
        assert_eq!(code, 0, "{errors}");
        assert!(said.contains("its last 8MiB are lost"), "{said}");
        is_now(&mut vm, device, 8 * MIB);
    }
    // The kernel has not seen a new disk: it goes on with this one.
    vm.run("dd if=/dev/vda of=/dev/vdb bs=1M count=8 conv=notrunc,fsync status=none");
    vm.power_off();
    assert!(fs::read(folder.path("raw.img")).unwrap() == content[..8 << 20]);
    folder.write("expected.img", &content[..8 << 20]);
    clean(&folder, "b.qcow2");
    is_as_expected(&folder, "b.qcow2", "qcow2");

    let (code, _, errors) = folder.order(&["disk", "resize", "vm.toml", "0", "4MiB"]);
    assert_eq!(code, 2, "{errors}");
    let shrunk = folder.ordered(&["disk", "resize", "vm.toml", "0", "4MiB", "--shrink"]);
    assert!(shrunk.contains("its last 4MiB are lost"), "{shrunk}");
    assert!(fs::read(folder.path("raw.img")).unwrap() == content[..4 << 20]);
}

/// Writers, one a disk: 64 KiB from where the source has them to the same place of the disk, by turns in the last
/// part that the disk has by now and all over it. What was written is read back at once, and listed at the end.
const LOAD: &str = r#"
load() {
    n=0
    while [ ! -e /tmp/enough ]; do
        n=$((n + 1))
        read sectors </sys/block/$1/size
        chunks=$((sectors / 128))
        at=$((chunks - 1))
        [ $((n % 2)) = 0 ] || at=$((n * 37 % chunks))
        dd if=/dev/vdc of=/dev/$1 bs=64k count=1 skip=$at seek=$at conv=notrunc oflag=direct status=none || break
        dd if=/dev/$1 of=/tmp/$1 bs=64k count=1 skip=$at iflag=direct status=none || break
        dd if=/dev/vdc bs=64k count=1 skip=$at status=none | cmp - /tmp/$1 || break
        echo $at >>/tmp/written.$1
    done
    [ -e /tmp/enough ] || echo "$1: write $n, at $at of $chunks, failed" >>/tmp/failed
}
touch /tmp/failed
load vda &
load vdb &
echo 'load runs'
read line
touch /tmp/enough
wait
cat /tmp/failed
for disk in vda vdb; do
    echo "$disk:" $(sort -un /tmp/written.$disk)";"
done
"#;

fn two_hundred_grows_of_each_disk_amid_verified_writes() {
    const GROWS: u64 = 200;
    const CHUNK: u64 = 64 << 10;
    const FIRST: u64 = 4 * MIB;
    let folder = Folder::new();
    let last = FIRST + GROWS * CHUNK;
    let source = random(last);
    folder.write("source.img", &source);
    folder.image("a.img", FIRST);
    script(&folder, "script.img", LOAD);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"a.img\"\n\
         [[block]]\npath = \"b.qcow2\"\nsize = \"4MiB\"\n[block.qcow2]\ncluster_size = \"16KiB\"\n\
         [[block]]\npath = \"source.img\"\nro = true\n[[block]]\npath = \"script.img\"\nro = true\n"
    ));
    vm.ready();
    vm.send("sh /dev/vdd\n");
    vm.wait_for("load runs\r\n");
    let mut client = Client::of(&folder);
    let writes = |client: &mut Client| -> [u64; 2] {
        let status = client.status();
        [0, 1].map(|disk| status["disks"][disk]["writes"].as_u64().unwrap())
    };
    let mut seen = writes(&mut client);
    for grow in 1..=GROWS {
        client.resize("0", "+64KiB");
        client.resize("1", "+64KiB");
        // However fast the host is: the guest writes between any ten of them.
        if grow % 10 != 0 {
            continue;
        }
        loop {
            let now = writes(&mut client);
            if now[0] > seen[0] && now[1] > seen[1] {
                seen = now;
                break;
            }
            assert!(vm.alive(), "launcher has ended");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    vm.send("enough\n");
    vm.wait_for("vda: ");
    let a = vm.wait_for(";");
    vm.wait_for("vdb: ");
    let b = vm.wait_for(";");
    assert_eq!(vm.run("cat /tmp/failed"), "");
    for device in ["vda", "vdb"] {
        assert_eq!(size(&mut vm, device), last);
        let logged = vm.run(&format!("dmesg | grep -c '.{device}. new size'"));
        assert!(logged.parse::<u64>().unwrap() >= GROWS / 10, "{logged}");
    }
    let (_, errors) = vm.attempt("dmesg | grep -iE 'I/O error|beyond end|WARNING'");
    assert_eq!(errors, "");
    vm.power_off();

    clean(&folder, "b.qcow2");
    for (image, format, written) in [("a.img", "raw", a), ("b.qcow2", "qcow2", b)] {
        folder.image("expected.img", last);
        let expected = File::options()
            .write(true)
            .open(folder.path("expected.img"))
            .unwrap();
        let chunks: Vec<u64> = written
            .split(' ')
            .map(|n| n.trim().parse().unwrap())
            .collect();
        assert!(chunks.len() >= 10, "{chunks:?}");
        assert!(chunks.iter().any(|chunk| chunk * CHUNK >= FIRST));
        for chunk in chunks {
            let at = (chunk * CHUNK) as usize;
            let bytes = &source[at..at + CHUNK as usize];
            expected.write_all_at(bytes, chunk * CHUNK).unwrap();
        }
        is_as_expected(&folder, image, format);
    }
}

fn sizes_changed_before_the_driver_is_loaded_are_found() {
    let folder = Folder::new();
    folder.image("a.img", 8 * MIB);
    let guest = GUEST.replace("quiet", "quiet late=virtio_blk");
    let mut vm = folder.up(&format!(
        "{guest}\n[[block]]\npath = \"a.img\"\n[[block]]\npath = \"b.qcow2\"\nsize = \"8MiB\"\n"
    ));
    vm.ready();
    let (status, _) = vm.attempt("test -e /sys/block/vda");
    assert_ne!(status, 0, "the driver is loaded already");
    let mut has = 8;
    for load in [
        "modprobe virtio_blk",
        "rmmod virtio_blk; modprobe virtio_blk",
    ] {
        // The second time the disks have had a driver, which is gone when they grow.
        if let Some((unload, _)) = load.split_once(';') {
            vm.run(unload);
        }
        for size in ["+4MiB", "+4MiB"] {
            resize(&folder, "0", size);
            Client::of(&folder).resize("1", size);
        }
        has += 8;
        vm.run(load);
        for device in ["vda", "vdb"] {
            assert_eq!(size(&mut vm, device), has * MIB);
            vm.run(&format!(
                "dd if=/bin/busybox of=/dev/{device} bs=64k count=1 seek={} conv=notrunc,fsync status=none",
                has * 16 - 1
            ));
        }
    }
    assert_eq!(vm.run("dmesg | grep -c 'new size' || true"), "0");
    vm.run("dmesg -n 6");
    resize(&folder, "0", "32MiB");
    is_now(&mut vm, "vda", 32 * MIB);
    vm.power_off();
    clean(&folder, "b.qcow2");
}
