//! A device with invalid values in its configuration space and registers: it causes errors, and never a panic.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use blkdev::{Device, Mapping};
use blkdev_vfio::{Bar, PciDevice};
use blkdev_virtio_pci::{Options, VirtioPci};

/// Registers that keep written values.
#[derive(Debug)]
struct Registers(Vec<AtomicU8>);

impl Registers {
    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at.is_multiple_of(N), "an access of {N} bytes at {at} is aligned");
        std::array::from_fn(|n| self.0[at + n].load(Ordering::Relaxed))
    }

    fn write<const N: usize>(&self, at: usize, bytes: [u8; N]) {
        assert!(at.is_multiple_of(N), "an access of {N} bytes at {at} is aligned");
        bytes.iter().enumerate().for_each(|(n, byte)| self.0[at + n].store(*byte, Ordering::Relaxed));
    }
}

impl Bar for Registers {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.read(at))
    }

    fn read16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    fn read32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.read(at))
    }

    fn read64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.read(at))
    }

    fn write8(&self, at: usize, value: u8) {
        self.write(at, value.to_le_bytes());
    }

    fn write16(&self, at: usize, value: u16) {
        self.write(at, value.to_le_bytes());
    }

    fn write32(&self, at: usize, value: u32) {
        self.write(at, value.to_le_bytes());
    }

    fn write64(&self, at: usize, value: u64) {
        self.write(at, value.to_le_bytes());
    }
}

#[derive(Debug)]
struct Odd {
    config: Vec<u8>,
    registers: Arc<Registers>,
    vectors: u16,
}

impl PciDevice for Odd {
    fn address(&self) -> &'static str {
        "0000:00:00.0"
    }

    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()> {
        let at = usize::from(at);
        let from = self.config.get(at..at + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn write_config(&self, _at: u16, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn bar(&self, _index: u8) -> io::Result<Arc<dyn Bar>> {
        Ok(Arc::clone(&self.registers) as Arc<dyn Bar>)
    }

    fn dma_map(&self, _mapping: &Arc<Mapping>) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&self, _mapping: &Arc<Mapping>) -> io::Result<()> {
        Ok(())
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn enable_vectors(&self, _fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn set_vector(&self, _index: u16, _fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        Ok(())
    }

    fn watch_removal(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Pseudo-random numbers from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[(self.next() % all.len() as u64) as usize]
    }
}

/// A valid device, except for the fields that `odd` changes.
fn device(random: &mut Random, odd: bool) -> Odd {
    let mut config = vec![0; 256];
    config[..4].copy_from_slice(&[0xf4, 0x1a, 0x42, 0x10]);
    config[6] = 1 << 4;
    config[0x34] = 0x40;
    let field = |random: &mut Random, good: u32| {
        let extremes = [0, 1, 2, 3, 4, 7, 55, 56, 57, 4094, 4095, 4096, 1 << 31, u32::MAX - 1, u32::MAX];
        if odd && random.next().is_multiple_of(6) { random.of(&extremes) } else { good }
    };
    // Common configuration, notifications, device configuration: a capability of 20 bytes each.
    for (n, (kind, at, len, multiplier)) in
        [(1, 0, 56, 0), (2, 1024, 1024, 4), (4, 2048, 60, 0)].into_iter().enumerate()
    {
        let to = 0x40 + 0x20 * n;
        let next = if n == 2 { 0 } else { to as u8 + 0x20 };
        config[to..to + 5].copy_from_slice(&[9, next, 20, kind, 0]);
        for (to, good) in [(to + 8, at), (to + 12, len), (to + 16, multiplier)] {
            config[to..to + 4].copy_from_slice(&field(random, good).to_le_bytes());
        }
    }
    if odd && random.next().is_multiple_of(8) {
        let to = random.of(&[0x34, 0x41, 0x61, 0x81]);
        config[to] = random.of(&[0x40, 0xfc, 0xff, 0xf0]);
    }
    let mut registers = vec![0; 4096];
    let mut set = |to: usize, value: u32| registers[to..to + 4].copy_from_slice(&value.to_le_bytes());
    // Every feature except packed rings, in both words, which are the same register here; a few queues of 256 descriptors.
    set(4, field(random, !(1 << 2)));
    set(16, 4 << 16);
    set(24, field(random, 256));
    set(28, field(random, 1 << 16));
    for (to, good) in [(0, 2048), (4, 0), (8, 0), (12, 126), (20, 512), (24, 0), (28, 0), (32, 4 << 16), (36, 8)] {
        set(2048 + to, field(random, good));
    }
    for to in [40, 44, 48, 52, 56] {
        set(2048 + to, field(random, 1));
    }
    if odd && random.next().is_multiple_of(4) {
        registers[18..20].copy_from_slice(&random.of(&[0_u16, 1, u16::MAX - 1, u16::MAX]).to_le_bytes());
    }
    let vectors = if odd { random.of(&[0, 1, 2, 3, 5, u16::MAX]) } else { 5 };
    Odd { config, registers: Arc::new(Registers(registers.into_iter().map(AtomicU8::new).collect())), vectors }
}

fn open(device: Odd) -> String {
    let mut options = Options::new("0000:00:00.0");
    options.virtio.timeout = Some(Duration::from_millis(1));
    match VirtioPci::drive(Arc::new(device), &options) {
        Ok(device) => format!("{} bytes", device.capacity()),
        Err(e) => e.to_string(),
    }
}

#[test]
fn registers_that_no_device_has() {
    // A valid device gets as far as its first request, which nothing completes.
    let text = open(device(&mut Random(1), false));
    assert!(text.contains("does not answer"), "{text}");
    let mut seen = std::collections::BTreeSet::new();
    for seed in 1..=1500 {
        let text = open(device(&mut Random(seed << 20 | 1), true));
        assert!(text.starts_with("virtio-pci 0000:00:00.0: "), "{text}");
        seen.insert(text);
    }
    for part in [
        "not aligned",
        "no capability",
        "more registers than the device has",
        "doorbell",
        "too little",
        "does not answer",
    ] {
        assert!(seen.iter().any(|text| text.contains(part)), "{part:?} was seen among {seen:#?}");
    }
}
