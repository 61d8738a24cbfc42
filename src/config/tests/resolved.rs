//! What holds, and where it comes from.

use super::*;

/// Every value of a VM with its key and origin, by lines: `boot.kernel = "k"  # vm.toml:2`.
fn lines(vm: &Vm) -> Vec<String> {
    fn collect(entries: &[Setting], above: &str, lines: &mut Vec<String>) {
        for Setting { key, holds } in entries {
            let key = format!("{above}{key}");
            match holds {
                Holds::Value(Some(value), origin) => {
                    lines.push(format!("{key} = {value}  # {origin}"));
                }
                Holds::Value(None, origin) => lines.push(format!("{key} is not  # {origin}")),
                Holds::Table(inner) => collect(inner, &format!("{key}."), lines),
                Holds::Tables(list) => {
                    for (index, inner) in list.iter().enumerate() {
                        collect(inner, &format!("{key}.{index}."), lines);
                    }
                }
            }
        }
    }
    let mut lines = Vec::new();
    collect(&vm.resolved(), "", &mut lines);
    lines
}

/// The lines of a VM read from files and a command line.
#[track_caller]
fn resolved(files: &[(&str, &str)], line: &[&str]) -> Vec<String> {
    let files: Vec<_> = files
        .iter()
        .map(|(f, text)| (*f, text.as_bytes()))
        .collect();
    match read_from(&files, line, &Renderer::plain()) {
        Ok(vm) => lines(&vm),
        Err(errors) => panic!("{errors}"),
    }
}

const BASE: &str = "memory = '1GiB'\n[boot]\nkernel = '/k'\n[[block]]\nid = 'A'\npath = '/a.qcow2'\n\
                    [block.qcow2]\ncluster_size = 131072\nrefcount_bits = 8\n";
const FILE: &str = "extends = '/base.toml'\n[lifecycle]\nstop_timeout = '1500ms'\n\
                    [profile.ci]\nlifecycle.on_reboot = 'stop'\n\
                    [[block]]\nid = 'A'\nbacking = ['/b', '/c']\n";

#[test]
fn each_value_says_where_it_comes_from() {
    let files = [("/vms/web.toml", FILE), ("/base.toml", BASE)];
    let line = ["-p", "ci", "--set", "cpus=3", "--set", "block.0.size=8GiB"];
    let expected = [
        "name = \"web\"  # from the file's name",
        "cpus = 3  # --set",
        "memory = \"1GiB\"  # /base.toml:1",
        "boot.kernel = \"/k\"  # /base.toml:3",
        "boot.initrd is not  # default",
        "boot.from_block is not  # default",
        "boot.cmdline = \"\"  # default",
        "block.0.path = \"/a.qcow2\"  # /base.toml:6",
        "block.0.vhost_user is not  # default",
        "block.0.format = \"qcow2\"  # the one that the extension of `path` or `url` stands for",
        "block.0.ro = false  # default",
        "block.0.root = false  # default",
        "block.0.sparse = true  # default",
        "block.0.o_direct = false  # default",
        "block.0.block_size = 512  # default",
        "block.0.id = \"A\"  # /vms/web.toml:7",
        "block.0.lock = true  # default",
        "block.0.queues = 1  # default",
        "block.0.poll_us is not  # default",
        "block.0.cpus is not  # default",
        "block.0.size = \"8GiB\"  # --set",
        "block.0.backing = [\"/b\", \"/c\"]  # /vms/web.toml:8",
        "block.0.ephemeral = false  # default",
        "block.0.sha256 is not  # default",
        "block.0.url is not  # default",
        "block.0.build is not  # default",
        "block.0.qcow2.cluster_size = \"128KiB\"  # /base.toml:8",
        "block.0.qcow2.refcount_bits = 8  # /base.toml:9",
        "console.mode = \"stdio\"  # default",
        "console.log is not  # default",
        "console.ready is not  # default",
        "lifecycle.on_reboot = \"stop\"  # /vms/web.toml:5",
        "lifecycle.stop_timeout = \"1500ms\"  # /vms/web.toml:3",
    ];
    assert_eq!(resolved(&files, &line), expected);
}

#[test]
fn a_path_is_absolute() {
    let text = "[boot]\nkernel = 'k'\ninitrd = '~/i'\n";
    let lines = resolved(&[("vms/vm.toml", text)], &[]);
    let kernel = std::env::current_dir().unwrap().join("vms/k");
    let kernel = format!("boot.kernel = \"{}\"  # vms/vm.toml:2", kernel.display());
    assert!(lines.contains(&kernel), "{lines:?}");
    let initrd = "boot.initrd = \"/home/ada/i\"  # vms/vm.toml:3".to_owned();
    assert!(lines.contains(&initrd), "{lines:?}");
}

/// The place of the entry of `[[block]]` that has the last word on the size of a disk.
fn own(files: &[(&str, &str)], line: &[&str], index: usize) -> std::result::Result<usize, String> {
    let files: Vec<_> = files
        .iter()
        .map(|(f, text)| (*f, text.as_bytes()))
        .collect();
    let vm = read_from(&files, line, &Renderer::plain()).unwrap();
    let own = vm.places.own_entry("block", index, "size");
    own.map_err(|origin| origin.to_string())
}

#[test]
fn the_entry_of_the_file_itself_is_found_for_a_disk() {
    let text = "extends = 'base.toml'\n[[block]]\npath = 'b.img'\n[[block]]\nid = 'A'\nro = true\n\
                [[profile.ci.block]]\nid = 'A'\nsize = '8GiB'\n";
    let base = "boot.kernel = 'k'\n[[block]]\npath = 'c.img'\n[[block]]\nid = 'A'\n\
                path = 'a.img'\nsize = '1GiB'\n";
    let sized = text.replace("ro = true", "size = '2GiB'");
    let files = [("vm.toml", &*sized), ("base.toml", base)];
    assert_eq!(
        own(&files, &[], 0),
        Err("base.toml:2".into()),
        "of the base alone"
    );
    assert_eq!(
        own(&files, &[], 1),
        Ok(1),
        "an entry of the base that the file changes"
    );
    assert_eq!(own(&files, &[], 2), Ok(0), "one of the file alone");
    assert_eq!(
        own(&files, &["-p", "ci"], 1),
        Err("vm.toml:7".into()),
        "the profile is the last to name it"
    );
    let set = ["--set", "block.1.size=4GiB"];
    assert_eq!(own(&files, &set, 1), Err("--set".into()));
    let files = [("vm.toml", text), ("base.toml", base)];
    assert_eq!(
        own(&files, &[], 1),
        Err("base.toml:7".into()),
        "the size is the base's"
    );
}

#[test]
fn a_file_of_the_host_is_a_path_or_all_that_is_said_of_it() {
    let digest = "0".repeat(64);
    let text = format!(
        "boot.kernel = {{ url = 'http://a/k', sha256 = '{digest}' }}\n\
         boot.initrd = {{ path = '/i', build = ['make', 'i'] }}\n[[block]]\nro = true\n\
         url = 'http://a/d.img'\nsha256 = '{digest}'\n"
    );
    let lines = resolved(&[("/vm.toml", &text)], &[]);
    let expected = [
        format!("boot.kernel = {{ sha256 = \"{digest}\", url = \"http://a/k\" }}  # /vm.toml:1"),
        "boot.initrd = { build = [\"make\", \"i\"], path = \"/i\" }  # /vm.toml:2".to_owned(),
        format!("block.0.path = \"/cache/files/{digest}/d.img\"  # where `url` is kept"),
        "block.0.url = \"http://a/d.img\"  # /vm.toml:5".to_owned(),
    ];
    for line in expected {
        assert!(lines.contains(&line), "{line}\n{lines:#?}");
    }
}
