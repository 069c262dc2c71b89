//! [`Nvme`]: brings a controller up, and presents one of its namespaces as a [`Device`].

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use blkdev::{Device, Info, Mapping};
use blkdev_vfio::{Bar, PciDevice, Vfio};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{
    admin::{self, Admin, Failure},
    limits::{Disk, Found, Shape, check, invalid, is_nsid, unusable},
    liveness::Liveness,
    pair::{Addresses, Bells, Flights, Layout, Pair, SIZE_MAX, Stage},
    queue::IoQueue,
    spec::{self, Command, Controller, Limits, Namespace, RANGE_LEN, cns},
    target::Target,
    watch::Watch,
};

/// What the user can choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The namespace; `None`: the first that is active.
    pub nsid: Option<u32>,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// I/O queue pairs to use; `None`: as many as the controller has, up to 64. More than it has is an error.
    pub queues: Option<u16>,
    /// Places in each I/O queue, 2 to 1024; the controller may have fewer. One less can be in use.
    pub queue_size: u16,
    /// How long a queue with commands may go without completing any before the device is declared dead; `None`: forever. Before
    /// that commands are aborted, and then the controller is reset. See the [crate](crate) on when.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { nsid: None, read_only: false, queues: None, queue_size: 256, timeout: Some(Duration::from_secs(30)) }
    }
}

/// I/O queue pairs that are used unless more are asked for: each has an interrupt vector and a file descriptor.
const QUEUES: u16 = 64;

/// Longest transfer, in bytes: what a list in one page of 4096 bytes can describe. Longer ones gain nothing.
const TRANSFER_MAX: u64 = 2 << 20;

/// How long an admin command may take where requests may take for ever.
const ADMIN: Duration = Duration::from_secs(60);

/// How long a controller may take to shut down when it does not tell.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// A namespace of an NVMe controller that this process drives.
#[derive(Debug)]
pub struct Nvme {
    owner: Arc<Owner>,
}

/// The controller, brought up. Dropped last of all, it shuts it down.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) core: Arc<Core>,
    watch: Watch,
}

/// What the device, its queues and the watching thread share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) pci: Arc<dyn PciDevice>,
    pub(crate) registers: Registers,
    pub(crate) life: Arc<Liveness>,
    pub(crate) info: Info,
    pub(crate) capacity: AtomicU64,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) disk: Disk,
    /// Contiguous memory can be described by one descriptor.
    pub(crate) sgl: bool,
    /// It can be asked to tell of changes.
    tells: bool,
    page_shift: u32,
    addresses: Addresses,
    queue_layout: Layout,
    /// One for each vector; the first is the admin queue's.
    wakes: Vec<Arc<EventFd>>,
    /// For each I/O queue, what is in flight, while it is open.
    pub(crate) queues: Mutex<Vec<Place>>,
    /// Counts eighths of the time-out.
    pub(crate) clock: Arc<AtomicU32>,
    shutdown: Duration,
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    Free,
    /// Being opened or closed, or its memory may still be written to.
    Taken,
    Open(Open),
}

/// An open queue, as others than its owner know it.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) flights: Arc<Flights>,
    size: u16,
    submission: u64,
    completion: u64,
}

impl Nvme {
    /// Opens a controller that is bound to `vfio-pci`. The namespace that the target names goes before
    /// [`Options::nsid`].
    ///
    /// # Errors
    /// As [`Vfio::open`] and [`open`](Self::open).
    pub fn open_vfio(target: &Target, how: &blkdev_vfio::Options, options: &Options) -> io::Result<Self> {
        let pci = Vfio::open(&target.controller, how)?;
        Self::open(Arc::new(pci), &Options { nsid: target.nsid.or(options.nsid), ..options.clone() })
    }

    /// Brings the controller up, and finds out what the namespace can do.
    ///
    /// # Errors
    /// The options are out of range, the device is no NVMe controller, fails or does not answer, or the namespace is not
    /// there or cannot be driven.
    pub fn open(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Self> {
        let name = format!("nvme {}", pci.address());
        let core = bring_up(pci, options).map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
        let core = Arc::new(core);
        let watch = Watch::start(&core)?;
        Ok(Self { owner: Arc::new(Owner { core, watch }) })
    }
}

impl Device for Nvme {
    fn info(&self) -> &Info {
        &self.owner.core.info
    }

    fn capacity(&self) -> u64 {
        self.owner.core.capacity.load(Ordering::Relaxed)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let core = &self.owner.core;
        core.pci.dma_map(mapping).map_err(|e| io::Error::new(e.kind(), format!("nvme {}: {e}", core.info.target)))?;
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        let core = &self.owner.core;
        if core.life.is_dead() && core.addresses.is_translated() {
            // A device without an IOMMU that is dead but not stopped may write here as long as the process lives.
            return;
        }
        if let Err(e) = core.pci.dma_unmap(mapping) {
            log::warn!("nvme {}: unmapping {} MiB of memory: {e}", core.info.target, mapping.len() >> 20);
        }
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let (pair, wake) = self.owner.core.open_queue(depth)?;
        Ok(Box::new(IoQueue::new(&self.owner, pair, wake)))
    }
}

/// The queues are closed: what holds this last.
impl Drop for Owner {
    fn drop(&mut self) {
        self.watch.stop();
        self.core.shut_down();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The controller's registers (base, 3.1.3).
#[derive(Debug)]
pub(crate) struct Registers {
    bar: Arc<dyn Bar>,
    cap: u64,
}

const CAP: usize = 0x00;
const VS: usize = 0x08;
const CC: usize = 0x14;
const CSTS: usize = 0x1c;
const AQA: usize = 0x24;
const ASQ: usize = 0x28;
const ACQ: usize = 0x30;

const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 3 << 14;
const CC_SHUTDOWN_NORMAL: u32 = 1 << 14;

const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const CSTS_SHUTDOWN: u32 = 3 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;

/// Trouble that no reset helps against.
pub(crate) const TAKEN_AWAY: &str = "its registers read as all ones: it was taken away";

/// Larger memory pages gain nothing, and a queue takes several.
const PAGE_SHIFT_MAX: u32 = 16;

/// What a device that is not there reads as.
const NOTHING: u32 = u32::MAX;

impl Registers {
    fn new(bar: Arc<dyn Bar>) -> io::Result<Self> {
        if bar.len() < Bells::end(1, 4) {
            return Err(unusable("its registers are too few for NVMe"));
        }
        // In halves, as not every controller can do 64 bits at a time.
        let cap = u64::from(bar.read32(CAP)) | u64::from(bar.read32(CAP + 4)) << 32;
        if cap == u64::MAX {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "its registers read as all ones"));
        }
        let registers = Self { bar, cap };
        registers.check()?;
        Ok(registers)
    }

    /// # Errors
    /// The capabilities are not those of a controller that this driver can use.
    fn check(&self) -> io::Result<()> {
        if self.cap >> 37 & 1 == 0 {
            return Err(unusable("it does not have the NVM command set (CAP.CSS)"));
        }
        if self.page_shift() > PAGE_SHIFT_MAX {
            let kib = 1u64 << (self.page_shift() - 10);
            return Err(unusable(format!(
                "its smallest memory page has {kib} KiB, at most 64 are supported (CAP.MPSMIN)"
            )));
        }
        if self.queue_size() < 2 {
            return Err(unusable("its queues have a single place, at least 2 are needed (CAP.MQES)"));
        }
        Ok(())
    }

    /// I/O queue pairs that have doorbells.
    fn pairs(&self) -> u16 {
        let (len, stride) = (self.bar.len(), self.stride());
        let room = len.saturating_sub(Bells::end(1, stride)) / (2 * stride);
        u16::try_from(room).unwrap_or(u16::MAX)
    }

    /// The largest queue.
    fn queue_size(&self) -> u32 {
        (self.cap as u32 & 0xffff) + 1
    }

    /// How long it may take to become ready, or not ready any more.
    fn timeout(&self) -> Duration {
        Duration::from_millis(500) * (self.cap >> 24 & 0xff).max(2) as u32
    }

    /// Bytes from one doorbell to the next, 4 to 128 Ki.
    fn stride(&self) -> usize {
        4 << (self.cap >> 32 & 0xf)
    }

    /// The smallest memory page, as a power of two: 12 to 27.
    fn page_shift(&self) -> u32 {
        12 + (self.cap >> 48 & 0xf) as u32
    }

    fn write64(&self, at: usize, value: u64) {
        self.bar.write32(at, value as u32);
        self.bar.write32(at + 4, (value >> 32) as u32);
    }

    /// Why the controller cannot work any more; `None`: it says nothing of the kind.
    pub(crate) fn trouble(&self) -> Option<&'static str> {
        match self.bar.read32(CSTS) {
            NOTHING => Some(TAKEN_AWAY),
            status if status & CSTS_FATAL != 0 => Some("it reports a fatal error (CSTS.CFS)"),
            _ => None,
        }
    }

    /// Whether it was enabled and is so no more.
    pub(crate) fn has_stopped(&self) -> bool {
        self.bar.read32(CSTS) & CSTS_READY == 0
    }

    /// Waits until `good` holds of the status.
    fn wait(&self, time: Duration, what: &str, good: impl Fn(u32) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + time;
        loop {
            let status = self.bar.read32(CSTS);
            if status == NOTHING {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "its registers read as all ones"));
            }
            if good(status) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let text = format!("it is not {what} within {time:?} (CSTS {status:#x})");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops the controller: from then on it touches no memory.
    pub(crate) fn disable(&self) -> io::Result<()> {
        let config = self.bar.read32(CC);
        if config != NOTHING && config & CC_ENABLE != 0 {
            self.bar.write32(CC, config & !(CC_ENABLE | CC_SHUTDOWN));
        }
        self.wait(self.timeout(), "disabled", |status| status & CSTS_READY == 0)
    }

    fn enable(&self, page_shift: u32, size: u16, submission: u64, completion: u64) -> io::Result<()> {
        self.bar.write32(AQA, u32::from(size - 1) << 16 | u32::from(size - 1));
        self.write64(ASQ, submission);
        self.write64(ACQ, completion);
        // Entries of 64 and 16 bytes, the NVM command set, round robin.
        self.bar.write32(CC, 4 << 20 | 6 << 16 | (page_shift - 12) << 7 | CC_ENABLE);
        self.wait(self.timeout(), "ready", |status| status & (CSTS_READY | CSTS_FATAL) != 0)?;
        self.trouble().map_or(Ok(()), |why| Err(io::Error::other(why)))
    }

    fn shut_down(&self, time: Duration) -> io::Result<()> {
        let config = self.bar.read32(CC);
        self.bar.write32(CC, config & !CC_SHUTDOWN | CC_SHUTDOWN_NORMAL);
        self.wait(time, "shut down", |status| status & CSTS_SHUTDOWN == CSTS_SHUTDOWN_DONE)
    }
}

/// The class code of an NVMe controller (PCI code and ID assignment, 1.9): mass storage, non-volatile memory, NVMe.
const CLASS: [u8; 3] = [0x02, 0x08, 0x01];

/// Whatever fails in here, the drop of `pci` stops the device before any memory goes.
fn bring_up(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Core> {
    if !(2..=SIZE_MAX).contains(&options.queue_size) {
        return Err(invalid(format!("queue size {}, not from 2 to {SIZE_MAX}", options.queue_size)));
    }
    let mut class = [0; 3];
    pci.read_config(0x09, &mut class)?;
    if class != CLASS {
        let [interface, subclass, class] = class;
        return Err(unusable(format!("no NVMe controller, but of PCI class {class:02x}{subclass:02x}{interface:02x}")));
    }
    let registers = Registers::new(pci.bar(0)?)?;
    // Left running by whoever had it before, or in trouble.
    stop(&*pci, &registers)?;

    let vectors = pci.vectors();
    if vectors < 2 {
        return Err(unusable(format!("it has {vectors} MSI-X vectors, at least 2 are needed")));
    }
    let pairs = registers.pairs();
    if pairs == 0 {
        return Err(unusable(format!(
            "its BAR of {:#x} bytes has no room for the doorbells of an I/O queue, which lie {:#x} bytes apart (CAP.DSTRD)",
            registers.bar.len(),
            registers.stride()
        )));
    }
    let queues_max = (vectors - 1).min(pairs);
    let wanted = options.queues.unwrap_or(QUEUES.min(queues_max));
    if wanted == 0 || wanted > queues_max {
        return Err(invalid(format!("{wanted} queues asked for, the device has {queues_max}")));
    }
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let wake = || Ok(Arc::new(EventFd::from_value_and_flags(0, flags)?));
    let mut wakes = (0..=wanted).map(|_| wake()).collect::<io::Result<Vec<_>>>()?;
    // Before the controller is enabled: some look at their vectors only then.
    pci.enable_vectors(&wakes.iter().map(|wake| wake.as_fd()).collect::<Vec<_>>())?;

    let page_shift = registers.page_shift();
    let page = 1 << page_shift;
    let addresses = Addresses(pci.translation());
    let layout = Layout { size: admin::SIZE, list_len: page.max(spec::IDENTIFY_LEN), page };
    let memory = Mapping::new(layout.len())?;
    pci.dma_map(&memory)?;
    let clock = Arc::new(AtomicU32::new(1));
    let bells = Bells::new(&registers.bar, 0, registers.stride());
    let pair = Pair::new(0, layout, &memory, &addresses, bells, &clock);
    let (submission, completion) = pair.addresses();
    pci.set_bus_master(true)?;
    registers.enable(page_shift, admin::SIZE, submission, completion)?;

    let life = Arc::new(Liveness::new(format!("nvme {}", pci.address())));
    let timeout = options.timeout.unwrap_or(ADMIN);
    let mut admin = Admin::new(pair, Arc::clone(&wakes[0]), Arc::clone(&life), timeout);
    let found = find(&mut admin, &registers, options)?;

    let granted = ask_for_queues(&mut admin, wanted)?;
    if options.queues.is_some_and(|queues| queues > granted) {
        return Err(invalid(format!("{wanted} queues asked for, the device has {granted}")));
    }
    let queues = wanted.min(granted);
    wakes.truncate(usize::from(queues) + 1);

    let size = u32::from(options.queue_size).min(registers.queue_size()) as u16;
    let target = format!("{}/{}", pci.address(), found.nsid);
    let transfer_max = found.transfer_max(page as u64, TRANSFER_MAX)?;
    // One entry for each page, as an odd start adds a page and the first page needs no entry.
    let list_len = (transfer_max as usize).div_ceil(page).saturating_mul(8).next_power_of_two().clamp(256, page);
    let shape = Shape {
        driver: "nvme",
        target,
        page: page as u64,
        transfer_max,
        ranges: list_len / RANGE_LEN,
        queues,
        depth: size - 1,
        read_only: options.read_only,
        timeout: options.timeout,
    };
    let (info, disk) = found.describe(shape);
    let sgl = found.controller.sgls & 3 != 0 && !addresses.is_translated();
    let tells = found.controller.oaes & 1 << 8 != 0;
    ask_for_events(&mut admin, tells);
    let told = Duration::from_micros(found.controller.shutdown_us.into());
    Ok(Core {
        capacity: AtomicU64::new(found.namespace.blocks << found.namespace.block_shift),
        life,
        admin: Mutex::new(admin),
        queue_layout: Layout { size, list_len, page },
        wakes,
        queues: Mutex::new(vec![Place::Free; queues.into()]),
        shutdown: told.clamp(SHUTDOWN, 4 * SHUTDOWN),
        pci,
        registers,
        info,
        disk,
        sgl,
        tells,
        page_shift,
        addresses,
        clock,
    })
}

/// Stops a controller, whoever had it before, by a reset of the function if need be.
fn stop(pci: &dyn PciDevice, registers: &Registers) -> io::Result<()> {
    if registers.disable().is_err() || registers.trouble().is_some() {
        pci.reset()?;
        registers.disable()?;
    }
    Ok(())
}

/// Asks for I/O queues, and tells how many there are to be had.
fn ask_for_queues(admin: &mut Admin, wanted: u16) -> io::Result<u16> {
    let count = u32::from(wanted - 1);
    let answer = admin.ask(Command::set_features(0x07, count | count << 16));
    let result = answer.map_err(|e| e.explain("asking for I/O queues"))?.result;
    Ok((result as u16).min((result >> 16) as u16).saturating_add(1))
}

fn ask_for_events(admin: &mut Admin, tells: bool) {
    if tells {
        // Changes of namespaces, and what a drive says of its health. Without it there are no events, which is no error.
        let _ = admin.ask(Command::set_features(0x0b, 1 << 8 | 0x1f));
    }
    admin.expect_event();
}

fn find(admin: &mut Admin, registers: &Registers, options: &Options) -> io::Result<Found> {
    let controller = admin.identify(cns::CONTROLLER, 0).map_err(|e| e.explain("identifying the controller"))?;
    let controller = Controller::parse(&controller);
    let version = registers.bar.read32(VS);
    // Told by controllers of NVMe 2.0, and of others that have I/O command sets (CAP.CSS).
    let limits = if version >= 2 << 16 || registers.cap >> 43 & 1 != 0 {
        match admin.identify(cns::CONTROLLER_OF_COMMAND_SET, 0) {
            Ok(bytes) => Limits::parse(&bytes),
            Err(Failure::Refused(_)) => Limits::default(),
            Err(silent) => return Err(silent.explain("identifying the controller")),
        }
    } else {
        Limits::default()
    };
    let active = active(admin, &controller, version)?;
    let listed = || active.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let nsid = match options.nsid {
        Some(nsid) if active.contains(&nsid) => nsid,
        Some(nsid) => return Err(invalid(format!("there is no namespace {nsid}; active are: {}", listed()))),
        None => *active.first().ok_or_else(|| invalid("it has no active namespace".to_owned()))?,
    };
    let namespace = identify_namespace(admin, nsid)?;
    Ok(Found { controller, limits, nsid, namespace })
}

/// Namespaces that are there, in order.
fn active(admin: &mut Admin, controller: &Controller, version: u32) -> io::Result<Vec<u32>> {
    // The list came with NVMe 1.1.
    if version < 1 << 16 | 1 << 8 {
        return Ok((1..=controller.namespaces.min(1024)).collect());
    }
    let list = admin.identify(cns::ACTIVE_NAMESPACES, 0).map_err(|e| e.explain("listing the namespaces"))?;
    let numbers = list.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    Ok(numbers.take_while(|nsid| is_nsid(*nsid)).collect())
}

pub(crate) fn identify_namespace(admin: &mut Admin, nsid: u32) -> io::Result<Namespace> {
    let what = format!("identifying namespace {nsid}");
    let namespace = Namespace::parse(&admin.identify(cns::NAMESPACE, nsid).map_err(|e| e.explain(&what))?);
    check(&namespace, nsid)?;
    Ok(namespace)
}

impl Core {
    fn open_queue(&self, depth: u16) -> io::Result<(Pair<blkdev::Request>, Arc<EventFd>)> {
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
        opened.map_err(|e| io::Error::new(e.kind(), format!("{}: queue {}: {e}", self.info.target, index + 1)))
    }

    fn create(&self, id: u16, depth: u16) -> io::Result<(Pair<blkdev::Request>, Arc<EventFd>)> {
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
            // One that does not answer may have taken it, and forgets it only when it is reset.
            if !self.life.is_dead() && !admin.is_late {
                let _ = self.pci.dma_unmap(&memory);
            }
            return Err(e);
        }
        // Before the lock is given up: who resets the controller has to know of the queue.
        lock(&self.queues)[usize::from(id) - 1] = Place::Open(open);
        let wake = Arc::clone(&self.wakes[usize::from(id)]);
        self.life.watch(&wake);
        Ok((pair, wake))
    }

    /// Tells the controller of a queue.
    fn announce(&self, admin: &mut Admin, id: u16, open: &Open) -> io::Result<()> {
        admin
            .ask(Command::create_cq(id, open.size, id, open.completion))
            .map_err(|e| e.explain("creating the completion queue"))?;
        admin.ask(Command::create_sq(id, open.size, open.submission)).map(drop).map_err(|e| {
            let _ = admin.ask(Command::delete_queue(spec::admin::DELETE_CQ, id));
            e.explain("creating the submission queue")
        })
    }

    /// Stops the controller and brings it up again. No queue's owner touches it meanwhile; afterwards they restart their
    /// queues, and [`resume`](Self::resume) tells the controller of them.
    ///
    /// # Errors
    /// It does not come up, or not as it was.
    pub(crate) fn reset(&self, admin: &mut Admin) -> io::Result<()> {
        let queues = lock(&self.queues).clone();
        let all =
            || queues.iter().filter_map(|place| if let Place::Open(open) = place { Some(&open.flights) } else { None });
        // Those that were restarted already, and never ran, can wait as they are.
        all().filter(|flights| flights.stage() == Stage::Running).for_each(|flights| flights.reach(Stage::Stopped));
        stop(&*self.pci, &self.registers)?;
        admin.restart();
        let (submission, completion) = admin.pair.addresses();
        // A reset of the function has switched it off.
        self.pci.set_bus_master(true)?;
        self.registers.enable(self.page_shift, admin::SIZE, submission, completion)?;
        let granted = ask_for_queues(admin, self.info.queues_max)?;
        if granted < self.info.queues_max {
            return Err(io::Error::other(format!("it has {granted} I/O queues now, not {}", self.info.queues_max)));
        }
        ask_for_events(admin, self.tells);
        all().filter(|flights| flights.stage() == Stage::Stopped).for_each(|flights| flights.reach(Stage::Cleared));
        self.wake_owners();
        Ok(())
    }

    /// Lets queues run whose owners have restarted them after a reset.
    pub(crate) fn resume(&self, admin: &mut Admin) -> io::Result<()> {
        let queues = lock(&self.queues).clone();
        for (place, id) in queues.iter().zip(1..) {
            if let Place::Open(open) = place
                && open.flights.stage() == Stage::Ready
            {
                self.announce(admin, id, open)?;
                open.flights.reach(Stage::Running);
                let _ = self.wakes[usize::from(id)].write(1);
            }
        }
        Ok(())
    }

    fn wake_owners(&self) {
        for wake in &self.wakes[1..] {
            // A full counter is readable, too.
            let _ = wake.write(1);
        }
    }

    /// For the owner of a queue that was restarted.
    pub(crate) fn wake_guard(&self) {
        let _ = self.wakes[0].write(1);
    }

    /// Takes a queue with nothing in flight away from the controller.
    pub(crate) fn close_queue(&self, id: u16, memory: &Arc<Mapping>, wake: &Arc<EventFd>) {
        self.life.unwatch(wake);
        let index = usize::from(id) - 1;
        let deleted = {
            let mut admin = lock(&self.admin);
            // The lock is held: the controller is not being reset, and has been if the queue does not run.
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
            // The queue stays taken, and its memory mapped.
            Err(e) => log::warn!("nvme {}: {}", self.info.target, e.explain(&format!("deleting queue {id}"))),
        }
    }

    /// Stops a device that is given up, as far as it lets us: from then on it should touch no memory.
    pub(crate) fn cut_off(&self) {
        if let Err(e) = self.registers.disable() {
            log::warn!("nvme {}: the controller could not be disabled: {e}", self.info.target);
        }
        if let Err(e) = self.pci.set_bus_master(false) {
            log::debug!("nvme {}: {e}", self.info.target);
        }
    }

    fn shut_down(&self) {
        if self.life.is_dead() {
            return;
        }
        let done = self.registers.shut_down(self.shutdown).and_then(|()| self.registers.disable());
        if let Err(e) = done {
            log::warn!("nvme {}: shutting down: {e}", self.info.target);
        }
    }
}
