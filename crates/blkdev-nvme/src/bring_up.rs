//! Initialises a controller, and finds its namespace.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64},
    },
    time::Duration,
};

use blkdev::{Mapping, liveness::Liveness, wake::Wake};
use blkdev_vfio::PciDevice;

use crate::{
    admin::{self, Admin, Failure, Purpose},
    core::{Core, Place, ask_for_events, ask_for_queues},
    limits::{IdentifyData, Shape, absent, check, invalid, is_nsid, unusable},
    options::Options,
    pair::{Addresses, Bells, Layout, Pair, SIZE_MAX},
    registers::{Registers, stop},
    spec::{self, Controller, Limits, Namespace, RANGE_LEN, cns},
};

/// Default number of I/O queue pairs: each has an interrupt vector and a file descriptor.
const QUEUES: u16 = 64;

/// Longest transfer, in bytes: the length that a PRP list in one page of 4096 bytes can describe. Longer transfers gain
/// nothing.
const TRANSFER_MAX: u64 = 2 << 20;

/// Time-out of admin commands, if requests have none.
const ADMIN: Duration = Duration::from_secs(60);

/// Longest shutdown, if the controller does not report a time.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Class code of an NVMe controller (PCI code and ID assignment, 1.9): mass storage, non-volatile memory, NVMe.
const CLASS: [u8; 3] = [0x02, 0x08, 0x01];

/// Initialises the controller. If any step fails, the drop of `pci` stops the device before memory is unmapped.
pub(crate) fn bring_up(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Core> {
    if !(2..=SIZE_MAX).contains(&options.queue_size) {
        return Err(invalid(format!("queue size {} is not from 2 to {SIZE_MAX}", options.queue_size)));
    }
    check_class(&*pci)?;
    let registers = Registers::new(pci.bar(0)?)?;
    // The controller may still run for an earlier user, or may have failed.
    stop(&*pci, &registers)?;

    let wanted = queues_to_request(&*pci, &registers, options.queues)?;
    let mut wakes = (0..=wanted).map(|_| Wake::new().map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
    // Before the controller is enabled: some controllers read their vectors only then.
    pci.enable_vectors(&wakes.iter().map(|wake| wake.as_fd()).collect::<Vec<_>>())?;

    let addresses = Addresses(pci.translation());
    let clock = Arc::new(AtomicU32::new(1));
    let pair = enable(&*pci, &registers, &addresses, &clock)?;
    let life = Liveness::new(format!("nvme {}", pci.address()));
    let mut admin = Admin::new(pair, Arc::clone(&wakes[0]), Arc::clone(&life), options.timeout.unwrap_or(ADMIN));
    let data = find(&mut admin, &registers, options)?;

    let granted = ask_for_queues(&mut admin, wanted)?;
    if options.queues.is_some_and(|queues| queues > granted) {
        return Err(invalid(format!("{wanted} queues requested, but the device has {granted}")));
    }
    let queues = wanted.min(granted);
    wakes.truncate(usize::from(queues) + 1);

    let transfer_max = data.transfer_max(1 << registers.page_shift(), TRANSFER_MAX)?;
    let queue_layout = queue_layout(&registers, options.queue_size, transfer_max);
    let target = format!("{}/{}", pci.address(), data.nsid);
    let (info, disk) = data.describe(shape(options, target, queues, queue_layout, transfer_max));
    let sgl = data.controller.sgls & 3 != 0 && !addresses.is_translated();
    let tells = data.controller.oaes & 1 << 8 != 0;
    ask_for_events(&mut admin, tells);
    let told = Duration::from_micros(data.controller.shutdown_us.into());
    Ok(Core {
        capacity: AtomicU64::new(data.namespace.blocks << data.namespace.block_shift),
        life,
        admin: Mutex::new(admin),
        queue_layout,
        wakes,
        queues: Mutex::new(vec![Place::Free; queues.into()]),
        resets: AtomicU64::new(0),
        shutdown: told.clamp(SHUTDOWN, 4 * SHUTDOWN),
        page_shift: registers.page_shift(),
        pci,
        registers,
        info,
        disk,
        sgl,
        tells,
        addresses,
        clock,
    })
}

/// Checks that the PCI device is an NVMe controller.
fn check_class(pci: &dyn PciDevice) -> io::Result<()> {
    let mut class = [0; 3];
    pci.read_config(0x09, &mut class)?;
    if class != CLASS {
        let [interface, subclass, class] = class;
        return Err(invalid(format!(
            "PCI class {class:02x}{subclass:02x}{interface:02x} is not that of an NVMe controller (010802)"
        )));
    }
    Ok(())
}

/// Number of I/O queue pairs to request: limited by interrupt vectors and doorbells.
fn queues_to_request(pci: &dyn PciDevice, registers: &Registers, wanted: Option<u16>) -> io::Result<u16> {
    let vectors = pci.vectors();
    if vectors < 2 {
        return Err(unusable(format!("it has {vectors} MSI-X vectors, but needs at least 2")));
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
    let wanted = wanted.unwrap_or(QUEUES.min(queues_max));
    if wanted == 0 || wanted > queues_max {
        return Err(invalid(format!("{wanted} queues requested, but the device has {queues_max}")));
    }
    Ok(wanted)
}

/// Enables the controller with a new admin queue pair.
fn enable(
    pci: &dyn PciDevice,
    registers: &Registers,
    addresses: &Addresses,
    clock: &Arc<AtomicU32>,
) -> io::Result<Pair<Purpose>> {
    let page_shift = registers.page_shift();
    let page = 1 << page_shift;
    let layout = Layout { size: admin::SIZE, list_len: page.max(spec::IDENTIFY_LEN), page };
    let memory = Mapping::new(layout.len())?;
    pci.dma_map(&memory)?;
    let bells = Bells::new(&registers.bar, 0, registers.stride());
    let pair = Pair::new(0, layout, &memory, addresses, bells, clock);
    let (submission, completion) = pair.addresses();
    pci.set_bus_master(true)?;
    registers.enable(page_shift, admin::SIZE, submission, completion)?;
    Ok(pair)
}

/// The limits of the driver and of the granted queues, for [`IdentifyData::describe`].
fn shape(options: &Options, target: String, queues: u16, layout: Layout, transfer_max: u32) -> Shape {
    Shape {
        driver: "nvme",
        target,
        page: layout.page as u64,
        transfer_max,
        ranges: layout.list_len / RANGE_LEN,
        queues,
        depth: layout.slots(),
        read_only: options.read_only,
        timeout: options.timeout,
    }
}

/// Layout of the largest I/O queue pair.
fn queue_layout(registers: &Registers, queue_size: u16, transfer_max: u32) -> Layout {
    let page = 1 << registers.page_shift();
    let size = u32::from(queue_size).min(registers.queue_size()) as u16;
    // One entry for each page: an unaligned start adds a page, but the first page needs no entry.
    let list_len = (transfer_max as usize).div_ceil(page).saturating_mul(8).next_power_of_two().clamp(256, page);
    Layout { size, list_len, page }
}

/// Identifies the controller and its namespace: the requested one, or the first active one.
fn find(admin: &mut Admin, registers: &Registers, options: &Options) -> io::Result<IdentifyData> {
    let controller = admin.identify(cns::CONTROLLER, 0).map_err(|e| e.explain("cannot identify the controller"))?;
    let controller = Controller::parse(&controller);
    let version = registers.version();
    // Supported by controllers of NVMe 2.0, and by older ones with I/O command sets (CAP.CSS).
    let limits = if version >= 2 << 16 || registers.cap >> 43 & 1 != 0 {
        match admin.identify(cns::CONTROLLER_OF_COMMAND_SET, 0) {
            Ok(bytes) => Limits::parse(&bytes),
            Err(Failure::Refused(_)) => Limits::default(),
            Err(silent) => return Err(silent.explain("cannot identify the controller")),
        }
    } else {
        Limits::default()
    };
    let active = active(admin, &controller, version)?;
    let listed = || active.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let nsid = match options.nsid {
        Some(nsid) if active.contains(&nsid) => nsid,
        Some(nsid) => return Err(absent(format!("there is no namespace {nsid}; active are: {}", listed()))),
        None => *active.first().ok_or_else(|| absent("it has no active namespace".to_owned()))?,
    };
    let namespace = identify_namespace(admin, nsid)?;
    Ok(IdentifyData { controller, limits, nsid, namespace })
}

/// Identifiers of the active namespaces, in order.
fn active(admin: &mut Admin, controller: &Controller, version: u32) -> io::Result<Vec<u32>> {
    // The list was added in NVMe 1.1.
    if version < 1 << 16 | 1 << 8 {
        return Ok((1..=controller.namespaces.min(1024)).collect());
    }
    let list = admin.identify(cns::ACTIVE_NAMESPACES, 0).map_err(|e| e.explain("cannot list the namespaces"))?;
    let numbers = list.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    Ok(numbers.take_while(|nsid| is_nsid(*nsid)).collect())
}

pub(crate) fn identify_namespace(admin: &mut Admin, nsid: u32) -> io::Result<Namespace> {
    let what = format!("cannot identify namespace {nsid}");
    let namespace = Namespace::parse(&admin.identify(cns::NAMESPACE, nsid).map_err(|e| e.explain(&what))?);
    check(&namespace, nsid)?;
    Ok(namespace)
}
