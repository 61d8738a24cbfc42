//! What is found on a host, below a root folder: the real one, or a test's.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvm_ioctls::{Cap, Kvm};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// What was found on a host.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) kvm: Node,
    /// The processor's flag for virtualisation, "svm" or "vmx".
    pub(super) virtualisation: Option<&'static str>,
    /// The host is a VM itself.
    pub(super) hypervisor: bool,
    /// KVM is pvm: virtualisation in software, for kernels made for it.
    pub(super) pvm: bool,
    /// Whether io_uring can be set up.
    pub(super) io_uring: Result<(), Errno>,
    /// The sysctl kernel.io_uring_disabled, since Linux 6.6.
    pub(super) io_uring_disabled: Option<u64>,
    /// RLIMIT_NOFILE as far as a process may raise it, `None` if there is no limit.
    pub(super) open_files: Option<u64>,
    /// RLIMIT_MEMLOCK in bytes, `None` if there is no limit.
    pub(super) locked_memory: Option<u64>,
    /// Version of the kernel.
    pub(super) kernel: Option<(u32, u32)>,
    /// The sysctl vm.overcommit_memory.
    pub(super) overcommit: Option<u64>,
    /// Bytes that may still be committed where there is no overcommit.
    pub(super) committable: Option<u64>,
    /// Bytes of memory available.
    pub(super) available: Option<u64>,
    pub(super) runtime_dir: RuntimeDir,
    /// The user's identifier.
    pub(super) uid: u32,
}

/// How /dev/kvm answers.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Open {
        /// KVM_GET_API_VERSION.
        version: i32,
        /// Capabilities that are needed and not there.
        missing: Vec<&'static str>,
    },
    Refused {
        errno: Errno,
        /// Who may open it, if it is there.
        access: Option<Access>,
    },
}

/// Who may open a device.
#[derive(Clone, Debug)]
pub(super) struct Access {
    /// Name of the owning group, or its number.
    pub(super) group: String,
    pub(super) mode: u32,
    /// /etc/group has the user in the group.
    pub(super) member: bool,
}

impl Access {
    /// Whether the group may read and write.
    pub(super) fn for_group(&self) -> bool {
        self.mode & 0o060 == 0o060
    }
}

/// Where sockets of running VMs lie.
#[derive(Clone, Debug)]
pub(super) enum RuntimeDir {
    Unset,
    Usable(PathBuf),
    Unusable(PathBuf, Errno),
}

/// What a VM needs of KVM (Documentation/virt/kvm/api.rst).
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

impl Host {
    /// Looks at the host whose files are below `root`. Limits and io_uring are this process's.
    pub(super) fn find(root: &Path) -> Self {
        let flags = cpu_flags(root);
        let has = |flag: &str| flags.split_ascii_whitespace().any(|known| known == flag);
        let memory = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
        let limit = |resource| getrlimit(resource).current;
        let open_files = getrlimit(Resource::Nofile).maximum;
        Host {
            kvm: kvm(root),
            virtualisation: ["svm", "vmx"].into_iter().find(|flag| has(flag)),
            hypervisor: has("hypervisor"),
            pvm: is_pvm(root),
            io_uring: io_uring(),
            io_uring_disabled: number(root, "proc/sys/kernel/io_uring_disabled"),
            open_files,
            locked_memory: limit(Resource::Memlock),
            kernel: kernel(root),
            overcommit: number(root, "proc/sys/vm/overcommit_memory"),
            committable: field(&memory, "CommitLimit:").map(|limit| {
                limit.saturating_sub(field(&memory, "Committed_AS:").unwrap_or_default())
            }),
            available: field(&memory, "MemAvailable:"),
            runtime_dir: match std::env::var_os("XDG_RUNTIME_DIR") {
                Some(path) if !path.is_empty() => runtime_dir(path.into()),
                _ => RuntimeDir::Unset,
            },
            uid: rustix::process::getuid().as_raw(),
        }
    }
}

/// Opens /dev/kvm.
pub(super) fn open_kvm(root: &Path) -> Result<Kvm, Errno> {
    let path = root.join("dev/kvm");
    // A path with a NUL byte is no file.
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::NOENT)?;
    Kvm::new_with_path(path).map_err(|error| Errno::from_raw_os_error(error.errno()))
}

fn kvm(root: &Path) -> Node {
    match open_kvm(root) {
        Ok(kvm) => {
            let lacks = |(cap, _): &&(Cap, &str)| !kvm.check_extension(*cap);
            Node::Open {
                version: kvm.get_api_version(),
                missing: NEEDED.iter().filter(lacks).map(|(_, name)| *name).collect(),
            }
        }
        Err(errno) => Node::Refused {
            errno,
            access: access(root, &root.join("dev/kvm")),
        },
    }
}

/// Whether KVM is pvm. Only one vendor's module works at a time, but one built into the kernel
/// shows in /sys/module without working: then the processor's flags decide.
pub(super) fn is_pvm(root: &Path) -> bool {
    let module = |name: &str| root.join("sys/module").join(name).exists();
    let other = || module("kvm_intel") || module("kvm_amd");
    let flags = || {
        let flags = cpu_flags(root);
        flags
            .split_ascii_whitespace()
            .any(|flag| flag == "svm" || flag == "vmx")
    };
    module("kvm_pvm") && !(other() && flags())
}

/// The flags of the first processor.
fn cpu_flags(root: &Path) -> String {
    use std::io::Read;

    /// The first processor takes about 1.5 KiB; the file of a large host a megabyte.
    const FIRST: u64 = 16 << 10;
    let mut text = Vec::new();
    if let Ok(file) = fs::File::open(root.join("proc/cpuinfo")) {
        // What was read before an error is as good.
        let _ = file.take(FIRST).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    let mut flags = text.lines().filter(|line| line.starts_with("flags"));
    flags.next().unwrap_or_default().to_owned()
}

fn access(root: &Path, path: &Path) -> Option<Access> {
    let node = fs::metadata(path).ok()?;
    let groups = fs::read_to_string(root.join("etc/group")).unwrap_or_default();
    let users = fs::read_to_string(root.join("etc/passwd")).unwrap_or_default();
    let gid = node.gid().to_string();
    let group = groups
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&&*gid));
    let uid = rustix::process::getuid().to_string();
    let user = users
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&&*uid))
        .and_then(|fields| fields.first().copied());
    let members = group.as_ref().and_then(|fields| fields.get(3).copied());
    let mut members = members.unwrap_or_default().split(',');
    Some(Access {
        member: members.any(|member| Some(member) == user),
        group: match group.as_ref().and_then(|fields| fields.first()) {
            Some(name) => (*name).to_owned(),
            None => gid,
        },
        mode: node.mode(),
    })
}

fn io_uring() -> Result<(), Errno> {
    match io_uring::IoUring::new(2) {
        Ok(_) => Ok(()),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

fn number(root: &Path, path: &str) -> Option<u64> {
    fs::read_to_string(root.join(path))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// A field of /proc/meminfo in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn kernel(root: &Path) -> Option<(u32, u32)> {
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn runtime_dir(path: PathBuf) -> RuntimeDir {
    use rustix::fs::{Access, FileType, access, stat};

    let usable = || {
        if FileType::from_raw_mode(stat(&path)?.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        access(&path, Access::WRITE_OK | Access::EXEC_OK)
    };
    match usable() {
        Ok(()) => RuntimeDir::Usable(path),
        Err(errno) => RuntimeDir::Unusable(path, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host made of these files.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn facts_are_read_from_proc_and_sys() {
        let root = host(&[
            (
                "proc/cpuinfo",
                "processor\t: 0\nflags\t\t: fpu vmx hypervisor\nflags\t: svm\n",
            ),
            (
                "proc/meminfo",
                "MemAvailable:    2048 kB\nCommitLimit: 100 kB\nCommitted_AS: 60 kB\n",
            ),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            ("proc/sys/kernel/io_uring_disabled", "1\n"),
            ("proc/sys/kernel/osrelease", "5.10.0-30-cloud-amd64\n"),
        ]);
        let host = Host::find(root.path());
        assert_eq!((host.virtualisation, host.hypervisor), (Some("vmx"), true));
        assert_eq!(
            (host.available, host.committable),
            (Some(2 << 20), Some(40 << 10))
        );
        assert_eq!(
            (host.overcommit, host.io_uring_disabled),
            (Some(2), Some(1))
        );
        assert_eq!(host.kernel, Some((5, 10)));
    }

    #[test]
    fn an_empty_host_is_no_error() {
        let root = host(&[]);
        let host = Host::find(root.path());
        assert_eq!((host.virtualisation, host.pvm), (None, false));
        assert_eq!((host.available, host.kernel), (None, None));
        assert!(matches!(
            host.kvm,
            Node::Refused {
                errno: Errno::NOENT,
                access: None
            }
        ));
    }

    #[test]
    fn a_file_that_is_not_kvm_has_no_version() {
        let root = host(&[("dev/kvm", "")]);
        let Node::Open { version, missing } = kvm(root.path()) else {
            panic!("it opens");
        };
        assert_eq!((version, missing.len()), (-1, NEEDED.len()));
    }

    #[test]
    fn pvm_is_told_by_its_module_unless_another_works() {
        let pvm = |files: &[(&str, &str)]| is_pvm(host(files).path());
        let (module, intel) = (("sys/module/kvm_pvm/x", ""), ("sys/module/kvm_intel/x", ""));
        let flags = ("proc/cpuinfo", "flags : fpu vmx\n");
        assert!(!pvm(&[]));
        assert!(!pvm(&[intel, flags]));
        assert!(pvm(&[module]));
        assert!(pvm(&[module, flags]), "pvm runs on processors with vmx too");
        assert!(pvm(&[module, intel]), "built in, but the processor cannot");
        assert!(!pvm(&[module, intel, flags]));
    }

    #[test]
    fn the_owning_group_has_a_name_or_its_number() {
        let root = host(&[("dev/kvm", ""), ("etc/group", "root:x:0:\nkvm:x:104:ada\n")]);
        let node = root.path().join("dev/kvm");
        let gid = fs::metadata(&node).unwrap().gid();
        fs::write(
            root.path().join("etc/group"),
            format!("kvm:x:{gid}:ada,me\n"),
        )
        .unwrap();
        let uid = rustix::process::getuid();
        fs::write(
            root.path().join("etc/passwd"),
            format!("me:x:{uid}:0::/:/bin/sh\n"),
        )
        .unwrap();
        let found = access(root.path(), &node).unwrap();
        assert_eq!((&*found.group, found.member), ("kvm", true));
        fs::remove_file(root.path().join("etc/group")).unwrap();
        let found = access(root.path(), &node).unwrap();
        assert_eq!((found.group, found.member), (gid.to_string(), false));
    }

    #[test]
    fn a_runtime_folder_is_a_folder() {
        let root = host(&[("file", "")]);
        let path = root.path().to_owned();
        assert!(matches!(runtime_dir(path.clone()), RuntimeDir::Usable(_)));
        let unusable = |path: PathBuf| match runtime_dir(path) {
            RuntimeDir::Unusable(_, errno) => errno,
            other => panic!("{other:?}"),
        };
        assert_eq!(unusable(path.join("file")), Errno::NOTDIR);
        assert_eq!(unusable(path.join("missing")), Errno::NOENT);
    }
}
