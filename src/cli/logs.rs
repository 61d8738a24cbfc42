//! `launcher logs`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use rustix::fs::OFlags;

use super::output::{is_unread, print_bytes};
use super::target::Target;
use crate::{Error, Result, exit};

/// How often a log is looked at that is followed.
const EVERY: Duration = Duration::from_millis(200);
/// What is read of a log at once: bytes.
const PIECE: usize = 64 << 10;

/// Show what a VM's guest has printed, also of one that has ended
#[derive(Args)]
#[command(after_help = "Example:\n  launcher logs web -f")]
pub(super) struct Logs {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// Go on with what it prints from now on, until it ends
    #[arg(short, long)]
    follow: bool,
    /// The messages of a detached `launcher up` instead
    #[arg(long)]
    launcher: bool,
}

impl Logs {
    pub(super) fn run(self) -> Result<u8> {
        let target = Target::of(self.vm)?;
        let place = target.place();
        let path = match self.launcher {
            true => place.launcher_log(),
            false => place.console_log(),
        };
        let mut log = Log::new(&path);
        let mut found = log.show_all()?;
        while self.follow && !is_unread() {
            // Asked before what is there is shown: what it printed last is there then.
            let runs = matches!(place.owner(), Ok(Some(_)));
            found |= log.show_new()?;
            if !runs {
                break;
            }
            thread::sleep(EVERY);
        }
        match found || target.is_running() {
            true => Ok(exit::DONE),
            false => Err(target.not_running().help(format!(
                "no log of it is left at {}: it may have been started without one",
                path.display()
            ))),
        }
    }
}

/// A log that is renamed to `….1` when it is long, and begun anew.
struct Log {
    path: PathBuf,
    /// What is being shown, shown up to its position.
    open: Option<File>,
}

impl Log {
    fn new(path: &Path) -> Log {
        Log {
            path: path.to_owned(),
            open: None,
        }
    }

    fn older(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".1");
        name.into()
    }

    /// Shows all that is left of a log; whether there is any.
    fn show_all(&mut self) -> Result<bool> {
        let newer = open(&self.path)?;
        let older = open(&self.older())?;
        // Renamed between the two, they are one.
        let older = older.filter(|older| !newer.as_ref().is_some_and(|newer| same(older, newer)));
        let found = older.is_some() || newer.is_some();
        for mut file in [older, newer].into_iter().flatten() {
            self.show(&mut file)?;
            self.open = Some(file);
        }
        Ok(found)
    }

    /// Shows what has come since; whether there is a log.
    fn show_new(&mut self) -> Result<bool> {
        let Some(mut file) = self.open.take() else {
            return self.show_all();
        };
        // Looked at first: after that nothing more is written to the old one.
        let newer = open(&self.path)?;
        self.show_from_start_if_cut(&mut file)?;
        self.show(&mut file)?;
        match newer.filter(|newer| !same(newer, &file)) {
            None => self.open = Some(file),
            Some(mut newer) => {
                // One that came and went between two looks.
                if let Some(mut between) = open(&self.older())?
                    && !same(&between, &file)
                    && !same(&between, &newer)
                {
                    self.show(&mut between)?;
                }
                self.show(&mut newer)?;
                self.open = Some(newer);
            }
        }
        Ok(true)
    }

    /// A log that was begun anew in place is shown from its beginning.
    fn show_from_start_if_cut(&self, file: &mut File) -> Result<()> {
        use std::io::Seek;
        let cut = file.metadata().and_then(|meta| {
            let position = file.stream_position()?;
            match meta.len() < position {
                true => file.rewind(),
                false => Ok(()),
            }
        });
        cut.map_err(|error| self.unreadable(&error))
    }

    fn show(&self, file: &mut File) -> Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(count) => print_bytes(&piece[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.unreadable(&error)),
            }
            if is_unread() {
                return Ok(());
            }
        }
    }

    fn unreadable(&self, error: &io::Error) -> Error {
        Error::failed(format!("cannot read {}: {error}", self.path.display()))
    }
}

/// Opens a log; none if there is none. No link is followed, and nothing waited for.
fn open(path: &Path) -> Result<Option<File>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::failed(format!(
            "cannot open {}: {error}",
            path.display()
        ))),
    }
}

fn same(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}
