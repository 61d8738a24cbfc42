//! Files made to break the reader: each ends in a clear error, soon.

use std::io::Write;

use super::*;

/// The error of [`load`] for a file of these bytes.
fn load_error(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let error = load(file.path()).unwrap_err();
    assert_eq!(error.exit, 2);
    error.to_string()
}

/// The error of [`load`] for a path in a new folder that `make` fills.
fn folder_error(make: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    make(&path);
    let error = load(&path).unwrap_err();
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
    let error = load(Path::new("/dev/zero")).unwrap_err().to_string();
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
    let loaded = load(&file);
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
        stop_timeout = \"30s\"\n";
    vm(whole);
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
    }
}
