//! The faults of each round. They follow from the seed alone, and not from what happens in a run.

use super::clock::Millis;
use super::rng::Rng;

/// Length of the part of a round in which faults begin.
pub(crate) const ROUND: Millis = 8_000;

/// Fewest and most faults of a round.
const FAULTS: (u64, u64) = (4, 8);

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL of a verifying client. Another one continues with its region.
    KillClient,
    /// SIGSTOP and SIGCONT of a verifying client.
    PauseClient,
    /// SIGKILL of a back end, which starts again later; a reload opens its device again.
    KillBackEnd,
    /// SIGSTOP and SIGCONT of a back end, within the time-out of its device.
    PauseBackEnd,
    /// The same for longer than the time-out.
    HangBackEnd,
    /// The server's log is not read.
    FullPipe,
    /// Clients that request much and read little.
    SlowReaders,
    /// Clients that stop in the middle of a payload.
    SlowWriters,
    /// Many clients with large requests: more than the payload memory of the server.
    Pressure,
    /// Clients that vanish in their handshake and in the middle of requests.
    Vanishing,
    /// Reloads that add an export with clients, and remove it.
    Reload,
    /// A reload with an error in the file.
    BadReload,
    /// The image of an export loses its second half, and gets its size back later.
    Truncate,
    /// The file system of an export is full.
    NoSpace,
    /// SIGTERM under load, and a new server.
    Stop,
    /// SIGKILL of the server, and a new one.
    Crash,
}

/// Each kind, once.
const KINDS: [Fault; 16] = [
    Fault::KillClient,
    Fault::PauseClient,
    Fault::KillBackEnd,
    Fault::PauseBackEnd,
    Fault::HangBackEnd,
    Fault::FullPipe,
    Fault::SlowReaders,
    Fault::SlowWriters,
    Fault::Pressure,
    Fault::Vanishing,
    Fault::Reload,
    Fault::BadReload,
    Fault::Truncate,
    Fault::NoSpace,
    Fault::Stop,
    Fault::Crash,
];

/// A fault, and when it happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) fault: Fault,
    /// Since the begin of the round.
    pub(crate) at: Millis,
    pub(crate) lasts: Millis,
    /// Chooses the target.
    pub(crate) pick: u64,
}

/// The faults of all rounds.
#[derive(Debug)]
pub(crate) struct Plan {
    rng: Rng,
    /// Kinds that are still to be dealt. So a few rounds have all of them.
    deck: Vec<Fault>,
}

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        Self { rng: Rng::of(seed, 1), deck: Vec::new() }
    }

    /// The faults of the next round, in the order in which they begin.
    pub(crate) fn next_round(&mut self) -> Vec<Planned> {
        let count = self.rng.between(FAULTS.0, FAULTS.1);
        let mut round: Vec<Planned> = (0..count).map(|_| self.deal()).collect();
        round.sort_by_key(|planned| planned.at);
        round
    }

    fn deal(&mut self) -> Planned {
        if self.deck.is_empty() {
            self.deck.extend(KINDS);
            self.rng.shuffle(&mut self.deck);
        }
        let fault = self.deck.pop().expect("it was just filled");
        let lasts = match fault {
            Fault::PauseBackEnd => self.rng.between(50, 1_000),
            Fault::HangBackEnd => self.rng.between(4_500, 6_000),
            Fault::KillBackEnd => self.rng.between(0, 2_500),
            _ => self.rng.between(300, 5_000),
        };
        Planned { fault, at: self.rng.below(ROUND), lasts, pick: self.rng.next() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let faults = |seed| {
            let mut plan = Plan::new(seed);
            (0..50).map(|_| plan.next_round()).collect::<Vec<_>>()
        };
        assert_eq!(faults(7), faults(7));
        assert_ne!(faults(7), faults(8));
    }

    #[test]
    fn four_rounds_have_every_fault() {
        for seed in 0..100 {
            let mut plan = Plan::new(seed);
            let all: Vec<Planned> = (0..4).flat_map(|_| plan.next_round()).collect();
            let kinds = KINDS.iter().filter(|kind| all.iter().any(|planned| planned.fault == **kind)).count();
            assert_eq!(kinds, KINDS.len(), "seed {seed}");
        }
    }
}
