//! The figures as tables: for a terminal, and as Markdown.

use crate::host::Host;
use crate::measure::{Column, Row};
use crate::statistics::Spread;

const HEAD: [&str; 9] = [
    "case",
    "launcher",
    "QEMU io_uring",
    "QEMU native or threads",
    "unit",
    "ratio to the better",
    "bar",
    "cpu us/request",
    "bar (<= 1)",
];

/// As lines for a terminal.
pub fn text(host: &Host, rows: &[Row]) -> String {
    let cells: Vec<_> = std::iter::once(HEAD.map(str::to_owned))
        .chain(rows.iter().map(cells))
        .collect();
    let mut out = conditions(host).join("\n") + "\n\n";
    for row in &cells {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let widths = cells.iter().map(|row| row[at].chars().count());
            line += &format!("{cell:<width$}  ", width = widths.max().unwrap_or(0));
        }
        out = out + line.trim_end() + "\n";
    }
    out + "\n" + &notes(rows)
}

/// As Markdown.
pub fn markdown(host: &Host, rows: &[Row]) -> String {
    let mut out = String::new();
    for line in conditions(host) {
        out += &format!("- {line}\n");
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    out = out + "\n" + &line(&HEAD.map(str::to_owned)) + &"|---".repeat(HEAD.len()) + "|\n";
    for row in rows {
        out += &line(&cells(row));
    }
    out + "\n" + &notes(rows)
}

fn conditions(host: &Host) -> [String; 4] {
    [
        host.machine.clone(),
        host.programs.clone(),
        host.rounds.clone(),
        format!("load before: {}", host.load),
    ]
}

fn cells(row: &Row) -> [String; 9] {
    let scale = scale(row);
    let speed = |column: Option<&Column>| column.map_or(String::new(), |it| figure(it, scale));
    let (bar, met) = row.verdict();
    let bar = match (bar, met) {
        (Some(bar), true) => format!("{bar:.1} met"),
        (Some(bar), false) => format!("{bar:.1} MISSED"),
        (None, _) => String::new(),
    };
    let other = row.columns.get(2);
    let name = other.map_or("", |column| column.side.name());
    let (ours, theirs) = (row.ours().processor(), row.best().processor());
    let ratio = row.processor_ratio();
    let met = if ratio <= 1.0 { "met" } else { "MISSED" };
    [
        row.case.to_string(),
        speed(row.columns.first()),
        speed(row.columns.get(1)),
        format!("{} {name}", speed(other)),
        if row.case.is_long() { "MiB/s" } else { "IOPS" }.into(),
        spread(row.ratio(), 2),
        bar,
        format!("{:.2} / {:.2}", ours.median, theirs.median),
        format!("{ratio:.2} {met}"),
    ]
}

/// From requests a second to what is shown.
fn scale(row: &Row) -> f64 {
    match row.case.is_long() {
        true => row.case.len as f64 / f64::from(1 << 20),
        false => 1.0,
    }
}

fn figure(column: &Column, scale: f64) -> String {
    let Spread {
        median,
        least,
        greatest,
    } = column.speed();
    let scaled = Spread {
        median: median * scale,
        least: least * scale,
        greatest: greatest * scale,
    };
    spread(scaled, 0)
}

fn spread(spread: Spread, digits: usize) -> String {
    let Spread {
        median,
        least,
        greatest,
    } = spread;
    format!("{median:.digits$} ({least:.digits$}..{greatest:.digits$})")
}

/// How long the flush after all requests of an allocating case took, which is in none of the
/// figures above; and how many bars were met.
fn notes(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows.iter().filter(|row| row.case.allocating) {
        let flushes = row.columns.iter().map(|column| {
            let seconds = column.rounds.iter().map(|it| it.flush.as_secs_f64());
            let median = Spread::of(seconds).median * 1000.0;
            format!("{} {median:.0} ms", column.side.name())
        });
        let flushes: Vec<_> = flushes.collect();
        out += &format!(
            "{}, the flush afterwards: {}.\n",
            row.case,
            flushes.join(", ")
        );
    }
    let with_bar = rows.iter().filter(|row| row.case.bar().is_some());
    let met = with_bar.clone().filter(|row| row.verdict().1).count();
    let lighter = rows.iter().filter(|row| row.processor_ratio() <= 1.0);
    out + &format!(
        "Bars met: {met} of {}; processor time for a request at most QEMU's: {} of {} rows.\n",
        with_bar.count(),
        lighter.count(),
        rows.len()
    )
}
