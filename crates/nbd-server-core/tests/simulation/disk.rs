//! [`Disk`]: an export with its device, and the model of its content.

use std::{collections::HashMap, sync::Arc, time::Duration};

use blkdev::{
    Buf, Channel, Device, PAGE, Plan,
    fault::{Bug, Fault, Faults, Rng},
    memory::Memory,
};
use nbd_server_core::{Export, Exports};

use crate::model::Model;

pub(crate) const DEVICE: u64 = 256 << 10;

/// Most workers, and so most queues of a device.
pub(crate) const WORKERS: u64 = 4;

/// Least length of a mapping, which the channels of a device share.
const MAPPING: usize = 2 << 20;

/// The reserve is a multiple of this.
const COMMON: usize = 256 << 10;

/// More than a channel needs for itself.
const OWN: usize = 136 << 10;

/// An export with its device.
pub(crate) struct Disk {
    pub(crate) device: Arc<Fault<Memory>>,
    pub(crate) exports: Exports,
    depth: u16,
    /// Memory of each of its channels, in bytes: the common part, and the reserve.
    common: usize,
    reserve: usize,
    pub(crate) model: Model,
    /// The number of its lane, at each worker that serves it. It is used again when the export is gone.
    pub(crate) lane: usize,
    /// The workers that serve it.
    pub(crate) workers: Vec<usize>,
    /// The longest of the requests of its clients, in bytes.
    pub(crate) longest: u64,
    pub(crate) faulty: bool,
    /// Its device loses requests, and may execute them much later.
    pub(crate) silent: bool,
    /// Its export was removed, and its clients were disconnected.
    pub(crate) is_removed: bool,
    /// And its lanes are closed.
    pub(crate) is_closed: bool,
}

pub(crate) fn export(device: Arc<dyn Device>, read_only: bool) -> Export {
    let mut export = Export::new("disk", device);
    export.read_only = read_only;
    export
}

pub(crate) fn plan(memory: usize, reserve: usize, depth: u16) -> Plan {
    let mut plan = Plan::new(memory);
    (plan.reserve, plan.depth) = (reserve, depth);
    plan
}

impl Disk {
    pub(crate) fn new(rng: &mut Rng, worsen: fn(&mut Rng, &mut Faults)) -> Self {
        let mut faults = Faults::new(rng.next());
        worsen(rng, &mut faults);
        let silent = faults.lost > 0.0;
        let faulty = silent || faults.death.is_some() || faults.bug.is_some() || faults.errors.read > 0.0;
        let is_void = matches!(faults.bug, Some((_, Bug::WrongTag | Bug::Twice)));
        let memory = Self::memory(rng, silent);
        let mut content = vec![0; DEVICE as usize];
        if rng.chance(0.5) {
            rng.fill(&mut content[..DEVICE as usize / 2]);
            memory.write(0, &content);
        }
        let device = Arc::new(Fault::new(memory, faults));
        let dynamic: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&device);
        let depth = rng.range(1, 32) as u16;
        let (common, reserve) =
            (*rng.pick(&[64 << 10, 128 << 10, 256 << 10]), *rng.pick(&[16 << 10, 64 << 10, 1 << 20]));
        let exports = Exports::new(vec![export(dynamic, rng.chance(0.1))], 1 << 20).unwrap();
        let model = Model { bytes: content.into_iter().map(Some).collect(), busy: HashMap::new(), is_void };
        // The longest request that fits the memory at any offset. With more memory, reads are long enough to have holes.
        let longest = common as u64 * 3 / 5;
        let (lane, workers) = (0, Vec::new());
        let (is_removed, is_closed) = (false, false);
        Self {
            device,
            exports,
            depth,
            common,
            reserve,
            model,
            lane,
            workers,
            longest,
            faulty,
            silent,
            is_removed,
            is_closed,
        }
    }

    /// Opens channels, with the buffers that take the memory which they are not to have: a mapping has 2 MiB at least.
    pub(crate) fn open(&self, count: usize) -> Vec<(Channel, Vec<Buf>)> {
        let dynamic: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&self.device);
        // Most of it is in the reserve, so that the common part has 256 KiB, or a little more.
        let aside = (MAPPING / count - COMMON) / COMMON * COMMON;
        let plan = plan(COMMON - OWN, aside - OWN, self.depth);
        let shrink = |mut channel: Channel| {
            let margins = (2 * channel.info().block_size as usize).next_multiple_of(PAGE);
            let reserve = channel.memory_unused() - channel.memory_free() - margins;
            let (common, reserve) =
                (channel.memory().saturating_sub(self.common), reserve.saturating_sub(self.reserve));
            let common = channel.alloc(0, common).expect("no other request holds memory");
            let reserve = channel.alloc_reserved(0, reserve).expect("no other request holds memory");
            (channel, vec![common, reserve])
        };
        plan.open(&dynamic, count).unwrap().into_iter().map(shrink).collect()
    }

    fn memory(rng: &mut Rng, silent: bool) -> Memory {
        let block = *rng.pick(&[1u32, 512, 4096]);
        Memory::new(DEVICE).with(|info| {
            info.block_size = block;
            info.transfer_max = *rng.pick(&[4096, 12 << 10, 1 << 20]);
            info.zero_max = *rng.pick(&[4096, 64 << 10, u64::MAX]);
            info.discard_max = *rng.pick(&[8192, u64::MAX]);
            info.discard_alignment = block.max(*rng.pick(&[1, 4096]));
            info.queues_max = WORKERS as u16;
            info.timeout = silent.then_some(Duration::from_secs(8));
            let caps = &mut info.caps;
            caps.zero = rng.chance(0.7);
            caps.discard = rng.chance(0.8);
            caps.status = rng.chance(0.7);
            caps.fua = rng.chance(0.5);
            caps.flush = !caps.fua || rng.chance(0.5);
        })
    }
}
