//! The comparison with QEMU works: every case is measured with everybody, and what was transferred
//! is right. How fast anybody is plays no part.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::time::Duration;

use side_by_side::case::{CLUSTER, Case};
use side_by_side::host::Host;
use side_by_side::measure::Options;
use side_by_side::{plot, table};

fn options(launcher: &Path) -> Options {
    Options {
        launcher: launcher.to_owned(),
        serve: Vec::new(),
        only: Vec::new(),
        rounds: 1,
        window: Duration::from_millis(20),
        warm_up: Duration::from_millis(5),
        area: 16 << 20,
        fresh: 64 * CLUSTER,
        iothread: false,
    }
}

#[test]
fn every_case_is_measured_with_everybody_and_verified() {
    // O_DIRECT needs a file system that has it, which the build's does.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = options(Path::new(env!("CARGO_BIN_EXE_launcher")));
    let host = Host::look(&options, folder.path()).unwrap();
    let rows = options.run(folder.path(), &mut |_| {}).unwrap();
    let cases: Vec<_> = rows.iter().map(|row| row.case).collect();
    assert_eq!(cases, Case::all());
    for row in &rows {
        assert_eq!(row.columns.len(), 3, "{}", row.case);
        for column in &row.columns {
            let [measured] = &column.rounds[..] else {
                panic!("{} rounds", column.rounds.len());
            };
            assert!(measured.requests > 0, "{}", row.case);
            if row.case.allocating {
                assert_eq!(measured.requests, 64, "{}", row.case);
            }
        }
    }
    let (text, markdown) = (table::text(&host, &rows), table::markdown(&host, &rows));
    let svg = plot::svg(&host, &rows);
    for case in cases.iter().map(Case::to_string) {
        assert!(text.contains(&case), "{text}");
        assert!(markdown.contains(&format!("| {case} |")), "{markdown}");
        assert!(svg.contains(&case), "{svg}");
    }
}

#[test]
fn a_server_that_does_not_start_is_told_with_what_it_said() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = folder.path().join("launcher");
    std::fs::write(&program, "#!/bin/sh\necho no such disk >&2\nexit 7\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    let options = Options {
        only: vec!["raw-write-4k-d1-warm".into()],
        ..options(&program)
    };
    let error = options.run(folder.path(), &mut |_| {}).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("raw-write-4k-d1-warm with launcher: "),
        "{text}"
    );
    assert!(
        text.contains("ended before it served, with exit status: 7"),
        "{text}"
    );
    assert!(text.ends_with("\n  it said: no such disk"), "{text}");
}
