//! Files that a command makes.

mod turn;

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{Signal, set_parent_process_death_signal};

use self::turn::{State, Turn};
use super::{Made, is_there};
use crate::config::HostFile;
use crate::signals::KeysIgnored;
use crate::{Error, Result, messages};

/// A command and the folder that it runs in: those of several files are one if these are.
type Which<'a> = (&'a Path, &'a [String]);

/// The commands of a VM's files, each run at most once.
pub(super) struct Commands<'a> {
    files: &'a [(String, HostFile)],
    rebuild: bool,
    run: HashSet<Which<'a>>,
}

impl<'a> Commands<'a> {
    /// With `rebuild`, each is run, whatever is there.
    pub(super) fn new(files: &'a [(String, HostFile)], rebuild: bool) -> Self {
        Commands {
            files,
            rebuild,
            run: HashSet::new(),
        }
    }

    /// Makes a file that has a command, if it is not there.
    pub(super) fn make(&mut self, key: &str, file: &'a HostFile) -> Result<Made> {
        let which = which(file);
        if self.run.contains(&which) {
            // For another file: whether it has made this one too was looked at then.
            return Ok(Made::Built);
        }
        if self.is_made(file) && !Turn::is_taken(which) {
            return Ok(Made::Present);
        }
        let build = Build::begin(which, self.files);
        let left = build.clear();
        if self.is_made(file) && left.is_empty() {
            // Whoever had the turn before has made it.
            build.end();
            return Ok(Made::Present);
        }
        self.run.insert(which);
        build
            .make_all(&left)
            .map_err(|error| error.about(format!("{key}.build")))?;
        Ok(Made::Built)
    }

    fn is_made(&self, file: &HostFile) -> bool {
        is_there(&file.path) && !self.rebuild
    }
}

/// A command at its turn.
struct Build<'a> {
    which: Which<'a>,
    /// `None` where nothing can be kept.
    turn: Option<Turn>,
    /// The files that it makes.
    paths: Vec<&'a Path>,
}

impl<'a> Build<'a> {
    /// Waits for its turn.
    fn begin(which: Which<'a>, files: &'a [(String, HostFile)]) -> Self {
        let own = files.iter().map(|(_, file)| file);
        let own = own.filter(|file| self::which(file) == which);
        Build {
            which,
            turn: Turn::take(which, &shown(which.1)),
            paths: own.map(|file| &*file.path).collect(),
        }
    }

    /// Moves away the files that were begun before it was interrupted, and says which: half a file
    /// would be taken for a whole one.
    fn clear(&self) -> Vec<&'a Path> {
        let begun = |path: &Path| self.turn.as_ref().is_some_and(|turn| turn.has_begun(path));
        let left = self.paths.iter().copied();
        let left: Vec<_> = left.filter(|path| begun(path)).collect();
        left.iter().for_each(|path| move_away(path));
        left
    }

    /// Makes all of its files. Those that were `left` count as absent, even if they could not be
    /// moved.
    fn make_all(mut self, left: &[&Path]) -> Result<()> {
        let state = |path| match left.contains(&path) {
            true => State::absent(),
            false => State::of(path),
        };
        let before: Vec<_> = self.paths.iter().map(|path| (*path, state(path))).collect();
        if let Some(turn) = &mut self.turn {
            turn.note(&before);
        }
        if let Err(error) = run(self.which) {
            return Err(self.undo(&before, error));
        }
        let missing = self.paths.iter().copied().find(|path| !is_there(path));
        let missing = missing.map(|path| not_made(path, self.which));
        self.end();
        missing.map_or(Ok(()), Err)
    }

    /// Removes what it has begun and not ended; the error that says so.
    fn undo(self, before: &[(&Path, State)], error: Error) -> Error {
        let begun = before
            .iter()
            .filter(|(path, before)| State::of(path).is_begun_since(before.text()));
        let begun: Vec<_> = begun.map(|(path, _)| *path).collect();
        let removed = removed(&begun);
        if !begun.iter().any(|path| is_there(path)) {
            self.end();
        }
        match &removed[..] {
            [] => error,
            removed => error.help(format!(
                "what it had begun is removed: {}",
                removed.join(", ")
            )),
        }
    }

    /// Nothing is left half done.
    fn end(self) {
        self.turn.into_iter().for_each(Turn::end);
    }
}

fn not_made(path: &Path, (_, build): Which<'_>) -> Error {
    let message = format!(
        "`build` has not made {}: {} has ended well, but there is no such file",
        path.display(),
        shown(build)
    );
    Error::failed(message).help(
        "`path` and `build` must mean the same file, from the folder of the file that names them",
    )
}

/// Moves away what an interrupted command has left of a file: it may have been put there since.
fn move_away(path: &Path) {
    let mut name = path.as_os_str().to_owned();
    name.push(".half");
    let half = PathBuf::from(name);
    if path.is_file() && std::fs::rename(path, &half).is_ok() {
        messages::say(format_args!(
            "launcher: a command that was interrupted had begun {}: it is {} now",
            path.display(),
            half.display()
        ));
    }
}

/// Removes files, not folders; those that are gone, for messages.
fn removed(paths: &[&Path]) -> Vec<String> {
    paths
        .iter()
        .filter(|path| path.is_file() && std::fs::remove_file(path).is_ok())
        .map(|path| path.display().to_string())
        .collect()
}

fn which(file: &HostFile) -> Which<'_> {
    (&file.folder, &file.build)
}

/// Runs a command to its end; what it prints goes to standard error.
fn run((folder, build): Which<'_>) -> Result<()> {
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    let line = shown(build);
    let Some((program, arguments)) = build.split_first() else {
        return Ok(());
    };
    messages::say(format_args!(
        "launcher: building: {line} (in {})",
        folder.display()
    ));
    let failed = |error: io::Error| {
        let message = format!("cannot run `build`, {line}: {error}");
        Error::failed(message).help(format!(
            "it is run in {}; a script needs `chmod +x` and a first line such as `#!/bin/sh`",
            folder.display()
        ))
    };
    // From where this process is, not from where the command will be.
    let program = match program.contains('/') {
        true => folder.canonicalize().map_err(failed)?.join(program),
        false => PathBuf::from(program),
    };
    let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(output);
    // As system(3) does: the terminal's keys are for the command, and what it leaves is for us to
    // clean up.
    let keys = KeysIgnored::begin();
    let before = keys.before();
    let begin = move || {
        before.set();
        // In a session of its own it would go on for nobody.
        set_parent_process_death_signal(Some(Signal::TERM))?;
        Ok(())
    };
    // SAFETY: system calls that are async-signal-safe; nothing is allocated or locked.
    unsafe { command.pre_exec(begin) };
    let status = command.status();
    drop(keys);
    let status = status.map_err(failed)?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "`build` has failed: {line} {}",
            ended(status)
        ))),
    }
}

/// How a command has ended badly.
fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exits with {code}"),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or_default()),
    }
}

/// A command as one reads it.
fn shown(build: &[String]) -> String {
    let word =
        |word: &String| match word.is_empty() || word.contains(|c: char| !c.is_ascii_graphic()) {
            true => format!("{word:?}"),
            false => word.clone(),
        };
    let words: Vec<_> = build.iter().map(word).collect();
    format!("`{}`", words.join(" "))
}
