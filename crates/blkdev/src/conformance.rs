//! The suite that every driver is held against: what a [`Device`] promises, checked through [`Channel`](crate::Channel)
//! and, where the promise is the queue's own, through a raw [`Queue`](crate::Queue).
//!
//! Everything here destroys what is on the device, and panics at the first deviation; what it was doing, and with which
//! seed, is printed next to the panic. Devices have at least 32 MiB; of larger ones not more than the first 32 MiB and the
//! end are used. A device that works passes in a few seconds.
//!
//! ```
//! use std::sync::Arc;
//! use blkdev::{Device, conformance, memory::Memory};
//!
//! let device: Arc<dyn Device> = Arc::new(Memory::new(32 << 20));
//! conformance::check(&device);
//! ```

mod model;
mod raw;
mod rig;
mod steps;

use std::{ops::Range, sync::Arc};

use crate::{
    arena::PAGE,
    channel::Plan,
    device::{Device, Info},
    fault::Rng,
    memory::Memory,
};
use rig::Rig;

/// Holds a device against everything that this crate promises of devices.
///
/// # Panics
/// At the first deviation.
pub fn check(device: &Arc<dyn Device>) {
    Suite::default().run(device);
}

/// As [`check`], for a device that keeps nothing and reads as zeroes.
///
/// # Panics
/// At the first deviation.
pub fn check_null(device: &Arc<dyn Device>) {
    Suite { keeps_data: false, ..Suite::default() }.run(device);
}

/// As [`check`], for a device that is read-only. Whatever it holds is still there afterwards.
///
/// # Panics
/// At the first deviation.
pub fn check_read_only(device: &Arc<dyn Device>) {
    assert!(device.info().caps.read_only, "a read-only device says so");
    Suite::default().run(device);
}

/// Gives a queue of the device up with requests in flight, and checks that all of them end. The device may be good for
/// nothing afterwards.
///
/// # Panics
/// At the first deviation.
pub fn check_give_up(device: &Arc<dyn Device>) {
    let _context = Context { target: describe(device), step: "give up", seed: 0 };
    raw::give_up(&**device);
}

/// What is checked.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The seed of everything random.
    pub seed: u64,
    /// What is written can be read. `false`: everything reads as zeroes.
    pub keeps_data: bool,
    /// Steps to leave out, by name, each with the fault of the device that makes it necessary.
    pub except: Vec<(&'static str, &'static str)>,
}

impl Default for Suite {
    fn default() -> Self {
        Self { seed: 1, keeps_data: true, except: Vec::new() }
    }
}

type Step = fn(&mut Bench);

/// Steps that need no channel come before any is opened, since a device may have one queue only.
const RAW: [(&str, Step); 3] = [("info", info), ("queue", raw::requests), ("queues", raw::queues)];

const CHANNEL: [(&str, Step); 17] = [
    ("fill", steps::fill),
    ("edges", steps::edges),
    ("zero", steps::zero),
    ("discard", steps::discard),
    ("durability", steps::durability),
    ("status", steps::status),
    ("out of range", steps::out_of_range),
    ("no length", steps::no_length),
    ("many at once", steps::many_at_once),
    ("back-pressure", steps::back_pressure),
    ("cancel", steps::cancel),
    ("wake", steps::wake),
    ("model", steps::model),
    ("threads", steps::threads),
    ("neighbours", steps::neighbours),
    ("whole and part", steps::whole_and_part),
    ("drop", steps::drop_in_flight),
];

const READ_ONLY: [(&str, Step); 8] = [
    ("read-only", steps::read_only),
    ("status", steps::status),
    ("out of range", steps::out_of_range),
    ("no length", steps::no_length),
    ("many at once", steps::many_at_once),
    ("cancel", steps::cancel),
    ("wake", steps::wake),
    ("drop", steps::drop_in_flight),
];

impl Suite {
    /// Leaves a step out, because of a fault that the device is known to have.
    ///
    /// # Panics
    /// When there is no step of that name.
    #[must_use]
    pub fn except(mut self, step: &'static str, fault: &'static str) -> Self {
        let mut all = RAW.iter().chain(&CHANNEL).chain(&READ_ONLY);
        assert!(all.any(|(name, _)| *name == step), "there is no step {step:?}");
        self.except.push((step, fault));
        self
    }

    /// Runs all steps but the exceptions.
    ///
    /// # Panics
    /// At the first deviation.
    pub fn run(&self, device: &Arc<dyn Device>) {
        let capacity = device.capacity();
        assert!(capacity >= AREA, "the suite needs {AREA} bytes, the device has {capacity}");
        let mut bench = Bench {
            device: Arc::clone(device),
            info: device.info().clone(),
            capacity,
            keeps_data: self.keeps_data,
            rng: Rng::new(self.seed),
            shadow: Memory::new(capacity),
            rigs: Vec::new(),
        };
        for step in RAW {
            self.step(&mut bench, step);
        }
        bench.open();
        let steps: &[(&str, Step)] = if bench.info.caps.read_only { &READ_ONLY } else { &CHANNEL };
        for step in steps {
            self.step(&mut bench, *step);
            bench.rigs.iter().for_each(Rig::settled);
        }
    }

    fn step(&self, bench: &mut Bench, (name, step): (&'static str, Step)) {
        if self.except.iter().any(|(except, _)| *except == name) {
            return;
        }
        let _context = Context { target: describe(&bench.device), step: name, seed: self.seed };
        step(bench);
    }
}

/// Says where it was when a step panics.
struct Context {
    target: String,
    step: &'static str,
    seed: u64,
}

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("conformance: {} failed at step {:?} with seed {}", self.target, self.step, self.seed);
        }
    }
}

fn describe(device: &Arc<dyn Device>) -> String {
    format!("{} ({})", device.info().driver, device.info().target)
}

/// The part of a device that is used, from its start.
const AREA: u64 = 32 << 20;

/// Payload memory of each channel.
const MEMORY: usize = 20 << 20;

/// Depth of each queue.
const DEPTH: u16 = 32;

/// The device at work, and what it should hold.
struct Bench {
    device: Arc<dyn Device>,
    info: Info,
    capacity: u64,
    keeps_data: bool,
    rng: Rng,
    /// What the device should hold, in the parts that were written.
    shadow: Memory,
    /// One, or two where the device has as many queues.
    rigs: Vec<Rig>,
}

impl Bench {
    fn open(&mut self) {
        let count = usize::from(self.info.queues_max.min(2));
        let channels =
            Plan { memory: MEMORY, depth: DEPTH, ..Plan::default() }.open(&self.device, count).expect("channels open");
        self.rigs = channels.into_iter().map(Rig::new).collect();
    }

    fn rig(&mut self) -> &mut Rig {
        &mut self.rigs[0]
    }

    fn block(&self) -> u64 {
        self.info.block_size.into()
    }

    /// The end of the device, as far as it is used: 1 MiB or so.
    fn tail(&self) -> Range<u64> {
        (self.capacity - (1 << 20)) / PAGE as u64 * PAGE as u64..self.capacity
    }

    fn noise(&mut self, len: u64) -> Vec<u8> {
        model::noise(&mut self.rng, len)
    }

    /// Writes noise.
    fn write(&mut self, at: u64, len: u64) {
        let bytes = self.noise(len);
        self.rig().write(at, &bytes);
        self.wrote(at, &bytes);
    }

    /// Notes what the device should hold.
    fn wrote(&self, at: u64, bytes: &[u8]) {
        if self.keeps_data {
            self.shadow.write(at, bytes);
        }
    }

    /// Compares a range with what it should hold.
    fn verify(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(1 << 20);
            let found = self.rig().read(at, len);
            let mut expected = vec![0; len as usize];
            self.shadow.read(at, &mut expected);
            same(at, &found, &expected);
            at += len;
        }
    }

    /// Compares a range and what lies around it with what it should hold.
    fn verify_around(&mut self, at: u64, len: u64) {
        let margin = self.block() + 1;
        self.verify(at.saturating_sub(margin)..at.saturating_add(len + margin).min(self.capacity));
    }
}

/// Compares what was read at `at`.
fn same(at: u64, found: &[u8], expected: &[u8]) {
    if found == expected {
        return;
    }
    let n = found.iter().zip(expected).position(|(f, e)| f != e).expect("equally long");
    let last = found.iter().zip(expected).rposition(|(f, e)| f != e).expect("equally long");
    panic!(
        "wrong data at byte {} of the device: found {:#04x}, expected {:#04x} (wrong from {} to {}, in a read of {} at {at})",
        at + n as u64,
        found[n],
        expected[n],
        at + n as u64,
        at + last as u64 + 1,
        found.len(),
    );
}

/// What the documentation of [`Info`] says of its fields.
fn info(bench: &mut Bench) {
    let Info {
        driver,
        queues_max,
        depth_max,
        block_size,
        preferred_block_size,
        transfer_max,
        zero_max,
        discard_max,
        discard_alignment,
        timeout,
        caps,
        ..
    } = bench.info.clone();
    assert!(!driver.is_empty());
    assert!(queues_max >= 1 && depth_max >= 1, "a queue for a request: {queues_max}, {depth_max}");
    assert!(block_size.is_power_of_two() && block_size <= 65536, "block size {block_size}");
    assert!(
        preferred_block_size.is_power_of_two() && preferred_block_size >= block_size.max(512),
        "preferred block size {preferred_block_size}, block size {block_size}"
    );
    assert!(
        transfer_max as usize >= PAGE && transfer_max >= block_size && transfer_max.is_multiple_of(block_size),
        "longest transfer {transfer_max}, block size {block_size}"
    );
    let fits = |max: u64, unit: u32| max == u64::MAX || max.is_multiple_of(unit.into());
    assert!(fits(zero_max, block_size), "longest zero {zero_max}, block size {block_size}");
    assert!(!caps.zero || zero_max > 0, "zeroes of some length");
    assert!(
        discard_alignment >= block_size && discard_alignment.is_multiple_of(block_size),
        "discard alignment {discard_alignment}, block size {block_size}"
    );
    assert!(fits(discard_max, discard_alignment), "longest discard {discard_max}, alignment {discard_alignment}");
    assert!(!caps.discard || discard_max > 0, "discards of some length");
    assert!(timeout.is_none_or(|timeout| !timeout.is_zero()), "time to do anything at all");
    assert!(bench.capacity.is_multiple_of(block_size.into()), "capacity {}", bench.capacity);
}
