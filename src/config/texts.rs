//! The texts that a VM is read from: its file, the files that it extends, what the command line
//! sets. A place is an offset into all of them, one behind the other.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// How messages call what `--set` gives.
const SET: &str = "--set";

/// The texts, the VM's own file first.
#[derive(Debug, Default)]
pub(super) struct Texts(Vec<Text>);

/// One of them.
#[derive(Debug)]
pub(super) struct Text {
    /// What messages call it: the file as it was named.
    pub(super) name: String,
    /// What paths that it writes are relative to.
    pub(super) folder: PathBuf,
    pub(super) text: String,
    /// Where it begins among all.
    start: usize,
    /// The file that it is, if it is one.
    path: Option<PathBuf>,
}

impl Texts {
    /// Adds a file.
    pub(super) fn file(&mut self, path: &Path, text: String) {
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let name = path.display().to_string();
        self.push(name, folder, text, Some(path.to_owned()));
    }

    /// Adds an argument of `--set`, whose paths are relative to `folder`.
    pub(super) fn set(&mut self, argument: &str, folder: &Path) {
        let (name, folder) = (SET.to_owned(), folder.to_owned());
        self.push(name, folder, argument.to_owned(), None);
    }

    fn push(&mut self, name: String, folder: PathBuf, text: String, path: Option<PathBuf>) {
        // One offset lies between two texts: the end of one is not the start of the next.
        let start = self.0.last().map_or(0, |last| last.end() + 1);
        self.0.push(Text {
            name,
            folder,
            text,
            start,
            path,
        });
    }

    /// The texts, in the order of their offsets.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, Text> {
        self.0.iter()
    }

    /// What messages call the VM's own file.
    pub(super) fn name(&self) -> &str {
        self.0.first().map_or("", |text| &text.name)
    }

    /// Index of the text that an offset lies in.
    pub(super) fn index(&self, offset: usize) -> usize {
        let after = self.0.partition_point(|text| text.start <= offset);
        after.saturating_sub(1)
    }

    /// The text that an offset lies in.
    pub(super) fn at(&self, offset: usize) -> Option<&Text> {
        self.0.get(self.index(offset))
    }

    /// What is written at a place.
    pub(super) fn written(&self, at: &Range<usize>) -> &str {
        let text = self.at(at.start);
        text.and_then(|text| text.text.get(text.within(at)))
            .unwrap_or_default()
    }
}

impl Text {
    /// Where it begins among all.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    fn end(&self) -> usize {
        self.start + self.text.len()
    }

    /// A place among all as one within this text.
    pub(super) fn within(&self, at: &Range<usize>) -> Range<usize> {
        at.start.saturating_sub(self.start)..at.end.saturating_sub(self.start)
    }

    /// A place within this text as one among all.
    pub(super) fn among(&self, at: Range<usize>) -> Range<usize> {
        at.start + self.start..at.end + self.start
    }

    /// Whether it is a file, rather than an argument.
    pub(super) fn is_file(&self) -> bool {
        self.path.is_some()
    }

    /// The file that it is, if it is one.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_lies_in_one_text() {
        let mut texts = Texts::default();
        texts.file(Path::new("vms/vm.toml"), "ab".into());
        texts.file(Path::new("base.toml"), String::new());
        texts.set("cpus=1", Path::new(""));
        let found: Vec<_> = (0..8).map(|offset| texts.index(offset)).collect();
        assert_eq!(found, [0, 0, 0, 1, 2, 2, 2, 2]);
        assert_eq!(texts.written(&(9..10)), "1");
        let set = texts.at(9).unwrap();
        assert_eq!((set.within(&(9..10)), set.among(5..6)), (5..6, 9..10));
        assert_eq!((&*set.name, set.is_file()), ("--set", false));
        assert_eq!(texts.at(0).unwrap().folder, Path::new("vms"));
        assert_eq!(texts.name(), "vms/vm.toml");
    }
}
