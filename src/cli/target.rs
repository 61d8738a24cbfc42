//! The VM that a command is about.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::choice;
use crate::config::{self, Choice, Vm};
use crate::control::messages::{DiskStatus, Order, Progress, Status};
use crate::control::{self, Client, Owner, Place};
use crate::{Error, Result, exit};

/// A VM, running or not.
pub(super) struct Target {
    place: Place,
    owner: Option<Owner>,
    /// Its TOML file, as the user named it if that is how.
    file: PathBuf,
}

impl Target {
    /// The VM that an argument of the command line means; none is `vm.toml`.
    pub(super) fn of(vm: Option<PathBuf>) -> Result<Target> {
        let named = vm.unwrap_or_else(|| PathBuf::from("vm.toml"));
        let (place, owner) = control::find(&named)?;
        let known = owner.clone().or_else(|| place.last_owner());
        let file = super::file(Some(named));
        let file = match known {
            Some(known) if !file.is_file() => known.file,
            _ => file,
        };
        Ok(Target { place, owner, file })
    }

    /// As [`Target::of`], for what only a running VM can do.
    pub(super) fn running(vm: Option<PathBuf>) -> Result<Target> {
        let target = Target::of(vm)?;
        match target.owner {
            Some(_) => Ok(target),
            None => Err(target.not_running()),
        }
    }

    /// The error for a VM that does not run.
    pub(super) fn not_running(&self) -> Error {
        let name = self.name();
        let file = self.file.display();
        let mut error = Error::failed(format!("`{name}` is not running"))
            .help(format!("start it with `launcher up {file}`"));
        error.exit = exit::NOT_RUNNING;
        error
    }

    /// What to call it.
    pub(super) fn name(&self) -> String {
        let owner = self.owner.clone().or_else(|| self.place.last_owner());
        match owner {
            Some(owner) => owner.name,
            None => self.file.display().to_string(),
        }
    }

    /// Its TOML file.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Where its logs and its socket are.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// What its TOML file says now, with what is laid over it if it runs.
    pub(super) fn config(&self) -> Result<Vm> {
        let laid = self.owner.as_ref().map(|owner| choice::of(&owner.laid));
        self.config_with(&laid.unwrap_or_default())
    }

    /// What its TOML file says now, with what is chosen laid over it.
    pub(super) fn config_with(&self, choice: &Choice) -> Result<Vm> {
        config::load(&self.file, choice)
    }

    /// Whether it runs.
    pub(super) fn is_running(&self) -> bool {
        self.owner.is_some()
    }

    /// A connection to it. One that has ended just now is not running.
    pub(super) fn connect(&self) -> Result<Client> {
        Client::connect(&self.place.socket())
    }

    /// A connection for an order that takes as long as it takes, to a VM that answers.
    pub(super) fn connect_for_order(&self) -> Result<Client> {
        self.connect()?.attentive()
    }

    /// How it is.
    pub(super) fn status(&self) -> Result<Status> {
        ask(&mut self.connect()?, Order::Status, &mut |_| {})
    }

    /// Its disks as they are, if it runs and answers.
    pub(super) fn disks(&self) -> Option<Vec<DiskStatus>> {
        self.owner.as_ref()?;
        Some(self.status().ok()?.disks)
    }
}

/// Has an order carried out; the reply in the type that it has.
pub(super) fn ask<T: DeserializeOwned>(
    client: &mut Client,
    order: Order,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<T> {
    let reply = client.ask(order, on_progress)?;
    serde_json::from_value(reply).map_err(|error| {
        Error::failed(format!("the VM's answer is not understood: {error}"))
            .help("its `launcher up` may be of another version")
    })
}
