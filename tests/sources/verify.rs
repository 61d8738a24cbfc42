//! Files that are compared with their digests.

use super::{Folder, sha256};

#[test]
fn every_file_that_differs_is_shown_with_both_digests() {
    let wrong = sha256(b"wrong");
    let folder = Folder::new(&format!(
        "[boot.kernel]\npath = \"k\"\nsha256 = \"{wrong}\"\n[[block]]\npath = \"a.img\"\nro = true\n\
         sha256 = \"{wrong}\"\n"
    ));
    let kernel = super::bare::kernel(super::bare::POWER_OFF);
    let k = sha256(&kernel);
    folder.write("k", kernel);
    folder.write("a.img", [0; 512]);
    let a = sha256(&[0; 512]);
    for command in ["prepare", "up", "check"] {
        let done = folder.launcher(&[command]);
        let carets = "^".repeat(66);
        assert_eq!(done.code, 2);
        assert_eq!(
            done.err,
            format!(
                "error: `sha256` is {wrong}, but k has {k}\n --> vm.toml:3:10\n  |\n\
                 3 | sha256 = \"{wrong}\"\n  |          {carets}\n  |\n  = help: if this is the \
                 file that is meant, write `sha256 = \"{k}\"`\n\n\
                 error: `sha256` is {wrong}, but a.img has {a}\n --> vm.toml:7:10\n  |\n\
                 7 | sha256 = \"{wrong}\"\n  |          {carets}\n  |\n  = help: if this is the \
                 file that is meant, write `sha256 = \"{a}\"`\n"
            )
        );
    }
}

#[test]
fn a_backing_file_that_differs_is_shown_at_its_digest() {
    let folder = Folder::new(&format!(
        "boot.kernel = \"k\"\n[[block]]\npath = \"a.qcow2\"\nsize = \"1MiB\"\n\
         backing = [{{ path = \"b.img\", sha256 = \"{}\" }}]\n",
        sha256(b"wrong")
    ));
    folder.write("k", "k");
    folder.write("b.img", "b");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 2);
    assert!(done.err.contains(", but b.img has "), "{}", done.err);
    assert!(done.err.contains(" --> vm.toml:5:39\n"), "{}", done.err);
}

#[test]
fn a_file_in_the_cache_that_has_rotted_is_named_for_removal() {
    let digest = sha256(b"k");
    let folder = Folder::new(&format!(
        "[boot.kernel]\nurl = \"http://127.0.0.1:9/k\"\nsha256 = \"{digest}\"\n"
    ));
    let place = format!("cache/launcher/files/{digest}/k");
    folder.write(&place, "rotten");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 2);
    let help = format!("= help: remove DIR/{place}, and it is fetched again\n");
    assert!(done.err.ends_with(&help), "{}", done.err);
}

#[test]
fn a_file_with_a_digest_and_no_source_is_shown_at_its_path_if_it_is_not_there() {
    let digest = sha256(b"k");
    let folder = Folder::new(&format!(
        "[boot.kernel]\npath = \"k\"\nsha256 = \"{digest}\"\n"
    ));
    let done = folder.launcher(&["up"]);
    assert_eq!(done.code, 2);
    assert!(
        done.err
            .starts_with("error: cannot open k: No such file or directory\n --> vm.toml:2:8\n"),
        "{}",
        done.err
    );
}

#[test]
fn prepare_refuses_what_is_not_there_and_comes_from_nowhere() {
    let folder = Folder::new(
        "boot.kernel = \"k\"\n[[block]]\npath = \"a.img\"\nsize = \"1MiB\"\n[[block]]\npath = \"b.img\"\n",
    );
    folder.write("k", "k");
    let done = folder.launcher(&["prepare"]);
    assert_eq!((done.code, &*done.out), (2, ""));
    assert_eq!(
        done.err,
        "error: b.img is not there, and nothing says where it comes from\n --> vm.toml:6:8\n  |\n\
         6 | path = \"b.img\"\n  |        ^^^^^^^\n  |\n  = help: add a `url` with its `sha256`, or \
         a command that makes it as `build`\n"
    );
    folder.write("b.img", "b");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(
        done.out,
        "boot.kernel  present                  k\n\
         block.0      absent, `up` creates it  a.img\n\
         block.1      present                  b.img\n"
    );
    assert!(!folder.path("a.img").exists());
}
