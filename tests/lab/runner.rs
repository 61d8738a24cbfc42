//! Runs cases and reports each as `cargo test` does, one line a case as soon as it ends.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest;

/// How long a case may take before its guests are killed. Waits inside a case have shorter bounds of their
/// own; this one is for a case that waits in a way they do not see.
const CASE_LIMIT: Duration = Duration::from_secs(1200);
/// How long a case has to end once its guests are killed.
const GRACE: Duration = Duration::from_secs(60);

/// One behaviour, named after it.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    /// `theme::behaviour`.
    pub(crate) name: &'static str,
    /// Panics if the behaviour is not there.
    pub(crate) run: fn(),
}

/// Names a theme's cases: `cases![boot: first, second]`.
macro_rules! cases {
    ($theme:ident: $($case:ident),+ $(,)?) => {
        pub(crate) const CASES: &[$crate::runner::Case] = &[$($crate::runner::Case {
            name: concat!(stringify!($theme), "::", stringify!($case)),
            run: $case,
        }),+];
    };
}
pub(crate) use cases;

/// The part of libtest's command line that means something here.
#[derive(Default)]
pub(crate) struct Options {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    pub(crate) list: bool,
    /// How often each case is run, to look for what goes wrong only now and then.
    repeat: usize,
    pub(crate) threads: Option<usize>,
}

impl Options {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Options {
            repeat: 1,
            ..Options::default()
        };
        while let Some(argument) = arguments.next() {
            let (flag, mut value) = match argument.split_once('=') {
                Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
                _ => (argument.as_str(), None),
            };
            let mut operand = || {
                value
                    .take()
                    .or_else(|| arguments.next())
                    .ok_or(format!("{flag} needs a value"))
            };
            match flag {
                "--exact" => options.exact = true,
                "--list" => options.list = true,
                "--skip" => options.skip.push(operand()?),
                "--test-threads" => options.threads = Some(number(flag, &operand()?)?),
                "--repeat" => options.repeat = number(flag, &operand()?)?,
                "--nocapture" | "--no-capture" | "--quiet" | "-q" | "--include-ignored" => {}
                _ if flag.starts_with('-') => return Err(format!("the lab does not know {flag}")),
                _ => options.filters.push(argument),
            }
        }
        Ok(options)
    }

    /// The cases named, in the order of the list; with `--exact` in the order, and as often, as they are named.
    pub(crate) fn select(&self, all: &[Case]) -> Vec<Case> {
        let named = |name: &String| all.iter().find(|case| case.name == name).copied();
        if self.exact && !self.filters.is_empty() {
            let named: Vec<_> = self.filters.iter().filter_map(named).collect();
            return named.repeat(self.repeat);
        }
        let matches = |case: &Case, filters: &[String]| {
            let matches = |filter: &String| case.name.contains(filter.as_str());
            filters.iter().any(matches)
        };
        let selected: Vec<_> = all
            .iter()
            .filter(|case| self.filters.is_empty() || matches(case, &self.filters))
            .filter(|case| !matches(case, &self.skip))
            .copied()
            .collect();
        selected.repeat(self.repeat)
    }
}

fn number(flag: &str, value: &str) -> Result<usize, String> {
    value
        .parse()
        .map_err(|_| format!("{flag} {value}: not a number"))
}

/// What a run inside the outer machine prints every [`ALIVE_EVERY`], so that one that stands still is known.
pub(crate) const ALIVE: &str = "(alive)";
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// What came of a case: its name, how long it took, and what to print if it failed.
struct Outcome {
    name: &'static str,
    took: Duration,
    failure: Option<String>,
}

thread_local! {
    /// Message and place of the last panic on this thread.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs the cases, `threads` at a time, and prints each and the summary. True if all passed.
pub(crate) fn run(cases: &[Case], filtered: usize, threads: Option<usize>) -> bool {
    let started = Instant::now();
    panic::set_hook(Box::new(|info| {
        PANIC.with_borrow_mut(|message| *message = info.to_string());
    }));
    println!("\nrunning {} tests", cases.len());
    let threads = threads.unwrap_or_else(default_threads).max(1);
    let queue = Arc::new(Mutex::new(cases.iter().copied().collect::<VecDeque<_>>()));
    let running = Arc::new(Mutex::new(Vec::<(Case, Instant)>::new()));
    let (sender, outcomes) = mpsc::channel();
    for _ in 0..threads.min(cases.len()) {
        let (queue, running, sender) = (queue.clone(), running.clone(), sender.clone());
        thread::spawn(move || {
            loop {
                let Some(case) = queue.lock().unwrap().pop_front() else {
                    break;
                };
                running.lock().unwrap().push((case, Instant::now()));
                let outcome = run_case(case);
                running
                    .lock()
                    .unwrap()
                    .retain(|(other, _)| other.name != case.name);
                if sender.send(outcome).is_err() {
                    break;
                }
            }
        });
    }
    drop(sender);

    let mut failed = Vec::new();
    let mut passed = 0;
    let mut said = started;
    loop {
        if emulated() && said.elapsed() > ALIVE_EVERY {
            println!("{ALIVE}");
            said = Instant::now();
        }
        match outcomes.recv_timeout(Duration::from_secs(1)) {
            Ok(outcome) => match report(outcome) {
                Some(name) => failed.push(name),
                None => passed += 1,
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let overdue = running.lock().unwrap().clone();
                for (case, since) in overdue {
                    if since.elapsed() > CASE_LIMIT {
                        guest::kill_all(case.name);
                    }
                    if since.elapsed() > CASE_LIMIT + GRACE {
                        println!("test {} ... FAILED <it never ended>", case.name);
                        summary(passed, cases.len() - passed, filtered, started.elapsed());
                        return false;
                    }
                }
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:");
        for name in &failed {
            println!("    {name}");
        }
    }
    summary(passed, cases.len() - passed, filtered, started.elapsed());
    failed.is_empty() && passed == cases.len()
}

/// The closing line of `cargo test`, which whoever counts tests reads.
pub(crate) fn summary(passed: usize, failed: usize, filtered: usize, took: Duration) {
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; \
         {filtered} filtered out; finished in {:.2}s\n",
        took.as_secs_f64()
    );
}

/// A guest keeps one CPU busy and little else.
fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2))
}

/// How many guests of one run an emulated machine may lose, and how many of one case.
///
/// Software emulation of nested virtualisation loses a guest now and then: with KVM's usual page
/// tables one run in ten of a case that makes some hundred thousand exits, without the TDP MMU,
/// which scripts/outer therefore leaves out, none in 45, but one in some sixty boots of others, and
/// one in two of the longest, a Debian that installs and trims.
/// KVM's trace shows how: the guest comes back from an exit, as thousands before, and its CR3 is
/// not its own any more.
///
/// - The fetch of the next instruction, in the kernel's own text, is a page fault whose delivery
///   is one too: a triple fault.
/// - Or its page walk leaves guest memory (an NPF with RSVD, at an address that the guest has not
///   got). KVM takes that for a device's register, cannot fetch the instruction to emulate, and
///   reflects a page fault that cannot be delivered either, 24,000 times a second, while `launcher`
///   sleeps.
///
/// It happened with no disk at all, with emulated CPUs one after the other and in parallel, with
/// and without huge pages and 5-level paging, with kernels 6.1 and 6.12 outside. A case that lost
/// its guest is run again, and says so; on hardware, and past these numbers, it fails. What goes
/// wrong each time fails anyhow.
const EMULATED_LOSSES: u32 = 20;
const EMULATED_LOSSES_OF_A_CASE: u32 = 5;

/// What a lost guest looks like: a crash, or a console on which nothing comes any more.
const LOST: [&str; 5] = [
    "crashed (triple fault)",
    // The same of a VM in the background, as whoever is at its console sees it.
    "launcher ended with 0 before",
    // What a client is told at that moment, before the crash is on standard error.
    r#""kind":"ending""#,
    "on the console within",
    "launcher has not ended within",
];

/// Whether this runs inside the outer machine.
fn emulated() -> bool {
    std::env::var_os(guest::FILES).is_some()
}

fn run_case(case: Case) -> Outcome {
    static LOSSES: AtomicU32 = AtomicU32::new(0);
    for _ in 0..EMULATED_LOSSES_OF_A_CASE {
        let outcome = run_once(case);
        match &outcome.failure {
            Some(text)
                if emulated()
                    && LOST.iter().any(|lost| text.contains(lost))
                    && LOSSES.fetch_add(1, Ordering::Relaxed) < EMULATED_LOSSES =>
            {
                println!("again: {}, a guest lost in emulation\n{text}", case.name);
            }
            _ => return outcome,
        }
    }
    run_once(case)
}

fn run_once(case: Case) -> Outcome {
    let started = Instant::now();
    guest::begin(case.name);
    let result = panic::catch_unwind(AssertUnwindSafe(case.run));
    let failure = result.err().map(|payload| describe(&*payload));
    guest::end();
    Outcome {
        name: case.name,
        took: started.elapsed(),
        failure,
    }
}

fn describe(payload: &(dyn Any + Send)) -> String {
    // What ends says why only after those who have asked it for something know that it ends.
    thread::sleep(Duration::from_secs(1));
    let mut text = PANIC.with_borrow(String::clone);
    if text.is_empty() {
        text = payload
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_default();
    }
    text + &guest::transcripts()
}

/// Prints an outcome; the name if it failed.
fn report(outcome: Outcome) -> Option<&'static str> {
    let took = outcome.took.as_secs_f64();
    match outcome.failure {
        None => {
            println!("test {} ... ok <{took:.1}s>", outcome.name);
            None
        }
        Some(text) => {
            println!(
                "test {} ... FAILED <{took:.1}s>\n---- {} ----\n{text}\n----",
                outcome.name, outcome.name
            );
            Some(outcome.name)
        }
    }
}
