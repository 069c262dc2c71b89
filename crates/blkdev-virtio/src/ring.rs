//! [`Virtqueue`]: the driver's side of a virtqueue, whatever its format.

use crate::{
    layout::{Chain, Place, RingError, Used},
    slots::Slots,
};

/// The driver's side of a virtqueue, in one of the formats. `T` is what a request's owner gets back with it.
pub(crate) trait Virtqueue<T>: Sized + Send + 'static {
    /// Goes on in a queue that nothing is in flight in. Of a new one all memory is zero, and `place` is
    /// [`Place::start`].
    fn resume(slots: Slots<T>, event_idx: bool, place: Place) -> Self;

    /// Where the queue has got to. Nothing is in flight, and what was pushed is published.
    fn place(&self) -> Place;

    fn in_flight(&self) -> usize;

    /// Takes every request out, for when the device is dead.
    fn take_all(&mut self) -> impl Iterator<Item = T>;

    /// Lays a request out in the ring; the device does not know yet. Full: `owner` comes back.
    fn push(&mut self, chain: &Chain, owner: T) -> Result<(), T>;

    /// Shows the device what was pushed. Tells whether it wants to be notified.
    fn publish(&mut self) -> bool;

    /// The next request that the device has given back. After an error the queue must not be used any more.
    fn pop(&mut self) -> Result<Option<Used<T>>, RingError>;

    /// Asks for a notification when something else is given back. `false`: something is, and none was asked for.
    fn arm(&mut self) -> bool;
}
