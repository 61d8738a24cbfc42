//! What is laid over a VM's file, on the command line.

use std::path::PathBuf;

use clap::Args;

use crate::config::Choice;
use crate::control::Laid;

/// Profiles and values over those of the file.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Chosen {
    /// Lay the file's `[profile.NAME]` over the rest of it; may be given several times
    #[arg(short, long, value_name = "NAME")]
    profile: Vec<String>,
    /// Set one value over all others, such as boot.cmdline=quiet or block.0.ro=true: TOML, or a
    /// text without quotes; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// What a VM runs with, as the configuration takes it.
pub(super) fn of(laid: &Laid) -> Choice {
    Choice {
        profiles: laid.profiles.clone(),
        set: laid.set.clone(),
        folder: laid.folder.clone(),
    }
}

impl Chosen {
    /// As the configuration takes it.
    pub(super) fn choice(&self) -> Choice {
        Choice {
            profiles: self.profile.clone(),
            set: self.set.clone(),
            folder: PathBuf::new(),
        }
    }

    /// As whoever asks about the VM that runs with it is told.
    pub(super) fn laid(&self) -> Laid {
        Laid {
            profiles: self.profile.clone(),
            set: self.set.clone(),
            folder: std::env::current_dir().unwrap_or_default(),
        }
    }

    /// It again, as arguments of a command.
    pub(super) fn arguments(&self) -> impl Iterator<Item = String> {
        let profiles = self.profile.iter().map(|name| format!("--profile={name}"));
        profiles.chain(self.set.iter().map(|set| format!("--set={set}")))
    }
}
