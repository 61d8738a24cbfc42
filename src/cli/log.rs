//! Our own log: lines on standard error, like the error messages.

use std::fmt;
use std::io::{self, Write};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::{Error, Result, messages};

/// The environment variable that sets the level.
const VARIABLE: &str = "LAUNCHER_LOG";

/// Starts the log on standard error at the level of `LAUNCHER_LOG`: error, warn (the default),
/// info, debug or trace. A second call changes nothing.
///
/// While [`RAW`](crate::terminal::RAW) is set, lines end in "\r\n".
pub fn init() -> Result<()> {
    let level = match std::env::var_os(VARIABLE) {
        None => LevelFilter::WARN,
        Some(value) => level(&value.to_string_lossy())?,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .event_format(Line)
        .with_writer(|| StandardError)
        .finish();
    // It fails if there is a log already: that one stays.
    let _ = tracing::subscriber::set_global_default(log);
    Ok(())
}

fn level(word: &str) -> Result<LevelFilter> {
    Ok(match word {
        "error" => LevelFilter::ERROR,
        "warn" | "" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => {
            return Err(Error::usage(format!(
                "{VARIABLE} is {word:?}, expected error, warn, info, debug or trace"
            )));
        }
    })
}

/// "warning: message key=value".
struct Line;

impl<S, F> FormatEvent<S, F> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, F>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str(match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "info: ",
            Level::DEBUG => "debug: ",
            Level::TRACE => "trace: ",
        })?;
        context
            .field_format()
            .format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Standard error, for a terminal in raw mode too. An event arrives in one piece.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        messages::log(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_line_has_its_level_message_and_fields() {
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl Write for Buffer {
            fn write(&mut self, text: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(text)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let log = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::WARN)
            .with_ansi(false)
            .event_format(Line)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(disk = 1, "a write failed");
            tracing::info!("not shown");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "warning: a write failed disk=1\n");
    }

    #[test]
    fn a_level_is_one_of_five_words() {
        assert_eq!(level("debug").unwrap(), LevelFilter::DEBUG);
        let error = level("loud").unwrap_err();
        assert_eq!(error.exit, 2);
        assert_eq!(
            error.to_string(),
            "error: LAUNCHER_LOG is \"loud\", expected error, warn, info, debug or trace"
        );
    }
}
