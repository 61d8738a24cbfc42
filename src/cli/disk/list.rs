//! `launcher disk list`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::format::named;
use super::look::{look, one_line};
use crate::cli::output::{print, print_json, rough, table};
use crate::cli::target::Target;
use crate::config::{Block, VHOST_USER, size};
use crate::{Result, exit};

/// List the disks of a VM, running or not
#[derive(Args)]
#[command(after_help = "Example:\n  launcher disk list vm.toml")]
pub(super) struct List {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A disk.
#[derive(Serialize)]
struct Row {
    index: usize,
    id: Option<String>,
    path: String,
    format: String,
    ro: bool,
    ephemeral: bool,
    root: bool,
    /// Bytes of the disk; none if the image cannot be looked at.
    size: Option<u64>,
    /// Bytes that the image takes on the host.
    host_size: Option<u64>,
    /// Why it cannot be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl List {
    pub(super) fn run(self) -> Result<u8> {
        let target = Target::of(self.vm)?;
        let vm = target.config()?;
        let live = target.disks();
        let rows: Vec<_> = vm
            .block
            .iter()
            .enumerate()
            .map(|(index, block)| {
                let mut row = Row::of(index, block, target.is_running());
                if let Some(disk) = live.as_ref().and_then(|disks| disks.get(index)) {
                    row.size = Some(disk.size);
                }
                row
            })
            .collect();
        match self.json {
            true => print_json(&rows)?,
            false => print(&listing(&rows))?,
        }
        Ok(exit::DONE)
    }
}

impl Row {
    fn of(index: usize, block: &Block, in_use: bool) -> Row {
        let seen = || named(&block.format).and_then(|format| look(&block.path, format, in_use));
        let (size, host_size, error) = match (!block.is_served()).then(seen) {
            Some(Ok(seen)) => (seen.size, seen.host_size, None),
            Some(Err(error)) => (None, None, Some(one_line(&error))),
            None => (None, None, None),
        };
        Row {
            index,
            id: block.id.clone(),
            path: block.path.display().to_string(),
            format: block.format.clone(),
            ro: block.ro,
            ephemeral: block.ephemeral,
            root: block.root,
            size,
            host_size,
            error,
        }
    }
}

/// What an image takes on the host, in a cell.
fn on_host(row: &Row) -> String {
    match (row.host_size, &row.error) {
        (Some(bytes), _) => rough(bytes),
        (None, Some(_)) => "?".to_owned(),
        (None, None) if row.format == VHOST_USER => "served".to_owned(),
        (None, None) => "a device".to_owned(),
    }
}

/// The disks as people see them.
fn listing(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "it has no disk\n".to_owned();
    }
    let mut cells =
        vec![["DISK", "ID", "FORMAT", "SIZE", "ON HOST", "FLAGS", "PATH"].map(str::to_owned)];
    for row in rows {
        let flags = [
            (row.root, "root"),
            (row.ro, "ro"),
            (row.ephemeral, "ephemeral"),
        ];
        let flags: Vec<_> = flags
            .iter()
            .filter(|(set, _)| *set)
            .map(|it| it.1)
            .collect();
        let bytes = |bytes: Option<u64>| bytes.map_or("?".to_owned(), size::show);
        let path = match &row.error {
            Some(error) => format!("{} ({error})", row.path),
            None => row.path.clone(),
        };
        cells.push([
            row.index.to_string(),
            row.id.clone().unwrap_or_default(),
            row.format.clone(),
            bytes(row.size),
            on_host(row),
            flags.join(" "),
            path,
        ]);
    }
    table(&cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_row_and_what_cannot_be_seen_says_why() {
        let row = |index, error: Option<&str>| Row {
            index,
            id: (index == 0).then(|| "ROOT".to_owned()),
            path: "a.img".into(),
            format: "raw".into(),
            ro: index == 1,
            ephemeral: false,
            root: index == 0,
            size: error.is_none().then_some(1 << 30),
            host_size: error.is_none().then_some(3 << 19),
            error: error.map(str::to_owned),
        };
        assert_eq!(
            listing(&[row(0, None), row(1, Some("cannot open it"))]),
            "DISK  ID    FORMAT  SIZE  ON HOST  FLAGS  PATH\n\
             0     ROOT  raw     1GiB  1.5MiB   root   a.img\n\
             1           raw     ?     ?        ro     a.img (cannot open it)\n"
        );
        let served = Row {
            format: VHOST_USER.to_owned(),
            path: "a.sock".into(),
            host_size: None,
            ..row(0, None)
        };
        assert_eq!(
            listing(&[served]),
            "DISK  ID    FORMAT      SIZE  ON HOST  FLAGS  PATH\n\
             0     ROOT  vhost-user  1GiB  served   root   a.sock\n"
        );
        assert_eq!(listing(&[]), "it has no disk\n");
    }
}
