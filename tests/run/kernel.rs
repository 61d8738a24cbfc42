//! Kernels of a few instructions each: a bzImage header with hand-assembled code at its 64-bit
//! entry point. They need no stock kernel's features of the processor, so they run on any KVM.

/// COM1's data port.
const SERIAL: u16 = 0x3f8;

/// A bzImage (Documentation/arch/x86/boot.rst) that runs `code` in 64-bit mode.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const ENTRY_64: usize = 0x200;
    let mut image = vec![0; SETUP + ENTRY_64];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &0xaa55_u16.to_le_bytes()); // boot_flag
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    image.extend_from_slice(code);
    image
}

/// Writes a byte to a port.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee] // mov dx, port; mov al, value; out dx, al
}

/// Prints on the serial port, a byte an instruction.
pub(crate) fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(SERIAL, byte)).collect()
}

/// Prints on the serial port by one string instruction.
pub(crate) fn print_string(text: &str) -> Vec<u8> {
    let len = text.len() as u32;
    let mut code = vec![0xe8]; // call over the text: its address is on the stack
    code.splice(0..0, [0xbc, 0x00, 0x00, 0x09, 0x00]); // mov esp, 0x90000
    code.extend(len.to_le_bytes());
    code.extend(text.bytes());
    code.extend([0x5e, 0xb9]); // pop rsi; mov ecx, len
    code.extend(len.to_le_bytes());
    let [low, high] = SERIAL.to_le_bytes();
    code.extend([0x66, 0xba, low, high, 0xfc, 0xf3, 0x6e]); // mov dx, port; cld; rep outsb
    code
}

/// Does it again and again.
pub(crate) fn forever(body: &[u8]) -> Vec<u8> {
    let mut code = body.to_vec();
    let back = -(body.len() as i32 + 5);
    code.push(0xe9); // jmp
    code.extend(back.to_le_bytes());
    code
}

/// Waits for a byte on the serial port and leaves it in `al`.
pub(crate) fn read_key() -> Vec<u8> {
    vec![
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xfb, // jz to the in
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
    ]
}

/// Prints each byte of input, forever.
pub(crate) fn echo() -> Vec<u8> {
    let mut body = read_key();
    body.push(0xee); // out dx, al
    forever(&body)
}

/// Waits for the power button: its interrupt is let through to the local APIC, whose request
/// register tells of it while interrupts are off.
pub(crate) fn wait_for_button() -> Vec<u8> {
    let mut code = vec![0xbf, 0x00, 0x00, 0xc0, 0xfe]; // mov edi, the I/O APIC
    code.extend([0xc7, 0x07, 0x1a, 0, 0, 0]); // select the entry of pin 5
    code.extend([0xc7, 0x47, 0x10, 0x35, 0, 0, 0]); // vector 0x35, an edge, not masked
    code.extend([0xbf, 0x00, 0x00, 0xe0, 0xfe]); // mov edi, the local APIC
    code.extend([0xc7, 0x87, 0xf0, 0, 0, 0, 0xff, 0x01, 0, 0]); // switch it on
    code.extend(print("button armed\r\n"));
    code.extend([0xf7, 0x87, 0x10, 0x02, 0, 0, 0, 0, 0x20, 0]); // test dword [rdi + 0x210], 1 << 21
    code.extend([0x74, 0xf4]); // jz to the test
    code
}

/// Sleeps for good.
pub(crate) fn halt() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd] // cli; hlt; jmp to the hlt
}

/// Runs for good, without an exit.
pub(crate) fn spin() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// Does nothing for about a millisecond.
pub(crate) fn spin_for_a_while() -> Vec<u8> {
    vec![0xb9, 0x00, 0x00, 0x10, 0x00, 0xff, 0xc9, 0x75, 0xfc] // mov ecx, 1 << 20; dec ecx; jnz
}

/// Powers off through the ACPI sleep control register.
pub(crate) fn power_off() -> Vec<u8> {
    [out(0x600, 5 << 2 | 1 << 5), halt()].concat()
}

/// Resets through the ACPI reset register.
pub(crate) fn reset() -> Vec<u8> {
    [out(0x602, 1), halt()].concat()
}

/// Reports a kernel panic to pvpanic.
pub(crate) fn panic() -> Vec<u8> {
    [out(0x505, 1), halt()].concat()
}

/// An exception without a handler for it, nor for that, nor for that.
pub(crate) fn triple_fault() -> Vec<u8> {
    vec![0x0f, 0x0b] // ud2
}
