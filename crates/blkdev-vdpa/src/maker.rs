//! [`Maker`]: the process that makes a device with VDUSE. It is watched as long as the device is open, and awaited before the
//! device is reset.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blkdev::{
    Peer,
    wake::{Wake, Watcher},
};
use blkdev_virtio::Liveness;

use crate::{
    remains::{GRACE, Remains},
    sys::Vhost,
    vduse::Vduse,
};

/// Longest time for the requests in flight of a dead device whose rings show them, before it is reset.
const GRACE_MAX: Duration = Duration::from_secs(30);
/// Pauses between two looks for a process, and for its requests.
const LOOK: Duration = Duration::from_millis(200);
const GLANCE: Duration = Duration::from_millis(10);

const UNSEEN: &str = "no process is seen behind the device (VDUSE), so its restart will not be noticed, and changes that it did \
                      not flush may be lost: run as the same user or as root, in the same PID namespace";

#[derive(Debug)]
pub(crate) struct Maker {
    vduse: Vduse,
    /// Ends the life of the device with the process. `None`: this process does not see it.
    watcher: Option<Watcher>,
    /// Rung when no process accesses this one's memory any more. Its end is not enough: the next process goes on with the same
    /// rings until it is reset.
    end: Wake,
    peer: Arc<Peer>,
}

impl Maker {
    /// `None`: the device is of another kind.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub(crate) fn of(vhost: &Vhost, life: &Arc<Liveness>) -> io::Result<Option<Self>> {
        let Some(vduse) = Vduse::behind(vhost.as_fd()) else { return Ok(None) };
        let watcher = vduse.watch(life)?;
        if watcher.is_none() {
            log::warn!("{}: {UNSEEN}", life.name());
        }
        let end = Wake::new()?;
        let peer = Arc::new(Peer::new(end.as_fd().try_clone_to_owned()?, 0));
        Ok(Some(Self { vduse, watcher, end, peer }))
    }

    /// The process that may access this one's memory, or its successor.
    pub(crate) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Closes a device that is alive.
    pub(crate) fn close(self, remains: Remains) {
        remains.reset();
        // Before the file is closed, which lets the device be opened again.
        self.end.ring();
        drop(remains);
    }

    /// Closes a dead device, on a thread of its own.
    ///
    /// The kernel passes a reset on to the process, and the device is broken for good if none answers within half a minute. So
    /// the reset waits for a process. That one first goes on with the requests of its predecessor, and qemu-storage-daemon
    /// aborts if it is reset before it has completed them.
    pub(crate) fn bury(self, remains: Remains, name: &str) {
        let is_seen = self.watcher.is_some();
        if is_seen && !self.vduse.has_process() {
            log::warn!("{name}: it stays open, and is reset when there is a process behind it (VDUSE) again");
        }
        let bury = move || {
            while is_seen && !self.vduse.is_removed() && !self.vduse.has_process() {
                thread::sleep(LOOK);
            }
            self.settle(&remains);
            self.close(remains);
        };
        if let Err(e) = thread::Builder::new().name("vduse-reset".to_owned()).spawn(bury) {
            log::error!("{name}: cannot start a thread: {e}; the device is closed without waiting for its process");
        }
    }

    /// Waits for the requests in flight.
    fn settle(&self, remains: &Remains) {
        let start = Instant::now();
        let limit = if remains.shows_requests() { GRACE_MAX } else { GRACE };
        while start.elapsed() < limit && !self.vduse.is_removed() && remains.may_be_busy() {
            thread::sleep(GLANCE);
        }
    }
}
