//! `launcher schema`.

use clap::Args;

use super::output::print_json;
use crate::{Result, config, exit};

/// Print the JSON schema of a VM's file, for editors
///
/// An editor with a TOML language server (taplo, tombi, Even Better TOML) completes keys, shows
/// what they do and marks mistakes in a file whose first line is `#:schema PATH`.
#[derive(Args)]
#[command(after_help = "Example:\n  launcher schema > vm-toml.schema.json")]
pub(super) struct Schema {}

impl Schema {
    pub(super) fn run(self) -> Result<u8> {
        print_json(&config::schema(&formats::formats()?))?;
        Ok(exit::DONE)
    }
}
