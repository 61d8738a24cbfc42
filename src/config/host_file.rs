//! A file of the host that a VM reads: where it is, what is in it, and where it comes from if it
//! is not there.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::diagnostic::{Diagnostic, Kind};
use super::kinds::{Argument, FilePath, Sha256, Url, last_part};
use super::options::{Absent, Given, Key, Table, derived, list, optional, options};
use super::resolved::Written;
use super::section::{self, Context, Section};
use super::vm::Vm;
use crate::digest::Digest;

options! {
    /// A file of the host: the kernel, an initial RAM disk, an image.
    pub struct HostFile, read as GivenHostFile {
        /// Where it is.
        path: PathBuf = derived::<FilePath>("with `url`: a place in the cache"),
        /// SHA-256 of the file: one that differs is not used.
        sha256: Option<Digest> = optional::<Sha256>("any content will do"),
        /// Where it is fetched from, once, if the cache (`$XDG_CACHE_HOME/launcher/files`) has
        /// not got it. Needs `sha256`; excludes `path` and `build`.
        url: Option<String> = optional::<Url>("it is not fetched"),
        /// Command that makes the file if it is not there, run in the folder of the TOML file
        /// that says so; by no shell. If it fails, what it has begun of the file is removed; if
        /// launcher is killed meanwhile, the next one moves that to `NAME.half`. Needs `path`.
        build: Vec<String> = list::<Argument>("it is not built"),
    }
    computed {
        /// The folder of the TOML file that names it: where `build` runs.
        folder: PathBuf,
    }
}

impl HostFile {
    /// A file that is there, whatever is in it.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        HostFile {
            path: path.into(),
            sha256: None,
            url: None,
            build: Vec::new(),
            folder: PathBuf::new(),
        }
    }

    /// It as one would write it: a path, or a table. What is fetched has its place from its URL.
    pub(super) fn written(&self) -> toml::Value {
        let mut table = toml::Table::new();
        if self.url.is_none() {
            table.insert("path".to_owned(), self.path.written());
        }
        let sha256 = self.sha256.as_ref().map(Written::written);
        table.extend(sha256.map(|digest| ("sha256".to_owned(), digest)));
        let url = self.url.as_ref().map(Written::written);
        table.extend(url.map(|url| ("url".to_owned(), url)));
        if !self.build.is_empty() {
            let words = self.build.iter().map(Written::written).collect();
            table.insert("build".to_owned(), toml::Value::Array(words));
        }
        match table.remove("path") {
            Some(path) if table.is_empty() => path,
            path => {
                table.extend(path.map(|path| ("path".to_owned(), path)));
                toml::Value::Table(table)
            }
        }
    }

    /// Whether `launcher up` makes it if it is not there.
    pub fn has_source(&self) -> bool {
        self.url.is_some() || !self.build.is_empty()
    }
}

impl Table for HostFile {
    const KEYS: &'static [Key] = HostFile::KEYS;

    fn from_section(mut section: Section<'_>) -> Option<Self> {
        let cx = section.cx;
        let mut given = GivenHostFile::read(&mut section);
        if given.origin().is_nowhere() {
            let title = format!(
                "`path` is missing, `{}` needs it or `url`",
                section.header()
            );
            let missing = Diagnostic::new(Kind::Missing, section.at(), title);
            cx.report(missing.help("add `path = \"...\"`".to_owned()));
        }
        given.origin().locate(cx);
        let header = section.at();
        let places = [&given.build.at, &given.path.at, &header];
        let folder = folder(cx, places.into_iter().flatten().next());
        section.unknown(HostFile::KEYS);
        given.finish(folder)
    }
}

/// The folder of the file that has this place.
pub(super) fn folder(cx: &Context<'_>, at: Option<&Range<usize>>) -> PathBuf {
    let folder = at.map_or(Path::new(""), |at| cx.folder(at));
    folder.to_owned()
}

/// The options that say where a file comes from, of a disk or of a table of their own.
pub(super) struct Origin<'a> {
    pub(super) path: &'a mut Given<PathBuf>,
    pub(super) sha256: &'a Given<Option<Digest>>,
    pub(super) url: &'a Given<Option<String>>,
    pub(super) build: &'a Given<Vec<String>>,
}

impl Origin<'_> {
    /// Whether nothing says where the file is or comes from.
    pub(super) fn is_nowhere(&self) -> bool {
        self.path.at.is_none() && self.url.at.is_none() && !self.is_built()
    }

    /// Whether a command is given, be it a wrong one.
    fn is_built(&self) -> bool {
        let none = |build: &Vec<String>| build.is_empty();
        self.build.at.is_some() && !self.build.value.as_ref().is_some_and(none)
    }

    /// Reports those that contradict each other, and gives a file that is fetched its place in
    /// the cache. Messages about that place show the URL.
    pub(super) fn locate(self, cx: &Context<'_>) {
        match self.url.at {
            Some(_) => self.url_stands_alone(cx),
            None if self.is_built() && self.path.at.is_none() => {
                let title = "`build` is given without `path`, expected the file that it makes";
                let help = "add a line `path = \"...\"`".to_owned();
                cx.report(Diagnostic::value(self.build.at.clone(), title).help(help));
            }
            None => {}
        }
        self.build_is_no_line(cx);
        let (Some(Some(url)), Some(Some(digest))) = (&self.url.value, &self.sha256.value) else {
            return;
        };
        self.path.at.clone_from(&self.url.at);
        self.path.value = match (cx.cache, last_part(url)) {
            (Some(cache), Some(name)) => Some(cache.join(digest.to_string()).join(name)),
            _ => {
                let title = "`url` is given, but there is no folder for a cache";
                let help = "set XDG_CACHE_HOME or HOME".to_owned();
                cx.report(Diagnostic::value(self.url.at.clone(), title).help(help));
                None
            }
        };
    }

    fn url_stands_alone(&self, cx: &Context<'_>) {
        let wrong = |title: String| Diagnostic::value(self.url.at.clone(), title);
        let beside = |other| format!("`url` is given beside `{other}`, expected one of them");
        if self.path.at.is_some() {
            let help = "what is fetched is kept in the cache: remove `path` or `url`";
            cx.report(
                wrong(beside("path"))
                    .related(self.path.at.clone(), "and this")
                    .help(help.to_owned()),
            );
        }
        if self.is_built() {
            let help = "a file is fetched or built: remove `build` or `url`";
            cx.report(
                wrong(beside("build"))
                    .related(self.build.at.clone(), "and this")
                    .help(help.to_owned()),
            );
        }
        if self.sha256.at.is_none() {
            let title = "`url` is given without `sha256`, expected the digest of what is fetched";
            let help = "`sha256sum FILE` prints it: add a line `sha256 = \"...\"`";
            cx.report(wrong(title.to_owned()).help(help.to_owned()));
        }
    }

    /// A command is run by no shell: a line with spaces is no program's name.
    fn build_is_no_line(&self, cx: &Context<'_>) {
        let Some([line]) = self.build.value.as_deref() else {
            return;
        };
        let is_text = self.build.entries.first() == self.build.at.as_ref();
        if is_text && line.contains(char::is_whitespace) {
            let words: Vec<_> = line
                .split_whitespace()
                .map(|word| format!("{word:?}"))
                .collect();
            let title = "`build` is one text with spaces, expected an array";
            let help = format!("write `build = [{}]`: no shell reads it", words.join(", "));
            cx.report(Diagnostic::value(self.build.at.clone(), title).help(help));
        }
    }
}

impl GivenHostFile {
    fn origin(&mut self) -> Origin<'_> {
        Origin {
            path: &mut self.path,
            sha256: &self.sha256,
            url: &self.url,
            build: &self.build,
        }
    }
}

/// What an option takes that is a file.
pub(super) const ONE: &str = "a path, or a table with `path` or `url`";

/// What an option takes that is a file or several.
pub(super) const ONE_OR_MORE: &str = "a path, a table with `path` or `url`, or an array of them";

/// Reads a file that may be left out, for [`super::options::Spec`].
pub(super) fn left_out(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Option<HostFile>> {
    let Some(value) = section.take(key) else {
        return Given {
            value: Some(None),
            ..Given::default()
        };
    };
    let given = one(section, key, &section.below(key), value, ONE);
    Given {
        value: given.value.map(Some),
        at: given.at,
        entries: Vec::new(),
    }
}

/// Reads one file or an array of them, for [`super::options::Spec`].
pub(super) fn several(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Vec<HostFile>> {
    let header = section.below(key);
    section::array(section, key, |section, index, value| match index {
        None => one(section, key, &header, value, ONE_OR_MORE),
        Some(index) => one(
            section,
            &format!("{key}[{index}]"),
            &format!("[{header}]"),
            value,
            ONE,
        ),
    })
}

/// Reads a path, or a table that `header` would be above.
fn one<'t>(
    section: &Section<'t>,
    key: &str,
    header: &str,
    value: toml::Spanned<toml::de::DeValue<'t>>,
    expects: &str,
) -> Given<HostFile> {
    if value.get_ref().is_table() {
        let at = Some(value.span());
        let table = section.open(key, header, value);
        return Given {
            value: table.and_then(HostFile::from_section),
            at,
            entries: Vec::new(),
        };
    }
    let path = section::expecting::<FilePath>(section.cx, key, value, expects);
    let folder = folder(section.cx, path.at.as_ref());
    Given {
        value: path.value.map(|path| HostFile {
            folder,
            ..HostFile::at(path)
        }),
        at: path.at,
        entries: Vec::new(),
    }
}

impl Vm {
    /// Every file of the host that it reads, each with its key: "boot.kernel", "block.0",
    /// "block.0.backing.1". Below that are the keys of [`HostFile`], as in "block.0.sha256".
    pub fn host_files(&self) -> Vec<(String, HostFile)> {
        let mut files = Vec::new();
        if let Some(kernel) = &self.boot.kernel {
            files.push(("boot.kernel".to_owned(), kernel.clone()));
        }
        if let Some(initrd) = &self.boot.initrd {
            files.push(("boot.initrd".to_owned(), initrd.clone()));
        }
        for (index, block) in self.block.iter().enumerate() {
            if block.is_served() {
                continue;
            }
            files.push((format!("block.{index}"), block.file()));
            let backing = block.backing.iter().enumerate();
            files.extend(
                backing
                    .map(|(below, file)| (format!("block.{index}.backing.{below}"), file.clone())),
            );
        }
        files
    }
}
