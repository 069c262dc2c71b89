//! [`Core`]: the state shared by a controller, its queues and its watching thread.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use blkdev::{Context, Info, Mapping, liveness::Liveness, wake::Wake};
use blkdev_vfio::PciDevice;

use crate::{
    admin::{self, Admin},
    limits::Disk,
    pair::{Addresses, Bells, Flights, Layout, Pair, Stage},
    registers::{Registers, stop},
    spec::{self, Command},
};

/// The state shared by the device, its queues and the watching thread.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) pci: Arc<dyn PciDevice>,
    pub(crate) registers: Registers,
    pub(crate) life: Arc<Liveness>,
    pub(crate) info: Info,
    pub(crate) capacity: AtomicU64,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) disk: Disk,
    /// Contiguous memory is described by a single SGL descriptor.
    pub(crate) sgl: bool,
    /// The controller can report namespace changes.
    pub(crate) tells: bool,
    pub(crate) page_shift: u32,
    pub(crate) addresses: Addresses,
    pub(crate) queue_layout: Layout,
    /// One eventfd for each vector; the first belongs to the admin queue.
    pub(crate) wakes: Vec<Arc<Wake>>,
    /// For each I/O queue: its commands in flight, while it is open.
    pub(crate) queues: Mutex<Vec<Place>>,
    /// Counts ticks: eighths of the time-out.
    pub(crate) clock: Arc<AtomicU32>,
    pub(crate) shutdown: Duration,
    /// Number of resets so far.
    pub(crate) resets: AtomicU64,
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    Free,
    /// The queue is being opened or closed, or the device may still write to its memory.
    Taken,
    Open(Open),
}

/// An open queue, as seen by other threads than its owner.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) flights: Arc<Flights>,
    pub(crate) size: u16,
    pub(crate) submission: u64,
    pub(crate) completion: u64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(crate) fn open_queue(&self, depth: u16) -> io::Result<(Pair<blkdev::Request>, Arc<Wake>)> {
        let index = {
            let mut queues = lock(&self.queues);
            let free = queues.iter().position(|place| matches!(place, Place::Free)).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!("{}: all {} queues are open", self.info.target, queues.len()),
                )
            })?;
            queues[free] = Place::Taken;
            free
        };
        let opened = self.create(index as u16 + 1, depth);
        if opened.is_err() && !self.life.is_dead() {
            lock(&self.queues)[index] = Place::Free;
        }
        opened.map_err(|e| Context::wrap(format!("{}: queue {}: {e}", self.info.target, index + 1), e))
    }

    pub(crate) fn create(&self, id: u16, depth: u16) -> io::Result<(Pair<blkdev::Request>, Arc<Wake>)> {
        let size = depth.clamp(1, self.queue_layout.slots()) + 1;
        let layout = Layout { size, ..self.queue_layout };
        let memory = Mapping::new(layout.len())?;
        self.pci.dma_map(&memory)?;
        let bells = Bells::new(&self.registers.bar, id, self.registers.stride());
        let pair = Pair::new(id, layout, &memory, &self.addresses, bells, &self.clock);
        let (submission, completion) = pair.addresses();
        let open = Open { flights: Arc::clone(pair.flights()), size, submission, completion };
        let mut admin = lock(&self.admin);
        if let Err(e) = self.announce(&mut admin, id, &open) {
            // A controller that does not respond may have created the queue; it forgets the queue only at a reset.
            if !self.life.is_dead() && !admin.is_late {
                let _ = self.pci.dma_unmap(&memory);
            }
            return Err(e);
        }
        // Before the lock is released: the thread that resets the controller must see the queue.
        lock(&self.queues)[usize::from(id) - 1] = Place::Open(open);
        let wake = Arc::clone(&self.wakes[usize::from(id)]);
        self.life.watch(&wake);
        Ok((pair, wake))
    }

    /// Creates a queue on the controller.
    pub(crate) fn announce(&self, admin: &mut Admin, id: u16, open: &Open) -> io::Result<()> {
        admin
            .ask(Command::create_cq(id, open.size, id, open.completion))
            .map_err(|e| e.explain("cannot create the completion queue"))?;
        admin.ask(Command::create_sq(id, open.size, open.submission)).map(drop).map_err(|e| {
            let _ = admin.ask(Command::delete_queue(spec::admin::DELETE_CQ, id));
            e.explain("cannot create the submission queue")
        })
    }

    /// Resets the controller and initialises it again. No queue's owner accesses it meanwhile. Afterwards the owners restart
    /// their queues, and [`resume`](Self::resume) creates them on the controller.
    ///
    /// # Errors
    /// The controller does not start, or its limits changed.
    pub(crate) fn reset(&self, admin: &mut Admin) -> io::Result<()> {
        let queues = lock(&self.queues).clone();
        let all =
            || queues.iter().filter_map(|place| if let Place::Open(open) = place { Some(&open.flights) } else { None });
        // Queues that were restarted but never ran can stay as they are.
        all().filter(|flights| flights.stage() == Stage::Running).for_each(|flights| flights.reach(Stage::Stopped));
        stop(&*self.pci, &self.registers)?;
        admin.restart();
        let (submission, completion) = admin.pair.addresses();
        // A function reset switches bus mastering off.
        self.pci.set_bus_master(true)?;
        self.registers.enable(self.page_shift, admin::SIZE, submission, completion)?;
        let granted = ask_for_queues(admin, self.info.queues_max)?;
        if granted < self.info.queues_max {
            return Err(io::Error::other(format!(
                "it now has {granted} I/O queues instead of {}",
                self.info.queues_max
            )));
        }
        ask_for_events(admin, self.tells);
        all().filter(|flights| flights.stage() == Stage::Stopped).for_each(|flights| flights.reach(Stage::Cleared));
        self.wake_owners();
        Ok(())
    }

    /// Creates the queues that their owners have restarted after a reset, and lets them run.
    pub(crate) fn resume(&self, admin: &mut Admin) -> io::Result<()> {
        let queues = lock(&self.queues).clone();
        for (place, id) in queues.iter().zip(1..) {
            if let Place::Open(open) = place
                && open.flights.stage() == Stage::Ready
            {
                self.announce(admin, id, open)?;
                open.flights.reach(Stage::Running);
                self.wakes[usize::from(id)].ring();
            }
        }
        Ok(())
    }

    pub(crate) fn wake_owners(&self) {
        for wake in &self.wakes[1..] {
            // A full counter is readable, too.
            wake.ring();
        }
    }

    /// Wakes the watching thread. Called by the owner of a restarted queue.
    pub(crate) fn wake_guard(&self) {
        self.wakes[0].ring();
    }

    /// Deletes a queue with nothing in flight from the controller.
    pub(crate) fn close_queue(&self, id: u16, memory: &Arc<Mapping>, wake: &Arc<Wake>) {
        self.life.unwatch(wake);
        let index = usize::from(id) - 1;
        let deleted = {
            let mut admin = lock(&self.admin);
            // Under the lock the controller is not being reset. If the queue does not run, the reset has deleted it.
            match std::mem::replace(&mut lock(&self.queues)[index], Place::Taken) {
                Place::Open(open) if open.flights.stage() != Stage::Running && !self.life.is_dead() => Ok(()),
                _ => admin
                    .ask(Command::delete_queue(spec::admin::DELETE_SQ, id))
                    .and_then(|_| admin.ask(Command::delete_queue(spec::admin::DELETE_CQ, id)))
                    .map(drop),
            }
        };
        match deleted {
            Ok(()) => {
                if let Err(e) = self.pci.dma_unmap(memory) {
                    log::warn!("nvme {}: {e}", self.info.target);
                }
                lock(&self.queues)[index] = Place::Free;
            }
            // The queue stays taken, and its memory stays mapped.
            Err(e) => log::warn!("nvme {}: {}", self.info.target, e.explain(&format!("cannot delete queue {id}"))),
        }
    }

    /// Stops a dead device as far as possible: afterwards it should not access memory.
    pub(crate) fn cut_off(&self) {
        if let Err(e) = self.registers.disable() {
            log::warn!("nvme {}: cannot disable the controller: {e}", self.info.target);
        }
        if let Err(e) = self.pci.set_bus_master(false) {
            log::debug!("nvme {}: {e}", self.info.target);
        }
    }

    pub(crate) fn shut_down(&self) {
        if self.life.is_dead() {
            return;
        }
        let done = self.registers.shut_down(self.shutdown).and_then(|()| self.registers.disable());
        if let Err(e) = done {
            log::warn!("nvme {}: cannot shut down the controller: {e}", self.info.target);
        }
    }
}

/// Requests I/O queues. Returns the number granted.
pub(crate) fn ask_for_queues(admin: &mut Admin, wanted: u16) -> io::Result<u16> {
    let count = u32::from(wanted - 1);
    let answer = admin.ask(Command::set_features(0x07, count | count << 16));
    let result = answer.map_err(|e| e.explain("cannot request I/O queues"))?.result;
    Ok((result as u16).min((result >> 16) as u16).saturating_add(1))
}

pub(crate) fn ask_for_events(admin: &mut Admin, tells: bool) {
    if tells {
        // Events for namespace changes and health warnings. An error is ignored: the controller then sends no events.
        let _ = admin.ask(Command::set_features(0x0b, 1 << 8 | 0x1f));
    }
    admin.expect_event();
}
