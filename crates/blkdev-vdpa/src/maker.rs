//! [`Maker`]: the process behind a VDUSE device. A device is reset only while such a process runs.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use blkdev::{
    Peer,
    thread::{Role, spawn},
    wake::Wake,
};

use crate::{
    place::Place,
    remains::{GRACE, RESET, Remains},
    vduse::Vduse,
};

/// Longest time for the requests in flight of a dead device whose rings show them, before it is reset.
const GRACE_MAX: Duration = Duration::from_secs(30);
/// Longest wait when the device is closed.
const MOMENT: Duration = Duration::from_secs(1);
/// Pauses between checks for a process, and for its requests.
const LOOK: Duration = Duration::from_millis(200);
const GLANCE: Duration = Duration::from_millis(10);

const UNSEEN: &str = "no process is visible behind the device (VDUSE), so a restart of it will not be noticed, and changes that it did \
                      not flush may be lost: run as the same user or as root, in the same PID namespace";

/// The process behind an open device, and the thread that closes the device.
#[derive(Debug)]
pub(crate) struct Maker {
    /// To the thread that closes the device.
    close: mpsc::Sender<Close>,
    peer: Arc<Peer>,
}

/// An order to close the device.
#[derive(Debug)]
struct Close {
    remains: Remains,
    is_dead: bool,
    name: String,
    /// Dropped when the device is closed.
    _done: mpsc::Sender<()>,
}

/// The thread that closes the device. It needs to see other processes, and the thread that drops the device may not be permitted to
/// (a sandbox). So it starts when the device is opened.
#[derive(Debug)]
struct Closer {
    place: Place,
    vduse: Vduse,
    /// The process is visible in /proc.
    is_seen: bool,
    /// Rung when no process can access our memory any more. The end of the process is not enough: the next process continues
    /// with the same rings until the device is reset.
    end: Wake,
}

impl Maker {
    /// The process behind the device at `place`, and descriptors that are readable when it has ended. `None`: it is no VDUSE device.
    ///
    /// # Errors
    /// No file descriptor or thread is left.
    pub(crate) fn at(place: &Place, name: &str) -> io::Result<Option<(Self, Vec<OwnedFd>)>> {
        let Some(vduse) = Vduse::at(place) else { return Ok(None) };
        let processes = vduse.processes();
        let is_seen = !processes.is_empty();
        if !is_seen {
            log::warn!("{name}: {UNSEEN}");
        }
        let end = Wake::new()?;
        let peer = Arc::new(Peer::new(end.as_fd().try_clone_to_owned()?, 0));
        let closer = Closer { place: place.clone(), vduse, is_seen, end };
        let (close, orders) = mpsc::channel();
        spawn(Role::Opener, "vduse", move || orders.into_iter().for_each(|order| closer.close(order)))?;
        Ok(Some((Self { close, peer }, processes)))
    }

    /// The process that may access our memory, or its successor.
    pub(crate) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Closes the device on the other thread, and waits for it. If the device is dead, it waits up to [`MOMENT`].
    pub(crate) fn close(self, remains: Remains, is_dead: bool, name: &str) {
        let (done, closed) = mpsc::channel();
        if self.close.send(Close { remains, is_dead, name: name.to_owned(), _done: done }).is_err() {
            return log::error!("{name}: the thread that closes it has ended");
        }
        let limit = if is_dead { MOMENT } else { RESET + MOMENT };
        let _ = closed.recv_timeout(limit);
    }
}

impl Closer {
    /// The kernel passes a reset on to the process, and the device is broken for good if none answers within half a minute. So
    /// the reset of a dead device waits for a process. That process first continues the requests of its predecessor, and
    /// qemu-storage-daemon aborts if the device is reset before they are completed.
    fn close(&self, Close { remains, is_dead, name, _done }: Close) {
        if is_dead && self.is_seen && !self.vduse.has_process() {
            log::warn!("{name}: it stays open, and is reset when there is a process behind it (VDUSE) again");
        }
        if is_dead && (!self.is_seen || self.await_process()) {
            settle(&remains);
        }
        let is_over = remains.reset().is_ok() || self.is_seen && !self.vduse.has_process();
        if is_over {
            // Before the file is closed, which lets the device be opened again.
            self.end.ring();
        }
        // Before the caller goes on.
        drop(remains);
    }

    /// Waits for a process. `false`: the device was removed first.
    fn await_process(&self) -> bool {
        loop {
            let start = Instant::now();
            if self.vduse.has_process() {
                return true;
            }
            if self.place.is_removed() {
                return false;
            }
            // The search takes long where there are many processes.
            thread::sleep(LOOK.max(10 * start.elapsed()));
        }
    }
}

/// Waits for the requests in flight.
fn settle(remains: &Remains) {
    let start = Instant::now();
    let limit = if remains.shows_requests() { GRACE_MAX } else { GRACE };
    while start.elapsed() < limit && remains.may_be_busy() {
        thread::sleep(GLANCE);
    }
}
