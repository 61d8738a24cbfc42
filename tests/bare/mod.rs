//! Kernels of a few instructions: with them `launcher up` runs wherever /dev/kvm opens, on hosts
//! too that boot no stock kernel.

use std::fs::File;
use std::process::Output;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

/// mov dx, 0x600; mov al, 0x34 (sleep type S5, and go); out dx, al; hlt; jmp to the hlt
pub(crate) const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];

/// A bzImage that does this in 64-bit mode.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    let header = setup_header {
        setup_sects: 1,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 0x10_0000,
        init_size: 0x1_0000,
        ..Default::default()
    };
    // The 64-bit entry is 0x200 behind the two sectors of the setup.
    let mut image = vec![0; 2 * 512 + 0x200];
    image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend(code);
    image.resize(8192, 0);
    image
}

/// Exit code and standard error of an `up --force`. Where there is no KVM it says so, and `None`.
pub(crate) fn ended(output: Output) -> Option<(i32, String)> {
    let code = output.status.code().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Some((code, errors)),
        Err(_) => {
            assert!(code == 1 && errors.contains("/dev/kvm"), "{code}: {errors}");
            None
        }
    }
}
