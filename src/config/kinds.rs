//! The kinds of values that options take.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http::uri::Authority;
use serde::Deserialize;

use super::resolved;
use super::section::Context;
use super::shape::Shape;
use super::value::{Leaf, Listed, Scalar, Wrong, leaf, whole};
use crate::digest::{Digest, NotADigest};

whole! {
    /// Number of vCPUs: APIC identifiers are 8 bits wide, 255 addresses all.
    Cpus(u32): 1 to 254, "2"
}

whole! {
    /// Number of virtqueues.
    Queues(u16): 1 to 64, "4"
}

whole! {
    /// A time in microseconds, short enough that nobody minds a processor that is busy for it.
    Micros(u16): 0 to 1000, "0"
}

whole! {
    /// A CPU of the host; `launcher` knows which there are only when it runs there.
    HostCpu(u16): 0 to 1023, "[2, 3]"
}

impl Listed for HostCpu {
    const ONE_OR_MORE: &'static str = "the number of a CPU, 0 to 1023, or an array of them";
}

leaf! {
    /// Name of a VM: also a file name in the run-time folder, and a word on the command line.
    Name(String):
    "1 to 64 letters, digits, `.`, `_` or `-`, the first no `.` or `-`",
    Shape::Text("^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), "\"web\"",
    |scalar| {
        let name = scalar.text()?;
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if let Some(bad) = name.chars().find(|c| !good(*c)) {
            return Err(format!("{bad:?} is not allowed").into());
        }
        if (1..=64).contains(&name.len()) && !name.starts_with(['.', '-']) {
            Ok(name)
        } else {
            Err(Wrong::default())
        }
    }
}

leaf! {
    /// Size of guest memory in bytes.
    Memory(u64): "a size from 2MiB to 1TiB, a multiple of 4KiB",
    Shape::Size { min: 2 << 20, max: 1 << 40, step: 4096 }, "\"1GiB\"",
    |scalar| {
        let bytes = scalar.bytes()?;
        if (2 << 20..=1 << 40).contains(&bytes) && bytes.is_multiple_of(4096) {
            Ok(bytes)
        } else {
            Err(Wrong::default())
        }
    },
    resolved::size
}

leaf! {
    /// Size of a disk in bytes: the kernel's file offsets are signed.
    DiskSize(u64): "a size of 512 bytes or more, a multiple of 512",
    Shape::Size { min: 512, max: i64::MAX as u64, step: 512 }, "\"8GiB\"",
    |scalar| {
        let bytes = scalar.bytes()?;
        if (512..=i64::MAX as u64).contains(&bytes) && bytes.is_multiple_of(512) {
            Ok(bytes)
        } else {
            Err(Wrong::default())
        }
    },
    resolved::size
}

leaf! {
    /// Any size in bytes.
    Bytes(u64): "a size such as 65536 or \"64KiB\"",
    Shape::Size { min: 0, max: i64::MAX as u64, step: 1 }, "\"64KiB\"",
    Scalar::bytes, resolved::size
}

leaf! {
    /// Any whole number.
    Number(u64): "a whole number",
    Shape::Whole { min: 0, max: i64::MAX as u64 }, "1",
    |scalar| {
        u64::try_from(scalar.whole()?).map_err(|_| Wrong::default())
    }
}

leaf! {
    /// Logical block size in bytes.
    BlockSize(u32): "a power of two, 512 to 65536",
    Shape::PowerOfTwo { min: 512, max: 65536 }, "4096",
    |scalar| {
        match u32::try_from(scalar.bytes()?) {
            Ok(bytes) if bytes.is_power_of_two() && (512..=65536).contains(&bytes) => Ok(bytes),
            _ => Err(Wrong::default()),
        }
    }
}

leaf! {
    /// Serial number of a disk: VIRTIO_BLK_ID_BYTES is 20 (virtio 1.3 section 5.2.6).
    Id(String): "1 to 20 printable ASCII characters",
    Shape::Text("^[ -~]{1,20}$"), "\"ROOT\"",
    |scalar| {
        let id = scalar.text()?;
        let printable = id.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if printable && (1..=20).contains(&id.len()) {
            Ok(id)
        } else if printable && !id.is_empty() {
            Err(format!("it has {} characters", id.len()).into())
        } else {
            Err(Wrong::default())
        }
    }
}

leaf! {
    /// A word that is looked up later.
    Word(String): "a name in quotes", Shape::Text(""), "\"zstd\"", Scalar::text
}

leaf! {
    /// Name of a disk format, looked up later.
    FormatName(String): "a name in quotes", Shape::Format, "\"qcow2\"", Scalar::text
}

leaf! {
    /// Kernel parameters.
    Cmdline(String): "one line of text",
    Shape::Text(r"^[^\u0000-\u001f\u007f-\u009f]*$"), "\"quiet\"",
    |scalar| {
        let text = scalar.text()?;
        match text.chars().find(|c| c.is_control()) {
            Some(bad) => Err(format!("{bad:?} is not allowed").into()),
            None => Ok(text),
        }
    }
}

leaf! {
    /// A text to look for in what the guest prints.
    Ready(String): "a text of 1 to 128 characters, in one line",
    Shape::Text(r"^[^\u0000-\u001f\u007f-\u009f]{1,128}$"), "\"login:\"",
    |scalar| {
        let text = scalar.text()?;
        match text.chars().find(|c| c.is_control()) {
            Some(bad) => Err(format!("{bad:?} is not allowed").into()),
            None if (1..=128).contains(&text.chars().count()) => Ok(text),
            None => Err(Wrong::default()),
        }
    }
}

/// The number of a time span as it is written, and its unit in milliseconds if it is one.
pub(crate) fn span_parts(text: &str) -> (&str, Option<u64>) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    (number, millis)
}

leaf! {
    /// A time span.
    Span(Duration): "a time such as \"500ms\", \"30s\" or \"2m\", at most \"1h\"",
    Shape::Text("^[0-9]+(ms|s|m|h)$"), "\"2m\"",
    |scalar| {
        let text = match scalar {
            Scalar::Text(text) => text,
            Scalar::Whole(number @ 0..=3600) => {
                return Err(format!("write \"{number}s\" for seconds").into());
            }
            _ => return Err(Wrong::default()),
        };
        let (number, Some(millis)) = span_parts(&text) else {
            return Err(Wrong::default());
        };
        match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
            Some(millis @ 0..=3_600_000) => Ok(Duration::from_millis(millis)),
            _ => Err(Wrong::default()),
        }
    }
}

leaf! {
    /// What is in a file.
    Sha256(Digest): "a SHA-256 digest of 64 hex digits",
    Shape::Text("^[0-9A-Fa-f]{64}$"),
    "\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"",
    |scalar| {
        scalar.text()?.parse().map_err(|wrong| match wrong {
            NotADigest::Length(length) => format!("it has {length} characters").into(),
            NotADigest::Character(c) => format!("{c:?} is no hex digit").into(),
        })
    }
}

leaf! {
    /// Where a file is fetched from.
    Url(String): "an http or https URL that ends in the name of a file",
    Shape::Text("^https?://[!-~]+$"), "\"https://example.org/files/disk.qcow2\"",
    |scalar| {
        let url = scalar.text()?;
        let (scheme, rest) = match url.split_once("://") {
            Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
            Some((scheme, _)) => return Err(format!("nothing is fetched by `{scheme}`").into()),
            None => return Err(Wrong::default()),
        };
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if host.contains('@') {
            return Err("leave out user and password: whoever reads this file reads them".into());
        }
        if let Some(bad) = url.chars().find(|c| !c.is_ascii_graphic()) {
            return Err(format!("{bad:?} is not allowed: write it as %XX").into());
        }
        if url.contains('#') {
            return Err("leave out what follows `#`: no server is sent it".into());
        }
        let is_host = |host: &Authority| {
            host.port().is_some() || host.host().len() == host.as_str().len()
        };
        let parsed = url.parse::<Uri>();
        if !parsed.is_ok_and(|uri| uri.authority().is_some_and(is_host)) {
            return Err(format!("this is no {scheme} URL").into());
        }
        match last_part(&url) {
            Some(_) => Ok(url),
            None => Err(Wrong::default()),
        }
    }
}

/// The last part of a URL's path, if it can be the name of a file.
pub(super) fn last_part(url: &str) -> Option<&str> {
    /// Other names are made of it, and a file system takes 255 bytes.
    const LONGEST: usize = 200;
    let path = url.split(['?', '#']).next()?;
    let (_, path) = path.split_once("://")?;
    let (_, name) = path.rsplit_once('/')?;
    let good = !["", ".", ".."].contains(&name) && name.len() <= LONGEST;
    good.then_some(name)
}

leaf! {
    /// A word of a command.
    Argument(String): "a text without NUL",
    Shape::Text("^[^\\u0000]*$"), "\"./prepare.sh\"",
    |scalar| {
        let text = scalar.text()?;
        match text.contains('\0') {
            true => Err(Wrong::default()),
            false => Ok(text),
        }
    }
}

impl Listed for Argument {
    const ONE_OR_MORE: &'static str = "a command: an array of texts, or one text";
}

/// A path, relative to the folder of the file that wrote it.
#[derive(Deserialize)]
#[serde(try_from = "Scalar")]
pub(super) struct FilePath(String);

impl TryFrom<Scalar> for FilePath {
    type Error = Wrong;

    fn try_from(scalar: Scalar) -> Result<Self, Wrong> {
        let path = scalar.text()?;
        match path.chars().find(|c| *c == '\0') {
            Some(nul) => Err(format!("{nul:?} is not allowed").into()),
            None if path.is_empty() => Err(Wrong::default()),
            None => Ok(FilePath(path)),
        }
    }
}

impl Leaf for FilePath {
    type Plain = PathBuf;
    const EXPECTS: &'static str = "a path";
    const SHAPE: Shape = Shape::Text("^[^\\u0000]+$");
    const EXAMPLE: &'static str = "\"disk.img\"";

    fn plain(self, cx: &Context<'_>, at: &Range<usize>) -> Result<PathBuf, String> {
        resolve(&self.0, cx.folder(at), cx.home)
    }
}

/// What a path means that a file in `folder` writes. The error is what would help.
pub(super) fn resolve(path: &str, folder: &Path, home: Option<&Path>) -> Result<PathBuf, String> {
    if path.is_empty() || path.contains('\0') {
        return Err(FilePath::EXPECTS.to_owned());
    }
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Ok(home.join(rest.trim_start_matches('/'))),
        (Some(_), None) => Err("HOME is not set: write the path out".to_owned()),
        (None, _) => Ok(folder.join(path)),
    }
}

impl Listed for FilePath {
    const ONE_OR_MORE: &'static str = "a path or an array of paths";
}
