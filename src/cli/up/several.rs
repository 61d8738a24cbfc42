//! `launcher up` of several VMs: all are looked at before the first starts, then each runs in a
//! process of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use super::Up;
use super::detach;
use crate::cli::output::{complain, print};
use crate::config::{self, Vm};
use crate::{Error, Result, exit, sources};

/// Starts the VMs of these files, and says of each when it runs, or is up. The exit code is that
/// of the first in their order that failed.
pub(super) fn start(up: &Up, files: &[PathBuf]) -> Result<u8> {
    for (option, given) in [("name", up.name.is_some()), ("socket", up.socket.is_some())] {
        if given {
            let message = format!(
                "`--{option}` is given for {} VMs, expected one",
                files.len()
            );
            return Err(Error::usage(message));
        }
    }
    let Some(vms) = loaded(up, files) else {
        return Ok(exit::USAGE);
    };
    each_has_its_place(&vms)?;
    if let Some(code) = unready(up, &vms) {
        return Ok(code);
    }
    let slots = Slots::new(thread::available_parallelism().map_or(2, |cpus| cpus.get() * 2));
    let (ended, ends) = mpsc::channel();
    let mut codes = vec![exit::DONE; vms.len()];
    thread::scope(|scope| {
        for (index, vm) in vms.iter().enumerate() {
            let (slots, ended) = (&slots, ended.clone());
            let one = move || {
                // A receiver that is gone has given up on all of them.
                let _ = ended.send((index, one(up, &vm.file, slots)));
            };
            thread::Builder::new()
                .spawn_scoped(scope, one)
                .map_err(|error| Error::failed(format!("cannot start a thread: {error}")))?;
        }
        drop(ended);
        for (index, end) in ends {
            let vm = &vms[index];
            match end {
                Ok(()) => {
                    let is = if up.wait.is_some() { "is up" } else { "runs" };
                    print(&format!("{} {is}\n", vm.name))?;
                }
                Err(failure) => {
                    let (name, file) = (&vm.name, vm.file.display());
                    complain(&format!("`{name}` of {file}:\n{}", failure.said));
                    codes[index] = failure.exit;
                }
            }
        }
        Ok::<_, Error>(())
    })?;
    let failed = codes.into_iter().find(|code| *code != exit::DONE);
    Ok(failed.unwrap_or(exit::DONE))
}

/// Reads all files; after an error in any, which is shown, `None`.
fn loaded(up: &Up, files: &[PathBuf]) -> Option<Vec<Vm>> {
    let choice = up.chosen.choice();
    let (mut vms, mut wrong) = (Vec::new(), Vec::new());
    for file in files {
        match config::load(file, &choice) {
            Ok(vm) => vms.push(vm),
            Err(error) => wrong.push((file, error)),
        }
    }
    if up.all.is_some() {
        // What others extend need not be a VM by itself; what is wrong in it, is so in them.
        let read: Vec<_> = vms.iter().flat_map(|vm| vm.places.files()).collect();
        let read: BTreeSet<_> = read
            .iter()
            .filter_map(|it| it.canonicalize().ok())
            .collect();
        wrong.retain(|(file, _)| !file.canonicalize().is_ok_and(|file| read.contains(&file)));
    }
    for (_, error) in &wrong {
        complain(&format!("{error}\n"));
    }
    wrong.is_empty().then_some(vms)
}

/// No two have the same name, and with it the same socket and logs.
fn each_has_its_place(vms: &[Vm]) -> Result<()> {
    let mut places = BTreeMap::new();
    for vm in vms {
        let place = crate::cli::place(vm)?;
        let Some(first) = places.insert(place, vm) else {
            continue;
        };
        let (name, one, other) = (&vm.name, first.file.display(), vm.file.display());
        let same = |one: &Path, other: &Path| one.canonicalize().ok() == other.canonicalize().ok();
        return Err(match same(&first.file, &vm.file) {
            true => Error::usage(format!("the VM {other} is named twice, expected once")),
            false => Error::usage(format!("{one} and {other} are both called `{name}`"))
                .help("give one of them another `name`: socket and logs go by it"),
        });
    }
    Ok(())
}

/// Fetches and builds what is not there, one file after the other, as VMs may share them, and
/// compares what is. The exit code of the first error, all of which are shown.
fn unready(up: &Up, vms: &[Vm]) -> Option<u8> {
    let ready = |vm| {
        sources::ensure(vm)?;
        sources::verify(vm)?;
        up.check_lock(vm)
    };
    let mut code = None;
    for error in vms.iter().filter_map(|vm| ready(vm).err()) {
        complain(&format!("{error}\n"));
        code.get_or_insert(error.exit);
    }
    code
}

/// Why a VM is not up.
struct Failure {
    exit: u8,
    said: String,
}

fn one(up: &Up, file: &Path, slots: &Slots) -> Result<(), Failure> {
    let failure = |error: Error| Failure {
        exit: error.exit,
        said: error.to_string(),
    };
    let slot = slots.take();
    let (code, mut said, detached) = detach::running(up, file).map_err(failure)?;
    drop(slot);
    let code = match detached {
        None => code,
        Some(detached) => detached.wait(up).map_err(failure)?,
    };
    if code == exit::DONE {
        if !said.is_empty() {
            complain(&said);
        }
        return Ok(());
    }
    if said.is_empty() {
        said = format!("error: it has ended with exit code {code}");
    }
    Err(Failure { exit: code, said })
}

/// How many VMs start at a time: a start is kernels read, memory mapped and images allocated.
struct Slots {
    free: Mutex<usize>,
    freed: Condvar,
}

struct Slot<'a>(&'a Slots);

impl Slots {
    fn new(count: usize) -> Slots {
        Slots {
            free: Mutex::new(count),
            freed: Condvar::new(),
        }
    }

    fn take(&self) -> Slot<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.freed.wait_while(free, |free| *free == 0);
        *free.unwrap_or_else(PoisonError::into_inner) -= 1;
        Slot(self)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}
