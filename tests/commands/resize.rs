//! `launcher disk resize`, `list` and `info` of a VM that runs.

use std::fs;

use launcher::control::Laid;
use launcher::control::messages::{Order, Resize, Size};
use serde_json::Value;

use super::vm::Folder;

#[test]
fn a_running_vm_is_asked_in_the_words_of_the_user() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    let done = folder.launcher(&["disk", "resize", "web", "ROOT", "+1MiB"]);
    assert_eq!(
        (done.code, &*done.out),
        (0, "disk ROOT has grown from 1MiB to 2MiB\n")
    );
    // The image was not touched by the command.
    assert_eq!(
        std::fs::metadata(folder.path("a.img")).unwrap().len(),
        1 << 20
    );
    assert!(
        done.err
            .contains("the next `launcher up` refuses the larger image"),
        "{done:?}"
    );
    let asked = Resize {
        disk: "ROOT".into(),
        size: Some(Size::Text("+1MiB".into())),
        shrink: false,
        force: false,
    };
    assert_eq!(web.obeyed.recv().unwrap(), Order::Resize(asked));
    folder.launcher(&["disk", "resize", "vm.toml", "0", "--shrink", "--force"]);
    let asked = Resize {
        disk: "0".into(),
        size: None,
        shrink: true,
        force: true,
    };
    assert_eq!(web.obeyed.recv().unwrap(), Order::Resize(asked));
}

#[test]
fn what_a_running_vm_refuses_is_told_in_its_words() {
    let folder = Folder::new();
    let _web = folder.start("web", "vm.toml");
    let done = folder.launcher(&["disk", "resize", "web", "9", "2MiB", "--save"]);
    assert_eq!(
        (done.code, &*done.out, &*done.err),
        (2, "", "error: there is no disk 9\nhelp: its disk is 0\n")
    );
    assert!(folder.text("vm.toml").contains("size = \"1MiB\""));
}

#[test]
fn save_writes_the_size_into_the_running_vm_s_file() {
    let folder = Folder::new();
    let _web = folder.start("web", "vm.toml");
    let before = folder.text("vm.toml");
    folder.does(&["disk", "resize", "web", "0", "2MiB", "--save"]);
    assert_eq!(folder.text("vm.toml"), before.replace("1MiB", "2MiB"));
}

#[test]
fn a_size_that_could_not_be_saved_is_not_asked_for() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    let changed = folder.text("vm.toml").replace("a.img", "b.img");
    folder.write("vm.toml", &changed);
    let done = folder.launcher(&["disk", "resize", "web", "0", "2MiB", "--save"]);
    assert_eq!(done.code, 1);
    assert!(
        done.err.contains("disk 0 in") && done.err.contains("is another one by now"),
        "{done:?}"
    );
    assert_eq!(folder.text("vm.toml"), changed);
    // Nor where the file is gone.
    std::fs::remove_file(folder.path("vm.toml")).unwrap();
    let done = folder.launcher(&["disk", "resize", "web", "0", "2MiB", "--save"]);
    assert_ne!(done.code, 0);
    assert!(web.obeyed.try_recv().is_err());
}

#[test]
fn a_size_that_a_profile_of_the_running_vm_says_is_not_saved_beside_it() {
    let folder = Folder::new();
    let profile = "[[profile.ci.block]]\nid = \"ROOT\"\nsize = \"512KiB\"\n";
    let text = folder.text("vm.toml") + profile;
    folder.write("vm.toml", &text);
    let laid = Laid {
        profiles: vec!["ci".to_owned()],
        ..Laid::default()
    };
    let web = folder.start_with("web", "vm.toml", laid);
    let done = folder.launcher(&["disk", "resize", "web", "0", "2MiB", "--save"]);
    assert_eq!(done.code, 1);
    let file = folder.path("vm.toml").display().to_string();
    let expected = format!(
        "error: disk 0 is not {file}'s own: its size is for {file}:8 to say\nhelp: nothing"
    );
    assert!(done.err.starts_with(&expected), "{done:?}");
    assert!(web.obeyed.try_recv().is_err());
    assert_eq!(folder.text("vm.toml"), text);
}

#[test]
fn a_disk_of_a_running_vm_is_found_with_what_was_laid_over_its_file() {
    let folder = Folder::new();
    fs::write(folder.path("b.img"), vec![0; 4096]).unwrap();
    let laid = Laid {
        set: vec!["block=[{path='b.img', id='DATA'}]".to_owned()],
        folder: folder.path(""),
        ..Laid::default()
    };
    let _web = folder.start_with("web", "vm.toml", laid);
    let info: Value =
        serde_json::from_str(&folder.does(&["disk", "info", "web", "DATA", "--json"])).unwrap();
    assert_eq!(info["path"], folder.path("b.img").to_str().unwrap());
}

#[test]
fn list_and_info_of_a_running_vm_have_the_size_that_the_guest_sees() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    web.fake.status.lock().unwrap().disks[0].size = 2 << 20;
    let json =
        |arguments: &[&str]| -> Value { serde_json::from_str(&folder.does(arguments)).unwrap() };
    assert_eq!(json(&["disk", "list", "web", "--json"])[0]["size"], 2 << 20);
    let info = json(&["disk", "info", "web", "ROOT", "--json"]);
    assert_eq!(info["size"], 2 << 20);
    assert_eq!(info["running"], true);
    assert_eq!(info["allocation"], Value::Null);
}
