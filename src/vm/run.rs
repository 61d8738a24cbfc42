//! `launcher up`: the VM's life from its file to the exit code, on the calling thread.

use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::UpOptions;
use super::devices::Devices;
use super::events::Outcome;
use super::machine::Loaded;
use super::session::{End, Session};
use super::{host, memory, vcpu};
use crate::config::Vm;
use crate::exit;
use crate::{Error, Result, messages};

/// Boots the VM and stays with it to its end. Returns the exit code.
///
/// An error that is about a key of the VM's file shows its place.
pub fn run(config: &Vm, options: &UpOptions) -> Result<u8> {
    up(config, options).map_err(|error| error.at(&config.places))
}

fn up(config: &Vm, options: &UpOptions) -> Result<u8> {
    host::refuse_hopeless_host(options.force)?;
    let kvm = Kvm::new().map_err(|error| {
        Error::failed(format!("cannot open /dev/kvm: {error}")).help("see `launcher doctor`")
    })?;
    host::raise_open_files();
    vcpu::install_kick_handler()?;
    // What can be wrong with the kernel comes before anything happens to a disk.
    let memory = memory::allocate(config.memory)?;
    let loaded = Loaded::new(&kvm, config, Arc::clone(&memory))?;
    let devices = Devices::open(config, options.engine)?;
    let mut session = Session::new(config)?;

    let next = || {
        memory::clear(&memory)?;
        Loaded::new(&kvm, config, Arc::clone(&memory))
    };
    let ended = session.run(loaded, next, &devices);
    // However it ended: nothing that the guest wrote or printed is lost.
    let closed = devices.close();
    session.close();
    let code = report(config, ended?)?;
    closed.map(|()| code)
}

/// The exit code, with a line for every end that is not the guest's own power-off or reboot.
fn report(config: &Vm, end: End) -> Result<u8> {
    let name = &config.name;
    match end {
        End::Guest(Outcome::PowerOff | Outcome::Reboot) => Ok(exit::DONE),
        End::Guest(Outcome::Crash) => {
            messages::say(format_args!(
                "launcher: guest `{name}` crashed (triple fault)"
            ));
            Ok(exit::GUEST_CRASH)
        }
        End::Guest(Outcome::Panic) => {
            messages::say(format_args!("launcher: guest `{name}` panicked"));
            Ok(exit::GUEST_PANIC)
        }
        End::Guest(Outcome::Failed(why)) => Err(Error::failed(why)),
        End::Forced(why) => Err(
            Error::failed(format!("guest `{name}` was ended by force: {why}"))
                .help("its disks are flushed, but it had no chance to unmount them"),
        ),
    }
}
