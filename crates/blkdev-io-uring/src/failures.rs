//! [`Failures`]: logs one line for each kind of error, not for each request.

use std::{
    io,
    sync::Mutex,
    time::{Duration, Instant},
};

/// After a logged error, errors of the same kind are only counted for this time.
const QUIET: Duration = Duration::from_secs(60);

/// The errors of one device.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    kinds: Mutex<Vec<Kind>>,
}

/// The errors of one operation with one errno.
#[derive(Debug)]
struct Kind {
    operation: &'static str,
    errno: i32,
    logged: Instant,
    hidden: u64,
}

impl Failures {
    /// Logs a failed operation on `target`, unless this kind of error was logged recently. `errno` 0: end of file.
    #[cold]
    pub(crate) fn report(&self, target: &str, operation: &'static str, at: u64, len: u64, errno: i32) {
        let Some(hidden) = self.count(operation, errno, Instant::now()) else { return };
        let why = match errno {
            0 => "the file or disk has shrunk".into(),
            errno => io::Error::from_raw_os_error(errno).to_string(),
        };
        let more = if hidden > 0 { format!("; {hidden} similar errors since the last message") } else { String::new() };
        log::error!("{target}: {operation} of {len} bytes at offset {at} failed: {why}{more}");
    }

    /// Counts an error. `Some`: the error is to be logged, with the number of errors not logged before it.
    fn count(&self, operation: &'static str, errno: i32, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(|e| e.into_inner());
        let Some(kind) = kinds.iter_mut().find(|kind| kind.operation == operation && kind.errno == errno) else {
            kinds.push(Kind { operation, errno, logged: now, hidden: 0 });
            return Some(0);
        };
        if now.saturating_duration_since(kind.logged) < QUIET {
            kind.hidden += 1;
            return None;
        }
        kind.logged = now;
        Some(std::mem::take(&mut kind.hidden))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_logged_once_a_minute() {
        let (failures, start) = (Failures::default(), Instant::now());
        let count = |operation, errno, seconds| failures.count(operation, errno, start + Duration::from_secs(seconds));
        assert_eq!(count("read", libc::EIO, 0), Some(0));
        assert_eq!(count("read", libc::EIO, 1), None);
        assert_eq!(count("read", libc::EIO, 59), None);
        assert_eq!(count("read", libc::ENOSPC, 59), Some(0));
        assert_eq!(count("write", libc::EIO, 59), Some(0));
        assert_eq!(count("read", libc::EIO, 60), Some(2));
        assert_eq!(count("read", libc::EIO, 61), None);
        assert_eq!(count("read", libc::EIO, 200), Some(1));
    }
}
