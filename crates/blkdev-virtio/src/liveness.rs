//! [`Liveness`]: that of a virtio device, whose queues sleep on [`Notifier`]s.

use blkdev::liveness::{self, Sleeper};

use crate::notifier::Notifier;

/// The liveness of a device, shared by its transport and its queues. A transport to another process must call [`unblock`]
/// periodically.
pub type Liveness = liveness::Liveness<Notifier>;

impl Sleeper for Notifier {
    /// A queue with a readable eventfd wakes without a write.
    fn wake(&self) {
        self.ring_if_empty();
    }
}

/// Frees the thread that wakes the queues of a dead device, if another process makes it block. `last`: there will be no further
/// call.
pub fn unblock(life: &Liveness, last: bool) {
    if life.is_dead() {
        for call in life.sleepers().iter().filter(|call| last || call.is_still_stuck()) {
            call.unblock();
        }
    }
}
