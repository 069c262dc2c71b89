//! [`Virtqueue`]: the driver side of a virtqueue, in either format.

use crate::{
    layout::{Chain, Place, RingError, Used},
    slots::Slots,
};

/// The driver side of a virtqueue, in one of the formats. `T` identifies a request to its owner; it comes back with the
/// request.
pub(crate) trait Virtqueue<T>: Sized + Send + 'static {
    /// Continues a queue with no requests in flight. For a new queue all memory is zero, and `place` is [`Place::start`].
    fn resume(slots: Slots<T>, event_idx: bool, place: Place) -> Self;

    /// The current position of the queue. Requires that nothing is in flight and every push is published.
    fn place(&self) -> Place;

    fn in_flight(&self) -> usize;

    /// Removes and returns all requests. For a dead device.
    fn take_all(&mut self) -> impl Iterator<Item = T>;

    /// Writes a request into the ring, not yet visible to the device. Returns `owner` if the queue is full.
    fn push(&mut self, chain: &Chain, owner: T) -> Result<(), T>;

    /// Makes pushed requests visible to the device. Returns whether the device wants a notification.
    fn publish(&mut self) -> bool;

    /// Returns the next used request. After an error the queue must not be used again.
    fn pop(&mut self) -> Result<Option<Used<T>>, RingError>;

    /// Its positions, for log messages.
    fn describe(&self) -> String;

    /// Requests a notification for the next used request. `false`: a request is used already, and no notification was
    /// requested.
    fn arm(&mut self) -> bool;
}

/// Whether notifications are requested, for log messages.
pub(crate) fn on(armed: bool) -> &'static str {
    if armed { "on" } else { "off" }
}
