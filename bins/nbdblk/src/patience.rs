//! Waits for a device that is not there yet.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blkdev::{Context, Device};
use blkdev_drivers::Settings;

/// Pauses between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Opens a device. While it is absent or busy, tries again, at most for `time`.
///
/// # Errors
/// It is not there in time, or cannot be opened for another reason.
pub(crate) fn open(settings: &Settings, export: &str, time: Duration) -> io::Result<Arc<dyn Device>> {
    let (start, mut pause) = (Instant::now(), PAUSE_MIN);
    loop {
        let error = match settings.open() {
            Ok(device) => return Ok(device),
            Err(error) if time.is_zero() || !may_pass(error.kind()) => return Err(error),
            Err(error) => error,
        };
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(Context::wrap(format!("not there after {time:?}: {error}"), error));
        }
        if pause == PAUSE_MIN {
            log::warn!("export {export:?}: waiting up to {time:?} for its device: {error}");
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Whether a device that cannot be opened for this reason may be there later.
fn may_pass(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::TimedOut
            | ErrorKind::ResourceBusy
            | ErrorKind::NotConnected
    )
}
