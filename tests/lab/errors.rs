//! What cannot boot is refused at once, with the file, the reason and an exit code.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

use crate::guest::{Folder, GUEST, Vm};
use crate::runner::cases;

cases![errors:
    missing_kernel_is_named,
    file_that_is_no_kernel_is_refused,
    kernel_cut_short_is_refused,
    unreadable_kernel_is_named,
    missing_disk_is_named,
    unreadable_disk_is_named,
    too_little_memory_is_refused,
    unknown_key_is_shown_with_its_place,
];

/// Checks the exit code and that each of `parts` is said, whatever the case of its letters.
fn refused((code, errors): (i32, String), allowed: &[i32], parts: &[&str]) {
    assert!(
        allowed.contains(&code),
        "exit code {code}, not one of {allowed:?}: {errors}"
    );
    for part in parts {
        assert!(
            errors.to_lowercase().contains(&part.to_lowercase()),
            "no {part:?} in:\n{errors}"
        );
    }
    assert!(!errors.contains("panicked"), "{errors}");
}

fn missing_kernel_is_named() {
    let folder = Folder::new();
    let toml = GUEST.replace("vmlinuz", "no-such-kernel");
    refused(
        folder.refused(&toml),
        &[2],
        &["no-such-kernel", "No such file", "--> vm.toml:3:14\n"],
    );
}

fn file_that_is_no_kernel_is_refused() {
    let folder = Folder::new();
    folder.write("garbage", vec![0x5a; 1 << 20]);
    let toml = GUEST.replace("vmlinuz", "garbage");
    refused(
        folder.refused(&toml),
        &[2],
        &["garbage", "bzImage", "--> vm.toml:3:14\n"],
    );
}

fn kernel_cut_short_is_refused() {
    let folder = Folder::new();
    let whole = fs::read(folder.path("vmlinuz")).unwrap();
    for len in [0, 1000, 4096, 20_000] {
        folder.write("short", &whole[..len]);
        let toml = GUEST.replace("vmlinuz", "short");
        refused(folder.refused(&toml), &[2], &["short", "vm.toml:3:14"]);
    }
    let whole = fs::read(folder.path("vmlinux")).unwrap();
    for len in [64, 1 << 20] {
        folder.write("short", &whole[..len]);
        let toml = GUEST.replace("vmlinuz", "short");
        refused(folder.refused(&toml), &[2], &["short", "vm.toml:3:14"]);
    }
}

/// Starts `launcher` without root's power to read every file.
fn up_without_override(folder: &Folder, toml: &str) -> Vm {
    let mut command = folder.command(toml);
    let drop = || {
        for capability in [CapabilitySet::DAC_OVERRIDE, CapabilitySet::DAC_READ_SEARCH] {
            // Fails for an ordinary user, who does not have that power anyway.
            let _ = remove_capability_from_bounding_set(capability);
        }
        Ok(())
    };
    // SAFETY: between fork and exec only two prctl system calls are made; nothing is allocated or locked.
    unsafe { command.pre_exec(drop) };
    Vm::start(&mut command)
}

fn unreadable_kernel_is_named() {
    let folder = Folder::new();
    folder.write("secret", fs::read(folder.path("vmlinuz")).unwrap());
    fs::set_permissions(folder.path("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    let mut vm = up_without_override(&folder, &GUEST.replace("vmlinuz", "secret"));
    refused(
        (vm.exit(), vm.errors()),
        &[2],
        &["secret", "Permission denied", "--> vm.toml:3:14\n"],
    );
}

fn missing_disk_is_named() {
    let folder = Folder::new();
    let toml = format!("{GUEST}\n[[block]]\npath = \"no-such-disk.img\"");
    refused(
        folder.refused(&toml),
        &[2],
        &["no-such-disk.img", "No such file", "--> vm.toml:8:8\n"],
    );
}

fn unreadable_disk_is_named() {
    let folder = Folder::new();
    folder.image("secret.img", 1 << 20);
    fs::set_permissions(folder.path("secret.img"), fs::Permissions::from_mode(0o000)).unwrap();
    let mut vm = up_without_override(
        &folder,
        &format!("{GUEST}\n[[block]]\npath = \"secret.img\""),
    );
    refused(
        (vm.exit(), vm.errors()),
        &[2],
        &["secret.img", "Permission denied", "--> vm.toml:8:8\n"],
    );
}

fn too_little_memory_is_refused() {
    let folder = Folder::new();
    for memory in ["1MiB", "16MiB"] {
        let toml = format!("memory = \"{memory}\"\n{GUEST}");
        refused(
            folder.refused(&toml),
            &[2],
            &["`memory` is", "--> vm.toml:1:10\n"],
        );
    }
}

fn unknown_key_is_shown_with_its_place() {
    let folder = Folder::new();
    let toml = format!("memroy = \"1GiB\"\n{GUEST}");
    refused(
        folder.refused(&toml),
        &[2],
        &["memroy", "vm.toml:1:1", "memory"],
    );
}
