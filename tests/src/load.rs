//! Clients that verify what they write while a test disturbs their server or its device.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::checker::{Checker, Durability};
use crate::raw::{Mode, Raw};
use crate::server::Address;

/// How often a test restarts something: as `NBDBLK_RESTARTS` says, or `few` times.
///
/// # Panics
/// If the variable is not a number.
pub fn restarts(few: u32) -> u32 {
    std::env::var("NBDBLK_RESTARTS").map_or(few, |number| number.parse().expect("a number"))
}

/// Runs `disturb` while clients work, one for each `durability`, each on `count` blocks of its own. Then each client verifies all its
/// blocks.
///
/// # Panics
/// If a client sees an error, or reads anything but what it wrote last.
pub fn under_load(address: &Address, durability: &[Durability], count: usize, disturb: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let checkers = thread::scope(|scope| {
        let clients: Vec<_> = durability
            .iter()
            .enumerate()
            .map(|(n, durability)| {
                let stop = &stop;
                scope.spawn(move || {
                    let raw = Raw::enter(address, Mode::Structured, "");
                    let mut checker = Checker::new(raw, (n * count) as u64, count, *durability);
                    while !stop.load(Ordering::Relaxed) {
                        checker.round();
                    }
                    checker
                })
            })
            .collect();
        disturb();
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().expect("no client sees an error")).collect::<Vec<_>>()
    });
    for mut checker in checkers {
        checker.flush();
        checker.verify_all();
    }
}
