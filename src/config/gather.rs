//! Brings together the texts that a VM is read from: its file and, through `extends`, others.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::diagnostic::Diagnostic;
use super::file::Content;
use super::kinds;
use super::syntax::{self, Mended};
use super::texts::Texts;
use super::{Choice, size};
use crate::Result;

/// So many files deep may `extends` go, the VM's own counted.
const DEPTH: usize = 8;
/// So many files may a VM be read from.
const FILES: usize = 64;
/// So many bytes may they have together: what is made of them in memory is many times as large.
const BYTES: usize = 4 << 20;

/// The texts, and what is known of them before they are read.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) texts: Texts,
    /// Each text as the parser takes it; none if it is no text.
    pub(super) mended: Vec<Option<Mended>>,
    /// The files' indices, the later over the earlier.
    pub(super) order: Vec<usize>,
    pub(super) diagnostics: Vec<Diagnostic>,
    /// Whether a file is not among them that should be.
    pub(super) incomplete: bool,
}

/// Reads the VM's file and what it extends. The error is that the VM's own cannot be read.
pub(super) fn gather(
    file: &Path,
    home: Option<&Path>,
    choice: &Choice,
    read: &dyn Fn(&Path) -> Result<Content>,
) -> Result<Gathered> {
    let mut gathering = Gathering {
        gathered: Gathered::default(),
        home,
        read,
        files: HashMap::new(),
        chain: Vec::new(),
        tries: 0,
        bytes: 0,
        full: false,
    };
    let content = read(file)?;
    gathering.tries = 1;
    gathering.take(file, content, None);
    let mut gathered = gathering.gathered;
    for argument in &choice.set {
        gathered.texts.set(argument, &choice.folder);
        gathered.mended.push(None);
    }
    Ok(gathered)
}

struct Gathering<'a> {
    gathered: Gathered,
    home: Option<&'a Path>,
    read: &'a dyn Fn(&Path) -> Result<Content>,
    /// The files by identity.
    files: HashMap<(u64, u64), Known>,
    /// The files that are being read, each extended by the one before it.
    chain: Vec<(PathBuf, (u64, u64))>,
    /// Files that were read, or tried to.
    tries: usize,
    bytes: usize,
    /// Whether a limit is reached, which is said once.
    full: bool,
}

/// How a file came to be read.
struct Known {
    /// Where it is named; `None` for the VM's own.
    at: Option<Range<usize>>,
    /// From the VM's own to it.
    chain: String,
}

impl Gathering<'_> {
    /// Adds a file, after those that it extends.
    fn take(&mut self, path: &Path, content: Content, named: Option<Range<usize>>) {
        let Content { bytes, identity } = content;
        self.bytes += bytes.len();
        let bytes = bytes
            .strip_prefix("\u{feff}".as_bytes())
            .unwrap_or(&bytes[..]);
        let text = String::from_utf8_lossy(bytes);
        let index = self.gathered.mended.len();
        let wrong = not_text(bytes);
        let (mended, extended) = match &wrong {
            Some(_) => (None, Vec::new()),
            None => {
                let (mended, extended) = syntax::mend(&text, extended);
                (Some(mended), extended)
            }
        };
        self.gathered.texts.file(path, text.into_owned());
        self.gathered.mended.push(mended);
        let start = self.gathered.texts.iter().next_back();
        let start = start.map_or(0, |text| text.start());
        let among = |at: Range<usize>| at.start + start..at.end + start;
        self.gathered
            .diagnostics
            .extend(wrong.map(|(at, title)| Diagnostic::value(Some(among(at)), title)));
        self.chain.push((path.to_owned(), identity));
        let known = Known {
            at: named,
            chain: self.chain_to(None),
        };
        self.files.insert(identity, known);
        let folder = path.parent().unwrap_or(Path::new(""));
        for (at, written) in extended {
            // What is no path is reported when the key is read.
            if let Ok(path) = kinds::resolve(&written, folder, self.home) {
                self.extend(&path, among(at));
            }
        }
        self.chain.pop();
        self.gathered.order.push(index);
    }

    /// Adds a file that is named at `at`, if it can and may be read.
    fn extend(&mut self, path: &Path, at: Range<usize>) {
        if self.full {
            return;
        }
        let limit = if self.tries == FILES {
            Some(format!(
                "`extends` leads to more than {FILES} files, the limit"
            ))
        } else if self.chain.len() == DEPTH {
            Some(format!(
                "`extends` leads more than {DEPTH} files deep, the limit"
            ))
        } else {
            None
        };
        if let Some(title) = limit {
            self.full = self.tries == FILES;
            let chain = format!("the chain is {}", self.chain_to(Some(path)));
            return self.refuse(at, title, Some(chain));
        }
        self.tries += 1;
        let content = match (self.read)(path) {
            Ok(content) => content,
            Err(error) => return self.refuse(at, error.message().to_owned(), None),
        };
        let chain = self.chain_to(Some(path));
        if self.chain.iter().any(|(_, open)| *open == content.identity) {
            let title = format!("`extends` comes back to {}", path.display());
            let help = format!("the chain is {chain}: remove one of its links");
            return self.refuse(at, title, Some(help));
        }
        if let Some(known) = self.files.get(&content.identity) {
            let title = format!("`extends` leads to {} twice, expected once", path.display());
            let help = format!("the chains are {} and {chain}", known.chain);
            let twice = Diagnostic::value(Some(at), title).related(known.at.clone(), "first here");
            return self.gathered.diagnostics.push(twice.help(help));
        }
        if self.bytes + content.bytes.len() > BYTES {
            self.full = true;
            let limit = size::show(BYTES as u64);
            let title = format!("`extends` leads to files of more than {limit} in all, the limit");
            return self.refuse(at, title, None);
        }
        self.take(path, content, Some(at));
    }

    /// Reports why a file is not read.
    fn refuse(&mut self, at: Range<usize>, title: String, help: Option<String>) {
        self.gathered.incomplete = true;
        let refused = Diagnostic::value(Some(at), title).help(help);
        self.gathered.diagnostics.push(refused);
    }

    /// The files from the VM's own to the one being read, and `next` behind it.
    fn chain_to(&self, next: Option<&Path>) -> String {
        let chain = self.chain.iter().map(|(path, _)| &**path).chain(next);
        let names: Vec<_> = chain.map(|path| path.display().to_string()).collect();
        names.join(" -> ")
    }
}

/// The files that a VM's file extends, as far as it can be read; not what those extend.
pub(crate) fn extends(file: &Path) -> Vec<PathBuf> {
    let bytes = super::text(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let (_, written) = syntax::mend(&text, extended);
    let (folder, home) = (file.parent().unwrap_or(Path::new("")), std::env::home_dir());
    let paths = written.into_iter();
    paths
        .filter_map(|(_, path)| kinds::resolve(&path, folder, home.as_deref()).ok())
        .collect()
}

/// What a file says that it extends, each with its place: what is no text is left out.
fn extended(table: &DeTable<'_>) -> Vec<(Range<usize>, String)> {
    let Some(value) = table.get("extends") else {
        return Vec::new();
    };
    let texts = match value.get_ref() {
        DeValue::Array(array) => array.iter().collect(),
        _ => vec![value],
    };
    texts
        .into_iter()
        .filter_map(|value| Some((value.span(), value.get_ref().as_str()?.to_owned())))
        .collect()
}

/// A file that is no text: where it stops to be one, and why.
fn not_text(bytes: &[u8]) -> Option<(Range<usize>, &'static str)> {
    if let Err(error) = std::str::from_utf8(bytes) {
        // In the text shown, one character stands for what is not UTF-8.
        let at = error.valid_up_to();
        let shown = char::REPLACEMENT_CHARACTER.len_utf8();
        return Some((at..at + shown, "this is not UTF-8 text"));
    }
    let nul = bytes.iter().position(|byte| *byte == 0)?;
    Some((nul..nul + 1, "a NUL byte: this is not text"))
}
