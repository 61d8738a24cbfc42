//! How snapshots are shown.

use std::time::Duration;

use formats::qcow2;
use serde::Serialize;

use crate::cli::output::{rough, table};
use crate::config::size;

/// A snapshot as programs see it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Listed {
    id: String,
    name: String,
    /// Seconds since the beginning of 1970 in UTC.
    date: u64,
    /// In bytes; null if its maker did not write it down.
    disk_size: Option<u64>,
    /// In bytes.
    vm_state_size: u64,
    /// How long the guest had run, in nanoseconds.
    vm_clock_ns: u64,
    icount: Option<u64>,
}

impl From<&qcow2::Snapshot> for Listed {
    fn from(snapshot: &qcow2::Snapshot) -> Self {
        Listed {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            date: snapshot.date.as_secs(),
            disk_size: snapshot.disk_size,
            vm_state_size: snapshot.vm_state_size,
            vm_clock_ns: u64::try_from(snapshot.vm_clock.as_nanos()).unwrap_or(u64::MAX),
            icount: snapshot.icount,
        }
    }
}

/// Snapshots as people see them.
pub(super) fn listing(snapshots: &[Listed]) -> String {
    if snapshots.is_empty() {
        return "no snapshots\n".to_owned();
    }
    let mut rows = vec![["SNAPSHOT ID", "NAME", "DATE", "SIZE", "VM STATE"].map(str::to_owned)];
    rows.extend(snapshots.iter().map(|snapshot| {
        [
            shown(&snapshot.id),
            shown(&snapshot.name),
            utc(Duration::from_secs(snapshot.date)),
            snapshot.disk_size.map_or("-".to_owned(), size::show),
            match snapshot.vm_state_size {
                0 => "-".to_owned(),
                len => rough(len),
            },
        ]
    }));
    table(&rows)
}

/// A text from an image, harmless on a terminal.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

/// A date since the beginning of 1970 as people write it.
pub(super) fn utc(date: Duration) -> String {
    let secs = date.as_secs();
    let (mut days, in_day) = (secs / 86_400, secs % 86_400);
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while let Some(len) = months.get(month).filter(|len| days >= **len) {
        days -= len;
        month += 1;
    }
    let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
    format!(
        "{year}-{:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC",
        month + 1,
        days + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_year_month_day_and_time_in_utc() {
        for (secs, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_700_000_000, "2023-11-14 22:13:20 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (u32::MAX.into(), "2106-02-07 06:28:15 UTC"),
        ] {
            assert_eq!(utc(Duration::from_secs(secs)), text);
        }
    }

    fn snapshot(name: &str, disk_size: Option<u64>, vm_state_size: u64) -> qcow2::Snapshot {
        qcow2::Snapshot {
            l1_table_offset: 0x50000,
            l1_size: 1,
            id: "1".into(),
            name: name.into(),
            date: Duration::from_secs(1_700_000_000),
            vm_clock: Duration::from_secs(2),
            vm_state_size,
            disk_size,
            icount: None,
        }
    }

    #[test]
    fn each_snapshot_has_a_row() {
        assert_eq!(listing(&[]), "no snapshots\n");
        let snapshots = [
            Listed::from(&snapshot("fresh", Some(1 << 30), 0)),
            Listed::from(&snapshot("\x1b[2Jx", None, 5 << 20)),
        ];
        assert_eq!(
            listing(&snapshots),
            "SNAPSHOT ID  NAME        DATE                     SIZE  VM STATE\n\
             1            fresh       2023-11-14 22:13:20 UTC  1GiB  -\n\
             1            \\u{1b}[2Jx  2023-11-14 22:13:20 UTC  -     5MiB\n"
        );
        let json = serde_json::to_value(&snapshots[1]).unwrap();
        assert_eq!(json["name"], "\x1b[2Jx");
        assert_eq!(json["disk_size"], serde_json::Value::Null);
        assert_eq!(json["vm_clock_ns"], 2_000_000_000u64);
    }
}
