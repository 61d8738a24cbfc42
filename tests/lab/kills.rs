//! `launcher` is killed amid a guest's writes, again and again, on one image.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::guest::{Folder, GUEST, PATIENCE, Vm};
use crate::qcow2::{convert, random, script};
use crate::runner::cases;

cases![qcow2:
    killed_twenty_times_amid_writes_loses_nothing_synced,
];

const KILLS: u32 = 20;

/// What the guest does in each round, after it has found all that was synced in the rounds before: files are
/// written, synced, told and, all but the last few, removed again, by three writers at once; one file of the base
/// is written over with what is in it; the space of what was removed is trimmed.
const WRITERS: &str = r#"
writer() {
    n=0
    while :; do
        n=$((n + 1))
        dd if=/dev/urandom of=$1.$n bs=1k count=$((RANDOM % 300 + 1)) conv=fsync status=none
        echo "synced $(md5sum $1.$n);"
        old=$1.$((n - 2))
        if [ -e $old ]; then
            echo "removing $old;"
            rm $old
        fi
    done
}
cp base.$round /tmp/same
for name in a b c; do writer r$round.$name & done
while :; do
    dd if=/tmp/same of=base.$round bs=4k conv=notrunc,fsync status=none
    fstrim .
done
"#;

/// Files that must be there, each with its MD5.
type Files = BTreeMap<String, String>;

/// The list that `md5sum -c` takes.
fn list(files: &Files) -> String {
    let line = |(name, sum): (&String, &String)| format!("{sum}  {name}\n");
    files.iter().map(line).collect()
}

/// Enters what a guest has told, as far as it came out whole.
fn told(console: &str, files: &mut Files) {
    for line in console.split("\r\n") {
        let Some(line) = line.strip_suffix(';') else {
            continue;
        };
        if let Some(name) = line.strip_prefix("removing ") {
            files.remove(name);
        } else if let Some((sum, name)) = line
            .strip_prefix("synced ")
            .and_then(|line| line.split_once("  "))
        {
            assert_eq!(sum.len(), 32, "{line}");
            files.insert(name.to_owned(), sum.to_owned());
        }
    }
}

/// A base image with a file system and twenty files.
fn base(folder: &Folder, files: &mut Files) {
    fs::create_dir(folder.path("content")).unwrap();
    for number in 0..KILLS {
        let name = format!("base.{number}");
        let file = format!("content/{name}");
        folder.write(&file, random(100_000 + u64::from(number) * 7919));
        let printed = folder.host("/bin/busybox", &["md5sum", &file]);
        let (sum, _) = printed.split_once(' ').unwrap();
        files.insert(name, sum.to_owned());
    }
    folder.image("base.img", 64 << 20);
    let arguments = [
        "-q",
        "-t",
        "ext4",
        "-E",
        "root_owner=0:0",
        "-d",
        "content",
        "base.img",
    ];
    folder.host("/sbin/mke2fs", &arguments);
}

/// Starts the guest and has it look for `files`; then it goes on with `rest` of its script.
fn boot(folder: &Folder, files: &Files, round: u32, rest: &str) -> Vm {
    let text = format!(
        "round={round}\nmkdir -p /mnt\nmount -t ext4 /dev/vda /mnt && cd /mnt &&\n\
         md5sum -c >/tmp/found <<'END' && echo 'files: right' || {{ cat /tmp/found; echo 'files: wrong'; exit; }}\n\
         {}END\n{rest}",
        list(files)
    );
    script(folder, "script.img", &text);
    let toml = format!(
        "{GUEST}\n[[block]]\npath = \"disk.qcow2\"\nsize = \"64MiB\"\nbacking = \"base.img\"\n\
         [[block]]\npath = \"script.img\"\nro = true\n"
    );
    let mut command = folder.command(&toml);
    // In turns by io_uring and by threads.
    if round % 2 == 1 {
        command.env("LAUNCHER_IO", "threads");
    }
    let mut vm = Vm::start(&mut command);
    vm.ready();
    vm.send("sh /dev/vdb\n");
    vm.wait_for("files: ");
    let verdict = vm.wait_for("\r\n");
    assert_eq!(verdict, "right", "round {round}: synced files are lost");
    vm
}

/// Checks an image whose `launcher` was killed as QEMU sees it: nothing but clusters leaked; the file system sound
/// once its journal is replayed; the files there.
fn whole(folder: &Folder, files: &Files, round: u32) {
    let ends = |program: &str, arguments: &[&str], allowed: [i32; 2]| {
        let mut command = Command::new(program);
        let output = command
            .args(arguments)
            .current_dir(folder.path(""))
            .output()
            .unwrap();
        assert!(
            output
                .status
                .code()
                .is_some_and(|code| allowed.contains(&code)),
            "round {round}: {program} {arguments:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    };
    // 3: leaked clusters and nothing else.
    ends(
        "/usr/bin/qemu-img",
        &["check", "-f", "qcow2", "disk.qcow2"],
        [0, 3],
    );
    convert(folder, "disk.qcow2", "disk.raw");
    // 1: the journal was replayed.
    ends("/sbin/e2fsck", &["-p", "disk.raw"], [0, 1]);
    folder.host("/sbin/e2fsck", &["-f", "-n", "disk.raw"]);
    let found = folder.path("found");
    let _ = fs::remove_dir_all(&found);
    fs::create_dir(&found).unwrap();
    folder.host("/sbin/debugfs", &["-R", "rdump / found", "disk.raw"]);
    folder.write("found/list", list(files));
    let names = folder.host(
        "/bin/busybox",
        &["sh", "-c", "cd found && busybox md5sum -c list"],
    );
    assert_eq!(names.lines().count(), files.len());
}

fn killed_twenty_times_amid_writes_loses_nothing_synced() {
    let folder = Folder::new();
    let mut files = Files::new();
    base(&folder, &mut files);
    let before = fs::read(folder.path("base.img")).unwrap();
    let mut random = 1_u32;
    for round in 0..KILLS {
        let mut vm = boot(&folder, &files, round, WRITERS);
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        for _ in 0..3 + (random >> 8) % 10 {
            vm.wait_for("synced ");
        }
        thread::sleep(Duration::from_millis(((random >> 16) % 250).into()));
        vm.signal(Signal::KILL);
        assert_eq!(vm.exit(), -9);
        assert!(vm.console.wait_for_end(PATIENCE));
        told(&vm.console.text(), &mut files);
        whole(&folder, &files, round);
    }
    let mut vm = boot(
        &folder,
        &files,
        KILLS,
        "cd / && umount /mnt && echo 'files: unmounted'\n",
    );
    vm.wait_for("files: unmounted");
    vm.power_off();
    whole(&folder, &files, KILLS);
    assert!(
        fs::read(folder.path("base.img")).unwrap() == before,
        "the base has changed"
    );
}
