//! What was measured: for programs, and for people.

use std::time::Duration;

use serde::Serialize;

use super::MIB;
use super::load::Measured;
use crate::cli::output::{rough, table};
use crate::config::size;

/// What was measured, as programs see it.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) path: String,
    pub(super) format: &'static str,
    pub(super) size: u64,
    /// Bytes where reads go to: those that hold data.
    pub(super) data: u64,
    pub(super) o_direct: bool,
    pub(super) engine: &'static str,
    pub(super) rows: Vec<Row>,
}

/// One row of the table. Latencies are in microseconds.
#[derive(Serialize)]
pub(super) struct Row {
    pub(super) what: &'static str,
    pub(super) request_size: u64,
    pub(super) depth: usize,
    pub(super) requests: u64,
    pub(super) iops: f64,
    pub(super) mib_per_second: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
    /// Of all threads of this process.
    pub(super) cpu_us_per_request: f64,
}

impl Row {
    pub(super) fn of(what: &'static str, len: u64, depth: usize, measured: &Measured) -> Row {
        let seconds = measured.time.as_secs_f64();
        let count = measured.requests as f64;
        let micros = |time: Duration| time.as_nanos() as f64 / 1000.0;
        Row {
            what,
            request_size: len,
            depth,
            requests: measured.requests,
            iops: count / seconds,
            mib_per_second: count / seconds * len as f64 / MIB as f64,
            p50_us: micros(measured.latency.p50),
            p99_us: micros(measured.latency.p99),
            max_us: micros(measured.latency.max),
            cpu_us_per_request: micros(measured.processor) / count.max(1.0),
        }
    }

    fn cells(&self) -> [String; 9] {
        [
            self.what.to_owned(),
            size::show(self.request_size),
            self.depth.to_string(),
            format!("{:.0}", self.iops),
            format!("{:.1}", self.mib_per_second),
            format!("{:.1}", self.p50_us),
            format!("{:.1}", self.p99_us),
            format!("{:.1}", self.max_us),
            format!("{:.2}", self.cpu_us_per_request),
        ]
    }
}

impl Report {
    pub(super) fn shown(&self, wrote: bool) -> String {
        let (size, data) = (size::show(self.size), rough(self.data));
        let cache = match self.o_direct {
            true => "past the page cache",
            false => "through the page cache",
        };
        let mut text = format!(
            "{} ({}, {size}, {data} of it data), {cache}, by {}\n",
            self.path, self.format, self.engine
        );
        if self.data == 0 {
            text += "there is no data on it: reads find zeroes, without reading anything\n";
        }
        if wrote {
            text += "writes went to a new image beside it, which is gone\n";
        }
        let head = [
            "", "size", "depth", "IOPS", "MiB/s", "p50 us", "p99 us", "max us", "cpu us",
        ];
        let head = head.map(str::to_owned);
        let rows: Vec<_> = [head]
            .into_iter()
            .chain(self.rows.iter().map(Row::cells))
            .collect();
        text + "\n" + &table(&rows)
    }
}
