//! docs/vm-toml.md is what the code says of the keys of a VM's file, and docs/commands.md what it
//! says of the command line, docs/vm-toml.schema.json the JSON schema for editors. After a change of either:
//!
//! ```sh
//! UPDATE_DOCS=1 cargo test --test reference
//! ```

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use formats::Format;
use launcher::config::{Absent, HostFile, KEYS, Key, Takes, expects};

/// What stands above the tables.
const HEAD: &str = "\
# vm.toml

A VM is one TOML file. Paths in it are relative to its own folder; a leading `~/` is the home
folder. A size is a whole number of bytes, or a text with KiB, MiB, GiB or TiB. An unknown key is
an error; `launcher check` shows every error of a file, and `launcher explain KEY` what a key does.

An editor with a TOML language server completes keys, shows these words and marks mistakes where the
first line of a file names the schema, [vm-toml.schema.json](vm-toml.schema.json) or what
`launcher schema` prints:

```toml
#:schema ../docs/vm-toml.schema.json
```

<!-- Written by `UPDATE_DOCS=1 cargo test --test reference` from the code: do not edit. -->

## Files over files, profiles, and single values

What VMs have in common is written once, in a file that the others extend. What is another way to
run a VM is a profile of it. What is for this once is set on the command line:

```toml
# vm.toml
extends = [\"../base.toml\"]         # laid over these, the later over the earlier
cpus = 4

[[block]]                          # the disk of base.toml with this id, changed
id = \"ROOT\"
size = \"16GiB\"

[profile.ci]                       # with `-p ci`
lifecycle.on_reboot = \"stop\"
[[profile.ci.block]]
id = \"ROOT\"
ephemeral = true
```

```sh
launcher up vm.toml -p ci --set memory=2GiB --set block.ROOT.ro=true
launcher config show vm.toml -p ci # what holds, and which line of which file says so
```

1. First come the files of `extends`, in their order; each may extend others, at most 8 files deep
   and 64 in all. A file that is reached twice is an error.
2. Then the VM's own file. Its name, if no file gives one, is that of this file.
3. Then the profiles named with `-p NAME`, in their order. Those of the files that are extended
   count: profiles of one name merge as the files do. A mistake in a profile that is not chosen is
   shown all the same.
4. Then what `--set KEY=VALUE` says, in its order. A key is written with dots, `boot.cmdline`; a disk
   is its index or its `id`, `block.0.ro`, `block.ROOT.size`. A value is TOML; what is no TOML is a
   text, so that `--set memory=2GiB` needs no quotes. `extends` and `profile` cannot be set.

At each step tables merge key by key, and so does the table of a disk's format. A `[[block]]` with the
`id` of one that is there changes that one in its place; any other is a further disk. Every other
value replaces the one that was there: also lists such as `backing`, and a kernel or initrd with all
that its table says of it. A value keeps the folder of the file that wrote it for its paths; those of
`--set` are relative to the current folder. Nothing can be taken away: a value that is to be its
default again is written out.

A file that others extend need not be a whole VM: what is missing is missed in the whole, and
reported at the VM's own file. `launcher up --all` passes it over.
";

/// A cell of a table.
fn cell(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.join(" ").replace('|', "\\|")
}

fn default(absent: Absent) -> String {
    match absent {
        Absent::Error(example) => format!("must be written, such as `{}`", cell(example)),
        Absent::Value(value) => format!("`{}`", cell(value)),
        Absent::Words(words) => cell(words),
    }
}

/// The keys of one table of the file, then the tables below it.
fn table(heading: &str, keys: &[Key], page: &mut String) {
    *page += &format!("\n## {heading}\n\n| key | takes | default | meaning |\n|---|---|---|---|\n");
    for key in keys {
        let takes = match key.takes {
            Takes::Value(words, _) => cell(words),
            Takes::File(_) => format!("{} of a host file, below", key.takes.words()),
            Takes::Files(_) => {
                "a path, a table of a host file, below, or an array of them".to_owned()
            }
            Takes::Profiles => format!("{}, above", key.takes.words()),
            tables => format!("{}, below", tables.words()),
        };
        let (name, default, mut doc) = (key.spelled(), default(key.absent), key.meaning());
        for (word, meaning) in key.words() {
            doc += &format!(" \"{word}\": {meaning}");
        }
        let doc = cell(&doc);
        *page += &format!("| `{name}` | {takes} | {default} | {doc} |\n");
    }
    for key in keys.iter().filter(|key| !key.keys().is_empty()) {
        table(&format!("`{}`", key.spelled()), key.keys(), page);
    }
}

/// What stands above the keys of a file of the host.
const HOST_FILE: &str = "
Where a path stands for a file that a VM reads, a table can say more of it, such as
`kernel = { path = \"vmlinuz\", sha256 = \"…\" }`. `[[block]]` has `sha256`, `url` and `build` of its
own, beside `path`. `launcher up` fetches or builds what is not there, and `launcher prepare` does
so ahead of it; no other command does.
";

/// The disk formats, and the options of each.
fn of_formats(formats: &[&Format], page: &mut String) {
    *page += "\n## Disk formats\n\n| `format` | extensions | abilities | what it is |\n|---|---|---|---|\n";
    for format in formats {
        let extensions: Vec<_> = format
            .extensions
            .iter()
            .map(|it| format!("`.{it}`"))
            .collect();
        *page += &format!(
            "| `{}` | {} | {} | {} |\n",
            format.name,
            extensions.join(" "),
            format.abilities.join(", "),
            cell(format.description)
        );
    }
    for format in formats.iter().filter(|format| !format.options.is_empty()) {
        *page += &format!(
            "\n### `[block.{}]`\n\n| key | takes | default | meaning |\n|---|---|---|---|\n",
            format.name
        );
        for option in format.options {
            let (takes, doc) = (cell(&expects(option.kind)), cell(option.doc));
            let default = match option.default {
                "" => default(Absent::Words("none")),
                value => default(Absent::Value(value)),
            };
            *page += &format!("| `{}` | {takes} | {default} | {doc} |\n", option.name);
        }
    }
}

#[test]
fn the_reference_says_what_the_code_says() {
    let mut page = HEAD.to_owned();
    table("The top of the file", KEYS, &mut page);
    let mut host_file = String::new();
    table("A file of the host", HostFile::KEYS, &mut host_file);
    page += &host_file.replacen("\n\n", &format!("\n{HOST_FILE}\n"), 1);
    // The page is that of the default build, whatever this one is.
    let mut formats = formats::formats().unwrap();
    formats.retain(|format| format.name != "qcow2-rs");
    of_formats(&formats, &mut page);
    held("docs/vm-toml.md", &page);
}

#[test]
fn the_schema_is_that_of_the_code() {
    let mut formats = formats::formats().unwrap();
    formats.retain(|format| format.name != "qcow2-rs");
    let schema = serde_json::to_string_pretty(&launcher::config::schema(&formats)).unwrap();
    held("docs/vm-toml.schema.json", &(schema + "\n"));
}

#[test]
fn every_vm_that_is_checked_in_is_taken_by_the_schema() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schema = launcher::config::schema(&formats::formats().unwrap());
    let validator = jsonschema::draft7::new(&schema).unwrap();
    let mut files: Vec<_> = fs::read_dir(folder.join("configs"))
        .unwrap()
        .flat_map(|vm| {
            let vm = vm.unwrap().path();
            let files = fs::read_dir(&vm).into_iter().flatten();
            files.map(|file| file.unwrap().path()).collect::<Vec<_>>()
        })
        .collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "toml")
    });
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let table: toml::Table = text.parse().unwrap();
        let json = serde_json::to_value(table).unwrap();
        let errors: Vec<_> = validator.iter_errors(&json).collect();
        assert!(errors.is_empty(), "{}: {errors:?}", file.display());
    }
}

/// Compares a page with the one that is checked in, or updates that.
fn held(name: &str, page: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&file, page).unwrap();
    }
    let checked_in = fs::read_to_string(&file).unwrap_or_default();
    let first = page.lines().zip(checked_in.lines()).find(|(a, b)| a != b);
    assert!(
        page == checked_in,
        "{name} is not what the code says (first difference: {first:?}); update it: \
         UPDATE_DOCS=1 cargo test --test reference"
    );
}

#[test]
fn an_option_of_a_format_is_in_the_reference() {
    static FORMAT: Format = Format {
        name: "x",
        extensions: &["x", "y"],
        description: "one | another",
        abilities: &["discard", "resize"],
        options: &[
            formats::FormatOption {
                name: "level",
                kind: formats::OptionKind::Choice(&["low", "high"]),
                default: "\"low\"",
                doc: "How much.",
            },
            formats::FormatOption {
                name: "beside",
                kind: formats::OptionKind::Path,
                default: "",
                doc: "Another file.",
            },
        ],
        open: |_, _| Box::pin(std::future::pending()),
        create: |_| Ok(()),
    };
    let mut page = String::new();
    of_formats(&[&FORMAT], &mut page);
    for line in [
        "| `x` | `.x` `.y` | discard, resize | one \\| another |",
        "### `[block.x]`",
        "| `level` | \"low\" or \"high\" | `\"low\"` | How much. |",
        "| `beside` | a path | none | Another file. |",
    ] {
        assert!(page.lines().any(|found| found == line), "{page}");
    }
}

/// What stands above the commands.
const COMMANDS_HEAD: &str = "\
# Commands

`VM` is the path of a TOML file (it has a `/`, ends in `.toml`, or is there as a file), the folder of
a `vm.toml`, or the name of a VM that runs or has run. Left out, it is `vm.toml`, but it is never left
out before a disk: `INDEX|ID` is a disk of that VM, and `--path IMAGE [--format FORMAT]` in place of
both an image that no VM's file describes. `launcher man DIR` writes manual pages of the same content,
`launcher completions SHELL` what a shell completes.

<!-- Written by `UPDATE_DOCS=1 cargo test --test reference` from the code: do not edit. -->
";

/// A command with its arguments, then those below it.
fn command(command: &clap::Command, depth: usize, page: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    *page += &format!("\n{} `{name}`\n\n", "#".repeat(depth));
    let about = command.get_long_about().or(command.get_about());
    let about = about.unwrap().to_string();
    let (first, rest) = match about.split_once("\n\n") {
        Some((first, rest)) => (first, format!("\n{rest}\n")),
        None => (&*about, String::new()),
    };
    *page += &format!("{}.\n{rest}", first.trim_end_matches('.'));
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    *page += &format!("\n```sh\n{usage}\n```\n");
    let arguments: Vec<_> = command
        .get_arguments()
        .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
        .filter(|argument| !argument.is_hide_set())
        .collect();
    if !arguments.is_empty() {
        *page += "\n| argument | meaning |\n|---|---|\n";
    }
    for argument in arguments {
        // Without the brackets of what may be left out.
        let spelled = argument.to_string();
        let spelled = spelled.trim_start_matches('[').replace("]...", "…");
        let spelled = match spelled.contains('[') {
            true => spelled,
            false => spelled.trim_end_matches(']').to_owned(),
        };
        let spelled = match (argument.get_short(), argument.get_long()) {
            (Some(short), Some(_)) => format!("-{short}, {spelled}"),
            _ => spelled,
        };
        let long = argument.get_long_help().or(argument.get_help());
        let help = long.map(ToString::to_string).unwrap_or_default();
        let values = argument.get_possible_values();
        let values: Vec<_> = values.iter().map(|value| value.get_name()).collect();
        let mut values = match argument.get_action().takes_values() && !values.is_empty() {
            true => format!(": {}", values.join(", ")),
            false => String::new(),
        };
        if argument.get_action().takes_values() {
            let default = argument.get_default_values().iter();
            default.for_each(|default| values += &format!(" [default: {}]", default.display()));
        }
        *page += &format!("| `{}` | {}{values} |\n", cell(&spelled), cell(&help));
    }
    if let Some(after) = command.get_after_help() {
        for part in after.to_string().split("\n\n") {
            let (title, lines) = part.split_once('\n').unwrap();
            let lines: Vec<_> = lines
                .lines()
                .map(|line| line.strip_prefix("  ").unwrap())
                .collect();
            *page += &format!("\n{title}\n\n```text\n{}\n```\n", lines.join("\n"));
        }
    }
    let below = command.get_subcommands();
    for below in below.filter(|below| below.get_name() != "help" && !below.is_hide_set()) {
        self::command(below, depth + 1, page);
    }
}

#[test]
fn the_commands_are_those_of_the_command_line() {
    let mut page = COMMANDS_HEAD.to_owned();
    let mut launcher = launcher::cli::command();
    launcher.build();
    command(&launcher, 2, &mut page);
    held("docs/commands.md", &page);
}
