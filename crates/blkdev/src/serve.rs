//! [`Serve`]: a device of your own in one method.

use std::{
    io,
    sync::atomic::{AtomicU16, Ordering},
};

use crate::{
    device::{Info, Op},
    error::Error,
};

/// A device of your own in one method.
///
/// Implement [`Serve`] and wrap it: in [`Inline`](crate::Inline) if every request is answered within microseconds, or in
/// [`Blocking`](crate::Blocking) if a request may wait for something (a network, another program, a slow library).
///
/// A driver that hands requests to hardware or to the kernel implements [`Queue`](crate::Queue) itself.
///
/// ```
/// use std::sync::Arc;
///
/// use blkdev::{Blocking, Error, Info, Op, Plan, Serve};
///
/// /// A read-only device in which each 8 bytes hold their own offset.
/// struct Offsets(Info);
///
/// impl Serve for Offsets {
///     fn info(&self) -> &Info {
///         &self.0
///     }
///
///     fn capacity(&self) -> u64 {
///         1 << 40
///     }
///
///     fn serve(&self, op: &mut Op) -> Result<(), Error> {
///         let Op::Read { at, buf } = op else { return Err(Error::NotSupported) };
///         for n in (0..buf.len()).step_by(8) {
///             buf.copy_from(n, &(*at + n as u64).to_be_bytes());
///         }
///         Ok(())
///     }
/// }
///
/// let mut info = Info::new("offsets", "1 TiB");
/// (info.block_size, info.caps.read_only) = (8, true);
/// let device = Blocking::new(Offsets(info), 4).into_device();
/// let mut channel = Plan::default().open(&device, 1)?.remove(0);
/// let mut bytes = [0; 4];
/// channel.read_at(0x123_4504, &mut bytes)?;
/// assert_eq!(bytes, [0x01, 0x23, 0x45, 0x00]);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// A request that panics fails with [`Error::Io`] in `Blocking`; in `Inline` it ends the device.
pub trait Serve: Send + Sync + 'static {
    /// Limits and capabilities. They must not change while the device is open. See [`Info::new`].
    fn info(&self) -> &Info;

    /// Size in bytes, a multiple of [`Info::block_size`]. May change while the device is open.
    fn capacity(&self) -> u64;

    /// Serves a request: fills the buffer of a READ, takes that of a WRITE, appends to the extents of a STATUS. It may rely on
    /// what [`Queue::push`](crate::Queue::push) promises. Called from several threads at a time.
    ///
    /// # Errors
    /// The request fails. The device goes on.
    fn serve(&self, op: &mut Op) -> Result<(), Error>;
}

/// Counts queues. Each is one until it is dropped.
pub(crate) fn open_one(open: &AtomicU16, info: &Info) -> io::Result<()> {
    let max = info.queues_max;
    let another = |open: u16| (open < max).then_some(open + 1);
    match open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, another) {
        Ok(_) => Ok(()),
        Err(_) => {
            let text = format!("{}: all of its {max} queues are open: use fewer threads", info.driver);
            Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
        }
    }
}
