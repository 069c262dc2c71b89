//! A thread that declares a device dead when it was removed, or when the process behind it has ended.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use blkdev::{
    thread::Role,
    wake::{Stop, Watcher, wait},
};
use blkdev_virtio::Liveness;

use crate::place::Place;

/// Interval of checks for the removal of the device. The kernel reports no event to its user.
const LOOK: Duration = Duration::from_secs(1);

const REMOVED: &str = "the vDPA device was removed";
const ENDED: &str = "the process behind it (VDUSE) has ended";

/// Watches the device and all `processes` behind it. The device is dead when the last of them has ended.
///
/// # Errors
/// No thread or file descriptor is left.
pub(crate) fn watch(place: Place, processes: Vec<OwnedFd>, life: &Arc<Liveness>) -> io::Result<Watcher> {
    let life = Arc::clone(life);
    Watcher::start(Role::Watcher, "vdpa", move |stop| {
        if let Some(why) = await_end(&place, processes, stop) {
            life.end(why);
        }
    })
}

/// Why the device is dead. `None`: it is closed.
fn await_end(place: &Place, mut processes: Vec<OwnedFd>, stop: &Stop) -> Option<&'static str> {
    let wake = stop.wake().as_fd();
    while !stop.is_requested() {
        if place.is_removed() {
            return Some(REMOVED);
        }
        let process = processes.last().map(AsFd::as_fd);
        let [_, has_ended] = wait([wake, process.unwrap_or(wake)], Some(LOOK));
        if process.is_some() && has_ended {
            processes.pop();
            if processes.is_empty() {
                return Some(ENDED);
            }
        }
    }
    None
}
