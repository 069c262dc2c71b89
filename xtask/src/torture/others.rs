//! [`Others`]: the part of the processors that other programs take. A thread that sleeps and wakes does not notice them, but work
//! takes longer.

use std::fs;
use std::process;
use std::sync::{Mutex, PoisonError};

use super::clock::{Millis, now, overlap};

/// Time for which shares are kept. No wait is longer.
const KEPT: Millis = 300_000;

/// Milliseconds of a tick in /proc.
const TICK: u64 = 10;

/// Processor time so far, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spent {
    /// Of everything on the machine, and what its host took from it.
    all: u64,
    /// Of nothing.
    idle: u64,
    /// Of this process and its children.
    own: u64,
}

/// The shares so far: begin and end, and the milliseconds that a thread lost if it worked all the time.
#[derive(Debug, Default)]
pub(crate) struct Others {
    shares: Mutex<Vec<(Millis, Millis, Millis)>>,
}

impl Others {
    /// Measures once in each `pause`, while `goes_on`.
    pub(crate) fn watch(&self, pause: impl Fn(), goes_on: impl Fn() -> bool) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let (mut begin, mut before) = (now(), spent());
        while goes_on() {
            pause();
            let (end, after) = (now(), spent());
            let Some((old, new)) = before.zip(after) else { return };
            // Processes that have ended are missing for a moment.
            let own = new.own.saturating_sub(old.own);
            let others = new.all.saturating_sub(old.all).saturating_sub(own);
            // While a processor is idle, others take nothing from it.
            let others = others.saturating_sub(new.idle.saturating_sub(old.idle)) * TICK / processors;
            let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            shares.retain(|(_, until, _)| until + KEPT > end);
            shares.push((begin, end, others.min(end - begin)));
            (begin, before) = (end, after);
        }
    }

    /// What a thread lost in a span.
    pub(crate) fn within(&self, span: (Millis, Millis)) -> Millis {
        let shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = shares.iter().map(|(from, until, lost)| {
            let length = (until - from).max(1);
            overlap((*from, *until), span) * lost / length
        });
        lost.sum()
    }
}

fn spent() -> Option<Spent> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let own = process::id();
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let names = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()));
    let stats = names.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let (all, idle) = of_machine(&stat)?;
    Some(Spent { all, idle, own: stats.filter_map(|stat| of_process(&stat, own)).sum() })
}

/// Time of work and idle time, of the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
fn of_machine(stat: &str) -> Option<(u64, u64)> {
    let fields: Vec<u64> = stat.lines().next()?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, steal] = *fields.first_chunk()?;
    Some((user + nice + system + irq + softirq + steal, idle + iowait))
}

/// The ticks of a process, from its line in /proc, if it is `own` or a child of it; those of its children that have ended too.
fn of_process(stat: &str, own: u32) -> Option<u64> {
    // The name may have any characters; the state and the parent follow, then user and system time as fields 14 to 17.
    let (head, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let pid: u32 = head.split_whitespace().next()?.parse().ok()?;
    let parent: u32 = fields.get(1)?.parse().ok()?;
    let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok());
    (pid == own || parent == own).then(|| ticks.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_process_and_its_children_are_its_own() {
        let stat = "77 (a) b) S 5 1 1 0 -1 0 0 0 0 0 1 2 30 400 20 0";
        assert_eq!(of_process(stat, 77), Some(433));
        assert_eq!(of_process(stat, 5), Some(433));
        assert_eq!(of_process(stat, 6), None);
        assert_eq!(of_machine("cpu  1 20 300 7 80 4000 50000 600000 7 7\ncpu0 1"), Some((654_321, 87)));
    }

    #[test]
    fn a_share_counts_for_the_part_of_a_span_that_it_covers() {
        let others = Others::default();
        others.shares.lock().unwrap().extend([(0, 100, 50), (100, 200, 0), (200, 300, 100)]);
        assert_eq!(others.within((50, 250)), 75);
        assert_eq!(others.within((300, 900)), 0);
    }
}
