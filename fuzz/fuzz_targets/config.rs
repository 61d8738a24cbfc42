//! A VM's file from any bytes, its lines `#-p NAME` and `#--set KEY=VALUE` as the command line:
//! plain data or diagnostics, in bounded time and memory.

#![no_main]

use launcher::config::fuzzing::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match parse(data) {
        Ok(vm) => {
            vm.resolved();
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("error: "), "{text}");
            assert!(text.len() < 1 << 20, "{} bytes of diagnostics", text.len());
        }
    }
});
