//! Kernels made for the test: what must be refused, and where things are put.

use std::fs;
use std::sync::Arc;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::{ByteValued, Bytes};

use super::*;
use crate::config::HostFile;
use crate::vm::memory::Sharing;

const MIB: u64 = 1 << 20;

/// A bzImage whose setup header says what the test wants.
fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x200_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; 2 * 512];
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend_from_slice(&[0x90; 4096]);
    image
}

/// A bzImage that loads.
pub(crate) fn bare_kernel() -> Vec<u8> {
    bzimage(|_| ())
}

struct Bench {
    folder: tempfile::TempDir,
    boot: crate::config::Boot,
}

impl Bench {
    fn new(kernel: &[u8]) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, kernel).unwrap();
        let boot = crate::config::Boot {
            kernel: Some(HostFile::at(path)),
            initrd: None,
            from_block: None,
            cmdline: String::new(),
            from_block_at: None,
        };
        Bench { folder, boot }
    }

    fn initrd(mut self, size: usize) -> Bench {
        let path = self.folder.path().join("initrd");
        fs::write(&path, vec![0x55; size]).unwrap();
        self.boot.initrd = Some(HostFile::at(path));
        self
    }

    fn load(&self, memory_size: u64, cmdline: &str) -> Result<(Entry, Arc<GuestMemory>)> {
        let memory = super::super::memory::allocate(memory_size, Sharing::Private)?;
        let parameters = Parameters {
            memory_size,
            cmdline,
            rsdp: layout::ACPI.start,
        };
        load(&memory, &BootFiles::named(&self.boot)?, &parameters).map(|entry| (entry, memory))
    }

    fn refusal(&self, memory_size: u64, cmdline: &str) -> String {
        let error = self.load(memory_size, cmdline).err().unwrap();
        assert_eq!(error.exit, crate::exit::USAGE);
        error.to_string()
    }

    /// The text that the caret of an error is under, in a file that has all keys.
    fn blamed(&self, memory_size: u64, cmdline: &str) -> String {
        let file = self.folder.path().join("vm.toml");
        let text = "memory = '16MiB'\nboot.kernel = 'kernel'\nboot.initrd = 'initrd'\n\
                    boot.cmdline = 'quiet'\n";
        fs::write(&file, text).unwrap();
        let places = crate::config::load(&file, &Default::default())
            .unwrap()
            .places;
        let error = self.load(memory_size, cmdline).err().unwrap();
        let shown = error.at(&places).to_string();
        let mut lines = shown.lines().skip_while(|line| !line.contains('^')).take(1);
        let caret = lines.next().unwrap();
        let before = shown.lines().take_while(|line| *line != caret);
        let range = caret.find('^').unwrap()..=caret.rfind('^').unwrap();
        before.last().unwrap()[range].to_owned()
    }
}

#[test]
fn a_bzimage_enters_at_its_64_bit_entry_with_its_parameters() {
    let bench = Bench::new(&bzimage(|_| ())).initrd(10_000);
    let (entry, memory) = bench.load(256 * MIB, "quiet").unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 0x10_0200 });
    let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
    let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((u64::from(image), size), (256 * MIB - 3 * PAGE, 10_000));
    assert_eq!(
        memory
            .read_obj::<u8>(GuestAddress(u64::from(image) + 9_999))
            .unwrap(),
        0x55
    );
    let mut cmdline = [0; 6];
    memory
        .read_slice(&mut cmdline, GuestAddress(layout::CMDLINE))
        .unwrap();
    assert_eq!(&cmdline, b"quiet\0");
    assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI.start);
}

#[test]
fn the_memory_map_leaves_out_firmware_and_the_hole() {
    let (_, memory) = Bench::new(&bzimage(|_| ())).load(4096 * MIB, "").unwrap();
    let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
    let map: Vec<_> = params.e820_table[..params.e820_entries.into()]
        .iter()
        .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (MIB, 3071 * MIB, 1),
            (4096 * MIB, 1024 * MIB, 1),
            (0x9_fc00, 0x6_0400, 2)
        ]
    );
}

#[test]
fn memory_too_small_for_the_unpacked_kernel_is_refused_with_what_is_needed() {
    let message = Bench::new(&bzimage(|_| ())).refusal(32 * MIB, "");
    assert!(
        message.contains("`memory` is 32 MiB, the kernel needs at least 48 MiB"),
        "{message}"
    );
    let message = Bench::new(&bzimage(|_| ()))
        .initrd(9 << 20)
        .refusal(52 * MIB, "");
    assert!(
        message.contains("the kernel with its initrd needs at least 57 MiB"),
        "{message}"
    );
}

#[test]
fn an_initrd_above_what_the_kernel_takes_is_not_told_as_too_little_memory() {
    let low = |header: &mut setup_header| header.initrd_addr_max = 0x380_0000 - 1;
    let bench = Bench::new(&bzimage(low)).initrd(9 << 20);
    let message = bench.refusal(256 * MIB, "");
    assert!(
        message.contains("initrd is 9 MiB, this kernel takes at most 8 MiB"),
        "{message}"
    );
}

#[test]
fn a_command_line_past_the_kernels_limit_is_refused() {
    let bench = Bench::new(&bzimage(|header| header.cmdline_size = 9));
    assert!(bench.load(64 * MIB, "123456789").is_ok());
    let message = bench.refusal(64 * MIB, "1234567890");
    assert!(
        message.contains("is 10 bytes, this kernel takes at most 9"),
        "{message}"
    );
}

#[test]
fn a_kernel_without_a_64_bit_entry_is_refused() {
    let message = Bench::new(&bzimage(|header| header.xloadflags = 0)).refusal(64 * MIB, "");
    assert!(message.contains("has no 64-bit entry point"), "{message}");
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    for (file, what) in [
        (
            b"#!/bin/sh\n".repeat(100),
            "neither a bzImage nor an ELF file",
        ),
        (b"\x1f\x8b\x08\x00".repeat(200), "is a gzip file"),
        (Vec::new(), "too short"),
        (b"\x7fELF".to_vec(), "cannot be loaded"),
    ] {
        let message = Bench::new(&file).refusal(64 * MIB, "");
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn a_file_that_cannot_be_opened_is_refused_with_the_reason() {
    let mut bench = Bench::new(&bzimage(|_| ()));
    let folder = bench.folder.path().to_owned();
    for (path, what) in [
        (folder.join("none"), "No such file"),
        (folder.clone(), "is a directory, expected a regular file"),
    ] {
        bench.boot.kernel = Some(HostFile::at(path));
        let message = bench.refusal(64 * MIB, "");
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn mutated_kernels_are_loaded_or_refused() {
    // A small xorshift: the same kernels in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut elf = vec![0; 4096];
    elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
    elf[54..58].copy_from_slice(&[56, 0, 2, 0]);
    elf[64] = 1;
    elf[120] = 4;
    let memory = super::super::memory::allocate(64 * MIB, Sharing::Private).unwrap();
    let parameters = Parameters {
        memory_size: 64 * MIB,
        cmdline: "",
        rsdp: 0,
    };
    for seed in [bzimage(|_| ()), elf] {
        let bench = Bench::new(&seed);
        for _ in 0..200 {
            let mut kernel = seed.clone();
            for _ in 0..4 {
                let range = if seed[0] == 0x7f {
                    4..232
                } else {
                    0x1f1..0x270
                };
                let at = range.start + random() as usize % range.len();
                kernel[at] = random() as u8;
            }
            fs::write(&bench.boot.kernel.as_ref().unwrap().path, &kernel).unwrap();
            let files = BootFiles::named(&bench.boot).unwrap();
            if let Err(error) = load(&memory, &files, &parameters) {
                assert_eq!(error.exit, crate::exit::USAGE, "{error}");
            }
        }
    }
}

#[test]
fn each_error_is_shown_at_the_key_it_is_about() {
    let good = || Bench::new(&bzimage(|_| ()));
    assert_eq!(Bench::new(b"#!/bin/sh").blamed(64 * MIB, ""), "'kernel'");
    assert_eq!(good().blamed(16 * MIB, ""), "'16MiB'");
    assert_eq!(good().initrd(0).blamed(64 * MIB, ""), "'initrd'");
    assert_eq!(good().initrd(99 << 20).blamed(64 * MIB, ""), "'16MiB'");
    let mut bench = good().initrd(1);
    bench.boot.initrd = Some(HostFile::at("/dev/null"));
    assert_eq!(bench.blamed(64 * MIB, ""), "'initrd'");
    assert_eq!(good().blamed(64 * MIB, &"x".repeat(2048)), "'quiet'");
}
