//! Files made to break the reader: each ends in a clear error, soon.

use std::io::Write;

use super::*;

/// The error of [`load`] for a file of these bytes.
fn load_error(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let error = load(file.path(), &Choice::default()).unwrap_err();
    assert_eq!(error.exit, 2);
    error.to_string()
}

/// The error of [`load`] for a path in a new folder that `make` fills.
fn folder_error(make: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    make(&path);
    let error = load(&path, &Choice::default()).unwrap_err();
    assert_eq!(error.exit, 2);
    error
        .to_string()
        .replace(folder.path().to_str().unwrap(), "DIR")
}

#[test]
fn a_missing_file_is_an_error_with_the_errno_text() {
    assert_eq!(
        folder_error(|_| ()),
        "error: cannot read DIR/vm.toml: No such file or directory (os error 2)\n\
         help: name the TOML file of a VM"
    );
}

#[test]
fn a_directory_is_no_file() {
    let error = folder_error(|path| std::fs::create_dir(path).unwrap());
    assert_eq!(
        error,
        "error: DIR/vm.toml is a directory, expected a TOML file"
    );
}

#[test]
fn a_fifo_without_a_writer_is_refused_at_once() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let error = folder_error(|path| {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap();
    });
    assert_eq!(error, "error: DIR/vm.toml is a FIFO, expected a TOML file");
}

#[test]
fn a_socket_or_a_device_is_no_file() {
    let error = folder_error(|path| {
        std::os::unix::net::UnixListener::bind(path).unwrap();
    });
    assert!(
        error.starts_with("error: cannot read DIR/vm.toml: "),
        "{error}"
    );
    let error = load(Path::new("/dev/zero"), &Choice::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "error: /dev/zero is a device, expected a TOML file");
}

#[test]
fn a_loop_of_links_is_an_error() {
    let error = folder_error(|path| std::os::unix::fs::symlink(path, path).unwrap());
    assert!(
        error.contains("Too many levels of symbolic links"),
        "{error}"
    );
}

#[test]
fn a_file_past_the_limit_is_refused_with_the_limit() {
    let error = load_error(&vec![b'#'; 10 << 20]);
    assert!(
        error.ends_with("is larger than 1MiB, the limit of a VM's file"),
        "{error}"
    );
    // One byte less than that is read.
    let mut text = BOOT.as_bytes().to_vec();
    text.resize(1 << 20, b'\n');
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("limit.toml");
    std::fs::write(&file, &text).unwrap();
    let loaded = load(&file, &Choice::default());
    assert_eq!(loaded.unwrap().name, "limit");
}

#[test]
fn an_empty_file_is_told_what_it_needs() {
    assert_eq!(error(""), "error: `kernel` is missing, `[boot]` needs it");
    assert_eq!(error("\n \n# nothing"), error(""));
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_text() {
    let vm = vm(&format!("\u{feff}cpus = 2\n{BOOT}"));
    assert_eq!(vm.cpus, 2);
    let errors = errors("\u{feff}cpu = 2\n[boot]\nkernel = 'k'");
    assert!(errors.contains("vm.toml:1:1"), "{errors}");
}

#[test]
fn bytes_that_are_no_utf8_are_pointed_at() {
    let errors = errors(b"cpus = 1\nname = \"caf\xe9\"\n");
    assert!(
        errors.starts_with("error: this is not UTF-8 text\n"),
        "{errors}"
    );
    assert!(errors.contains("vm.toml:2:12"), "{errors}");
    assert!(super::errors(b"\xff\xfec\0p\0").starts_with("error: this is not UTF-8 text"));
}

#[test]
fn a_nul_byte_is_pointed_at() {
    let errors = errors("cpus = 1\nname = \"a\0b\"\n");
    assert!(
        errors.starts_with("error: a NUL byte: this is not text\n"),
        "{errors}"
    );
    assert!(errors.contains("vm.toml:2:10"), "{errors}");
    assert!(!errors.contains('\0'));
}

#[test]
fn nesting_is_bounded() {
    for open in ["[", "{a=", "[{a=", "[[", "a."] {
        let deep = format!("cpus = {}", open.repeat(200_000));
        assert!(errors(deep).starts_with("error: "));
    }
    for depth in [79, 80, 1000, 100_000] {
        let path = vec!["a"; depth].join(".");
        assert!(errors(format!("{path} = 1\n")).starts_with("error: "));
        assert!(errors(format!("[{path}]\n")).starts_with("error: "));
        assert!(errors(format!("[[{path}]]\n")).starts_with("error: "));
    }
}

#[test]
fn many_mistakes_are_shown_in_part_and_counted() {
    for (text, shown) in [
        ("=\n".repeat(10_000), 1),
        ("a = 1\n".repeat(10_000), 100),
        ("[[block]]\n".repeat(10_000), 100),
        ("[[block]]\npath=1\nro=2\n".repeat(10_000), 100),
        ("[boot]\n".repeat(10_000), 100),
        ("]\n".repeat(10_000), 1),
        ("[\n".repeat(10_000), 1),
        ((0..10_000).map(|n| format!("x{n} = 1\n")).collect(), 100),
    ] {
        let errors = errors(&text);
        let count = errors.matches("error: ").count();
        assert!((shown..=101).contains(&count), "{count} of {:.20}", text);
        assert!(errors.len() < 100_000);
    }
    let many = errors((0..1000).map(|n| format!("x{n} = 1\n")).collect::<String>() + BOOT);
    assert!(many.ends_with("error: 900 more in vms/vm.toml"), "{many}");
}

#[test]
fn a_line_of_a_megabyte_is_cut() {
    let long = "x".repeat(1 << 20);
    for text in [
        format!("cpus = \"{long}\"\n"),
        format!("{long} = 1\n"),
        format!("cpus = {}\n", "9".repeat(1 << 20)),
        format!("cpus = 0x{}\n", "f".repeat(1 << 20)),
        format!("name = {long}\n"),
        format!("[{long}]\n"),
        format!("block = [{}]", "1,".repeat(1 << 15)),
        format!("block = [{}]", "{},".repeat(1 << 15)),
        format!("[boot]\nkernel = 'k'\n[[block]]\nformat = '{long}'\npath = 'a'"),
        format!("[boot]\nkernel = 'k'\n[[block]]\npath = 'a.{long}'"),
    ] {
        let errors = errors(&text);
        assert!(errors.len() < 100_000, "{} for {:.30}", errors.len(), text);
    }
}

#[test]
fn related_places_may_be_far_apart() {
    let far = "#\n".repeat(500_000);
    let errors = errors(format!(
        "{BOOT}[[block]]\npath = 'a.img'\nroot = true\n{far}[[block]]\npath = 'b.img'\nroot = true\n"
    ));
    assert!(
        errors.contains("first here") && errors.contains("500008"),
        "{errors}"
    );
}

#[test]
fn escapes_of_a_terminal_are_made_harmless() {
    let errors = errors("\"\\u001b[31m\\n\" = 1\nname = '\u{1b}[2J'\n# \u{202e}\ncpus = 0\n");
    assert!(!errors.contains(['\u{1b}', '\u{202e}', '\r']), "{errors:?}");
}

#[test]
fn no_mutation_of_a_file_breaks_the_reader() {
    let whole = "name = \"a\"\ncpus = 2\nmemory = \"1GiB\"\nboot.kernel = 'k'\n[[block]]\n\
        path = \"a.qcow2\"\nro = true\n[block.qcow2]\ncluster_size = \"64KiB\"\n[[block]]\n\
        path = '~/b.img'\nsize = 8_192\nid = \"\\u0041\"\n[console]\nmode = \"off\"\n[lifecycle]\n\
        stop_timeout = \"30s\"\n[profile.a]\ncpus = 3\n[[profile.a.block]]\nid = \"A\"\nro = true\n";
    vm(whole);
    let base = "memory = 1\n[[block]]\nid = 'A'\nqueues = 2\nbacking = 'c'\n[profile.a.boot]\n";
    // xorshift, so that a failure repeats.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let tokens: Vec<&[u8]> = vec![
        b"[",
        b"]",
        b"[[",
        b"{",
        b"}",
        b"=",
        b".",
        b",",
        b"\"",
        b"'''",
        b"\n",
        b"\r",
        b"#",
        b"\\",
        b"\0",
        b"\xff",
        b"-9",
        b"1e9",
        b"block",
        b"boot",
        b"\xc3\xa9",
        b"\xef\xbb\xbf",
        b" ",
        "€😀".as_bytes(),
    ];
    for _ in 0..4000 {
        let mut bytes = whole.as_bytes().to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            let len = random(12).min(bytes.len() - at);
            let token = tokens[random(tokens.len())].iter().copied();
            match random(3) {
                0 => drop(bytes.splice(at..at + len, token)),
                1 => drop(bytes.splice(at..at, token)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        match parse(&bytes, &source(), &Renderer::styled()) {
            Ok(_) => schema::takes(std::str::from_utf8(&bytes).unwrap()),
            Err(errors) => assert!(errors.contains("error"), "{bytes:?}"),
        }
        let extends = [b"extends = 'base.toml'\n", &bytes[..]].concat();
        let text = String::from_utf8_lossy(&bytes);
        let set = text.lines().nth(random(text.lines().count().max(1)));
        let line = ["-p", "a", "--set", set.unwrap_or_default()];
        let files = [("vm.toml", &extends[..]), ("base.toml", base.as_bytes())];
        match read_from(&files, &line, &Renderer::styled()) {
            Ok(vm) => drop(vm.resolved()),
            Err(errors) => assert!(errors.contains("error"), "{bytes:?}"),
        }
    }
}

/// The error of [`load`] for `vm.toml` in a new folder with these files.
fn layered_error(files: &[(&str, &str)], make: impl FnOnce(&Path)) -> String {
    folder_error(|path| {
        for (name, text) in files {
            std::fs::write(path.with_file_name(name), text).unwrap();
        }
        make(path.parent().unwrap());
    })
}

#[test]
fn what_is_extended_is_a_regular_file_of_the_same_limit() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let text = "extends = ['dir', 'fifo', 'loop', 'large', 'none', '/dev/zero']\n";
    let error = layered_error(&[("vm.toml", text)], |folder| {
        std::fs::create_dir(folder.join("dir")).unwrap();
        mknodat(CWD, folder.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        std::os::unix::fs::symlink("loop", folder.join("loop")).unwrap();
        std::fs::write(folder.join("large"), vec![b'#'; 10 << 20]).unwrap();
    });
    let titles: Vec<_> = error
        .lines()
        .filter(|line| line.starts_with("error"))
        .collect();
    assert_eq!(
        titles,
        [
            "error: DIR/dir is a directory, expected a TOML file",
            "error: DIR/fifo is a FIFO, expected a TOML file",
            "error: cannot read DIR/loop: Too many levels of symbolic links (os error 40)",
            "error: DIR/large is larger than 1MiB, the limit of a VM's file",
            "error: cannot read DIR/none: No such file or directory (os error 2)",
            "error: /dev/zero is a device, expected a TOML file",
        ]
    );
}

#[test]
fn a_link_to_the_file_itself_is_the_file_itself() {
    let error = layered_error(&[("vm.toml", "extends = 'other.toml'\n")], |folder| {
        std::os::unix::fs::symlink("vm.toml", folder.join("other.toml")).unwrap();
    });
    assert!(
        error.starts_with("error: `extends` comes back to DIR/other.toml\n"),
        "{error}"
    );
}

#[test]
fn a_thousand_files_are_too_many() {
    let names: Vec<_> = (0..1000).map(|n| format!("{n}.toml")).collect();
    let text = format!("extends = {names:?}\n");
    let error = layered_error(&[("vm.toml", &text)], |folder| {
        for name in &names {
            std::fs::write(folder.join(name), "cpus = 1\n").unwrap();
        }
    });
    assert!(
        error.starts_with("error: `extends` leads to more than 64 files, the limit\n"),
        "{error}"
    );
    assert_eq!(error.matches("error: ").count(), 1, "said once");
}

#[test]
fn a_thousand_files_that_are_not_there_are_not_all_tried() {
    let names: Vec<_> = (0..1000).map(|n| format!("{n}.toml")).collect();
    let error = layered_error(&[("vm.toml", &format!("extends = {names:?}\n"))], |_| ());
    assert_eq!(error.matches("error: cannot read ").count(), 63);
    assert_eq!(error.matches("error: ").count(), 64);
}

#[test]
fn a_chain_past_the_limit_is_shown() {
    let error = layered_error(&[("vm.toml", "extends = '1.toml'\n")], |folder| {
        for n in 1..20 {
            let text = format!("extends = '{}.toml'\n", n + 1);
            std::fs::write(folder.join(format!("{n}.toml")), text).unwrap();
        }
    });
    assert!(
        error.starts_with("error: `extends` leads more than 8 files deep, the limit\n"),
        "{error}"
    );
    assert!(
        error.contains("the chain is DIR/vm.toml -> DIR/1.toml -> "),
        "{error}"
    );
    assert!(error.contains("DIR/7.toml -> DIR/8.toml"), "{error}");
}

#[test]
fn large_files_together_are_bounded() {
    let error = layered_error(
        &[("vm.toml", "extends = ['1', '2', '3', '4', '5']\n")],
        |folder| {
            for n in 1..=5 {
                std::fs::write(folder.join(n.to_string()), vec![b'#'; 1 << 20]).unwrap();
            }
        },
    );
    assert!(
        error.starts_with("error: `extends` leads to files of more than 4MiB in all, the limit\n"),
        "{error}"
    );
}

#[test]
fn many_disks_merge_soon() {
    let text: String = (0..20_000)
        .map(|n| format!("[[block]]\nid='{n}'\nro=true\n"))
        .collect();
    let vm = format!("extends = 'base.toml'\n{BOOT}{text}");
    let files = [("vm.toml", vm.as_bytes()), ("base.toml", text.as_bytes())];
    let errors = read_from(&files, &["--set", "block.19999.ro=1"], &Renderer::plain()).unwrap_err();
    assert!(
        errors.contains("--set:1:16") || errors.contains("more in"),
        "{errors:.300}"
    );
    assert!(errors.len() < 100_000);
}

#[test]
fn profiles_and_arguments_may_be_anything() {
    let profiles = "boot.kernel = 'k'\n[profile]\n\"\\u001b[31m\\n\" = 1\n\"\" = {}\n[profile.a]\n";
    let long = "x".repeat(1 << 16);
    let deep = vec!["a"; 1000].join(".");
    let files = [("vm.toml", profiles.as_bytes())];
    for argument in [
        "",
        "=",
        "==",
        "a=",
        ".=1",
        "a.=1",
        ".a=1",
        "a..b=1",
        "\"=1",
        "\"a=1",
        "'=1",
        "a=\n",
        "a\n=1",
        "#=1",
        "[[a]]=1",
        "a={",
        "a=[",
        "a=\"\"\"",
        "block=1",
        "block.=1",
        "block.0=1",
        "block.0.0.0=1",
        "boot=1",
        "boot.kernel.path.x=1",
        "\0=\0",
        "cpus=\u{1b}[2J",
        "é=ü",
        "cpus=99999999999999999999",
        &long,
        &format!("{long}=1"),
        &format!("cpus={long}"),
        &format!("{deep}=1"),
        &"a=".repeat(1 << 14),
        &"\"=".repeat(1 << 14),
        &format!("cpus={}", "[".repeat(1 << 14)),
    ] {
        for line in [["--set", argument], ["-p", argument]] {
            let errors = read_from(&files, &line, &Renderer::plain()).unwrap_err();
            assert!(
                errors.starts_with("error: "),
                "{argument:.40}: {errors:.300}"
            );
            assert!(!errors.contains(['\u{1b}', '\0', '\r']), "{errors:?}");
            assert!(errors.len() < 100_000, "{argument:.40}");
        }
    }
}
