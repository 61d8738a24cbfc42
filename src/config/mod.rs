//! A VM's configuration as plain data: what vm.toml says, checked, defaults filled in.
//!
//! [`load`] reads a file and reports every mistake of it in one run. The options are declared in
//! `vm.rs` and `block.rs`, each once: [`KEYS`] describes them all.

mod block;
mod diagnostic;
mod explain;
mod file;
mod host_file;
mod image_format;
mod kinds;
mod lines;
mod nearest;
mod options;
mod places;
mod schema;
mod section;
mod shape;
pub mod size;
mod syntax;
mod value;
mod vm;

use std::cell::RefCell;
use std::io::IsTerminal;
use std::path::Path;

use annotate_snippets::Renderer;
use formats::Format;

pub use self::block::Block;
use self::diagnostic::Diagnostic;
pub use self::explain::{Entry, Named, entries, find};
pub(crate) use self::file::read as text;
pub use self::host_file::HostFile;
pub use self::image_format::expects;
pub(crate) use self::kinds::span_parts;
use self::lines::Lines;
use self::options::Table;
pub use self::options::{Absent, Key, Takes};
pub use self::places::Places;
pub use self::schema::schema;
use self::section::{Context, Section};
pub use self::shape::Shape;
pub use self::vm::{Boot, Console, ConsoleMode, DiskName, Lifecycle, OnReboot, Vm};
use crate::{Error, Result};

/// The keys at the top of a VM's file; the tables' are below them.
pub const KEYS: &[Key] = Vm::KEYS;

/// Reads a VM's file.
///
/// The error (exit code 2) shows every mistake of the file with its line and column, in colour if
/// standard error is a terminal. Files that the VM names are not looked at.
pub fn load(file: &Path) -> Result<Vm> {
    let bytes = file::read(file)?;
    let formats = formats::formats()?;
    let home = std::env::home_dir();
    let cache = crate::cache::folder("files");
    let source = Source {
        file,
        home: home.as_deref(),
        cache: cache.as_deref(),
        formats: &formats,
    };
    parse(&bytes, &source, &renderer()).map_err(Error::rendered)
}

/// Where a text comes from, and what it is read with.
struct Source<'a> {
    file: &'a Path,
    home: Option<&'a Path>,
    cache: Option<&'a Path>,
    formats: &'a [&'static Format],
}

/// Reads a VM from text. The error is its diagnostics, laid out.
fn parse(bytes: &[u8], source: &Source<'_>, renderer: &Renderer) -> Result<Vm, String> {
    let path = source.file.display().to_string();
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let text = String::from_utf8_lossy(bytes);
    let lines = Lines::new(&text);
    if let Some(diagnostic) = not_text(bytes) {
        return Err(diagnostic::render(
            &path,
            &lines,
            vec![diagnostic],
            0,
            renderer,
        ));
    }
    let (mended, errors) = syntax::mend(&text);
    let parsed = syntax::parse(&lines, &mended, errors);
    let cx = Context {
        file: source.file,
        text: &text,
        home: source.home,
        cache: source.cache,
        formats: source.formats,
        diagnostics: RefCell::default(),
    };
    let vm = Vm::from_section(Section::root(&cx, parsed.table));
    let mut diagnostics = cx.diagnostics.take();
    diagnostics.retain(|diagnostic| parsed.damage.spares(&lines, diagnostic));
    diagnostics.extend(parsed.diagnostics);
    match vm {
        Some(vm) if diagnostics.is_empty() => Ok(vm),
        _ => Err(diagnostic::render(
            &path,
            &lines,
            diagnostics,
            parsed.hidden,
            renderer,
        )),
    }
}

/// A file that is no text: where it stops to be one.
fn not_text(bytes: &[u8]) -> Option<Diagnostic> {
    if let Err(error) = std::str::from_utf8(bytes) {
        // In the text shown, one character stands for what is not UTF-8.
        let at = error.valid_up_to();
        let shown = char::REPLACEMENT_CHARACTER.len_utf8();
        return Some(Diagnostic::value(
            Some(at..at + shown),
            "this is not UTF-8 text",
        ));
    }
    let nul = bytes.iter().position(|byte| *byte == 0)?;
    Some(Diagnostic::value(
        Some(nul..nul + 1),
        "a NUL byte: this is not text",
    ))
}

/// How messages on standard error are laid out.
fn renderer() -> Renderer {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if std::io::stderr().is_terminal() && !plain {
        Renderer::styled()
    } else {
        Renderer::plain()
    }
}

/// For the fuzz target of the same name.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use super::*;

    /// Reads a VM from the bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Vm> {
        let formats = formats::formats()?;
        let source = Source {
            file: Path::new("/vm/vm.toml"),
            home: Some(Path::new("/home")),
            cache: Some(Path::new("/home/.cache/launcher/files")),
            formats: &formats,
        };
        super::parse(bytes, &source, &Renderer::plain()).map_err(Error::rendered)
    }
}

#[cfg(test)]
mod tests;
