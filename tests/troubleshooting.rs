//! docs/troubleshooting.md is by error message: each is one that the program has.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// All sources of a folder, with texts that go on in the next line joined.
fn sources(folder: &Path, all: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(path).unwrap();
            let mut lines = text.split("\\\n");
            all.push_str(lines.next().unwrap_or_default());
            lines.for_each(|line| all.push_str(line.trim_start()));
        }
    }
}

/// The code spans of a cell: between one backtick, or between two where the text has some.
fn spans(cell: &str) -> Vec<&str> {
    let mut spans = Vec::new();
    let mut rest = cell;
    while let Some(start) = rest.find('`') {
        let fence = if rest[start..].starts_with("``") {
            "``"
        } else {
            "`"
        };
        let inner = &rest[start + fence.len()..];
        let Some(end) = inner.find(fence) else { break };
        spans.push(inner[..end].trim());
        rest = &inner[end + fence.len()..];
    }
    spans
}

#[test]
fn every_message_of_the_page_is_one_that_the_program_has() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut program = String::new();
    sources(&root.join("src"), &mut program);
    sources(&root.join("formats/src"), &mut program);
    let page = fs::read_to_string(root.join("docs/troubleshooting.md")).unwrap();
    let cells = page.lines().filter_map(|line| line.strip_prefix("| "));
    // What the guest says is the guest's.
    let ours = cells.filter(|line| line.starts_with('`'));
    let mut messages = 0;
    for line in ours {
        let (cell, _) = line.split_once(" | ").unwrap();
        for message in spans(cell) {
            messages += 1;
            for part in message.split('…').map(str::trim) {
                assert!(program.contains(part), "no message has {part:?}: {cell}");
            }
        }
    }
    assert!(messages >= 30, "{messages}");
}
