//! Log records as lines on stderr: warnings and errors always, more with `-v`.

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Starts logging. `verbose` counts the `-v`: information, debugging, everything.
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    log::set_logger(&Stderr).expect("the logger is set once, at the start");
    log::set_max_level(level);
}

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args();
        crate::complain(&match record.level() {
            Level::Error => format!("error: {text}"),
            Level::Warn => format!("warning: {text}"),
            Level::Info => text.to_string(),
            Level::Debug | Level::Trace => format!("{}: {text}", record.target()),
        });
    }

    fn flush(&self) {}
}
