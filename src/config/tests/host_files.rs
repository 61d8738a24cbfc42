//! Files of the host: where they are, what is in them, and where they come from.

use super::blocks::{disks, format};
use super::messages::said;
use super::*;

const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A kernel that is written so.
fn kernel(value: &str) -> HostFile {
    vm(&format!("boot.kernel = {value}")).boot.kernel.unwrap()
}

#[test]
fn a_file_is_a_path_or_a_table_with_one() {
    for value in ["'k'", "{ path = 'k' }"] {
        let file = kernel(value);
        assert_eq!(file.path, Path::new("vms/k"));
        assert_eq!(file.folder, Path::new("vms"));
        assert!(file.sha256.is_none() && file.url.is_none() && file.build.is_empty());
    }
    let vm = vm("[boot.kernel]\npath = '~/k'\n[boot.initrd]\npath = 'i'\n");
    assert_eq!(vm.boot.kernel.unwrap().path, Path::new("/home/ada/k"));
    assert_eq!(vm.boot.initrd.unwrap().path, Path::new("vms/i"));
}

#[test]
fn a_file_may_have_a_digest_in_either_case() {
    for written in [DIGEST.to_owned(), DIGEST.to_uppercase()] {
        let file = kernel(&format!("{{ path = 'k', sha256 = '{written}' }}"));
        assert_eq!(file.sha256.unwrap().to_string(), DIGEST);
    }
}

#[test]
fn a_file_that_is_fetched_lies_in_the_cache() {
    for (url, name) in [
        ("https://a.example/x/vmlinuz", "vmlinuz"),
        ("http://127.0.0.1:8080/k%20k?x=/y", "k%20k"),
        ("https://[::1]/a/b.qcow2", "b.qcow2"),
    ] {
        let file = kernel(&format!("{{ url = '{url}', sha256 = '{DIGEST}' }}"));
        let place = Path::new("/cache/files").join(DIGEST).join(name);
        assert_eq!((&file.path, file.url.as_deref()), (&place, Some(url)));
    }
}

#[test]
fn a_command_is_an_array_or_one_word() {
    for (build, words) in [
        ("'./make-it'", &["./make-it"][..]),
        ("['make', '-C', 'a b']", &["make", "-C", "a b"]),
        ("['./a b']", &["./a b"]),
        ("[]", &[]),
    ] {
        let file = kernel(&format!("{{ path = 'k', build = {build} }}"));
        assert_eq!(file.build, words);
    }
}

#[test]
fn a_disk_has_the_keys_of_a_file_beside_its_own() {
    let text = format!(
        "[[block]]\npath = 'a.img'\nro = true\nsha256 = '{DIGEST}'\nbuild = ['./a']\n\
         [[block]]\nurl = 'http://a/b.qcow2'\nephemeral = true\nsha256 = '{DIGEST}'\n\
         backing = ['c.img', {{ url = 'http://a/d.img', sha256 = '{DIGEST}' }}]\n"
    );
    let disks = disks(&text);
    let built = disks[0].file();
    assert_eq!(built.path, Path::new("vms/a.img"));
    assert_eq!((built.build.len(), &*built.folder), (1, Path::new("vms")));
    assert_eq!(built.sha256.unwrap().to_string(), DIGEST);
    let place = |name| Path::new("/cache/files").join(DIGEST).join(name);
    assert_eq!(disks[1].file().path, place("b.qcow2"));
    assert_eq!(
        disks[1].image().backing,
        [Path::new("vms/c.img"), &place("d.img")]
    );
}

#[test]
fn a_disk_that_is_fetched_has_the_format_of_its_url_s_extension() {
    let url = |url: &str| format(&format!("url = '{url}'\nro = true\nsha256 = '{DIGEST}'"));
    assert_eq!(url("http://a/b.qcow2?c=d.img"), "qcow2");
    assert_eq!(url("http://a/b.img"), "sparse-raw");
    said(
        &format!(
            "boot.kernel = 'k'\n[[block]]\nurl = 'http://a/b.xz'\nro = true\nsha256 = '{DIGEST}'\n"
        ),
        r#"
error: `url` ends in ".xz", the extension of no format
 --> vms/vm.toml:3:7
  |
3 | url = 'http://a/b.xz'
  |       ^^^^^^^^^^^^^^^
  |
  = help: add a line `format = "..."` with "qcow2", "raw" or "sparse-raw"
"#,
    );
}

#[test]
fn every_file_of_a_vm_is_listed_with_its_key() {
    let vm = vm(
        "boot = { kernel = 'k', initrd = 'i' }\n[[block]]\npath = 'a.qcow2'\n\
                 backing = [{ path = 'b.qcow2' }, 'c.img']\n[[block]]\npath = 'd.img'\n",
    );
    let listed: Vec<_> = vm.host_files().into_iter().collect();
    let listed: Vec<_> = listed
        .iter()
        .map(|(key, file)| (&**key, file.path.to_str().unwrap()))
        .collect();
    assert_eq!(
        listed,
        [
            ("boot.kernel", "vms/k"),
            ("boot.initrd", "vms/i"),
            ("block.0", "vms/a.qcow2"),
            ("block.0.backing.0", "vms/b.qcow2"),
            ("block.0.backing.1", "vms/c.img"),
            ("block.1", "vms/d.img"),
        ]
    );
}

#[test]
fn what_is_no_file_is_told_what_one_is() {
    said(
        "boot = { kernel = 7, initrd = {} }\n",
        r#"
error: `kernel` is 7, expected a path, or a table with `path` or `url`
 --> vms/vm.toml:1:19
  |
1 | boot = { kernel = 7, initrd = {} }
  |                   ^

error: `path` is missing, `[boot.initrd]` needs it or `url`
 --> vms/vm.toml:1:31
  |
1 | boot = { kernel = 7, initrd = {} }
  |                               ^^
  |
  = help: add `path = "..."`
"#,
    );
}

#[test]
fn an_unknown_key_of_a_file_is_told_the_nearest() {
    said(
        "[boot.kernel]\npath = 'k'\nsha-256 = ''\n[[block]]\npath = 'a.qcow2'\nbacking = [{ path = 'b', ro = true }]\n",
        r#"
error: unknown key `sha-256` in `[boot.kernel]`
 --> vms/vm.toml:3:1
  |
3 | sha-256 = ''
  | ^^^^^^^
  |
  = help: did you mean `sha256`?

error: unknown key `ro` in `[[block.backing]]`
 --> vms/vm.toml:6:26
  |
6 | backing = [{ path = 'b', ro = true }]
  |                          ^^
  |
  = help: `ro` belongs in `[[block]]`
"#,
    );
}

#[test]
fn a_bad_digest_is_told_its_length_or_the_character() {
    let errors = |sha256: &str| {
        errors(format!(
            "boot.kernel = {{ path = 'k', sha256 = '{sha256}' }}"
        ))
    };
    let short = errors(&DIGEST[1..]);
    assert!(
        short.starts_with(
            "error: `sha256` is '3b0c44298fc1c149afbf4c8996fb92427ae41e4..., expected a SHA-256 \
             digest of 64 hex digits\n --> vms/vm.toml:1:38\n"
        ),
        "{short}"
    );
    assert!(
        short.ends_with("\n  = help: it has 63 characters"),
        "{short}"
    );
    let bad = errors(&DIGEST.replace('f', "g"));
    assert!(bad.ends_with("\n  = help: 'g' is no hex digit"), "{bad}");
}

#[test]
fn a_bad_url_is_told_why() {
    let said = |url: &str| {
        let text = format!("boot.kernel = {{ sha256 = '{DIGEST}', url = \"{url}\" }}");
        let errors = errors(text);
        let expected = "expected an http or https URL that ends in the name of a file\n";
        assert!(
            errors.lines().count() < 8 && errors.contains(expected),
            "{errors}"
        );
        let (_, help) = errors.split_once("help: ").unwrap_or_default();
        help.to_owned()
    };
    assert_eq!(said("ftp://a/b"), "nothing is fetched by `ftp`");
    assert_eq!(said("file:///a/b"), "nothing is fetched by `file`");
    assert_eq!(
        said("https://ada:secret@a/b"),
        "leave out user and password: whoever reads this file reads them"
    );
    assert_eq!(said("https://a/b c"), "' ' is not allowed: write it as %XX");
    assert_eq!(said("https://a/ä"), "'ä' is not allowed: write it as %XX");
    assert_eq!(
        said("https://a/b#c"),
        "leave out what follows `#`: no server is sent it"
    );
    for none in ["https:///a", "http://[a/b", "https://a:99999/b"] {
        assert!(said(none).starts_with("this is no http"), "{none}");
    }
    for nameless in [
        "",
        "a/b",
        "https://a",
        "https://a/",
        "http://a/b/..",
        "http://a/?b",
    ] {
        assert_eq!(said(nameless), "", "{nameless}");
    }
}

#[test]
fn a_url_stands_alone_and_with_its_digest() {
    said(
        "[boot.kernel]\nurl = 'http://a/b'\npath = 'k'\nbuild = './k'\n",
        r#"
error: `url` is given beside `build`, expected one of them
 --> vms/vm.toml:2:7
  |
2 | url = 'http://a/b'
  |       ^^^^^^^^^^^^
3 | path = 'k'
4 | build = './k'
  |         ----- and this
  |
  = help: a file is fetched or built: remove `build` or `url`

error: `url` is given beside `path`, expected one of them
 --> vms/vm.toml:2:7
  |
2 | url = 'http://a/b'
  |       ^^^^^^^^^^^^
3 | path = 'k'
  |        --- and this
  |
  = help: what is fetched is kept in the cache: remove `path` or `url`

error: `url` is given without `sha256`, expected the digest of what is fetched
 --> vms/vm.toml:2:7
  |
2 | url = 'http://a/b'
  |       ^^^^^^^^^^^^
  |
  = help: `sha256sum FILE` prints it: add a line `sha256 = "..."`
"#,
    );
}

#[test]
fn what_is_built_has_a_path_and_a_command() {
    said(
        "[boot.kernel]\nbuild = './k'\n[boot.initrd]\npath = 'i'\nbuild = 'make -C linux'\n",
        r#"
error: `build` is given without `path`, expected the file that it makes
 --> vms/vm.toml:2:9
  |
2 | build = './k'
  |         ^^^^^
  |
  = help: add a line `path = "..."`

error: `build` is one text with spaces, expected an array
 --> vms/vm.toml:5:9
  |
5 | build = 'make -C linux'
  |         ^^^^^^^^^^^^^^^
  |
  = help: write `build = ["make", "-C", "linux"]`: no shell reads it
"#,
    );
}

#[test]
fn a_command_of_a_wrong_kind_is_told_what_one_is() {
    assert_eq!(
        error("boot.kernel = { path = 'k', build = 7 }"),
        "error: `build` is 7, expected a command: an array of texts, or one text"
    );
    assert_eq!(
        error("boot.kernel = { path = 'k', build = ['a', true] }"),
        "error: `build[1]` is true, expected a text without NUL"
    );
}

#[test]
fn a_disk_that_the_guest_writes_has_no_digest() {
    said(
        &format!(
            "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nsha256 = '{DIGEST}'\nro = false\n\
             [[block]]\nurl = 'http://a/b.img'\n"
        ),
        r#"
error: `sha256` is given on a disk that the guest writes, expected none
 --> vms/vm.toml:4:10
  |
4 | sha256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
  |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
5 | ro = false
  |      ----- and this
  |
  = help: the guest changes it: add `ephemeral = true` or `ro = true`, or remove `sha256`

error: `url` is given on a disk that the guest writes, expected none
 --> vms/vm.toml:7:7
  |
7 | url = 'http://a/b.img'
  |       ^^^^^^^^^^^^^^^^
  |
  = help: what is fetched is shared: add `ephemeral = true` or `ro = true`, or give it to `backing` of an overlay

error: `url` is given without `sha256`, expected the digest of what is fetched
 --> vms/vm.toml:7:7
  |
7 | url = 'http://a/b.img'
  |       ^^^^^^^^^^^^^^^^
  |
  = help: `sha256sum FILE` prints it: add a line `sha256 = "..."`
"#,
    );
}

#[test]
fn without_a_folder_for_a_cache_nothing_is_fetched() {
    let source = Source {
        cache: None,
        ..source()
    };
    let text = format!("boot.kernel = {{ url = 'http://a/k', sha256 = '{DIGEST}' }}");
    let errors = parse(text.as_bytes(), &source, &Renderer::plain()).unwrap_err();
    assert!(
        errors.starts_with("error: `url` is given, but there is no folder for a cache\n"),
        "{errors}"
    );
    assert!(
        errors.ends_with("help: set XDG_CACHE_HOME or HOME"),
        "{errors}"
    );
}
