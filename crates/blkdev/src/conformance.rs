//! The conformance suite for drivers. It checks the promises of [`Device`] through [`Channel`](crate::Channel), and the promises
//! of the queue itself through a raw [`Queue`](crate::Queue).
//!
//! The suite destroys the content of the device, and panics at the first deviation. Next to the panic message, it prints the step
//! and its seed. Devices need at least 32 MiB; of larger ones, only the first 32 MiB and the end are used. A correct device passes
//! in a few seconds.
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

/// Checks all promises of this crate about devices.
///
/// # Panics
/// At the first deviation.
pub fn check(device: &Arc<dyn Device>) {
    Suite::default().run(device);
}

/// As [`check`], for a device that discards writes and reads as zeroes.
///
/// # Panics
/// At the first deviation.
pub fn check_null(device: &Arc<dyn Device>) {
    Suite { keeps_data: false, ..Suite::default() }.run(device);
}

/// As [`check`], for a read-only device. Its content does not change.
///
/// # Panics
/// At the first deviation.
pub fn check_read_only(device: &Arc<dyn Device>) {
    assert!(device.info().caps.read_only, "Info reports that the device is read-only");
    Suite::default().run(device);
}

/// Declares the device dead ([`Queue::give_up`](crate::Queue::give_up)) with requests in flight, and checks that all of them end.
/// The device may be unusable afterwards.
///
/// # Panics
/// At the first deviation.
pub fn check_give_up(device: &Arc<dyn Device>) {
    let _context = Context { target: describe(device), step: "give up", seed: 0 };
    raw::give_up(&**device);
}

/// The parameters of the suite.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The seed of all random choices.
    pub seed: u64,
    /// Written data can be read. `false`: everything reads as zeroes.
    pub keeps_data: bool,
    /// Steps to skip, by name, each with the fault of the device that makes this necessary.
    pub except: Vec<(&'static str, &'static str)>,
}

impl Default for Suite {
    fn default() -> Self {
        Self { seed: 1, keeps_data: true, except: Vec::new() }
    }
}

type Step = fn(&mut Bench);

/// Steps without channels come first, because the device may have only one queue.
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
    /// Skips a step, because of a known fault of the device.
    ///
    /// # Panics
    /// If no step has this name.
    #[must_use]
    pub fn except(mut self, step: &'static str, fault: &'static str) -> Self {
        let mut all = RAW.iter().chain(&CHANNEL).chain(&READ_ONLY);
        assert!(all.any(|(name, _)| *name == step), "there is no step {step:?}");
        self.except.push((step, fault));
        self
    }

    /// Runs all steps except the skipped ones.
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

/// Prints the present step if it panics.
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

/// The part of a device that is used, from its start, in bytes.
const AREA: u64 = 32 << 20;

/// Payload memory of each channel, in bytes.
const MEMORY: usize = 20 << 20;

/// Depth of each queue.
const DEPTH: u16 = 32;

/// The device under test, and its expected content.
struct Bench {
    device: Arc<dyn Device>,
    info: Info,
    capacity: u64,
    keeps_data: bool,
    rng: Rng,
    /// The expected content of the device, in the parts that were written.
    shadow: Memory,
    /// One channel, or two if the device has as many queues.
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

    /// The end of the device, as far as it is used: about 1 MiB.
    fn tail(&self) -> Range<u64> {
        (self.capacity - (1 << 20)) / PAGE as u64 * PAGE as u64..self.capacity
    }

    fn noise(&mut self, len: u64) -> Vec<u8> {
        model::noise(&mut self.rng, len)
    }

    /// Writes random bytes.
    fn write(&mut self, at: u64, len: u64) {
        let bytes = self.noise(len);
        self.rig().write(at, &bytes);
        self.wrote(at, &bytes);
    }

    /// Updates the expected content.
    fn wrote(&self, at: u64, bytes: &[u8]) {
        if self.keeps_data {
            self.shadow.write(at, bytes);
        }
    }

    /// Compares a range with its expected content.
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

    /// Compares a range and its surroundings with their expected content.
    fn verify_around(&mut self, at: u64, len: u64) {
        let margin = self.block() + 1;
        self.verify(at.saturating_sub(margin)..at.saturating_add(len + margin).min(self.capacity));
    }
}

/// Compares the content that was read at `at`.
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

/// Checks the rules in the documentation of [`Info`].
fn info(bench: &mut Bench) {
    promises(&bench.info, bench.capacity);
}

/// Checks the rules in the documentation of [`Info`].
pub(crate) fn promises(info: &Info, capacity: u64) {
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
    } = info.clone();
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
        !caps.discard || (discard_alignment >= block_size && discard_alignment.is_multiple_of(block_size)),
        "discard alignment {discard_alignment}, block size {block_size}"
    );
    assert!(
        !caps.discard || fits(discard_max, discard_alignment),
        "longest discard {discard_max}, alignment {discard_alignment}"
    );
    assert!(!caps.discard || discard_max > 0, "discards of some length");
    assert!(timeout.is_none_or(|timeout| !timeout.is_zero()), "time to do anything at all");
    assert!(capacity.is_multiple_of(block_size.into()), "capacity {capacity}");
}
