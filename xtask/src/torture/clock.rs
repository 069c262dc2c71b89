//! The clock that all processes of the torture share.

use nix::time::{ClockId, clock_gettime};

/// Milliseconds of CLOCK_MONOTONIC.
pub(crate) type Millis = u64;

/// The present time.
pub(crate) fn now() -> Millis {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has a monotonic clock");
    time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000
}

/// Milliseconds that two spans of time have in common.
pub(crate) fn overlap(a: (Millis, Millis), b: (Millis, Millis)) -> Millis {
    a.1.min(b.1).saturating_sub(a.0.max(b.0))
}
