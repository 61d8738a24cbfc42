//! What the user sees while a disk is allocated, checked or converted, or a file is
//! read for its digest.

use std::cell::OnceCell;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use formats::Progress;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// For [`formats::Ring::on_progress`]: a bar on standard error if that is a terminal, otherwise
/// one line. Both come after a second; the bar goes when the hook is dropped.
pub(crate) fn hook() -> impl Fn(&Progress<'_>) {
    shown(&ALLOCATING)
}

/// As [`hook`], for a check of the image at `path`: what is done, and of how much, is counted in
/// L2 tables.
pub(crate) fn checking(path: &Path) -> impl FnMut(u64, u64) {
    tables(&CHECKING, path)
}

/// As [`checking`], for what a snapshot of the image reads, several times over.
pub(crate) fn reading(path: &Path) -> impl FnMut(u64, u64) {
    tables(&READING, path)
}

/// As [`hook`], for the copying part of a conversion.
pub(crate) fn converting() -> impl Fn(&Progress<'_>) {
    shown(&CONVERTING)
}

/// As [`hook`], for the comparing part of a conversion.
pub(crate) fn verifying() -> impl Fn(&Progress<'_>) {
    shown(&VERIFYING)
}

/// As [`hook`], for the digest of a file.
pub(crate) fn hashing() -> impl Fn(&Progress<'_>) {
    shown(&HASHING)
}

/// As [`hook`], for a file that is fetched; its size may not be known.
pub(crate) fn fetching(size_known: bool) -> impl Fn(&Progress<'_>) {
    shown(if size_known {
        &FETCHING
    } else {
        &FETCHING_UNSIZED
    })
}

/// What takes long.
struct Task {
    /// For [`ProgressStyle`].
    style: &'static str,
    /// The line where there is no terminal.
    line: fn(&Progress<'_>) -> String,
}

static ALLOCATING: Task = Task {
    style: "allocating {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}{msg}",
    line: |progress| {
        let mib = progress.total.div_ceil(1 << 20);
        format!("launcher: allocating {mib} MiB for {}", name(progress.path))
    },
};

static FETCHING: Task = Task {
    style: "fetching {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}{msg}",
    line: |progress| {
        let mib = progress.total.div_ceil(1 << 20);
        format!("launcher: fetching {mib} MiB for {}", name(progress.path))
    },
};

static FETCHING_UNSIZED: Task = Task {
    style: "fetching {prefix} {spinner} {binary_bytes}",
    line: |progress| format!("launcher: fetching {}", name(progress.path)),
};

static CHECKING: Task = Task {
    style: "checking {prefix} [{bar:30}] {pos} of {len} L2 tables{msg}",
    line: |progress| format!("launcher: checking {}", name(progress.path)),
};

static READING: Task = Task {
    style: "reading {prefix} [{bar:30}] {pos} of {len} L2 tables{msg}",
    line: |progress| format!("launcher: reading the tables of {}", name(progress.path)),
};

static CONVERTING: Task = Task {
    style: "converting to {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}{msg}",
    line: |progress| format!("launcher: converting to {}", name(progress.path)),
};

static VERIFYING: Task = Task {
    style: "verifying {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}{msg}",
    line: |progress| format!("launcher: verifying {}", name(progress.path)),
};

static HASHING: Task = Task {
    style: "computing the digest of {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes}{msg}",
    line: |progress| format!("launcher: computing the digest of {}", name(progress.path)),
};

fn tables(task: &'static Task, path: &Path) -> impl FnMut(u64, u64) {
    let (show, mut start, mut last) = (shown(task), Instant::now(), 0);
    move |done, total| {
        if done < last {
            // Another pass has begun.
            start = Instant::now();
        }
        last = done;
        show(&Progress {
            path,
            done,
            total,
            elapsed: start.elapsed(),
        });
    }
}

fn shown(task: &'static Task) -> impl Fn(&Progress<'_>) {
    let terminal = io::stderr().is_terminal();
    let bar = Bar::new(task, ProgressDrawTarget::stderr);
    let line = OnceCell::new();
    move |progress| {
        if terminal {
            bar.show(progress);
        } else if late(progress) && line.set(()).is_ok() {
            // Nobody is left to tell if standard error is gone.
            let _ = writeln!(io::stderr(), "{}", (task.line)(progress));
        }
    }
}

/// Whether it has taken long enough to be shown, and is not done.
fn late(progress: &Progress<'_>) -> bool {
    progress.elapsed >= PATIENCE && progress.done < progress.total
}

/// A file's name, harmless on a terminal.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().escape_debug().to_string()
}

/// A bar that is there from the second on until it is dropped.
struct Bar {
    task: &'static Task,
    target: fn() -> ProgressDrawTarget,
    shown: OnceCell<ProgressBar>,
}

impl Bar {
    fn new(task: &'static Task, target: fn() -> ProgressDrawTarget) -> Self {
        Bar {
            task,
            target,
            shown: OnceCell::new(),
        }
    }

    fn show(&self, progress: &Progress<'_>) {
        if self.shown.get().is_none() && !late(progress) {
            return;
        }
        let bar = self.shown.get_or_init(|| {
            let style = ProgressStyle::with_template(self.task.style)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(Some(progress.total), (self.target)())
                .with_style(style.progress_chars("=> "))
                .with_prefix(name(progress.path))
        });
        // One of the three draws, at most twenty times a second.
        bar.set_length(progress.total);
        bar.set_message(left(progress));
        bar.set_position(progress.done);
    }
}

/// How long it will still take, going by how long it has taken.
fn left(progress: &Progress<'_>) -> String {
    let per_byte = progress.elapsed.as_secs_f64() / progress.done.max(1) as f64;
    let seconds = per_byte * progress.total.saturating_sub(progress.done) as f64;
    match Duration::try_from_secs_f64(seconds.round()) {
        Ok(left) => format!(", {:#} left", HumanDuration(left)),
        Err(_) => String::new(),
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.shown.get() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use indicatif::TermLike;

    use super::*;

    thread_local! {
        /// The line that the terminal of this thread's test shows.
        static LINE: RefCell<String> = const { RefCell::new(String::new()) };
    }

    /// A terminal of one line.
    #[derive(Debug)]
    struct Terminal;

    impl TermLike for Terminal {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            LINE.with_borrow_mut(|line| line.push_str(text));
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            LINE.with_borrow_mut(String::clear);
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn terminal() -> Bar {
        Bar::new(&ALLOCATING, || {
            ProgressDrawTarget::term_like(Box::new(Terminal))
        })
    }

    fn shown() -> String {
        LINE.with_borrow(|line| line.trim_end().to_owned())
    }

    fn progress(done: u64, millis: u64) -> Progress<'static> {
        Progress {
            path: Path::new("vms/a\u{1b}.img"),
            done: done << 30,
            total: 4 << 30,
            elapsed: Duration::from_millis(millis),
        }
    }

    #[test]
    fn there_is_no_bar_within_the_first_second_or_at_the_end() {
        let bar = terminal();
        for progress in [progress(1, 500), progress(2, 999), progress(4, 1500)] {
            bar.show(&progress);
            assert_eq!(shown(), "");
        }
    }

    #[test]
    fn the_bar_has_file_and_sizes_and_goes_when_dropped() {
        let bar = terminal();
        bar.show(&progress(1, 1000));
        bar.show(&progress(2, 2000));
        let line = shown();
        assert!(
            line.starts_with("allocating a\\u{1b}.img [====="),
            "{line:?}"
        );
        assert!(line.ends_with("2.00 GiB of 4.00 GiB, 2s left"), "{line:?}");
        bar.show(&progress(4, 3000));
        drop(bar);
        assert_eq!(shown(), "");
    }

    #[test]
    fn a_check_counts_tables() {
        let bar = Bar::new(&CHECKING, || {
            ProgressDrawTarget::term_like(Box::new(Terminal))
        });
        bar.show(&Progress {
            path: Path::new("a.qcow2"),
            done: 3,
            total: 12,
            elapsed: Duration::from_secs(2),
        });
        let line = shown();
        assert!(line.starts_with("checking a.qcow2 [====="), "{line:?}");
        assert!(line.ends_with("3 of 12 L2 tables, 6s left"), "{line:?}");
    }

    #[test]
    fn a_file_of_unknown_size_is_counted_without_an_end() {
        let bar = Bar::new(&FETCHING_UNSIZED, || {
            ProgressDrawTarget::term_like(Box::new(Terminal))
        });
        bar.show(&Progress {
            path: Path::new("a.img"),
            done: 3 << 20,
            total: u64::MAX,
            elapsed: Duration::from_secs(2),
        });
        let line = shown();
        assert!(line.starts_with("fetching a.img "), "{line:?}");
        assert!(line.ends_with(" 3.00 MiB"), "{line:?}");
    }

    #[test]
    fn another_pass_may_have_another_length() {
        let bar = Bar::new(&READING, || {
            ProgressDrawTarget::term_like(Box::new(Terminal))
        });
        for (done, total) in [(9, 12), (1, 4)] {
            bar.show(&Progress {
                path: Path::new("a.qcow2"),
                done,
                total,
                elapsed: Duration::from_secs(2),
            });
        }
        let line = shown();
        assert!(line.starts_with("reading a.qcow2 [====="), "{line:?}");
        assert!(line.ends_with("1 of 4 L2 tables, 6s left"), "{line:?}");
    }

    #[test]
    fn a_line_names_file_and_size() {
        assert_eq!(
            (ALLOCATING.line)(&progress(1, 1000)),
            "launcher: allocating 4096 MiB for a\\u{1b}.img"
        );
    }
}
