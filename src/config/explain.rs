//! The keys of a VM's file one by one, each with all that is to be read about it, and how one of
//! them is found by what somebody calls it.

use formats::{Format, FormatOption, OptionKind};

use super::image_format::expects;
use super::kinds::Sha256;
use super::nearest::nearest;
use super::options::{Absent, Key, Takes, running};
use super::value::Leaf;

/// What is to be read about a key, or about a table of keys.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its path: `memory`, `boot`, `block.sparse`, `block.qcow2.cluster_size`.
    pub path: String,
    /// What it does.
    pub meaning: String,
    /// What it takes, in words.
    pub takes: String,
    /// The words that it takes, each with what it means, if it takes words.
    pub words: Vec<(&'static str, String)>,
    /// What holds if it is not written.
    pub default: String,
    /// Lines that have it.
    pub example: String,
    /// The paths of the keys of its table, if it is one or may be one.
    pub keys: Vec<String>,
    /// Whether it is a key of the table that may stand for the path of a file.
    pub of_file: bool,
}

/// What a name stands for.
#[derive(Debug)]
pub enum Named<'a> {
    /// This one.
    One(&'a Entry),
    /// One of these.
    Several(Vec<&'a Entry>),
    /// None, but this one is near.
    Near(&'a Entry),
    /// None.
    Unknown,
}

/// All keys, in the order of the reference.
pub fn entries(formats: &[&Format]) -> Vec<Entry> {
    let mut entries = Vec::new();
    of_table(super::KEYS, "", "", &mut entries);
    for format in formats.iter().filter(|it| !it.options.is_empty()) {
        of_format(format, &mut entries);
    }
    entries
}

/// Finds a key by its path, in brackets too, or by its last part if no other has the same.
pub fn find<'a>(entries: &'a [Entry], name: &str) -> Named<'a> {
    let parts = name.split(['.', '[', ']', ' ', '"']);
    // A disk's index says nothing about the key.
    let parts = parts.filter(|part| !part.is_empty() && part.parse::<u64>().is_err());
    let name = parts.collect::<Vec<_>>().join(".");
    if let Some(entry) = entries.iter().find(|entry| entry.path == name) {
        return Named::One(entry);
    }
    let ends = |entry: &&Entry| {
        let rest = entry.path.strip_suffix(&*name);
        rest.is_some_and(|rest| rest.ends_with('.'))
    };
    let mut fit: Vec<_> = entries.iter().filter(ends).collect();
    // `path` is that of a disk, not of the table that may stand for the path of a backing file.
    if fit.iter().any(|entry| !entry.of_file) {
        fit.retain(|entry| !entry.of_file);
    }
    match fit[..] {
        [] => near(entries, &name),
        [one] => Named::One(one),
        _ => Named::Several(fit),
    }
}

fn near<'a>(entries: &'a [Entry], name: &str) -> Named<'a> {
    let paths: Vec<_> = entries.iter().map(|entry| &*entry.path).collect();
    let lasts: Vec<_> = paths.iter().map(|path| last(path)).collect();
    let near = match name.contains('.') {
        true => nearest(name, &paths),
        false => nearest(name, &lasts),
    };
    // A key that is right, below a table that is not.
    let near = near.or_else(|| lasts.iter().position(|it| *it == last(name)));
    near.map_or(Named::Unknown, |near| Named::Near(&entries[near]))
}

fn last(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, last)| last)
}

/// The keys of a table, then those of the tables in it.
fn of_table(keys: &[Key], parents: &str, header: &str, entries: &mut Vec<Entry>) {
    for key in keys {
        let path = format!("{parents}{}", key.name);
        let file = of_file(key);
        let below = key.keys().iter().chain(file);
        let example = match key.keys() {
            [] => format!("{header}{}", lines(key, &path)),
            [first, ..] => format!("{}\n{} = {}", key.spelled(), first.name, first.example),
        };
        entries.push(Entry {
            meaning: key.meaning(),
            takes: key.takes.words().to_owned(),
            words: key.words(),
            default: key.absent.to_string(),
            example,
            keys: below
                .map(|below| format!("{path}.{}", below.name))
                .collect(),
            of_file: false,
            path,
        });
    }
    for key in keys {
        let path = format!("{parents}{}", key.name);
        let inner = format!("{}\n", key.spelled());
        of_table(key.keys(), &format!("{path}."), &inner, entries);
        entries.extend(of_file(key).iter().map(|option| {
            let (name, inside) = (key.name, lines(option, "").replace('\n', ", "));
            let inside = match inside.contains("url = ") || inside.contains("path = ") {
                true => inside,
                false => format!("path = {}, {inside}", key.example),
            };
            Entry {
                path: format!("{path}.{}", option.name),
                meaning: option.meaning(),
                takes: option.takes.words().to_owned(),
                words: option.words(),
                default: option.absent.to_string(),
                example: format!("{header}{name} = {{ {inside} }}"),
                keys: Vec::new(),
                of_file: true,
            }
        }));
    }
}

/// The keys of the table that may stand for the path of a file, if it takes one.
fn of_file(key: &Key) -> &'static [Key] {
    match key.takes {
        Takes::File(keys) | Takes::Files(keys) => keys,
        _ => &[],
    }
}

/// The line that has a key, with those that it needs beside it.
fn lines(key: &Key, path: &str) -> String {
    let line = format!("{} = {}", key.name, key.example);
    let digest = format!("sha256 = {}", Sha256::EXAMPLE);
    match (key.name, path) {
        ("url", "") => format!("{line}\n{digest}"),
        ("url", _) => format!("{line}\n{digest}\nro = true"),
        ("sha256", "block.sha256") => format!("{line}\nro = true"),
        _ => line,
    }
}

/// The table of a format's own options.
fn of_format(format: &Format, entries: &mut Vec<Entry>) {
    let path = format!("block.{}", format.name);
    let extension = format.extensions.first().unwrap_or(&"img");
    let above = format!("[[block]]\npath = \"disk.{extension}\"\n\n[{path}]\n");
    let line = |option: &FormatOption| format!("{above}{} = {}", option.name, example(option));
    let of = |option: &FormatOption| format!("{path}.{}", option.name);
    entries.push(Entry {
        meaning: format!("Options of the format \"{}\".", format.name),
        takes: "a table".to_owned(),
        words: Vec::new(),
        default: Absent::Words("the defaults of its keys").to_string(),
        example: format.options.first().map(line).unwrap_or_default(),
        keys: format.options.iter().map(of).collect(),
        of_file: false,
        path: path.clone(),
    });
    entries.extend(format.options.iter().map(|option| Entry {
        path: of(option),
        meaning: running(option.doc),
        takes: expects(option.kind),
        words: Vec::new(),
        default: match option.default {
            "" => Absent::Words("none").to_string(),
            default => default.to_owned(),
        },
        example: line(option),
        keys: Vec::new(),
        of_file: false,
    }));
}

/// A value that somebody might write for a format's option, as TOML.
fn example(option: &FormatOption) -> String {
    match (option.kind, option.default) {
        (OptionKind::Bool, "true") => "false".to_owned(),
        (OptionKind::Bool, _) => "true".to_owned(),
        (OptionKind::Choice([.., last]), _) => format!("\"{last}\""),
        (OptionKind::Size, "" | "0") => "\"64MiB\"".to_owned(),
        (OptionKind::Path, "") => "\"data.raw\"".to_owned(),
        (_, "") => "1".to_owned(),
        (_, default) => default.to_owned(),
    }
}

impl Key {
    /// The words that it takes, each with what it means, if it takes words.
    pub fn words(&self) -> Vec<(&'static str, String)> {
        let Takes::Value(_, super::Shape::Words(words)) = self.takes else {
            return Vec::new();
        };
        let words = words.iter();
        words.map(|(word, doc)| (*word, running(doc))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Entry> {
        entries(&formats::formats().unwrap())
    }

    fn found(name: &str) -> String {
        match find(&all(), name) {
            Named::One(entry) => entry.path.clone(),
            Named::Several(several) => {
                let paths: Vec<_> = several.iter().map(|entry| &*entry.path).collect();
                format!("one of {}", paths.join(", "))
            }
            Named::Near(entry) => format!("near {}", entry.path),
            Named::Unknown => "unknown".to_owned(),
        }
    }

    #[test]
    fn a_key_is_found_by_its_path() {
        for path in [
            "memory",
            "boot",
            "boot.kernel",
            "block.sparse",
            "block.qcow2",
            "block.qcow2.cluster_size",
        ] {
            assert_eq!(found(path), path);
        }
        assert_eq!(found("[boot]"), "boot");
        assert_eq!(found("[[block]]"), "block");
        assert_eq!(found("block.0.size"), "block.size");
    }

    #[test]
    fn a_bare_name_is_enough_for_the_only_key_that_has_it() {
        assert_eq!(found("sparse"), "block.sparse");
        assert_eq!(found("cluster_size"), "block.qcow2.cluster_size");
        assert_eq!(found("qcow2"), "block.qcow2");
        assert_eq!(found("path"), "block.path");
        assert_eq!(found("kernel.url"), "boot.kernel.url");
    }

    #[test]
    fn a_bare_name_that_several_have_lists_them() {
        static FORMAT: Format = Format {
            name: "x",
            extensions: &[],
            description: "",
            abilities: &[],
            options: &[FormatOption {
                name: "size",
                kind: OptionKind::Size,
                default: "",
                doc: "Another.",
            }],
            open: |_, _| Box::pin(std::future::pending()),
            create: |_| Ok(()),
        };
        let entries = entries(&[&FORMAT]);
        let Named::Several(several) = find(&entries, "size") else {
            panic!("not several");
        };
        let paths: Vec<_> = several.iter().map(|entry| &*entry.path).collect();
        assert_eq!(paths, ["block.size", "block.x.size"]);
    }

    #[test]
    fn an_unknown_name_has_its_nearest() {
        assert_eq!(found("o-direct"), "near block.o_direct");
        assert_eq!(found("boot.kernl"), "near boot.kernel");
        assert_eq!(found("disk.sparse"), "near block.sparse");
        assert_eq!(found("serial"), "unknown");
        assert_eq!(found(""), "unknown");
    }

    #[test]
    fn the_example_of_every_entry_is_a_file_that_is_right() {
        let formats = formats::formats().unwrap();
        for entry in all() {
            let mut text = entry.example.clone();
            let places = ["\npath = ", "\nurl = ", "\nvhost_user = "];
            let located = places.iter().any(|place| text.contains(place));
            if text.starts_with("[[block]]") && !located {
                text = text.replacen("\n", "\npath = \"disk.qcow2\"\n", 1);
            }
            text = match (text.starts_with("[boot]"), text.contains("kernel")) {
                (true, _) if text.contains("from_block") => {
                    format!("{text}\n[[block]]\npath = \"disk.img\"")
                }
                (true, false) => format!("{text}\nkernel = \"vmlinuz\""),
                (true, true) => text,
                (false, _) if text.starts_with('[') => format!("boot.kernel = \"k\"\n{text}"),
                (false, _) => format!("{text}\nboot.kernel = \"k\""),
            };
            let file = std::path::Path::new("vm.toml");
            // What it extends is empty.
            let read = |path: &std::path::Path| {
                Ok(crate::config::file::Content {
                    bytes: if path == file {
                        text.clone()
                    } else {
                        String::new()
                    }
                    .into_bytes(),
                    identity: (0, (path != file).into()),
                })
            };
            let source = crate::config::Source {
                file,
                home: None,
                cache: Some(std::path::Path::new("cache")),
                formats: &formats,
                read: &read,
            };
            let plain = annotate_snippets::Renderer::plain();
            let read = crate::config::parse(&source, &Default::default(), &plain);
            assert!(read.is_ok(), "{}", read.unwrap_err());
        }
    }
}
