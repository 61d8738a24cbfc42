use super::facts::Access;
use super::*;

/// A host on which all is well.
fn good() -> Host {
    Host {
        kvm: Node::Open {
            version: 12,
            missing: Vec::new(),
        },
        virtualisation: Some("svm"),
        hypervisor: false,
        pvm: false,
        io_uring: Ok(()),
        io_uring_disabled: Some(0),
        open_files: Some(1 << 20),
        locked_memory: Some(8 << 20),
        kernel: Some((6, 1)),
        overcommit: Some(0),
        committable: Some(0),
        available: Some(8 << 30),
        runtime_dir: RuntimeDir::Usable("/run/user/1000".into()),
        uid: 1000,
    }
}

/// /dev/kvm does not open.
fn refused(errno: Errno, access: Option<Access>) -> Host {
    Host {
        kvm: Node::Refused { errno, access },
        ..good()
    }
}

/// /dev/kvm is not permitted to a user.
fn not_permitted(group: &str, mode: u32, member: bool) -> Check {
    let access = Access {
        group: group.into(),
        mode,
        member,
    };
    kvm(&refused(Errno::ACCESS, Some(access)))
}

/// The state of a check and all that it says.
fn said(check: &Check) -> (State, String) {
    let advice = check.advice.iter().map(|advice| format!("\n{advice}"));
    (
        check.state,
        check.detail.clone() + &advice.collect::<String>(),
    )
}

#[test]
fn a_good_host_passes_every_check_and_has_no_advice() {
    let checks = checks_of(&good());
    assert_eq!(checks.len(), 8);
    for check in checks {
        assert_eq!(
            (check.state, check.advice.len()),
            (State::Ok, 0),
            "{check:?}"
        );
    }
}

#[test]
fn every_check_that_is_not_ok_has_advice() {
    let bad = Host {
        kvm: Node::Open {
            version: 12,
            missing: vec!["KVM_CAP_IRQFD"],
        },
        virtualisation: None,
        io_uring: Err(Errno::PERM),
        open_files: Some(256),
        locked_memory: Some(64 << 10),
        kernel: Some((5, 10)),
        available: None,
        runtime_dir: RuntimeDir::Unset,
        ..good()
    };
    let mut not_ok = 0;
    for check in checks_of(&bad)
        .iter()
        .chain(&checks_of(&refused(Errno::NOENT, None)))
    {
        assert_eq!(
            check.state == State::Ok,
            check.advice.is_empty(),
            "{check:?}"
        );
        not_ok += usize::from(check.state != State::Ok);
    }
    assert_eq!(not_ok, 8);
}

#[test]
fn a_missing_kvm_is_loaded_where_the_processor_can() {
    let host = refused(Errno::NOENT, None);
    assert_eq!(
        said(&kvm(&host)),
        (
            State::Failed,
            "/dev/kvm is missing\nload KVM: `sudo modprobe kvm_amd`\n\
             in a container: pass the device in (`--device /dev/kvm`)"
                .into()
        )
    );
    let intel = Host {
        virtualisation: Some("vmx"),
        ..host.clone()
    };
    assert!(said(&kvm(&intel)).1.contains("modprobe kvm_intel"));
    let nested = Host {
        virtualisation: None,
        hypervisor: true,
        ..host
    };
    assert!(said(&kvm(&nested)).1.contains("nested virtualisation"));
}

#[test]
fn a_kvm_that_is_not_permitted_names_the_group_and_the_commands() {
    assert_eq!(
        said(&not_permitted("kvm", 0o20660, false)),
        (
            State::Failed,
            "/dev/kvm is not permitted: Permission denied (os error 13)\n\
             it belongs to group kvm: `sudo usermod -aG kvm $USER`, then log in again\n\
             for now: `sudo setfacl -m u:$USER:rw /dev/kvm`"
                .into()
        )
    );
}

#[test]
fn a_member_of_the_group_since_this_login_logs_in_again() {
    let (_, text) = said(&not_permitted("kvm", 0o660, true));
    assert!(
        text.contains("log in again") && !text.contains("usermod"),
        "{text}"
    );
}

#[test]
fn a_group_that_may_not_open_it_is_no_way() {
    let (_, text) = said(&not_permitted("root", 0o20600, false));
    assert!(
        text.contains("mode 600 permits nothing to group root"),
        "{text}"
    );
    assert!(
        !text.contains("usermod") && text.contains("setfacl"),
        "{text}"
    );
}

#[test]
fn root_is_refused_only_by_a_sandbox() {
    let access = Access {
        group: "kvm".into(),
        mode: 0o660,
        member: false,
    };
    let host = Host {
        uid: 0,
        ..refused(Errno::PERM, Some(access))
    };
    let (_, text) = said(&kvm(&host));
    assert!(
        text.contains("sandbox") && !text.contains("usermod"),
        "{text}"
    );
}

#[test]
fn another_interface_than_kvm_s_is_refused() {
    let host = Host {
        kvm: Node::Open {
            version: -1,
            missing: vec!["KVM_CAP_IRQCHIP"],
        },
        ..good()
    };
    let (state, text) = said(&kvm(&host));
    assert_eq!(state, State::Failed);
    assert!(text.starts_with("/dev/kvm has interface version -1, expected 12\n"));
    assert_eq!(capabilities(&host), None, "they say nothing then");
}

#[test]
fn missing_capabilities_are_named() {
    let host = Host {
        kvm: Node::Open {
            version: 12,
            missing: vec!["KVM_CAP_IRQFD", "KVM_CAP_SIGNAL_MSI"],
        },
        ..good()
    };
    let (state, text) = said(&capabilities(&host).unwrap());
    assert_eq!(state, State::Failed);
    assert!(text.starts_with("KVM lacks KVM_CAP_IRQFD, KVM_CAP_SIGNAL_MSI\n"));
}

#[test]
fn pvm_fails_whatever_the_processor_can() {
    let host = Host {
        pvm: true,
        ..good()
    };
    let (state, text) = said(&hardware(&host));
    assert_eq!(state, State::Failed);
    assert!(text.starts_with("the KVM here is pvm: it cannot boot an unmodified kernel\n"));
}

#[test]
fn a_processor_without_virtualisation_fails() {
    let host = Host {
        virtualisation: None,
        ..good()
    };
    let (state, text) = said(&hardware(&host));
    assert_eq!(state, State::Failed);
    assert!(text.contains("firmware"), "{text}");
}

#[test]
fn a_refused_io_uring_is_a_warning_that_says_who_refuses() {
    let refusal = |errno, disabled| {
        let host = Host {
            io_uring: Err(errno),
            io_uring_disabled: disabled,
            ..good()
        };
        said(&io_uring(&host))
    };
    let (state, text) = refusal(Errno::PERM, Some(2));
    assert_eq!(state, State::Warning);
    assert!(
        text.contains("threads, which is slower: Operation not permitted"),
        "{text}"
    );
    assert!(text.contains("sysctl kernel.io_uring_disabled=0"), "{text}");
    assert!(
        refusal(Errno::PERM, Some(0))
            .1
            .contains("allow io_uring_setup")
    );
    assert!(refusal(Errno::NOSYS, None).1.contains("CONFIG_IO_URING"));
    assert!(refusal(Errno::NOMEM, None).1.contains("ulimit -l"));
}

#[test]
fn few_open_files_are_a_warning() {
    let limit = |open_files| {
        let host = Host {
            open_files,
            ..good()
        };
        super::open_files(&host).state
    };
    assert_eq!(limit(Some(1023)), State::Warning);
    assert_eq!((limit(Some(1024)), limit(None)), (State::Ok, State::Ok));
}

#[test]
fn locked_memory_matters_to_old_kernels_and_users_only() {
    let limit = |locked_memory, kernel, uid| {
        let host = Host {
            locked_memory,
            kernel,
            uid,
            ..good()
        };
        super::locked_memory(&host).state
    };
    let little = Some(64 << 10);
    assert_eq!(limit(little, Some((5, 11)), 1000), State::Warning);
    assert_eq!(limit(little, Some((5, 11)), 0), State::Ok);
    assert_eq!(limit(little, Some((5, 12)), 1000), State::Ok);
    assert_eq!(limit(None, Some((5, 4)), 1000), State::Ok);
}

#[test]
fn memory_without_overcommit_is_a_warning_with_what_is_left() {
    let host = Host {
        overcommit: Some(2),
        committable: Some(3 << 30),
        ..good()
    };
    let (state, text) = said(&memory(&host));
    assert_eq!(state, State::Warning);
    assert!(
        text.starts_with("no overcommit, 3072MiB left for all programs\n"),
        "{text}"
    );
}

#[test]
fn a_host_without_kvm_is_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    let error = refuse(root.path(), true).unwrap_err();
    assert_eq!(error.exit, 1);
    assert!(
        error
            .to_string()
            .starts_with("error: /dev/kvm is missing\nhelp: ")
    );
}

#[test]
fn pvm_is_refused_at_once_unless_forced() {
    let root = tempfile::tempdir().unwrap();
    for folder in ["dev", "sys/module/kvm_pvm"] {
        std::fs::create_dir_all(root.path().join(folder)).unwrap();
    }
    std::fs::write(root.path().join("dev/kvm"), "").unwrap();
    let error = refuse(root.path(), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "error: the KVM here is pvm: it cannot boot an unmodified kernel\n\
         help: use a host with svm or vmx: bare metal, or a VM with nested virtualisation\n      \
         `--force` goes on all the same"
    );
    refuse(root.path(), true).unwrap();
}
