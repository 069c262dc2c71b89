//! [`Noise`]: how slow the machine itself is. One thread sleeps and wakes, one writes to the disk, and one measures what other
//! programs take. What they lose is not the server's fault.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::clock::{Millis, now, overlap};
use super::others::Others;

/// Pauses between two looks at the processors and at the disk.
const LOOKS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
/// Shorter delays are not counted.
const COUNTS: Millis = 30;
/// Bytes that are written to the disk at a time.
const WRITTEN: usize = 256 << 10;
/// Time for which delays are kept. No wait is longer.
const KEPT: Millis = 300_000;

/// The delays that one thread has seen.
#[derive(Debug, Default)]
struct Delays {
    past: Mutex<Vec<(Millis, Millis)>>,
    /// Begin of the present step.
    since: AtomicU64,
}

impl Delays {
    /// Notes what a step has taken beyond `usual`.
    fn step(&self, usual: Millis, work: impl FnOnce()) {
        let begin = now();
        self.since.store(begin + usual, Ordering::Relaxed);
        work();
        let end = now();
        if end.saturating_sub(begin + usual) > COUNTS {
            let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
            past.retain(|(_, until)| until + KEPT > end);
            past.push((begin + usual, end));
        }
    }

    fn within(&self, span: (Millis, Millis)) -> Millis {
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let present = (self.since.load(Ordering::Relaxed), now());
        let present = if present.1.saturating_sub(present.0) > COUNTS { overlap(present, span) } else { 0 };
        past.iter().map(|delay| overlap(*delay, span)).sum::<Millis>() + present
    }
}

/// The delays of the machine. The threads end when this is dropped.
#[derive(Debug)]
pub(crate) struct Noise {
    processors: Arc<Delays>,
    disk: Arc<Delays>,
    others: Arc<Others>,
    over: Arc<AtomicBool>,
}

impl Noise {
    /// Watches the processors, and the file system of this directory.
    pub(crate) fn watch(dir: &Path) -> io::Result<Self> {
        let file = File::create(dir.join("noise"))?;
        let over = Arc::default();
        let noise = Self { processors: Arc::default(), disk: Arc::default(), others: Arc::default(), over };
        let (processors, disk) = (Arc::clone(&noise.processors), Arc::clone(&noise.disk));
        let others = Arc::clone(&noise.others);
        let [awake, written, measured] =
            [(); 3].map(|()| Arc::clone(&noise.over)).map(|over| move || !over.load(Ordering::Relaxed));
        std::thread::spawn(move || {
            while awake() {
                processors.step(LOOKS[0].as_millis() as Millis, || std::thread::sleep(LOOKS[0]));
            }
        });
        std::thread::spawn(move || {
            while written() {
                disk.step(0, || {
                    let _ = file.write_all_at(&[0xff; WRITTEN], 0).and_then(|()| file.sync_data());
                });
                disk.step(LOOKS[1].as_millis() as Millis, || std::thread::sleep(LOOKS[1]));
            }
        });
        std::thread::spawn(move || others.watch(|| std::thread::sleep(LOOKS[1]), measured));
        Ok(noise)
    }

    /// Time that the machine has lost in a span: at most three quarters of it, so that a wait for something with this in addition
    /// has an end.
    pub(crate) fn within(&self, span: (Millis, Millis)) -> Millis {
        let lost = self.processors.within(span) + self.disk.within(span) + self.others.within(span);
        lost.min(span.1.saturating_sub(span.0) / 4 * 3)
    }

    /// How much of a span each of them has lost.
    pub(crate) fn describe(&self, span: (Millis, Millis)) -> String {
        let length = (span.1 - span.0).max(1);
        let parts = [self.processors.within(span), self.disk.within(span), self.others.within(span)];
        let [processors, disk, others] = parts.map(|lost| 100 * lost / length);
        format!("late to wake {processors} %, waiting for the disk {disk} %, taken by other programs {others} %")
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
