//! A VM's configuration as plain data: what vm.toml says, checked, defaults filled in.
//!
//! [`load`] reads a file, with those that it extends, and reports every mistake of them in one
//! run. The options are declared in `vm.rs` and `block.rs`, each once: [`KEYS`] describes them all.
//!
//! A text becomes a VM in these steps: `gather` reads the files, `syntax` makes tables of each,
//! `layers` lays them one over the other as `merge` and `set` say, `section` reads the whole.

mod block;
mod diagnostic;
mod explain;
mod file;
mod gather;
mod host_file;
mod image_format;
mod kinds;
mod layers;
mod lines;
mod merge;
mod nearest;
mod options;
mod places;
mod resolved;
mod schema;
mod section;
mod set;
mod shape;
pub mod size;
mod syntax;
mod texts;
mod value;
mod vm;

use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use annotate_snippets::Renderer;
use formats::Format;

pub use self::block::{Block, VHOST_USER};
use self::diagnostic::Diagnostic;
pub use self::explain::{Entry, Named, entries, find};
pub(crate) use self::file::text;
pub(crate) use self::gather::extends;
pub use self::host_file::HostFile;
pub use self::image_format::expects;
pub(crate) use self::kinds::span_parts;
pub use self::options::{Absent, Key, Takes};
pub use self::places::Places;
pub use self::resolved::{Holds, Origin, Setting};
pub use self::schema::schema;
use self::section::{Context, Section};
pub use self::shape::Shape;
pub use self::vm::{Boot, Console, ConsoleMode, DiskName, Lifecycle, OnReboot, Vm};
use crate::{Error, Result};

/// The keys at the top of a VM's file; the tables' are below them.
pub const KEYS: &[Key] = Vm::KEYS;

/// What the command line lays over a VM's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Names of profiles, the later over the earlier.
    pub profiles: Vec<String>,
    /// Single values as `KEY=VALUE`, over the profiles.
    pub set: Vec<String>,
    /// What paths in those are relative to; empty: the current folder.
    pub folder: PathBuf,
}

/// Reads a VM's file, with those that it extends and what is chosen on the command line.
///
/// The error (exit code 2) shows every mistake of the files with its line and column, in colour
/// if standard error is a terminal. Files other than those are not looked at.
pub fn load(file: &Path, choice: &Choice) -> Result<Vm> {
    let formats = formats::formats()?;
    let home = std::env::home_dir();
    let cache = crate::cache::folder("files");
    let source = Source {
        file,
        home: home.as_deref(),
        cache: cache.as_deref(),
        formats: &formats,
        read: &file::read,
    };
    parse(&source, choice, &renderer())
}

/// Where a VM comes from, and what it is read with.
struct Source<'a> {
    file: &'a Path,
    home: Option<&'a Path>,
    cache: Option<&'a Path>,
    formats: &'a [&'static Format],
    /// How a file is read.
    read: &'a dyn Fn(&Path) -> Result<file::Content>,
}

/// Reads a VM. The error is its diagnostics, laid out, or that its file cannot be read.
fn parse(source: &Source<'_>, choice: &Choice, renderer: &Renderer) -> Result<Vm> {
    let mut gathered = gather::gather(source.file, source.home, choice, source.read)?;
    let (vm, diagnostics, hidden) = read(&gathered, source, choice);
    match vm {
        Some(mut vm) if diagnostics.is_empty() => {
            vm.places.tell(std::mem::take(&mut gathered.texts));
            Ok(vm)
        }
        _ => Err(Error::rendered(diagnostic::render(
            &gathered.texts,
            diagnostics,
            hidden,
            renderer,
        ))),
    }
}

/// Reads a VM from its texts, with all that is wrong and how much more there is of that.
fn read(
    gathered: &gather::Gathered,
    source: &Source<'_>,
    choice: &Choice,
) -> (Option<Vm>, Vec<Diagnostic>, usize) {
    let layers = layers::lay(gathered, choice);
    let cx = Context {
        file: source.file,
        texts: &gathered.texts,
        home: source.home,
        cache: source.cache,
        formats: source.formats,
        diagnostics: RefCell::new(layers.found),
        part: Cell::new(false),
    };
    for table in layers.alone {
        cx.in_part(|| Vm::check(Section::root(&cx, table)));
    }
    let places = Places::of(&layers.whole);
    let vm = Vm::from_section(Section::root(&cx, layers.whole), places);
    let mut diagnostics = cx.diagnostics.take();
    diagnostics.retain(|diagnostic| layers.belief.spares(diagnostic));
    diagnostics.extend(layers.mistakes);
    (vm, diagnostics, layers.hidden)
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

    /// Reads a VM from the bytes of a file. Its lines `#-p NAME` and `#--set KEY=VALUE` are the
    /// command line; what it extends is not there.
    pub fn parse(bytes: &[u8]) -> Result<Vm> {
        let formats = formats::formats()?;
        let read = |path: &Path| match path == Path::new(FILE) {
            true => Ok(file::Content {
                bytes: bytes.to_owned(),
                identity: (0, 0),
            }),
            false => Err(Error::usage("there is no other file")),
        };
        let source = Source {
            file: Path::new(FILE),
            home: Some(Path::new("/home")),
            cache: Some(Path::new("/home/.cache/launcher/files")),
            formats: &formats,
            read: &read,
        };
        let text = String::from_utf8_lossy(bytes);
        let mut choice = Choice::default();
        for line in text.lines() {
            let line = line.trim_end_matches('\r');
            if let Some(name) = line.strip_prefix("#-p ") {
                choice.profiles.push(name.to_owned());
            } else if let Some(set) = line.strip_prefix("#--set ") {
                choice.set.push(set.to_owned());
            }
        }
        super::parse(&source, &choice, &Renderer::plain())
    }

    const FILE: &str = "/vm/vm.toml";
}

#[cfg(test)]
mod tests;
