use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

const VM: &str = r#"
cpus = 2
memory = "1GiB"
[boot]
kernel = "vmlinuz"
initrd = "boot/initrd.img"
cmdline = "quiet"
[[block]]
path = "root.img"
root = true
ro = true
id = "ROOT"
[[block]]
path = "overlay.qcow2"
backing = "base.img"
size = "8GiB"
[[block]]
path = "data.img"
[[block]]
path = "scratch.img"
ephemeral = true
"#;

/// A folder with a VM and all its files.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        let place = Folder(tempfile::tempdir().unwrap());
        place.put("vm.toml", VM);
        fs::create_dir(place.path("boot")).unwrap();
        for name in [
            "vmlinuz",
            "boot/initrd.img",
            "root.img",
            "base.img",
            "scratch.img",
        ] {
            place.put(name, name);
        }
        place.put("data.img", &"x".repeat(4096));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// The VM's file with another text in the place of one.
    fn edit(&self, from: &str, to: &str) {
        let text = VM.replace(from, to);
        assert_ne!(text, VM, "{from}");
        self.put("vm.toml", &text);
    }

    fn vm(&self) -> Vm {
        config::load(&self.path("vm.toml"), &Default::default()).unwrap()
    }

    fn place(&self) -> Place {
        Place::of(&self.path("vm.toml"), &Default::default()).unwrap()
    }

    fn lock(&self) -> String {
        write(&self.vm(), &self.place()).unwrap();
        fs::read_to_string(self.path("vm.lock")).unwrap()
    }

    /// What a check says, without the folder's name; `Ok` is that nothing has drifted.
    fn check(&self) -> Result<(), String> {
        check(&self.vm(), &self.place()).map_err(|error| {
            assert_eq!(error.exit, 2);
            self.plain(&error)
        })
    }

    fn plain(&self, error: &Error) -> String {
        let folder = format!("{}/", self.0.path().display());
        error.to_string().replace(&folder, "")
    }

    /// The differences that a check finds: title, locked, found.
    fn drift(&self) -> Vec<(String, String, String)> {
        let said = self.check().unwrap_err();
        let lines: Vec<_> = said.lines().collect();
        let count = lines
            .iter()
            .filter(|it| it.starts_with("    locked"))
            .count();
        let end = lines.len() - 1;
        assert_eq!(end - 1, 3 * count, "{said}");
        let differences = lines[1..end].chunks(3).map(|lines| {
            let part = |line: &str, start: &str| line.strip_prefix(start).unwrap().to_owned();
            (
                part(lines[0], "  "),
                part(lines[1], "    locked  "),
                part(lines[2], "    found   "),
            )
        });
        differences.collect()
    }
}

fn sha256(text: &str) -> String {
    crate::digest::Digest::of_bytes(text.as_bytes()).to_string()
}

fn one(title: &str, locked: &str, found: &str) -> Vec<(String, String, String)> {
    vec![(title.into(), locked.into(), found.into())]
}

#[test]
fn a_lock_is_made_to_be_read() {
    let text = Folder::new().lock();
    let [acpi, pci] = ["acpi_tables", "pci_config"].map(|key| {
        let start = format!("{key} = \"");
        let line = text.lines().find(|line| line.starts_with(&start)).unwrap();
        line[start.len()..line.len() - 1].to_owned()
    });
    let version = env!("CARGO_PKG_VERSION");
    let [kernel, initrd, root, base, scratch] = [
        "vmlinuz",
        "boot/initrd.img",
        "root.img",
        "base.img",
        "scratch.img",
    ]
    .map(sha256);
    assert_eq!(
        text,
        format!(
            r#"# What vm.toml boots, and the machine its guest finds. `launcher lock vm.toml` renews it.

version = 1
launcher = "{version}"

[machine]
cpus = 2
memory = "1GiB"
cmdline = "console=ttyS0 root=/dev/vda ro quiet"
acpi_tables = "{acpi}"
pci_config = "{pci}"

[machine.pci]
"00:00.0" = "host bridge"
"00:01.0" = "entropy source"
"00:02.0" = "block.0"
"00:03.0" = "block.1"
"00:04.0" = "block.2"
"00:05.0" = "block.3"

[boot.initrd]
path = "boot/initrd.img"
sha256 = "{initrd}"

[boot.kernel]
path = "vmlinuz"
sha256 = "{kernel}"

[[block]]
path = "root.img"
id = "ROOT"
format = "sparse-raw"
ro = true
ephemeral = false
sparse = true
block_size = 512
queues = 1
sha256 = "{root}"

[[block]]
path = "overlay.qcow2"
format = "qcow2"
ro = false
ephemeral = false
sparse = true
block_size = 512
queues = 1
size = "8GiB"

[[block.backing]]
path = "base.img"
sha256 = "{base}"
format = "raw"

[[block]]
path = "data.img"
format = "sparse-raw"
ro = false
ephemeral = false
sparse = true
block_size = 512
queues = 1
size = "4KiB"

[[block]]
path = "scratch.img"
format = "sparse-raw"
ro = false
ephemeral = true
sparse = true
block_size = 512
queues = 1
sha256 = "{scratch}"
"#
        )
    );
}

#[test]
fn a_lock_is_the_same_wherever_the_vm_lies() {
    assert_eq!(Folder::new().lock(), Folder::new().lock());
}

#[test]
fn what_is_locked_is_as_it_was() {
    let place = Folder::new();
    place.lock();
    assert_eq!(place.check(), Ok(()));
    assert!(!write(&place.vm(), &place.place()).unwrap());
}

#[test]
fn every_file_that_the_vm_does_not_write_is_locked() {
    for (name, title) in [
        ("vmlinuz", "boot.kernel (vmlinuz), sha256"),
        ("boot/initrd.img", "boot.initrd (boot/initrd.img), sha256"),
        ("root.img", "block.0.path (root.img), sha256"),
        ("base.img", "block.1.backing.0 (base.img), sha256"),
        ("scratch.img", "block.3.path (scratch.img), sha256"),
    ] {
        let place = Folder::new();
        place.lock();
        place.put(name, "another");
        assert_eq!(place.drift(), one(title, &sha256(name), &sha256("another")));
        fs::remove_file(place.path(name)).unwrap();
        let [(_, _, found)] = &place.drift()[..] else {
            panic!("{name}")
        };
        assert!(found.ends_with("No such file or directory"), "{found}");
    }
}

#[test]
fn what_the_vm_writes_may_have_any_content() {
    let place = Folder::new();
    place.lock();
    place.put("data.img", &"y".repeat(4096));
    assert_eq!(place.check(), Ok(()));
}

#[test]
fn an_image_that_has_grown_is_no_drift_and_one_that_has_shrunk_is() {
    let place = Folder::new();
    place.lock();
    place.put("data.img", &"x".repeat(8192));
    assert_eq!(place.check(), Ok(()));
    place.put("data.img", &"x".repeat(1024));
    assert_eq!(place.drift(), one("block.2.size", "4KiB", "1KiB"));
    fs::remove_file(place.path("data.img")).unwrap();
    let [(title, _, found)] = &place.drift()[..] else {
        panic!()
    };
    assert_eq!(title, "block.2.size");
    assert!(found.contains("data.img: No such file"), "{found}");
}

#[test]
fn a_size_in_the_vm_s_file_is_what_counts() {
    let place = Folder::new();
    place.lock();
    // The overlay is created at the next start.
    assert!(!place.path("overlay.qcow2").exists());
    place.edit("8GiB", "9GiB");
    assert_eq!(place.drift(), one("block.1.size", "8GiB", "9GiB"));
    place.edit(
        "path = \"data.img\"",
        "path = \"data.img\"\nsize = \"8KiB\"",
    );
    assert_eq!(place.drift(), one("block.2.size", "4KiB", "8KiB"));
}

#[test]
fn what_the_guest_sees_is_locked() {
    let place = Folder::new();
    place.lock();
    place.edit("memory = \"1GiB\"", "memory = \"2GiB\"");
    assert_eq!(place.drift(), one("memory", "1GiB", "2GiB"));
    place.edit("\"quiet\"", "\"debug\"");
    assert_eq!(
        place.drift(),
        one(
            "the kernel's command line",
            "console=ttyS0 root=/dev/vda ro quiet",
            "console=ttyS0 root=/dev/vda ro debug"
        )
    );
    for (from, to, titles) in [
        ("cpus = 2", "cpus = 3", &["cpus", "ACPI tables, sha256"][..]),
        ("id = \"ROOT\"", "id = \"DATA\"", &["block.0.id"]),
        (
            "root = true",
            "root = true\nqueues = 2",
            &["PCI configuration spaces, sha256", "block.0.queues"],
        ),
        (
            "root = true",
            "root = true\nblock_size = 4096",
            &["block.0.block_size"],
        ),
        (
            "[[block]]\npath = \"data.img\"\n",
            "",
            &[
                "PCI address 00:05.0",
                "block.2.ephemeral",
                "block.2.size",
                "block.2.path (scratch.img), sha256",
                "block.3",
            ],
        ),
        ("initrd = \"boot/initrd.img\"", "", &["boot.initrd"]),
    ] {
        place.edit(from, to);
        let drift = place.drift();
        let found: Vec<_> = drift.iter().map(|(title, ..)| &**title).collect();
        assert_eq!(found, titles);
    }
}

#[test]
fn which_disk_is_booted_from_is_locked() {
    let place = Folder::new();
    let files = "kernel = \"vmlinuz\"\ninitrd = \"boot/initrd.img\"";
    place.edit(files, "from_block = \"ROOT\"");
    let text = place.lock();
    assert!(text.contains("\nfrom_block = 0\n"), "{text}");
    place.edit(files, "from_block = 0");
    assert_eq!(place.check(), Ok(()));
    place.edit(files, "from_block = 3");
    assert_eq!(place.drift(), one("boot.from_block", "disk 0", "disk 3"));
    place.edit("initrd = \"boot/initrd.img\"", "");
    assert_eq!(
        place.drift()[0],
        one("boot.from_block", "disk 0", "nothing")[0]
    );
}

#[test]
fn a_backing_file_that_is_read_in_another_format_is_drift() {
    let place = Folder::new();
    place.lock();
    fs::rename(place.path("base.img"), place.path("base.qcow2")).unwrap();
    place.edit("\"base.img\"", "\"base.qcow2\"");
    let title = "block.1.backing.0 (base.qcow2), format";
    assert_eq!(place.drift(), one(title, "raw", "qcow2"));
}

#[test]
fn a_path_that_is_another_is_no_drift() {
    let place = Folder::new();
    place.lock();
    fs::rename(place.path("vmlinuz"), place.path("kernel")).unwrap();
    place.edit("\"vmlinuz\"", "\"kernel\"");
    assert_eq!(place.check(), Ok(()));
}

#[test]
fn all_that_has_drifted_is_said_at_once() {
    let place = Folder::new();
    place.lock();
    place.put("vmlinuz", "new");
    place.put("base.img", "new");
    place.edit("cpus = 2\nmemory = \"1GiB\"", "cpus = 2\nmemory = \"4GiB\"");
    let (new, old, base) = (sha256("new"), sha256("vmlinuz"), sha256("base.img"));
    assert_eq!(
        place.check().unwrap_err(),
        format!(
            "error: vm.toml is not as vm.lock has it: 3 differences\n  \
             memory\n    locked  1GiB\n    found   4GiB\n  \
             boot.kernel (vmlinuz), sha256\n    locked  {old}\n    found   {new}\n  \
             block.1.backing.0 (base.img), sha256\n    locked  {base}\n    found   {new}\n\
             help: if that is what you want, renew the lock with `launcher lock vm.toml`; else \
             put back what was locked"
        )
    );
}

#[test]
fn a_lock_of_another_launcher_with_the_same_machine_is_no_drift() {
    let place = Folder::new();
    let text = place.lock();
    let own = env!("CARGO_PKG_VERSION");
    place.put("vm.lock", &text.replace(own, "9.0.1"));
    assert_eq!(place.check(), Ok(()));
    let note = compare(&place.vm(), &place.place())
        .unwrap()
        .note()
        .unwrap();
    assert_eq!(
        note,
        format!("launcher 9.0.1 wrote the lock, this is {own}: the machine is the same")
    );
    place.put("vm.lock", &text);
    assert_eq!(compare(&place.vm(), &place.place()).unwrap().note(), None);
}

#[test]
fn without_a_lock_the_command_that_writes_it_is_said() {
    assert_eq!(
        Folder::new().check().unwrap_err(),
        "error: vm.toml has no lock file: vm.lock is not there\nhelp: write it with `launcher \
         lock vm.toml`"
    );
}

#[test]
fn a_lock_of_another_version_is_refused() {
    let place = Folder::new();
    let text = place.lock();
    place.put("vm.lock", &text.replace("version = 1", "version = 2"));
    assert_eq!(
        place.check().unwrap_err(),
        "error: vm.lock has `version` 2, expected 1\nhelp: another launcher wrote it: use that \
         one, or write it anew with `launcher lock vm.toml`"
    );
}

#[test]
fn a_damaged_lock_is_refused_with_its_line() {
    let place = Folder::new();
    let text = place.lock();
    for (from, to, why) in [
        ("version = 1\n", "", "it has no `version`"),
        ("cpus = 2", "cpus = -2", "line 7: "),
        (
            "cpus = 2",
            "cpus = 2\ncolour = 1",
            "line 8: unknown field `colour`",
        ),
        ("cpus = 2\n", "", "line 6: missing field `cpus`"),
        ("[machine]", "[machine", "line 6: "),
        (
            "memory = \"1GiB\"",
            "memory = \"x\"",
            "line 8: \"x\" is no size",
        ),
        (
            "initrd.img\"\nsha256 = \"",
            "initrd.img\"\nsha256 = \"0",
            "line 23: the digest ",
        ),
        ("quiet", "\u{0}", "line 9: "),
    ] {
        let damaged = text.replace(from, to);
        assert_ne!(damaged, text, "{from}");
        place.put("vm.lock", &damaged);
        let said = place.check().unwrap_err();
        let start = format!("error: vm.lock is no lock file: {why}");
        assert!(said.starts_with(&start), "{said}");
        let help = "\nhelp: restore it, or write it anew with `launcher lock vm.toml`";
        assert!(said.ends_with(help), "{said}");
    }
    for hostile in [&b"\xff\xfe"[..], b"", b"<<<<<<< HEAD\n", &[b'['; 5000]] {
        fs::write(place.path("vm.lock"), hostile).unwrap();
        let said = place.check().unwrap_err();
        assert!(
            said.starts_with("error: vm.lock is no lock file: "),
            "{said}"
        );
    }
    fs::write(place.path("vm.lock"), vec![b'#'; 2 << 20]).unwrap();
    assert!(place.check().unwrap_err().contains("is larger than 1MiB"));
}

#[test]
fn a_lock_cut_short_anywhere_is_an_error_or_drift_and_never_a_panic() {
    let place = Folder::new();
    let text = place.lock();
    for end in (0..text.trim_end().len()).step_by(7) {
        place.put("vm.lock", &text[..end]);
        assert!(place.check().is_err(), "{end}");
    }
}

#[test]
fn a_file_that_is_missing_is_no_lock() {
    let place = Folder::new();
    fs::remove_file(place.path("base.img")).unwrap();
    let error = write(&place.vm(), &place.place()).unwrap_err();
    let said = place.plain(&error);
    assert!(
        said.starts_with("error: cannot open base.img: No such file or directory\n"),
        "{said}"
    );
    assert!(said.contains("vm.toml:15:"), "{said}");
    assert!(!place.path("vm.lock").exists());
}

#[test]
fn a_folder_that_is_the_initrd_is_locked_with_all_that_is_in_it() {
    let place = Folder::new();
    place.edit("boot/initrd.img", "boot");
    place.lock();
    assert_eq!(place.check(), Ok(()));
    place.put("boot/more", "");
    assert_eq!(place.drift()[0].0, "boot.initrd (boot), sha256");
}

#[test]
fn a_file_that_is_yet_to_be_fetched_is_locked_by_its_digest() {
    let place = Folder::new();
    let digest = sha256("a kernel from afar");
    place.edit(
        "kernel = \"vmlinuz\"",
        &format!("kernel = {{ url = \"https://example.org/a/vmlinuz\", sha256 = \"{digest}\" }}"),
    );
    let text = place.lock();
    let input = format!("[boot.kernel]\npath = \"vmlinuz\"\nsha256 = \"{digest}\"\n");
    assert!(text.contains(&input), "{text}");
    assert_eq!(place.check(), Ok(()));
}

/// A chain of qcow2 images: the top one, a middle, and a raw base.
fn chain(place: &Folder, backing: &str) {
    let image = |name: &str, under: &str| {
        let _ = fs::remove_file(place.path(name));
        let image = formats::Image {
            ro: false,
            backing: vec![place.path(under)],
            ..formats::Image::new(place.path(name))
        };
        (formats::find("qcow2").unwrap().create)(&image).unwrap();
    };
    place.put("base.img", &"b".repeat(1 << 20));
    image("middle.qcow2", "base.img");
    image("top.qcow2", "middle.qcow2");
    place.put(
        "vm.toml",
        &format!(
            "[boot]\nkernel = 'vmlinuz'\n[[block]]\npath = 'top.qcow2'\nbacking = {backing}\n"
        ),
    );
}

#[test]
fn a_chain_of_images_is_locked_to_its_end() {
    let place = Folder::new();
    chain(&place, "['middle.qcow2', 'base.img']");
    let text = place.lock();
    assert!(text.contains("path = \"middle.qcow2\"\n") && text.contains("path = \"base.img\"\n"));
    assert!(text.contains("format = \"qcow2\"\n") && text.contains("format = \"raw\"\n"));
    assert!(text.contains("size = \"1MiB\"\n"), "{text}");
    place.put("base.img", &"c".repeat(1 << 20));
    assert_eq!(place.drift()[0].0, "block.0.backing.1 (base.img), sha256");
}

#[test]
fn a_file_of_a_chain_that_is_not_named_is_refused() {
    let place = Folder::new();
    chain(&place, "['middle.qcow2', 'base.img']");
    place.lock();
    chain(&place, "['middle.qcow2']");
    let error = write(&place.vm(), &place.place()).unwrap_err();
    let said = place.plain(&error);
    assert!(
        said.starts_with(
            "error: middle.qcow2 has the backing file `base.img`, which `backing` does not name"
        ),
        "{said}"
    );
    let titles: Vec<_> = place.drift().into_iter().map(|(title, ..)| title).collect();
    assert_eq!(
        titles[titles.len() - 2..],
        ["block.0.backing.1", "block.0.backing"]
    );
}
