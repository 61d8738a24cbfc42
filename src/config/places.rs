//! Where in a VM's file its keys stand, for errors that turn up only once the file is acted on.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use annotate_snippets::Renderer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{self, Diagnostic};
use super::lines::Lines;

/// The text that a VM was read from. A key is named by its path: `memory`, `boot.kernel`,
/// `block.0.size`.
#[derive(Clone, Default)]
pub struct Places {
    file: String,
    text: Arc<str>,
}

impl Places {
    pub(super) fn new(file: &Path, text: &str) -> Self {
        Places {
            file: file.display().to_string(),
            text: text.into(),
        }
    }

    /// Lays out one error as those of reading the file are: with the line of `key` and a caret.
    pub(crate) fn show(&self, key: &str, message: String, help: Option<String>) -> String {
        self.lay_out(key, message, help, &super::renderer())
    }

    fn lay_out(
        &self,
        key: &str,
        message: String,
        help: Option<String>,
        renderer: &Renderer,
    ) -> String {
        let diagnostic = Diagnostic::value(self.find(key), message).help(help);
        let lines = Lines::new(&self.text);
        diagnostic::render(&self.file, &lines, vec![diagnostic], 0, renderer)
    }

    /// Where the value of a key is. What stands for a key that is not written is the `path` or
    /// `url` beside it, or else the table or text that it would be in.
    fn find(&self, key: &str) -> Option<Range<usize>> {
        let (root, _) = DeTable::parse_recoverable(&self.text);
        let (parents, key) = key.rsplit_once('.').unwrap_or(("", key));
        let mut header = None;
        let mut table = root.get_ref();
        let mut list: Option<&[Spanned<DeValue<'_>>]> = None;
        for name in parents.split_terminator('.') {
            let value = match (list.take(), name.parse::<usize>()) {
                (Some(list), Ok(index)) => list.get(index),
                // One table stands for a list of one.
                (None, Ok(0)) => continue,
                _ => table.get(name),
            };
            match value?.get_ref() {
                DeValue::Table(inner) => {
                    header = Some(value?.span());
                    table = inner;
                }
                DeValue::Array(values) => list = Some(values),
                _ => return Some(value?.span()),
            }
        }
        // An option of a format stands in the format's own table.
        let own = |value: &Spanned<DeValue<'_>>| match value.get_ref() {
            DeValue::Table(inner) => inner.get(key).map(Spanned::span),
            _ => None,
        };
        let written = |key| table.get(key).map(Spanned::span);
        let of_format = |key: &str| !["kernel", "initrd", "backing"].contains(&key);
        let in_own = || {
            let mut tables = table.iter().filter(|(key, _)| of_format(key.get_ref()));
            tables.find_map(|(_, value)| own(value))
        };
        written(key)
            .or_else(|| in_own().filter(|_| !parents.is_empty()))
            .or_else(|| written("path"))
            .or_else(|| written("url"))
            .or(header)
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("file", &self.file).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n[[block]]\npath = 'b.x'\n\
                        size = 512\nbacking = ['c.img']\n[block.x]\nlevel = 3\ndata_file = 'd'\n[lifecycle]\n";

    /// What the caret of an error about `key` is under.
    fn found(key: &str) -> Option<&'static str> {
        let places = Places::new(Path::new("vm.toml"), TEXT);
        places.find(key).map(|at| &TEXT[at])
    }

    #[test]
    fn a_key_is_found_by_its_path() {
        assert_eq!(found("boot.kernel"), Some("'k'"));
        assert_eq!(found("block.0.path"), Some("'a.img'"));
        assert_eq!(found("block.1.size"), Some("512"));
        assert_eq!(found("block.1.backing"), Some("['c.img']"));
    }

    #[test]
    fn an_option_of_a_format_is_found_in_the_format_s_table() {
        assert_eq!(found("block.1.level"), Some("3"));
        assert_eq!(found("block.1.data_file"), Some("'d'"));
    }

    #[test]
    fn the_path_stands_for_a_key_of_a_disk_that_is_not_written() {
        assert_eq!(found("block.0.size"), Some("'a.img'"));
        assert_eq!(found("block.0.backing"), Some("'a.img'"));
        assert_eq!(found("block.1.ro"), Some("'b.x'"));
    }

    #[test]
    fn the_header_stands_for_a_key_of_a_table_that_is_not_written() {
        assert_eq!(found("lifecycle.on_reboot"), Some("[lifecycle]"));
    }

    #[test]
    fn a_key_of_a_file_is_found_in_its_table_or_at_its_path() {
        const TEXT: &str = "boot.kernel = { url = 'u', sha256 = 's' }\nboot.initrd = 'i'\n\
                            [[block]]\nurl = 'v'\nbacking = ['a', { path = 'b', sha256 = 't' }]\n\
                            [[block]]\npath = 'c'\nbacking = { path = 'd', sha256 = 'w' }\n";
        let places = Places::new(Path::new("vm.toml"), TEXT);
        for (key, expected) in [
            ("boot.kernel.sha256", "'s'"),
            ("boot.kernel.path", "'u'"),
            ("boot.initrd.path", "'i'"),
            ("block.0.path", "'v'"),
            ("block.0.sha256", "'v'"),
            ("block.0.backing.0.path", "'a'"),
            ("block.0.backing.1.sha256", "'t'"),
            ("block.1.backing.0.sha256", "'w'"),
            ("block.1.backing.0.url", "'d'"),
        ] {
            assert_eq!(
                places.find(key).map(|at| &TEXT[at]),
                Some(expected),
                "{key}"
            );
        }
    }

    #[test]
    fn what_is_not_written_at_all_has_no_place() {
        for key in ["memory", "console.log", "block.2.path", "block.x.path", ""] {
            assert_eq!(found(key), None, "{key}");
        }
    }

    #[test]
    fn an_error_is_laid_out_like_those_of_reading_the_file() {
        let places = Places::new(Path::new("vm.toml"), TEXT);
        let help = Some("leave it out".to_owned());
        let said = places.lay_out(
            "block.1.size",
            "`size` is odd".into(),
            help,
            &Renderer::plain(),
        );
        assert_eq!(
            said,
            "error: `size` is odd\n --> vm.toml:6:8\n  |\n6 | size = 512\n  |        ^^^\n  |\n  = \
             help: leave it out"
        );
        let said = places.lay_out("memory", "no memory".into(), None, &Renderer::plain());
        assert_eq!(said, "error: no memory\n--> vm.toml");
    }
}
