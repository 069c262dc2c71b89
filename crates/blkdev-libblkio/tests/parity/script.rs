//! Sends the same requests to two devices, one after the other: the results must be equal, errno and data.

use std::{sync::Arc, time::Instant};

use blkdev::{Channel, Device, Done, Error, Extent, Io, Plan, fault::Rng};

/// A device with one channel.
pub(crate) struct Side {
    name: String,
    channel: Channel,
}

impl Side {
    pub(crate) fn open(device: &Arc<dyn Device>) -> Self {
        let name = format!("{} ({})", device.info().driver, device.info().target);
        let mut plan = Plan::new(24 << 20);
        plan.depth = 32;
        let channel = plan.open(device, 1).unwrap().remove(0);
        Self { name, channel }
    }

    /// Sends a request and waits for it. Returns its result, and the data read.
    pub(crate) fn one(&mut self, io: impl FnOnce(&mut Channel) -> Io) -> (Result<(), Error>, Vec<u8>) {
        let io = io(&mut self.channel);
        self.channel.submit(1, io);
        let mut done: Vec<Done> = Vec::new();
        while done.is_empty() {
            self.channel.tick(Instant::now());
            self.channel.kick();
            self.channel.reap(&mut done);
            std::thread::yield_now();
        }
        let Done { io, result, .. } = done.remove(0);
        let data = match io {
            Io::Read { buf, .. } if result.is_ok() => buf.to_vec(),
            _ => Vec::new(),
        };
        (result, data)
    }
}

/// A step of the script, before memory is allocated for it.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read { at: u64, len: u64 },
    Write { at: u64, len: u64, noise: u64, fua: bool },
    Zero { at: u64, len: u64, fua: bool, unmap: bool, fast: bool },
    Discard { at: u64, len: u64, fua: bool },
    Flush,
    Status { at: u64, len: u64 },
}

impl Step {
    fn io(self, channel: &mut Channel) -> Io {
        let mut memory = |at, len: u64| channel.alloc(at, len as usize).expect("an idle channel has memory");
        match self {
            Self::Read { at, len } => Io::Read { at, buf: memory(at, len) },
            Self::Write { at, len, noise, fua } => {
                let (mut buf, mut bytes) = (memory(at, len), vec![0; len as usize]);
                Rng::new(noise).fill(&mut bytes);
                buf.copy_from(0, &bytes);
                Io::Write { at, buf, fua }
            }
            Self::Zero { at, len, fua, unmap, fast } => Io::Zero { at, len, fua, unmap, fast },
            Self::Discard { at, len, fua } => Io::Discard { at, len, fua },
            Self::Flush => Io::Flush,
            Self::Status { at, len } => Io::Status { at, len, extents: Vec::<Extent>::new() },
        }
    }
}

/// Sends `count` requests to both devices: of all lengths, aligned and not, inside and outside of the device.
pub(crate) fn same_all_the_way(ours: &mut Side, theirs: &mut Side, count: usize, discard: bool) {
    let infos = [ours.channel.info(), theirs.channel.info()];
    let told = infos.map(|info| (info.block_size, info.caps.read_only, info.caps.flush));
    assert_eq!(told[0], told[1], "{} and {} report the same limits", ours.name, theirs.name);
    let capacity = ours.channel.capacity();
    assert_eq!(capacity, theirs.channel.capacity());

    let mut rng = Rng::new(11);
    for n in 0..count {
        let step = draw(&mut rng, capacity, discard);
        let ((result, data), (expected, their_data)) = (ours.one(|c| step.io(c)), theirs.one(|c| step.io(c)));
        assert_eq!(result, expected, "step {n}, {step:?}: {} and {}", ours.name, theirs.name);
        let differ = data.iter().zip(&their_data).position(|(a, b)| a != b);
        assert_eq!(
            (data.len(), differ),
            (their_data.len(), None),
            "step {n}, {step:?}: {} and {}",
            ours.name,
            theirs.name
        );
    }
    let mut at = 0;
    while at < capacity {
        let step = Step::Read { at, len: (4 << 20).min(capacity - at) };
        assert!(ours.one(|c| step.io(c)) == theirs.one(|c| step.io(c)), "at the end, {step:?} has the same result");
        at += 4 << 20;
    }
}

fn draw(rng: &mut Rng, capacity: u64, discard: bool) -> Step {
    let len = match rng.below(20) {
        0 => 0,
        1..6 => rng.range(1, 4096),
        6..12 => 512 * rng.range(1, 256),
        12..17 => 4096 * rng.range(1, 32),
        17 | 18 => rng.range(1, 2 << 20),
        _ => rng.range(16 << 20, 20 << 20),
    };
    let at = match rng.below(20) {
        0 => capacity - len,
        1 => capacity - len / 2,
        2 => capacity + rng.below(1 << 40),
        3 => u64::MAX - rng.below(8192),
        4..10 => rng.below(capacity - len),
        // At a place that other requests have used.
        10..13 => rng.below(64 << 10),
        _ => rng.below(1 << 20) / 4096 * 4096,
    };
    let (fua, unmap, fast) = (rng.chance(0.2), rng.chance(0.5), false);
    match rng.below(20) {
        0..8 => Step::Read { at, len },
        8..14 => Step::Write { at, len, noise: rng.next(), fua },
        14..17 => Step::Zero { at, len, fua, unmap, fast },
        17 if discard => Step::Discard { at, len, fua },
        18 => Step::Flush,
        _ => Step::Status { at, len },
    }
}
