//! The registry of formats: each registers itself with `inventory`.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;

use crate::Disk;

/// A format plug-in.
///
/// ```text
/// inventory::submit! { Format { name: "raw", extensions: &["img", "raw"], … } }
/// ```
pub struct Format {
    /// Name as `format = "…"` gives it.
    pub name: &'static str,
    /// File name extensions that choose this format when none is written out, without the dot.
    pub extensions: &'static [&'static str],
    /// One line: what the format is.
    pub description: &'static str,
    /// What it can do, as `launcher formats` shows it: "discard", "resize", "backing", …
    pub abilities: &'static [&'static str],
    /// The options of its own table `[block.NAME]`.
    pub options: &'static [FormatOption],
    /// Opens an image.
    pub open: for<'a> fn(&'a crate::Ring, &'a Image) -> Opening<'a>,
    /// Creates an image of `image.size` bytes at `image.path`, which does not exist yet.
    pub create: fn(&Image) -> Result<(), OpenError>,
}

inventory::collect!(Format);

/// An image being opened.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Disk>, OpenError>> + 'a>>;

/// Why an image could not be opened or created: what is wrong, and what to do about it.
#[derive(Debug)]
pub struct OpenError {
    /// Lower case, one sentence: key or file, value, limit.
    pub message: String,
    /// What to do, if there is something to say.
    pub help: Option<String>,
    /// The option (a key of `[[block]]`) that is at fault; `path` if it is the file itself;
    /// [`OpenError::HOST`] if nothing in the configuration is.
    pub key: &'static str,
}

impl OpenError {
    /// As `key`: the configuration is right, but the host failed or someone is in the way.
    pub const HOST: &'static str = "";

    /// The `key` for an error of opening or creating a file: `path` if it is about the name or
    /// about who may use it, else [`OpenError::HOST`].
    pub fn key_of(error: &io::Error) -> &'static str {
        match error.raw_os_error() {
            Some(
                libc::ENOENT
                | libc::ENOTDIR
                | libc::EISDIR
                | libc::EACCES
                | libc::EPERM
                | libc::EROFS
                | libc::EEXIST
                | libc::ELOOP
                | libc::ENAMETOOLONG
                | libc::ENXIO
                | libc::ENODEV
                | libc::EINVAL,
            ) => "path",
            _ => OpenError::HOST,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for OpenError {}

/// One option of a format, in its own table.
#[derive(Debug)]
pub struct FormatOption {
    /// Key in the table.
    pub name: &'static str,
    /// What values it takes.
    pub kind: OptionKind,
    /// The default as written in TOML; empty if the option has none.
    pub default: &'static str,
    /// What it does.
    pub doc: &'static str,
}

/// The values that a format's option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `true` or `false`.
    Bool,
    /// A size in bytes: an integer or a string such as "64KiB".
    Size,
    /// A whole number.
    Integer,
    /// A file beside the image, named as the image itself is.
    Path,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// A value given for a format's option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// For [`OptionKind::Bool`].
    Bool(bool),
    /// For [`OptionKind::Size`] and [`OptionKind::Integer`].
    Number(u64),
    /// For [`OptionKind::Path`], resolved: it means the same from every working directory that
    /// the image's own path does.
    Path(PathBuf),
    /// For [`OptionKind::Choice`].
    Word(String),
}

/// An image to open or to create, and how: the options that all formats share.
#[derive(Clone, Debug)]
pub struct Image {
    /// The file or host block device.
    pub path: PathBuf,
    /// Opened read-only, with a shared lock.
    pub ro: bool,
    /// Thin with discard (true), or fully allocated at opening (false).
    pub sparse: bool,
    /// O_DIRECT on the host file.
    pub o_direct: bool,
    /// Logical block size in bytes: a power of two, 512 to 65536.
    pub block_size: u32,
    /// Takes the locks that QEMU honours too.
    pub lock: bool,
    /// Size in bytes to create or grow to.
    pub size: Option<u64>,
    /// The backing files that the configuration approves, in the chain's order: the first is the
    /// image's own, or becomes that of a new one. No other is ever opened; empty: none at all.
    pub backing: Vec<PathBuf>,
    /// Whether the user wrote the format out (then content that looks like another format is
    /// no contradiction).
    pub format_written: bool,
    /// Options of the format's own table, in the file's order.
    pub options: Vec<(&'static str, OptionValue)>,
}

impl Image {
    /// An image that is there and that its user knows the format of: to read and write, thin,
    /// through the page cache, in blocks of 512 bytes, locked, with no other file.
    pub fn new(path: impl Into<PathBuf>) -> Image {
        Image {
            path: path.into(),
            ro: false,
            sparse: true,
            o_direct: false,
            block_size: 512,
            lock: true,
            size: None,
            backing: Vec::new(),
            format_written: true,
            options: Vec::new(),
        }
    }
}

/// All registered formats, sorted by name. Two of one name, or for one extension, are an error.
pub fn formats() -> Result<Vec<&'static Format>, OpenError> {
    check(inventory::iter::<Format>.into_iter().collect())
}

fn check(mut all: Vec<&'static Format>) -> Result<Vec<&'static Format>, OpenError> {
    all.sort_by_key(|format| format.name);
    let twice = |what: String| OpenError {
        message: what,
        help: Some("leave one of the two plug-ins out of this build".into()),
        key: "format",
    };
    for (at, format) in all.iter().enumerate() {
        for other in &all[..at] {
            if other.name == format.name {
                return Err(twice(format!(
                    "format `{}` is registered twice",
                    format.name
                )));
            }
            let mut shared = format.extensions.iter();
            if let Some(extension) = shared.find(|it| other.extensions.contains(it)) {
                return Err(twice(format!(
                    "extension `{extension}` is claimed by the formats `{}` and `{}`",
                    other.name, format.name
                )));
            }
        }
    }
    Ok(all)
}

/// Finds a format by name.
pub fn find(name: &str) -> Option<&'static Format> {
    inventory::iter::<Format>
        .into_iter()
        .find(|format| format.name == name)
}

/// Finds the format that a file name extension, without the dot, stands for.
pub fn for_extension(extension: &str) -> Option<&'static Format> {
    inventory::iter::<Format>.into_iter().find(|format| {
        let mut extensions = format.extensions.iter();
        extensions.any(|other| other.eq_ignore_ascii_case(extension))
    })
}

/// The format of a raw image, for the option `sparse`: thin, or fully allocated.
pub fn raw_for(sparse: bool) -> &'static str {
    if sparse { "sparse-raw" } else { "raw" }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn named(name: &'static str, extensions: &'static [&'static str]) -> Format {
        Format {
            name,
            extensions,
            description: "",
            abilities: &[],
            options: &[],
            open: |_, _| Box::pin(std::future::pending()),
            create: |_| Ok(()),
        }
    }

    static A: Format = named("a", &["x", "y"]);
    static A_TOO: Format = named("a", &[]);
    static B: Format = named("b", &["z"]);
    static C: Format = named("c", &["y"]);

    #[test]
    fn formats_are_sorted_by_name() {
        let sorted = check(vec![&B, &A]).unwrap();
        assert_eq!([sorted[0].name, sorted[1].name], ["a", "b"]);
    }

    #[test]
    fn two_formats_of_one_name_or_extension_are_an_error() {
        for (other, message) in [
            (&A_TOO, "format `a` is registered twice"),
            (&C, "extension `y` is claimed by the formats `a` and `c`"),
        ] {
            let error = check(vec![other, &B, &A]).err().unwrap();
            assert_eq!(error.message, message);
            assert_eq!(error.key, "format");
        }
    }

    #[test]
    fn a_name_or_a_permission_is_the_configuration_s_fault_and_a_broken_disk_is_the_host_s() {
        let key = |errno| OpenError::key_of(&io::Error::from_raw_os_error(errno));
        for errno in [libc::ENOENT, libc::EISDIR, libc::EACCES, libc::EROFS] {
            assert_eq!(key(errno), "path");
        }
        for errno in [libc::EIO, libc::ENOSPC, libc::EMFILE, libc::ENOMEM] {
            assert_eq!(key(errno), OpenError::HOST);
        }
        assert_eq!(OpenError::key_of(&io::Error::other("?")), OpenError::HOST);
    }

    #[test]
    fn an_error_is_shown_with_what_to_do() {
        let error = OpenError {
            message: "no".into(),
            help: Some("try".into()),
            key: "path",
        };
        assert_eq!(error.to_string(), "no\nhelp: try");
    }
}
