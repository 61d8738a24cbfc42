//! Which CPUs of the host a disk's thread runs on.

use std::io;

use formats::OpenError;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Has the thread that calls this, and those that it starts, run on these CPUs; none is any.
pub(super) fn pin(cpus: &[u16]) -> Result<(), OpenError> {
    if cpus.is_empty() {
        return Ok(());
    }
    let there = usable().map_err(failed)?;
    let mut wanted = CpuSet::new();
    for cpu in cpus {
        let index = usize::from(*cpu);
        if index >= CpuSet::MAX_CPU || !there.is_set(index) {
            return Err(OpenError {
                message: format!(
                    "`cpus` has {cpu}, expected CPUs of this host: {}",
                    show(&there)
                ),
                help: Some("`lscpu --extended` tells which CPUs share a core or memory".into()),
                key: "cpus",
            });
        }
        wanted.set(index);
    }
    sched_setaffinity(None, &wanted).map_err(|error| failed(error.into()))
}

/// The CPUs that this thread may have, and has from now on: those that are online, less those
/// that its control group keeps from it.
fn usable() -> io::Result<CpuSet> {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
    sched_setaffinity(None, &all)?;
    Ok(sched_getaffinity(None)?)
}

fn failed(error: io::Error) -> OpenError {
    OpenError {
        message: format!("cannot choose CPUs for a disk's thread: {error}"),
        help: Some("leave `cpus` out".into()),
        key: OpenError::HOST,
    }
}

/// As the kernel lists them: `0-3,8`.
fn show(cpus: &CpuSet) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu)) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let shown = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    shown.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu));
        set
    }

    #[test]
    fn a_thread_is_pinned_to_cpus_of_the_host() {
        // On a thread of its own: others keep theirs.
        let pinned = thread::spawn(|| {
            let there = usable().unwrap();
            let last = (0..CpuSet::MAX_CPU)
                .rfind(|cpu| there.is_set(*cpu))
                .unwrap();
            pin(&[last as u16]).unwrap();
            let alone = sched_getaffinity(None).unwrap() == set(&[last]);
            pin(&[]).unwrap();
            alone && sched_getaffinity(None).unwrap() == set(&[last])
        });
        assert!(pinned.join().unwrap());
    }

    #[test]
    fn a_cpu_that_the_host_has_not_got_is_refused() {
        for cpu in [CpuSet::MAX_CPU as u16 - 1, u16::MAX] {
            let refused = thread::spawn(move || pin(&[0, cpu]).unwrap_err());
            let refused = refused.join().unwrap();
            assert_eq!(refused.key, "cpus");
            let start = format!("`cpus` has {cpu}, expected CPUs of this host: ");
            assert!(refused.message.starts_with(&start), "{}", refused.message);
        }
    }

    #[test]
    fn cpus_are_listed_as_the_kernel_does() {
        assert_eq!(show(&set(&[0])), "0");
        assert_eq!(show(&set(&[0, 1, 2, 5, 8, 9])), "0-2,5,8-9");
    }
}
