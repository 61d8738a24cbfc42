//! What a VM's file means, and what is said of a wrong one.

mod backing;
mod blocks;
mod host_files;
mod hostile;
mod layers;
mod merge;
mod messages;
mod resolved;
mod schema;
mod served;
mod values;

use formats::{FormatOption, Image, OpenError, Opening, OptionKind, Ring};

use super::*;

/// Formats of the tests' own: what is registered in this build does not matter here.
static FORMATS: [&Format; 3] = [
    &Format {
        name: "qcow2",
        extensions: &["qcow2"],
        options: &[
            FormatOption {
                name: "cluster_size",
                kind: OptionKind::Size,
                default: "\"64KiB\"",
                doc: "Size of a cluster.",
            },
            FormatOption {
                name: "lazy_refcounts",
                kind: OptionKind::Bool,
                default: "false",
                doc: "Delays updates of reference counts.",
            },
            FormatOption {
                name: "refcount_bits",
                kind: OptionKind::Integer,
                default: "16",
                doc: "Width of a reference count.",
            },
            FormatOption {
                name: "compression",
                kind: OptionKind::Choice(&["zlib", "zstd"]),
                default: "\"zlib\"",
                doc: "How clusters are compressed.",
            },
            FormatOption {
                name: "data_file",
                kind: OptionKind::Path,
                default: "",
                doc: "Where the data is.",
            },
        ],
        abilities: &["backing"],
        ..RAW
    },
    &RAW,
    &Format {
        name: "sparse-raw",
        extensions: &[],
        ..RAW
    },
];

const RAW: Format = Format {
    name: "raw",
    extensions: &["img", "raw"],
    description: "of the tests",
    abilities: &[],
    options: &[],
    open,
    create,
};

fn open<'a>(_: &'a Ring, _: &'a Image) -> Opening<'a> {
    Box::pin(async { Err(no_image()) })
}

fn create(_: &Image) -> Result<(), OpenError> {
    Err(no_image())
}

fn no_image() -> OpenError {
    OpenError {
        message: "the tests open no image".into(),
        help: None,
        key: "path",
    }
}

/// What the top of a right file needs.
const BOOT: &str = "[boot]\nkernel = \"vmlinuz\"\n";

/// The file that any name means but the VM's own.
fn empty(_: &Path) -> crate::Result<file::Content> {
    Ok(file::Content {
        bytes: Vec::new(),
        identity: (0, 1),
    })
}

fn source() -> Source<'static> {
    Source {
        file: Path::new("vms/vm.toml"),
        home: Some(Path::new("/home/ada")),
        cache: Some(Path::new("/cache/files")),
        formats: &FORMATS,
        read: &empty,
    }
}

/// Reads a VM from files, the first of which is its own, and a command line of `-p` and `--set`.
fn read_from(
    files: &[(&str, &[u8])],
    line: &[&str],
    renderer: &Renderer,
) -> std::result::Result<Vm, String> {
    let read = |path: &Path| {
        let found = files.iter().position(|(file, _)| Path::new(file) == path);
        match found {
            Some(index) => Ok(file::Content {
                bytes: files[index].1.to_vec(),
                identity: (0, index as u64),
            }),
            None => Err(Error::usage(format!("cannot read {}", path.display()))),
        }
    };
    let source = Source {
        file: Path::new(files[0].0),
        read: &read,
        ..source()
    };
    let mut choice = Choice::default();
    for argument in line.chunks(2) {
        match argument {
            ["-p", name] => choice.profiles.push((*name).to_owned()),
            ["--set", set] => choice.set.push((*set).to_owned()),
            _ => panic!("{argument:?}"),
        }
    }
    super::parse(&source, &choice, renderer).map_err(|error| error.to_string())
}

/// Reads a VM from one file of these bytes.
fn parse(
    bytes: &[u8],
    source: &Source<'_>,
    renderer: &Renderer,
) -> std::result::Result<Vm, String> {
    let read = |path: &Path| match path == source.file {
        true => Ok(file::Content {
            bytes: bytes.to_vec(),
            identity: (0, 0),
        }),
        false => (source.read)(path),
    };
    let source = Source {
        read: &read,
        ..*source
    };
    super::parse(&source, &Choice::default(), renderer).map_err(|error| error.to_string())
}

/// Reads a right file.
fn vm(text: &str) -> Vm {
    match read(text) {
        Ok(vm) => vm,
        Err(errors) => panic!("{errors}"),
    }
}

/// Reads a file. What is right, the schema must take too.
fn read(text: &str) -> Result<Vm, String> {
    let vm = parse(text.as_bytes(), &source(), &Renderer::plain())?;
    schema::takes(text);
    Ok(vm)
}

/// Reads a right file with `[boot]` added below.
fn booting(text: &str) -> Vm {
    vm(&format!("{text}\n{BOOT}"))
}

/// What is said of a wrong file.
fn errors(text: impl AsRef<[u8]>) -> String {
    match parse(text.as_ref(), &source(), &Renderer::plain()) {
        Ok(vm) => panic!("nothing is wrong: {vm:?}"),
        Err(errors) => errors,
    }
}

/// The first line of what is said of a wrong file.
fn error(text: &str) -> String {
    errors(text).lines().next().unwrap_or_default().to_owned()
}

/// The first line that is said of a file with `[boot]` added below.
fn booting_error(text: &str) -> String {
    error(&format!("{text}\n{BOOT}"))
}

#[test]
fn every_default_is_a_value_its_option_takes() {
    let vm = booting("[[block]]\npath = \"a.img\"");
    assert_eq!(vm.file, Path::new("vms/vm.toml"));
    assert_eq!((vm.name.as_str(), vm.cpus, vm.memory), ("vm", 1, 512 << 20));
    let kernel = vm.boot.kernel.unwrap();
    assert_eq!(kernel.path, Path::new("vms/vmlinuz"));
    assert!(vm.boot.initrd.is_none() && vm.boot.cmdline.is_empty());
    assert_eq!(
        (vm.console.mode, vm.console.log),
        (ConsoleMode::Stdio, None)
    );
    assert_eq!(vm.lifecycle.on_reboot, OnReboot::Restart);
    assert_eq!(vm.lifecycle.stop_timeout.as_secs(), 30);
    let disk = &vm.block[0];
    assert!(!disk.ro && !disk.root && disk.sparse && !disk.o_direct && disk.lock);
    assert_eq!((disk.block_size, disk.queues, disk.size), (512, 1, None));
    assert_eq!((&disk.id, disk.format_written), (&None, false));
    assert_eq!((disk.poll_us, &*disk.cpus), (None, &[][..]));
    assert!(!disk.ephemeral && disk.backing.is_empty());
}

#[test]
fn every_option_reaches_the_vm() {
    let vm = vm(r#"
name = "web-1"
cpus = 254
memory = "3GiB"

[boot]
kernel = "k"
initrd = "i"
cmdline = "quiet"

[[block]]
path = "a"
format = "qcow2"
ro = true
root = true
sparse = false
o_direct = true
block_size = 4096
id = "ROOT"
lock = false
queues = 64
poll_us = 0
cpus = [2, 3]
size = "8GiB"
backing = ["c.qcow2", "~/base.img"]

[block.qcow2]
refcount_bits = 64
cluster_size = "2MiB"
lazy_refcounts = true
compression = "zstd"
data_file = "data/a"

[[block]]
path = "b.img"
ephemeral = true

[console]
mode = "off"
log = "console.log"

[lifecycle]
on_reboot = "stop"
stop_timeout = "500ms"
"#);
    assert_eq!(
        (vm.name.as_str(), vm.cpus, vm.memory),
        ("web-1", 254, 3 << 30)
    );
    assert_eq!(vm.boot.initrd.unwrap().path, Path::new("vms/i"));
    assert_eq!(vm.boot.cmdline, "quiet");
    assert_eq!(vm.console.mode, ConsoleMode::Off);
    assert_eq!(
        vm.console.log.as_deref(),
        Some(Path::new("vms/console.log"))
    );
    assert_eq!(vm.lifecycle.on_reboot, OnReboot::Stop);
    assert_eq!(vm.lifecycle.stop_timeout.as_millis(), 500);
    assert!(vm.block[1].ephemeral);
    let disk = &vm.block[0];
    assert_eq!((&*disk.format, disk.format_written), ("qcow2", true));
    assert!(disk.ro && disk.root && !disk.sparse && disk.o_direct && !disk.lock);
    assert_eq!((disk.block_size, disk.queues), (4096, 64));
    assert_eq!((disk.poll_us, &*disk.cpus), (Some(0), &[2, 3][..]));
    assert_eq!(
        (disk.id.as_deref(), disk.size),
        (Some("ROOT"), Some(8 << 30))
    );
    assert_eq!(
        disk.image().backing,
        [Path::new("vms/c.qcow2"), Path::new("/home/ada/base.img")]
    );
    let word = formats::OptionValue::Word("zstd".into());
    assert_eq!(
        disk.options,
        [
            ("refcount_bits", formats::OptionValue::Number(64)),
            ("cluster_size", formats::OptionValue::Number(2 << 20)),
            ("lazy_refcounts", formats::OptionValue::Bool(true)),
            ("compression", word),
            ("data_file", formats::OptionValue::Path("vms/data/a".into())),
        ],
        "in the order of the file"
    );
}

#[test]
fn every_key_is_described() {
    fn described(keys: &[Key]) -> usize {
        keys.iter()
            .map(|key| {
                assert!(key.doc.ends_with('.'), "{}: {:?}", key.name, key.doc);
                assert!(!key.doc.starts_with(' '), "{}", key.name);
                1 + described(key.keys())
            })
            .sum()
    }
    assert_eq!(described(KEYS), 9 + 4 + 19 + 3 + 2);
    let memory = KEYS.iter().find(|key| key.name == "memory").unwrap();
    assert!(matches!(memory.absent, Absent::Value("\"512MiB\"")));
    assert!(matches!(memory.takes, Takes::Value(words, _) if words.contains("4KiB")));
}
