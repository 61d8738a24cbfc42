use std::fs;
use std::path::Path;

use formats::Engine;

use super::*;
use crate::config;
use crate::vm::devices::Devices;

const VM: &str = r#"
    cpus = 3
    memory = "1GiB"
    [boot]
    kernel = "vmlinuz"
    cmdline = "quiet"
    [[block]]
    path = "root.img"
    root = true
    id = "ROOT"
    size = "1MiB"
    [[block]]
    path = "data.qcow2"
    queues = 4
    size = "2MiB"
"#;

/// A VM in a folder of its own.
fn vm_in(folder: &Path, text: &str) -> Vm {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("vm.toml"), text).unwrap();
    config::load(&folder.join("vm.toml"), &Default::default()).unwrap()
}

fn with_disks(count: usize) -> String {
    let disks = (0..count).map(|n| format!("[[block]]\npath = '{n}.img'\n"));
    format!("[boot]\nkernel = 'k'\n{}", disks.collect::<String>())
}

/// The bus as [`shape`] has it, with the devices of the VM open.
fn opened(vm: &Vm, engine: Engine) -> Vec<Function> {
    let devices = Devices::open(vm, engine).unwrap();
    let kinds = functions(vm).map(|function| match function {
        devices::Function::Entropy => Device::Entropy,
        devices::Function::Disk(index, _) => Device::Disk(index),
    });
    let bus = bus(kinds.collect(), devices.all()).unwrap();
    devices.close().unwrap();
    bus
}

#[test]
fn the_machine_is_the_one_that_is_run() {
    let folder = tempfile::tempdir().unwrap();
    let vm = vm_in(folder.path(), VM);
    assert_eq!(shape(&vm).unwrap().pci, opened(&vm, Engine::Auto));
}

#[test]
fn the_machine_is_the_same_wherever_its_file_lies() {
    let folder = tempfile::tempdir().unwrap();
    let here = vm_in(&folder.path().join("here"), VM);
    let mut there = vm_in(&folder.path().join("over/there"), VM);
    there.rename("another").unwrap();
    let shape_here = shape(&here).unwrap();
    assert_eq!(shape_here, shape(&there).unwrap());
    assert_eq!(opened(&here, Engine::Auto), opened(&there, Engine::Threads));
    let ids = |vm: &Vm| vm.block.iter().map(|it| it.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&here), ids(&there));
    // A second time, with the images there.
    assert_eq!(opened(&here, Engine::Threads), shape_here.pci);
}

#[test]
fn the_devices_are_the_entropy_source_and_the_disks_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let shape = shape(&vm_in(folder.path(), VM)).unwrap();
    let listed: Vec<_> = shape
        .pci
        .iter()
        .map(|function| {
            let id = &function.config[..4];
            let id = u32::from_le_bytes(id.try_into().unwrap());
            format!("{} {id:08x} {}", function.address, function.device)
        })
        .collect();
    assert_eq!(
        listed,
        [
            "00:00.0 00081b36 host bridge",
            "00:01.0 10441af4 entropy source",
            "00:02.0 10421af4 disk 0",
            "00:03.0 10421af4 disk 1",
        ]
    );
    assert_eq!(
        (shape.cpus, shape.memory, &*shape.cmdline),
        (3, 1 << 30, "console=ttyS0 root=/dev/vda rw quiet")
    );
}

#[test]
fn what_the_guest_sees_changes_the_shape() {
    let folder = tempfile::tempdir().unwrap();
    let base = shape(&vm_in(folder.path(), VM)).unwrap();
    let changed = |from: &str, to: &str| {
        let text = VM.replace(from, to);
        assert_ne!(text, VM);
        shape(&vm_in(folder.path(), &text)).unwrap()
    };
    assert_ne!(changed("cpus = 3", "cpus = 2").acpi, base.acpi);
    assert_ne!(changed("queues = 4", "queues = 1").pci, base.pci);
    let off = changed("[boot]", "[console]\nmode = 'off'\n[boot]");
    assert_ne!((off.acpi, off.cmdline), (base.acpi.clone(), base.cmdline));
    let data = "[[block]]\n    path = \"data.qcow2\"";
    let more = changed(data, &format!("[[block]]\npath = 'x.img'\n{data}"));
    assert_eq!(more.pci.len(), base.pci.len() + 1);
}

#[test]
fn a_bus_with_more_disks_than_slots_has_functions() {
    let folder = tempfile::tempdir().unwrap();
    let address = |count: usize| {
        let shape = shape(&vm_in(folder.path(), &with_disks(count))).unwrap();
        shape.pci.last().unwrap().address.to_string()
    };
    assert_eq!(address(30), "00:1f.0");
    assert_eq!(address(31), "00:10.1");
}

#[test]
fn no_file_needs_to_be_there() {
    let folder = tempfile::tempdir().unwrap();
    shape(&vm_in(folder.path(), VM)).unwrap();
    let names = fs::read_dir(folder.path()).unwrap();
    assert_eq!(names.count(), 1);
}
