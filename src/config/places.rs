//! Where each value of a VM comes from, for errors that turn up only once it is acted on.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use annotate_snippets::Renderer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{self, Diagnostic};
use super::lines::Lines;
use super::resolved::Origin;
use super::texts::{Text, Texts};

/// The texts that a VM was read from, and where in them each key has its value. A key is named by
/// its path in the whole: `memory`, `boot.kernel`, `block.0.size`.
#[derive(Clone, Default)]
pub struct Places {
    texts: Arc<Texts>,
    root: Arc<BTreeMap<String, Node>>,
}

/// A value's place, and those of what is in it.
struct Node {
    at: Range<usize>,
    within: Within,
}

enum Within {
    Value,
    Table(BTreeMap<String, Node>),
    List(Vec<Node>),
}

impl Places {
    /// The places of what is in a table. Which texts they are in is told later.
    pub(super) fn of(table: &DeTable<'_>) -> Self {
        Places {
            texts: Arc::default(),
            root: Arc::new(nodes(table)),
        }
    }

    /// Tells which texts the places are in.
    pub(super) fn tell(&mut self, texts: Texts) {
        self.texts = Arc::new(texts);
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
        diagnostic::render(&self.texts, vec![diagnostic], 0, renderer)
    }

    /// The files that the VM was read from, its own first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.texts.iter().filter_map(Text::path)
    }

    /// Where the value of a key was written; `None` if it was not.
    pub fn origin(&self, key: &str) -> Option<Origin> {
        Some(self.origin_of(&self.exactly(key)?.at))
    }

    fn origin_of(&self, at: &Range<usize>) -> Origin {
        match self.texts.at(at.start) {
            Some(text) if text.is_file() => {
                let line = Lines::new(&text.text).number(text.within(at).start);
                Origin::Line(text.name.clone(), line)
            }
            _ => Origin::Set,
        }
    }

    /// Which entry of the list `list`, as the VM's own file writes it, says last what holds for
    /// the entry `index` of the whole and its `key`.
    ///
    /// # Errors
    ///
    /// Where else that is said: in a file that it extends, in a profile, on the command line.
    pub fn own_entry(&self, list: &str, index: usize, key: &str) -> Result<usize, Origin> {
        let Some(entry) = self.exactly(&format!("{list}.{index}")) else {
            return Err(Origin::Default);
        };
        let value = self.exactly(&format!("{list}.{index}.{key}"));
        let other = value.filter(|value| self.texts.index(value.at.start) != 0);
        if let Some(other) = other {
            return Err(self.origin_of(&other.at));
        }
        let own = self.texts.iter().next().map_or("", |text| &text.text);
        let (written, _) = DeTable::parse_recoverable(own);
        let entries = written.get_ref().get(list).map(Spanned::get_ref);
        let mut entries = entries.and_then(DeValue::as_array).into_iter().flatten();
        let own = entries.position(|own| own.span() == entry.at);
        own.ok_or_else(|| self.origin_of(&entry.at))
    }

    fn exactly(&self, key: &str) -> Option<&Node> {
        let mut names = key.split('.');
        let mut node = self.root.get(names.next()?)?;
        for name in names {
            node = match &node.within {
                Within::Table(table) => table.get(name)?,
                Within::List(list) => list.get(name.parse::<usize>().ok()?)?,
                Within::Value => return None,
            };
        }
        Some(node)
    }

    /// Where the value of a key is. What stands for a key that is not written is the `path` or
    /// `url` beside it, or else the table or text that it would be in.
    fn find(&self, key: &str) -> Option<Range<usize>> {
        let (parents, key) = key.rsplit_once('.').unwrap_or(("", key));
        let mut header = None;
        let mut table = &*self.root;
        let mut list: Option<&[Node]> = None;
        for name in parents.split_terminator('.') {
            let node = match (list.take(), name.parse::<usize>()) {
                (Some(list), Ok(index)) => list.get(index),
                // One table stands for a list of one.
                (None, Ok(0)) => continue,
                _ => table.get(name),
            }?;
            match &node.within {
                Within::Table(inner) => {
                    header = Some(node.at.clone());
                    table = inner;
                }
                Within::List(nodes) => list = Some(nodes),
                Within::Value => return Some(node.at.clone()),
            }
        }
        // An option of a format stands in the format's own table.
        let own = |node: &Node| match &node.within {
            Within::Table(inner) => inner.get(key).map(|node| node.at.clone()),
            _ => None,
        };
        let written = |key| table.get(key).map(|node| node.at.clone());
        let of_format = |key: &str| !["kernel", "initrd", "backing"].contains(&key);
        let in_own = || {
            let mut tables = table.iter().filter(|(key, _)| of_format(key));
            tables.find_map(|(_, node)| own(node))
        };
        written(key)
            .or_else(|| in_own().filter(|_| !parents.is_empty()))
            .or_else(|| written("path"))
            .or_else(|| written("url"))
            .or(header)
    }
}

/// The parser bounds the depth.
fn nodes(table: &DeTable<'_>) -> BTreeMap<String, Node> {
    let nodes = table.iter();
    nodes
        .map(|(key, value)| (key.get_ref().clone().into_owned(), node(value)))
        .collect()
}

fn node(value: &Spanned<DeValue<'_>>) -> Node {
    let within = match value.get_ref() {
        DeValue::Table(table) => Within::Table(nodes(table)),
        DeValue::Array(list) => Within::List(list.iter().map(node).collect()),
        _ => Within::Value,
    };
    Node {
        at: value.span(),
        within,
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.texts.name();
        f.debug_struct("Places").field("file", &file).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n[[block]]\npath = 'b.x'\n\
                        size = 512\nbacking = ['c.img']\n[block.x]\nlevel = 3\ndata_file = 'd'\n[lifecycle]\n";

    fn places(text: &str) -> Places {
        let mut texts = Texts::default();
        texts.file(Path::new("vm.toml"), text.to_owned());
        let mut places = Places::of(DeTable::parse(text).unwrap().get_ref());
        places.tell(texts);
        places
    }

    /// What the caret of an error about `key` is under.
    fn found(key: &str) -> Option<&'static str> {
        let places = places(TEXT);
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
        let places = places(TEXT);
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
        let places = places(TEXT);
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
