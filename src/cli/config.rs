//! `launcher config`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Map, Value as Json, json};
use toml::Value;

use super::choice::Chosen;
use super::output::{print, print_json};
use super::target::Target;
use crate::config::{Holds, Origin, Setting};
use crate::{Error, Result, exit};

/// Look at the configuration of a VM
#[derive(Args)]
#[command(after_help = "Example:\n  launcher config show vm.toml")]
pub(super) struct Config {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Show(Show),
}

impl Config {
    pub(super) fn run(self) -> Result<u8> {
        match self.command {
            Command::Show(show) => show.run(),
        }
    }
}

/// Show every value that holds, and where it comes from
///
/// What is printed is a VM's file by itself: what it extends, profiles and defaults are filled in,
/// and paths are absolute; a `build` runs in the folder of the file that says it. A comment behind
/// each value says which line of which file it is from; a value that follows from others is a
/// comment as a whole. As JSON, each value is an object with `value` (null: none) and `origin`:
/// `{"from": "file", "file": FILE, "line": LINE}`, or `from` is `set`, `default`, or `derived` with
/// the reason in `why`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher config show vm.toml\n  launcher config show web -p ci --set cpus=4 --json"
)]
struct Show {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    #[command(flatten)]
    chosen: Chosen,
    /// Print JSON: of each value what it is and where it comes from
    #[arg(long)]
    json: bool,
}

impl Show {
    fn run(self) -> Result<u8> {
        let vm = Target::of(self.vm)?.config_with(&self.chosen.choice())?;
        if std::path::absolute(&vm.file).is_ok_and(|file| file.to_str().is_none()) {
            let file = vm.file.display();
            let message = format!("the path of {file} is not UTF-8, which TOML and JSON are");
            return Err(Error::failed(message));
        }
        let entries = vm.resolved();
        match self.json {
            true => print_json(&to_json(&entries))?,
            false => print(&to_toml(&entries))?,
        }
        Ok(exit::DONE)
    }
}

/// The entries as a file.
fn to_toml(entries: &[Setting]) -> String {
    let mut text = String::new();
    table("", "", entries, &mut text);
    text.trim_start().to_owned()
}

/// Writes a table under its header, its values before the tables in it.
fn table(header: &str, path: &str, entries: &[Setting], text: &mut String) {
    let lines: Vec<_> = entries.iter().filter_map(line).collect();
    if !lines.is_empty() || header.starts_with("[[") {
        *text += &format!("\n{header}\n");
    }
    let widest = lines.iter().map(|(value, _)| value.chars().count());
    // One long value does not push all comments to the right.
    let widest = widest.filter(|width| *width <= 40).max().unwrap_or(0);
    for (value, origin) in lines {
        let blanks = (widest + 2).saturating_sub(value.chars().count()).max(2);
        *text += &format!("{value}{}# {origin}\n", " ".repeat(blanks));
    }
    for Setting { key, holds } in entries {
        let key = match path {
            "" => key.clone(),
            path => format!("{path}.{key}"),
        };
        match holds {
            Holds::Value(..) => {}
            Holds::Table(inner) => table(&format!("[{key}]"), &key, inner, text),
            Holds::Tables(list) => {
                for inner in list {
                    table(&format!("[[{key}]]"), &key, inner, text);
                }
            }
        }
    }
}

/// The line of a value with its comment. What follows from other values is a comment: written out
/// it would no longer follow.
fn line(entry: &Setting) -> Option<(String, String)> {
    let Holds::Value(Some(value), origin) = &entry.holds else {
        return None;
    };
    let follows = matches!(origin, Origin::Derived(_)) && entry.key != "name";
    let mark = if follows { "# " } else { "" };
    Some((format!("{mark}{} = {value}", entry.key), one_line(origin)))
}

/// A comment ends with its line, whatever a file is called.
fn one_line(origin: &Origin) -> String {
    let control = |c: char| if c.is_control() { '?' } else { c };
    origin.to_string().chars().map(control).collect()
}

/// The entries as an object: of each value what it is and where it comes from.
fn to_json(entries: &[Setting]) -> Json {
    let member = |Setting { key, holds }: &Setting| {
        let value = match holds {
            Holds::Value(value, origin) => {
                let value = value.as_ref().map_or(Json::Null, plain);
                json!({ "value": value, "origin": origin_of(origin) })
            }
            Holds::Table(inner) => to_json(inner),
            Holds::Tables(list) => list.iter().map(|inner| to_json(inner)).collect(),
        };
        (key.clone(), value)
    };
    Json::Object(entries.iter().map(member).collect::<Map<_, _>>())
}

fn origin_of(origin: &Origin) -> Json {
    match origin {
        Origin::Line(file, line) => json!({ "from": "file", "file": file, "line": line }),
        Origin::Set => json!({ "from": "set" }),
        Origin::Default => json!({ "from": "default" }),
        Origin::Derived(words) => json!({ "from": "derived", "why": words }),
    }
}

/// A value as JSON.
fn plain(value: &Value) -> Json {
    match value {
        Value::String(text) => json!(text),
        Value::Integer(number) => json!(number),
        Value::Float(number) => json!(number),
        Value::Boolean(value) => json!(value),
        Value::Datetime(time) => json!(time.to_string()),
        Value::Array(values) => values.iter().map(plain).collect(),
        Value::Table(table) => {
            let members = table.iter().map(|(key, value)| (key.clone(), plain(value)));
            Json::Object(members.collect())
        }
    }
}
