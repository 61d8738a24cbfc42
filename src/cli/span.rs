//! Time spans on the command line and in what is printed.

use std::time::Duration;

use crate::config::span_parts;

/// Reads a span as in a VM's file: "500ms", "30s", "2m" or "1h", at most a day; for
/// [`clap::Arg::value_parser`].
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    const LONGEST: u64 = 24 * 3_600_000;
    let (number, millis) = span_parts(text);
    let Some(millis) = millis else {
        return Err(match !text.is_empty() && number == text {
            true => format!("write \"{number}s\" for seconds"),
            false => "expected a time such as 500ms, 30s or 2m".to_owned(),
        });
    };
    let number = number.parse::<u64>().ok();
    match number.and_then(|number| number.checked_mul(millis)) {
        Some(millis @ 0..=LONGEST) => Ok(Duration::from_millis(millis)),
        _ => Err("expected a time such as 500ms, 30s or 2m, at most 24h".to_owned()),
    }
}

/// A time span to get an idea of: its two largest units.
pub(super) fn rough(span: Duration) -> String {
    let seconds = span.as_secs();
    let two = |large: u64, unit: &str, small: u64, other: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit} {small}{other}"),
    };
    match seconds {
        0 => format!("{}ms", span.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3600 => two(seconds / 60, "m", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds / 60 % 60, "m"),
        _ => two(seconds / 86_400, "d", seconds / 3600 % 24, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_a_unit() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("0s"), Ok(Duration::ZERO));
        assert_eq!(parse("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse("30"), Err("write \"30s\" for seconds".to_owned()));
        for wrong in [
            "",
            "s",
            "-1s",
            "1.5s",
            "25h",
            "99999999999999999999s",
            "1 s",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_span_is_told_in_its_two_largest_units() {
        for (millis, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (59_999, "59s"),
            (60_000, "1m"),
            (3_599_000, "59m 59s"),
            (7_260_000, "2h 1m"),
            (90_000_000, "1d 1h"),
        ] {
            assert_eq!(rough(Duration::from_millis(millis)), text);
        }
    }
}
