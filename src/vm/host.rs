//! Whether this host can run VMs.
//!
//! `Host` is what was found, `checks_of` what it means: the one reads the machine, the other is a
//! function of plain data.

mod facts;
#[cfg(test)]
mod tests;

use std::path::Path;

use rustix::io::Errno;
use serde::Serialize;

use self::facts::{Host, Node, RuntimeDir};
use crate::config::size;
use crate::{Error, Result};

/// One thing that a VM needs of its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at, in a word.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it, a line each; none if all is well.
    pub advice: Vec<String>,
}

/// How a thing that a VM needs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Good.
    Ok,
    /// A VM runs, but slower or with less.
    Warning,
    /// No VM runs.
    Failed,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Check {
            name,
            state: State::Ok,
            detail: detail.into(),
            advice: Vec::new(),
        }
    }

    fn warning(name: &'static str, detail: impl Into<String>) -> Self {
        Check {
            state: State::Warning,
            ..Check::ok(name, detail)
        }
    }

    fn failed(name: &'static str, detail: impl Into<String>) -> Self {
        Check {
            state: State::Failed,
            ..Check::ok(name, detail)
        }
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice.push(advice.into());
        self
    }
}

/// Looks at everything that a VM needs of this host.
pub fn checks() -> Vec<Check> {
    checks_of(&Host::find(Path::new("/")))
}

/// Refuses, before anything is built, a host on which no VM can run: /dev/kvm is missing or not
/// permitted, or it is pvm, which cannot boot an unmodified kernel (`force` goes on all the same).
///
/// Takes three or four system calls.
pub fn refuse_hopeless_host(force: bool) -> Result<()> {
    refuse(Path::new("/"), force)
}

fn refuse(root: &Path, force: bool) -> Result<()> {
    let hopeless = match facts::open_kvm(root) {
        Err(_) => Some(kvm(&Host::find(root))),
        Ok(_) if !force && facts::is_pvm(root) => {
            Some(pvm().advice("`--force` goes on all the same"))
        }
        Ok(_) => None,
    };
    match hopeless {
        Some(check) if check.state == State::Failed => {
            Err(Error::failed(check.detail).help(check.advice.join("\n      ")))
        }
        _ => Ok(()),
    }
}

/// Raises the limit of open files as far as this process may. Every disk and queue takes some,
/// and the usual limit is low for the sake of programs that use select(2) only.
pub(super) fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files cannot be raised: {error}");
    }
}

/// What the facts mean.
fn checks_of(host: &Host) -> Vec<Check> {
    let mut checks = vec![kvm(host), hardware(host)];
    checks.extend(capabilities(host));
    checks.extend([
        io_uring(host),
        open_files(host),
        locked_memory(host),
        memory(host),
        runtime_dir(host),
    ]);
    checks
}

/// The version of KVM's interface, fixed since Linux 2.6.22 (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;

fn kvm(host: &Host) -> Check {
    const NAME: &str = "kvm";
    match &host.kvm {
        Node::Open { version, .. } if *version == KVM_API_VERSION => {
            Check::ok(NAME, format!("/dev/kvm opens, interface version {version}"))
        }
        Node::Open { version, .. } => Check::failed(
            NAME,
            format!("/dev/kvm has interface version {version}, expected {KVM_API_VERSION}"),
        )
        .advice("boot a kernel whose KVM is the mainline one"),
        Node::Refused {
            errno: Errno::NOENT | Errno::NXIO | Errno::NODEV,
            ..
        } => {
            let check = Check::failed(NAME, "/dev/kvm is missing");
            let check = match host.virtualisation {
                Some("svm") => check.advice("load KVM: `sudo modprobe kvm_amd`"),
                Some(_) => check.advice("load KVM: `sudo modprobe kvm_intel`"),
                None => check.advice(enable_virtualisation(host)),
            };
            check.advice("in a container: pass the device in (`--device /dev/kvm`)")
        }
        Node::Refused {
            errno: errno @ (Errno::ACCESS | Errno::PERM),
            access,
        } => {
            let check = Check::failed(NAME, format!("/dev/kvm is not permitted: {errno}"));
            match access {
                Some(access) if host.uid != 0 => permit(check, access),
                _ => check.advice(
                    "the container or sandbox forbids it: pass the device in (`--device /dev/kvm`)",
                ),
            }
        }
        Node::Refused { errno, .. } => {
            Check::failed(NAME, format!("/dev/kvm does not open: {errno}"))
                .advice("see what the kernel says of it: `sudo dmesg | grep -i kvm`")
        }
    }
}

/// How a user comes to the permission for /dev/kvm.
fn permit(check: Check, access: &facts::Access) -> Check {
    let facts::Access { group, mode, .. } = access;
    let check = match (access.for_group(), access.member) {
        (true, true) => check.advice(format!(
            "it belongs to group {group}, of which you are a member since this login: log in again"
        )),
        (true, false) => check.advice(format!(
            "it belongs to group {group}: `sudo usermod -aG {group} $USER`, then log in again"
        )),
        (false, _) => check.advice(format!(
            "its mode {:o} permits nothing to group {group}",
            mode & 0o777
        )),
    };
    check.advice("for now: `sudo setfacl -m u:$USER:rw /dev/kvm`")
}

fn hardware(host: &Host) -> Check {
    const NAME: &str = "hardware";
    match (host.pvm, host.virtualisation) {
        (true, _) => pvm(),
        (false, Some(flag)) => Check::ok(NAME, format!("{flag} in /proc/cpuinfo")),
        (false, None) => Check::failed(NAME, "neither svm nor vmx in /proc/cpuinfo")
            .advice(enable_virtualisation(host)),
    }
}

fn pvm() -> Check {
    Check::failed(
        "hardware",
        "the KVM here is pvm: it cannot boot an unmodified kernel",
    )
    .advice("use a host with svm or vmx: bare metal, or a VM with nested virtualisation")
}

fn enable_virtualisation(host: &Host) -> &'static str {
    match host.hypervisor {
        true => "this host is a VM itself: switch nested virtualisation on where it is run",
        false => "switch virtualisation (SVM or VT-x) on in the firmware's setup",
    }
}

fn capabilities(host: &Host) -> Option<Check> {
    const NAME: &str = "capabilities";
    let Node::Open { version, missing } = &host.kvm else {
        return None;
    };
    if *version != KVM_API_VERSION {
        return None;
    }
    Some(match &missing[..] {
        [] => Check::ok(NAME, "KVM has all that is needed"),
        missing => Check::failed(NAME, format!("KVM lacks {}", missing.join(", ")))
            .advice("boot a newer kernel: Linux 5.10 has them all"),
    })
}

fn io_uring(host: &Host) -> Check {
    const NAME: &str = "io_uring";
    let errno = match host.io_uring {
        Ok(()) => return Check::ok(NAME, "works"),
        Err(errno) => errno,
    };
    let detail = format!("refused, disks use threads, which is slower: {errno}");
    let check = Check::warning(NAME, detail);
    match (errno, host.io_uring_disabled) {
        (Errno::NOSYS, _) => check.advice("boot a kernel with CONFIG_IO_URING"),
        (Errno::NOMEM, _) => check.advice("raise the limit of locked memory: `ulimit -l 65536`"),
        (_, Some(disabled @ 1..)) => check.advice(format!(
            "kernel.io_uring_disabled is {disabled}: `sudo sysctl kernel.io_uring_disabled=0`"
        )),
        _ => check.advice(
            "a system call filter forbids it: allow io_uring_setup, io_uring_enter and \
             io_uring_register",
        ),
    }
}

fn open_files(host: &Host) -> Check {
    /// A VM with thirty disks of four queues needs about 400.
    const ENOUGH: u64 = 1024;
    const NAME: &str = "open files";
    match host.open_files {
        None => Check::ok(NAME, "no limit"),
        Some(limit) if limit >= ENOUGH => Check::ok(NAME, format!("at most {limit}")),
        Some(limit) => Check::warning(NAME, format!("at most {limit}, few for many disks")).advice(
            format!("`ulimit -n {ENOUGH}`, or LimitNOFILE= in a service"),
        ),
    }
}

fn locked_memory(host: &Host) -> Check {
    /// Rings of 256 entries for a few dozen disks.
    const ENOUGH: u64 = 8 << 20;
    const NAME: &str = "locked memory";
    match (host.locked_memory, host.kernel) {
        (None, _) => Check::ok(NAME, "no limit"),
        (Some(limit), Some(kernel)) if kernel < (5, 12) && limit < ENOUGH && host.uid != 0 => {
            let limit = size::show(limit);
            Check::warning(
                NAME,
                format!("at most {limit}, and this kernel counts io_uring"),
            )
            .advice("`ulimit -l 65536`, or LimitMEMLOCK= in a service")
        }
        (Some(limit), _) => Check::ok(NAME, format!("at most {}", size::show(limit))),
    }
}

fn memory(host: &Host) -> Check {
    /// The default of `memory` in a VM's file.
    const ENOUGH: u64 = 512 << 20;
    const NAME: &str = "memory";
    let mib = |bytes: u64| format!("{}MiB", bytes >> 20);
    match (host.overcommit, host.committable, host.available) {
        (Some(2), Some(left), _) => {
            let left = mib(left);
            Check::warning(NAME, format!("no overcommit, {left} left for all programs"))
                .advice("all VMs' memory must fit in that: `sudo sysctl vm.overcommit_memory=0`")
        }
        (_, _, Some(left)) if left < ENOUGH => {
            Check::warning(NAME, format!("{} available", mib(left)))
                .advice("give VMs less `memory`, or end other programs")
        }
        (_, _, Some(left)) => Check::ok(NAME, format!("{} available", mib(left))),
        (_, _, None) => Check::warning(NAME, "/proc/meminfo does not tell what is available")
            .advice("mount /proc"),
    }
}

fn runtime_dir(host: &Host) -> Check {
    const NAME: &str = "runtime folder";
    let path = format!("/run/user/{}", host.uid);
    let advice = format!("`export XDG_RUNTIME_DIR={path}`, a folder of your own with mode 700");
    let (detail, errno) = match &host.runtime_dir {
        RuntimeDir::Unset => ("XDG_RUNTIME_DIR is not set".to_owned(), None),
        RuntimeDir::Usable(path) => return Check::ok(NAME, path.display().to_string()),
        RuntimeDir::Unusable(path, errno) => (
            format!("XDG_RUNTIME_DIR is {}", path.display()),
            Some(errno),
        ),
    };
    match errno {
        None => Check::warning(NAME, detail).advice(advice),
        Some(errno) => Check::warning(NAME, format!("{detail}: {errno}")).advice(advice),
    }
}
