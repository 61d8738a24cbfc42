//! What cannot be a backing file: a file that changes under the images over it, or none at all.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::GivenBlock;
use crate::config::diagnostic::{Diagnostic, shortened};
use crate::config::image_format::{Resolved, is_raw};
use crate::config::section::Context;

/// The backing files of a disk, each with its place.
fn files(block: &GivenBlock) -> impl Iterator<Item = (&Path, &Range<usize>)> {
    let given = block.backing.value.iter().flatten();
    given.map(|file| &*file.path).zip(&block.backing.entries)
}

fn shown(path: &Path) -> String {
    shortened(&path.display().to_string())
}

/// Reports a backing file that another disk writes.
pub(super) fn written_by_another(cx: &Context<'_>, given: &[GivenBlock]) {
    let mut writers: HashMap<&Path, Vec<usize>> = HashMap::new();
    for (index, block) in given.iter().enumerate() {
        if let Some(path) = block.writable() {
            writers.entry(path).or_default().push(index);
        }
    }
    for (index, block) in given.iter().enumerate() {
        for (path, at) in files(block) {
            let writers = writers.get(path).into_iter().flatten();
            let Some(writer) = writers.copied().find(|writer| *writer != index) else {
                continue;
            };
            let title = format!(
                "`backing` is {}, which another disk writes, expected a file that never changes",
                shown(path)
            );
            cx.report(
                Diagnostic::value(Some(at.clone()), title)
                    .related(given[writer].path.at.clone(), "written here")
                    .help(
                        "add `ro = true` to that disk, or make it an overlay of its own".to_owned(),
                    ),
            );
        }
    }
}

/// Reports a chain that comes back to a file it has been at.
pub(super) fn names_a_file_twice(cx: &Context<'_>, block: &GivenBlock) {
    let mut seen: HashMap<&Path, &Range<usize>> = HashMap::new();
    for (path, at) in files(block) {
        let wrong = |title: String| Diagnostic::value(Some(at.clone()), title);
        if block.path.value.as_deref() == Some(path) {
            let title = format!(
                "`backing` is {}, the disk's own `path`, expected another file",
                shown(path)
            );
            cx.report(wrong(title).related(block.path.at.clone(), "the image over it"));
        } else if let Some(first) = seen.get(path) {
            let title = format!("`backing` has {} twice, expected it once", shown(path));
            cx.report(wrong(title).related(Some((*first).clone()), "first here"));
        } else {
            seen.insert(path, at);
        }
    }
}

/// Reports backing files of an image whose format has none.
pub(super) fn fits_the_format(cx: &Context<'_>, block: &GivenBlock, format: &Resolved) {
    let able = |name: &str| {
        let mut formats = cx.formats.iter().filter(|format| format.name == name);
        formats.any(|format| format.abilities.contains(&ABILITY))
    };
    if files(block).next().is_none() || able(format.name) {
        return;
    }
    // Either backend of a raw image is `raw` to whoever has not asked for one.
    let name = match is_raw(format.name) {
        true => formats::raw_for(false),
        false => format.name,
    };
    let others = cx.formats.iter().map(|format| format.name);
    let help = match others.filter(|name| able(name)).collect::<Vec<_>>()[..] {
        [] => "remove it".to_owned(),
        [other, ..] => format!("remove it, or write `format = \"{other}\"` for an overlay"),
    };
    let title = format!("`backing` is given, but format `{name}` has no backing files");
    cx.report(
        Diagnostic::value(block.backing.at.clone(), title)
            .related(format.at.clone(), "the format follows from this")
            .help(help),
    );
}

/// How a format says that its images may have backing files.
const ABILITY: &str = "backing";
