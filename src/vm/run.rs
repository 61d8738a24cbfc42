//! `launcher up`: the VM's life from its file to the exit code, on the calling thread.

use std::io;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::boot::{self, BootFiles};
use super::console::{Console, KeptLog, Outlet, log_file};
use super::control::Control;
use super::devices::{Devices, DiskHandle};
use super::events::Outcome;
use super::life::Life;
use super::machine::Loaded;
use super::memory::{self, Sharing};
use super::session::{End, Session};
use super::{Ended, Running, UpOptions, host, vcpu};
use crate::config::{Block, ConsoleMode, Vm};
use crate::control::messages::{Event, How, Resized};
use crate::exit;
use crate::{Error, Result, messages};

/// Boots the VM and stays with it to its end. Once its vCPUs are ready, `running` is called.
pub fn run(config: &Vm, options: &UpOptions, running: Running<'_>) -> Ended {
    let at = |error: Error| error.at(&config.places);
    match up(config, options, running) {
        Ok((end, closed)) => ended(config, end, closed.map_err(at)),
        Err(error) => failed(at(error)),
    }
}

/// How it ended, and whether its disks closed.
fn up(config: &Vm, options: &UpOptions, running: Running<'_>) -> Result<(End, Result<()>)> {
    host::refuse_hopeless_host(options.force)?;
    let kvm = Kvm::new().map_err(|error| {
        Error::failed(format!("cannot open /dev/kvm: {error}")).help("see `launcher doctor`")
    })?;
    host::raise_open_files();
    vcpu::install_kick_handler()?;
    let served = config.block.iter().any(Block::is_served);
    let sharing = match served {
        true => Sharing::WithServers,
        false => Sharing::Private,
    };
    let memory = memory::allocate(config.memory, sharing)?;
    let load = |files| Loaded::new(&kvm, config, Arc::clone(&memory), &files);
    let (loaded, devices) = match config.boot_disk() {
        // What can be wrong with the kernel comes before anything happens to a disk.
        None => {
            let loaded = load(BootFiles::verified(&config.boot)?)?;
            (loaded, Devices::open(config, options.engine)?)
        }
        Some(_) => {
            let devices = Devices::open(config, options.engine)?;
            (load(boot_files(config, &devices)?)?, devices)
        }
    };
    let life = Arc::new(Life::new());
    let console = console(config, options, &life)?;
    let keys = shown(config, options);
    tell_of_resizes(&devices, &life);
    let (mut session, orders) = Session::new(config, Arc::clone(&life), console.clone(), keys)?;

    let control = Control::new(config, &devices, Arc::clone(&life), orders, console);
    let running = || {
        life.tell(running(Arc::new(control))?);
        Ok(())
    };
    let next = || {
        memory::clear(&memory)?;
        load(boot_files(config, &devices)?)
    };
    let ended = session.run(loaded, next, &devices, running);
    // However it ended: nothing that the guest wrote or printed is lost.
    let closed = devices.close();
    session.close();
    Ok((ended?, closed))
}

/// Has disks that other processes serve tell of the sizes that they get there.
fn tell_of_resizes(devices: &Devices, life: &Arc<Life>) {
    for (index, disk) in devices.disks().enumerate() {
        if let DiskHandle::Served(disk) = disk {
            let life = Arc::clone(life);
            disk.on_resize(move |from, to| {
                let disk = index;
                life.publish(Event::Resized(Resized { disk, from, to }));
            });
        }
    }
}

/// What is booted now: with `from_block`, what the disk has at this time.
fn boot_files(config: &Vm, devices: &Devices) -> Result<BootFiles> {
    let disk = config.boot_disk();
    let disk = disk.and_then(|index| Some((devices.disks().nth(index)?, config.block.get(index)?)));
    match disk {
        Some((DiskHandle::Own(disk), block)) => boot::image::read(&disk, block),
        // Reading the file has refused it already.
        Some((DiskHandle::Served(_), _)) => {
            let message = "`from_block` is a disk that another process serves";
            Err(Error::usage(message).about("boot.from_block"))
        }
        None => BootFiles::verified(&config.boot),
    }
}

/// Whether the console is on standard input and output.
fn shown(config: &Vm, options: &UpOptions) -> bool {
    config.console.mode == ConsoleMode::Stdio && !options.detached
}

fn console(config: &Vm, options: &UpOptions, life: &Arc<Life>) -> Result<Option<Arc<Console>>> {
    if config.console.mode == ConsoleMode::Off {
        return Ok(None);
    }
    let mut outlets = Vec::new();
    if let Some(path) = &config.console.log {
        let unopenable = |error| log_file::unopenable(path, &error);
        let log = log_file::open(path).map_err(unopenable)?;
        let metadata = log.metadata().map_err(unopenable)?;
        if let Some(other) = log_file::same_file(&metadata, config) {
            return Err(log_file::is_same(other));
        }
        outlets.push(Outlet::Log(log));
    }
    if shown(config, options) {
        outlets.push(Outlet::Stdout);
    } else if let Some(path) = &options.console_log {
        let log = KeptLog::begin(path)
            .map_err(|error| Error::failed(format!("cannot create {}: {error}", path.display())))?;
        outlets.push(Outlet::Kept(log));
    }
    let life = Arc::clone(life);
    let on_boot = move || life.publish(Event::Booted);
    let failed = |error: io::Error| Error::failed(format!("cannot start a thread: {error}"));
    let console = Console::new(outlets, config.console.ready.clone(), on_boot).map_err(failed)?;
    Ok(Some(console))
}

/// The exit code, with a line for every end that is not the guest's own power-off or reboot.
fn ended(config: &Vm, end: End, closed: Result<()>) -> Ended {
    let name = &config.name;
    let (how, why, result) = match end {
        End::Guest(Outcome::PowerOff | Outcome::Reboot) => (How::Guest, None, Ok(exit::DONE)),
        End::Guest(Outcome::Crash) => {
            let why = "crashed (triple fault)";
            messages::say(format_args!("launcher: guest `{name}` {why}"));
            (How::Crashed, Some(why.into()), Ok(exit::GUEST_CRASH))
        }
        End::Guest(Outcome::Panic) => {
            let why = "panicked";
            messages::say(format_args!("launcher: guest `{name}` {why}"));
            (How::Crashed, Some(why.into()), Ok(exit::GUEST_PANIC))
        }
        End::Guest(Outcome::Failed(why)) => return failed(Error::failed(why)),
        End::Forced(why) => {
            let error = Error::failed(format!("guest `{name}` was ended by force: {why}"))
                .help("its disks are flushed, but it had no chance to unmount them");
            (How::Forced, Some(why), Err(error))
        }
    };
    match closed {
        Ok(()) => Ended { result, how, why },
        // What may be lost comes before how that came about.
        Err(error) => {
            if let Err(first) = result {
                messages::say(&first);
            }
            failed(error)
        }
    }
}

fn failed(error: Error) -> Ended {
    Ended {
        how: How::Failed,
        why: Some(error.message().to_owned()),
        result: Err(error),
    }
}
