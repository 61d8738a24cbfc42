//! Disks that another process serves: `vhost_user`.

use super::blocks::disks;
use super::messages::said;
use super::*;

#[test]
fn a_socket_stands_for_the_image() {
    let disks = disks(
        "[[block]]\nvhost_user = 'disk.sock'\n[[block]]\nvhost_user = '/run/b.sock'\nro = true\n\
         root = true\nqueues = 4\n[[block]]\npath = 'a.img'\n",
    );
    let [first, second, third] = &disks[..] else {
        panic!("{disks:?}")
    };
    assert!(first.is_served() && second.is_served() && !third.is_served());
    assert_eq!(first.path, Path::new("vms/disk.sock"));
    assert_eq!((first.ro, first.root, first.queues), (false, false, 1));
    assert_eq!(second.path, Path::new("/run/b.sock"));
    assert_eq!((second.ro, second.root, second.queues), (true, true, 4));
    assert_eq!(first.format, VHOST_USER);
}

#[test]
fn the_options_of_an_image_are_shown_with_the_socket() {
    said(
        "boot.kernel = 'k'\n[[block]]\nvhost_user = 'disk.sock'\npath = 'a.img'\nid = 'ROOT'\n\
         sparse = false\n[block.qcow2]\ncluster_size = '64KiB'\n",
        r#"
error: `path` is given beside `vhost_user`, expected one of them
 --> vms/vm.toml:4:8
  |
3 | vhost_user = 'disk.sock'
  |              ----------- and this
4 | path = 'a.img'
  |        ^^^^^^^
  |
  = help: the image is opened here, or by the process that serves it: remove one of them

error: `id` is given beside `vhost_user`, expected one of them
 --> vms/vm.toml:5:6
  |
3 | vhost_user = 'disk.sock'
  |              ----------- and this
4 | path = 'a.img'
5 | id = 'ROOT'
  |      ^^^^^^
  |
  = help: the guest asks the server for it: `launcher disk serve --id ...`

error: `sparse` is given beside `vhost_user`, expected one of them
 --> vms/vm.toml:6:10
  |
3 | vhost_user = 'disk.sock'
  |              ----------- and this
...
6 | sparse = false
  |          ^^^^^
  |
  = help: it is for the process that serves the disk: give it there

error: `[block.qcow2]` is given beside `vhost_user`, expected one of them
 --> vms/vm.toml:7:1
  |
3 | vhost_user = 'disk.sock'
  |              ----------- and this
...
7 | [block.qcow2]
  | ^^^^^^^^^^^^^
  |
  = help: it is for the process that serves the disk: give it there
"#,
    );
}

#[test]
fn every_option_but_four_is_refused() {
    for key in Block::KEYS {
        let allowed = ["vhost_user", "ro", "root", "queues"].contains(&key.name);
        if key.name == "vhost_user" {
            continue;
        }
        let text = format!(
            "boot.kernel = 'k'\n[[block]]\nvhost_user = 's'\n{} = {}\n",
            key.name, key.example
        );
        let refused = format!("`{}` is given beside `vhost_user`", key.name);
        match read_from(&[("vm.toml", text.as_bytes())], &[], &Renderer::plain()) {
            Ok(_) => assert!(allowed, "{text}"),
            Err(errors) => assert!(!allowed && errors.contains(&refused), "{errors}"),
        }
    }
}

#[test]
fn one_socket_is_not_two_disks() {
    said(
        "boot.kernel = 'k'\n[[block]]\nvhost_user = 'a.sock'\n[[block]]\nvhost_user = 'a.sock'\n\
         ro = true\n",
        r#"
error: `vhost_user` is vms/a.sock on two disks, expected another socket for each
 --> vms/vm.toml:5:14
  |
3 | vhost_user = 'a.sock'
  |              -------- first here
4 | [[block]]
5 | vhost_user = 'a.sock'
  |              ^^^^^^^^
"#,
    );
}

#[test]
fn nothing_is_booted_from_a_disk_that_another_process_serves() {
    said(
        "boot.from_block = 0\n[[block]]\nvhost_user = 'a.sock'\n",
        r#"
error: `from_block` is 0, a disk that another process serves
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = 0
  |                   ^
  |
  = help: name files of the host with `kernel` and `initrd`
"#,
    );
}

#[test]
fn a_socket_of_a_wrong_kind_is_shown_where_it_is() {
    said(
        "boot.kernel = 'k'\n[[block]]\nvhost_user = true\n",
        r#"
error: `vhost_user` is true, expected a path
 --> vms/vm.toml:3:14
  |
3 | vhost_user = true
  |              ^^^^
"#,
    );
}

#[test]
fn what_another_process_keeps_is_not_dropped() {
    let text = "boot.kernel = 'k'\n[[block]]\nvhost_user = 's'\n";
    let read =
        |text: &str| read_from(&[("vm.toml", text.as_bytes())], &[], &Renderer::plain()).unwrap();
    let error = read(text).drop_what_is_written().unwrap_err();
    assert!(error.to_string().contains("vm.toml:3:14"), "{error}");
    let mut vm = read(&format!("{text}ro = true\n[[block]]\npath = 'a.img'\n"));
    vm.drop_what_is_written().unwrap();
    assert!(!vm.block[0].ephemeral && vm.block[1].ephemeral);
}

#[test]
fn no_file_of_the_host_is_read_for_it() {
    let text = "boot.kernel = '/k'\n[[block]]\nvhost_user = '/s'\n[[block]]\npath = '/a.img'\n";
    let vm = read_from(&[("vm.toml", text.as_bytes())], &[], &Renderer::plain()).unwrap();
    let keys: Vec<_> = vm.host_files().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["boot.kernel", "block.1"]);
}
