//! [`Queue`]: one open queue of a device.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use blkdev::{Completion, Error, Op, Request, wake::now};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::{
    config::SECTOR,
    core::{Core, DRAIN, wait},
    layout::{Chain, Data, Used},
    notifier::Notifier,
    ring::Virtqueue,
    transport::{Doorbell, Transport},
};

/// One open queue.
pub(crate) struct Queue<T: Transport, V: Virtqueue<Request>> {
    core: Arc<Core<T>>,
    index: u16,
    ring: V,
    bell: T::Doorbell,
    call: Arc<Notifier>,
    /// The queue was armed since the eventfd was last emptied, so the device may have written to it.
    drain_call: bool,
    /// Requests that ended in `push`.
    ended: Vec<Completion>,
    /// Released last: then the window of `ring` on the queue's memory is gone.
    claim: Claim<T>,
}

/// The claim of a queue's number, and with it of its memory.
struct Claim<T: Transport> {
    core: Arc<Core<T>>,
    index: u16,
    /// The device may still use the memory, so the claim stays.
    is_kept: bool,
}

impl<T: Transport> Claim<T> {
    fn new(core: &Arc<Core<T>>) -> io::Result<Self> {
        Ok(Self { index: core.claim()?, core: Arc::clone(core), is_kept: false })
    }
}

impl<T: Transport> Drop for Claim<T> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.core.release(self.index);
        }
    }
}

impl<T: Transport, V: Virtqueue<Request>> Queue<T, V> {
    pub(crate) fn open(core: &Arc<Core<T>>, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let claim = Claim::new(core)?;
        let index = claim.index;
        let (ring, bell, call) = core.start::<V>(index, depth)?;
        let core = Arc::clone(core);
        // The eventfd may still be readable from the queue's previous use.
        Ok(Box::new(Self { core, index, ring, bell, call, drain_call: true, ended: Vec::new(), claim }))
    }

    /// Takes what the device has completed. `false`: it is dead, and its requests in flight are still in the ring.
    #[inline]
    fn collect(&mut self, done: &mut Vec<Completion>) -> bool {
        done.append(&mut self.ended);
        if self.core.life.is_dead() {
            return false;
        }
        loop {
            match self.ring.pop() {
                Ok(Some(used)) => done.push(complete(used, self.core.clear_reads)),
                Ok(None) => return true,
                Err(nonsense) => {
                    self.core.end(&format!("queue {}: {nonsense}", self.index));
                    return false;
                }
            }
        }
    }

    /// Ends a request without sending it to the device.
    #[cold]
    fn refuse(&mut self, request: Request, error: Error) -> Result<(), Request> {
        self.ended.push(request.refuse(error));
        Ok(())
    }
}

impl<T: Transport, V: Virtqueue<Request>> blkdev::Queue for Queue<T, V> {
    #[inline]
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        if self.core.life.is_dead() {
            return self.refuse(request, Error::Gone);
        }
        let sector = |at: u64| at / SECTOR;
        let (kind, at, data) = match &mut request.op {
            Op::Read { at, buf } => {
                if self.core.clear_reads {
                    buf.zero(0, buf.len());
                }
                (VIRTIO_BLK_T_IN, *at, Data::In(buf.iova(), buf.len() as u32))
            }
            Op::Write { at, buf, .. } => (VIRTIO_BLK_T_OUT, *at, Data::Out(buf.iova(), buf.len() as u32)),
            Op::Zero { at, len, unmap } => {
                let unmap = *unmap && self.core.config.zero_may_unmap;
                let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
                (VIRTIO_BLK_T_WRITE_ZEROES, 0, range(*at, *len, flags))
            }
            Op::Discard { at, len } => (VIRTIO_BLK_T_DISCARD, 0, range(*at, *len, 0)),
            Op::Flush => (VIRTIO_BLK_T_FLUSH, 0, Data::None),
            // Not among this device's `Caps`, so a caller never pushes it.
            Op::Status { .. } | Op::Prefetch { .. } => return self.refuse(request, Error::NotSupported),
        };
        self.ring.push(&Chain { header: [u64::from(kind), sector(at)], data }, request)
    }

    #[inline]
    fn kick(&mut self) {
        // A dead device gets no more requests: those in the ring end, or have ended, with an error.
        if !self.core.life.is_dead() && self.ring.publish() {
            self.bell.ring();
        }
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        if !self.collect(done) {
            done.extend(self.ring.take_all().map(Request::lose));
        }
    }

    #[inline]
    fn reap_unfinished(&mut self, done: &mut Vec<Completion>, unfinished: &mut Vec<Request>) {
        if !self.collect(done) {
            unfinished.extend(self.ring.take_all());
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.call.as_fd())
    }

    fn arm(&mut self) -> bool {
        if self.drain_call {
            self.call.drain();
            self.drain_call = false;
        }
        // Only after emptying the eventfd: `Liveness::end` sets its mark first and then writes to the eventfd.
        fence(Ordering::SeqCst);
        if self.core.life.is_dead() {
            // If nothing is left to finish, no wake-up is needed. `push` handles later requests.
            return self.ring.in_flight() == 0 && self.ended.is_empty();
        }
        self.drain_call = true;
        self.ended.is_empty() && self.ring.arm()
    }

    fn give_up(&mut self) {
        let (count, state) = (self.ring.in_flight(), self.ring.describe());
        self.core.end(&format!("queue {}: abandoned with {count} requests in flight ({state})", self.index));
    }

    fn describe(&self) -> String {
        let (count, state) = (self.ring.in_flight(), self.ring.describe());
        format!("queue {}: {count} requests at the device, {state}", self.index)
    }

    fn is_dead(&self) -> bool {
        self.core.life.is_dead()
    }
}

/// `struct virtio_blk_discard_write_zeroes` (virtio 1.2, 5.2.6).
#[inline]
fn range(at: u64, len: u64, flags: u32) -> Data {
    Data::Segment([at / SECTOR, (len / SECTOR) | (u64::from(flags) << 32)])
}

#[inline(always)]
fn complete(used: Used<Request>, cleared: bool) -> Completion {
    let Request { tag, op } = used.owner;
    let result = match u32::from(used.status) {
        VIRTIO_BLK_S_OK => match &op {
            // The unwritten part of the buffer holds another request's old data.
            Op::Read { buf, .. } if (used.len as usize) < buf.len() && !cleared => Err(Error::Io),
            _ => Ok(()),
        },
        VIRTIO_BLK_S_UNSUPP => Err(Error::NotSupported),
        VIRTIO_BLK_S_IOERR => Err(Error::Io),
        _ => Err(Error::Io),
    };
    Completion { tag, op, result }
}

impl<T: Transport, V: Virtqueue<Request>> Drop for Queue<T, V> {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let deadline = now() + self.core.info.timeout.map_or(DRAIN, |t| t.min(DRAIN));
        blkdev::Queue::kick(self);
        loop {
            blkdev::Queue::reap(self, &mut done);
            done.clear();
            if self.ring.in_flight() == 0 || self.core.life.is_dead() {
                break;
            }
            if blkdev::Queue::arm(self) && !wait(&self.call, &self.core.life, deadline) {
                blkdev::Queue::give_up(self);
            }
        }
        self.core.life.unwatch(&self.call);
        if self.core.life.is_dead() {
            // The ring memory must not be reused either: the queue stays claimed.
            self.claim.is_kept = true;
            return;
        }
        if let Err(e) = self.core.stop(self.index, &self.ring) {
            self.claim.is_kept = true;
            self.core.end(&format!("cannot stop queue {}: {e}", self.index));
        }
    }
}
