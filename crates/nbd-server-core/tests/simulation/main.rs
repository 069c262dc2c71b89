//! Simulates a whole server without sockets and without a clock: clients, sessions, workers with their policy ([`Turns`]), channels,
//! and devices that complete requests out of order. A seed drives everything, and a model checks it.
//!
//! Each seed makes one to four workers and one to three exports with other devices (block sizes, limits, capabilities), other
//! protocol modes, another set of faults, and several clients of each at once. A device has a queue at some of the workers, and
//! the steps of the workers' turns interleave. Bytes arrive and leave in pieces of any size. Some clients stop, some send what is no
//! request, some vanish in the middle of one, and others come in their place, with the same number. Exports are added and removed.
//! Only the first export has faults, and the others must not notice.
//!
//! In every run, each request of a living client gets exactly one reply, which is correct; acknowledged data is there; no buffer
//! is lost; clients get memory in the order in which they began to wait for it, also while others stop; each worker sleeps while
//! nothing happens, and only an event wakes it; and everything ends.
//!
//! TLS has a simulation of its own: the fuzz target `tls_session`, which the tests of `tls::fuzz` replay.
//!
//! [`Turns`]: nbd_server_core::Turns

mod client;
mod disk;
mod model;
mod replies;
mod worker;
mod world;

use std::panic::RefUnwindSafe;

use blkdev::fault::{Bug, Errors, Faults, Rng};
use nbd_proto::wire::CommandKind as Kind;

use crate::{disk::DEVICE, world::World};

#[test]
fn orderly_devices() {
    run_seeds(0, 4800, |_, _| {});
}

#[test]
fn failing_devices() {
    run_seeds(1, 2000, |rng, faults| {
        let some = rng.below(20) as f64 / 100.0;
        faults.errors =
            Errors { read: some, write: some, zero: some, discard: some, flush: some, status: some, prefetch: some };
        faults.torn = rng.chance(0.5);
    });
}

#[test]
fn dying_devices() {
    run_seeds(2, 1500, |rng, faults| faults.death = Some(rng.below(200)));
}

/// Some requests are never completed by the device. They must end all the same, and so must all requests behind them.
#[test]
fn silent_devices() {
    run_seeds(3, 1000, |rng, faults| faults.lost = 0.001 + rng.below(20) as f64 / 1000.0);
}

/// A driver that panics, or completes requests that it does not have, causes errors for its clients, and nothing else.
#[test]
fn faulty_drivers() {
    run_seeds(4, 500, |rng, faults| {
        let bug = *rng.pick(&[Bug::Panic, Bug::PanicOfDevice, Bug::WrongTag, Bug::Twice]);
        faults.bug = Some((1 + rng.below(100), bug));
    });
}

/// Many clients wait for memory, in both lines.
#[test]
fn crowds() {
    run_worlds(5, 200, World::throng);
}

/// If many clients request long replies and read none of them, others get replies, and no client is disconnected.
#[test]
fn greedy_clients_do_not_delay_others() {
    for seed in 40_000..40_300 {
        let greedy = Rng::new(seed).range(1, 60) as usize;
        let mut world = World::crowd(seed, greedy + 1);
        for n in 0..greedy {
            for _ in 0..world.rng.range(1, 100) {
                let (client, len) = (&mut world.clients[n], world.rng.range(17 << 10, DEVICE - 1));
                client.request(Kind::READ, 0, len);
            }
        }
        world.clients[greedy].socket_len = 10 << 20;
        let has_contexts = !world.clients[greedy].session.terms().contexts.is_empty();
        let long = (Kind::READ, 200 << 10);
        let requests =
            [(Kind::READ, 4096), long, (Kind::FLUSH, 0), (Kind::WRITE_ZEROES, 4096), (Kind::BLOCK_STATUS, 4096)];
        let (count, mut taken) = (if has_contexts { 5 } else { 4 }, 0);
        for n in 0..=greedy {
            let honest = n == greedy;
            for &(kind, len) in requests[..count].iter().filter(|_| honest) {
                world.clients[n].request(kind, 0, len);
            }
            world.arrive(n, usize::MAX);
            for _ in 0..if honest { 2000 } else { 20 } {
                let client = &mut world.clients[greedy];
                if taken > 0 && client.is_served() {
                    break;
                }
                world.turn();
                taken += world.take(greedy, usize::MAX).len();
            }
        }
        world.sleep();
        assert!(world.clients.iter().all(|client| !client.gone), "seed {seed}: no client is disconnected");
        assert!(world.clients[greedy].is_served(), "seed {seed}: the honest client is served");
        assert!(taken >= 16 * count, "seed {seed}: and gets its replies");
    }
}

/// If many clients fill the queue with requests, those of a later client do not wait behind all of them.
#[test]
fn a_flood_of_requests_does_not_fill_the_queue() {
    for seed in 50_000..50_050 {
        let mut rng = Rng::new(seed);
        let (depth, count) = (rng.range(1, 32) as u16, rng.range(1, 60) as usize);
        let mut world = World::with(seed, count, depth);
        // Unaligned zeroes wait for each other before they reach the queue.
        let (kind, at, len) =
            *world.rng.pick(&[(Kind::FLUSH, 0, 0), (Kind::READ, 0, 512), (Kind::WRITE_ZEROES, 1, 100)]);
        for client in &mut world.clients {
            (0..500).for_each(|_| client.request(kind, at, len));
        }
        for _ in 0..200 {
            (0..count).for_each(|n| world.arrive(n, usize::MAX));
            world.turn();
            let most = (1..=count).map(|n| 2 * usize::from(depth) / n + 1).sum::<usize>() + 2 * usize::from(depth);
            let in_flight = world.workers[0].lane(0).in_flight();
            assert!(
                in_flight <= most,
                "seed {seed}: {in_flight} in flight of {count} clients, the queue takes {depth}"
            );
        }
        let busiest = world.clients.iter().map(|client| client.session.in_flight()).max().unwrap();
        assert!(busiest <= 2 * usize::from(depth) + 1, "seed {seed}: {busiest} of one client");
    }
}

/// If many requests wait for memory that is held by a WRITE without its payload, the worker sleeps. Requests that need no memory
/// get replies, as long as their client does not have too many.
#[test]
fn a_worker_sleeps_while_requests_wait_for_memory() {
    for seed in 60_000..60_100 {
        let mut world = World::crowd(seed, 50);
        let last = world.take_memory(Kind::WRITE, 100 << 10);
        let count = *world.rng.pick(&[1, 1000, 1023, 1024, 1025, 1500]);
        let has_flush = world.rng.chance(0.5);
        let client = &mut world.clients[last];
        client.socket_len = 10 << 20;
        (0..count).for_each(|_| client.request(Kind::READ, 0, 100 << 10));
        if has_flush {
            client.request(Kind::FLUSH, 0, 0);
        }
        world.arrive(last, usize::MAX);
        world.sleep();
        let flushed = world.take(last, usize::MAX).len() >= 16;
        assert_eq!(flushed, has_flush && count < 1024, "seed {seed}: {count} READs wait");
        // Time passes, and the writers are disconnected.
        while !world.clients[..last].iter().all(|client| client.gone) {
            world.turn();
        }
        while !world.clients[last].is_served() {
            world.turn();
            world.take(last, usize::MAX);
        }
    }
}

/// Clients that do not read replies must give up memory, so that a client with long requests gets more than the rest.
#[test]
fn memory_of_stopped_clients_is_given_to_others() {
    for seed in 70_000..70_100 {
        let mut world = World::crowd(seed, 50);
        let last = world.take_memory(Kind::READ, 60 << 10);
        let client = &mut world.clients[last];
        client.socket_len = 10 << 20;
        (0..400).for_each(|_| client.request(Kind::READ, 0, 50 << 10));
        world.arrive(last, usize::MAX);
        let mut most = 0;
        while !world.clients[last].is_served() {
            world.turn();
            world.take(last, usize::MAX);
            most = most.max(world.clients[last].session.in_flight());
        }
        assert!(most >= 8, "seed {seed}: no more than {most} READs in flight");
        assert!(world.clients.iter().all(|client| !client.gone), "seed {seed}: no client is disconnected");
    }
}

/// Runs `count` seeds of a group, 10,000 in all groups; or, for long runs, so many times as many as `SIMULATION_TIMES` says,
/// without the first `SIMULATION_DONE` times as many.
fn run_seeds(group: u64, count: u64, worsen: fn(&mut Rng, &mut Faults)) {
    run_worlds(group, count, |seed| World::new(seed, worsen));
}

fn run_worlds(group: u64, count: u64, world: impl Fn(u64) -> World + RefUnwindSafe) {
    let number = |name, default| std::env::var(name).map_or(default, |value| value.parse().expect("a number"));
    let (done, times): (u64, u64) = (number("SIMULATION_DONE", 0), number("SIMULATION_TIMES", 1));
    let first = group << 32;
    for seed in first + count * done..first + count * times {
        // A panic reports the seed, which is enough to reproduce it.
        let result = std::panic::catch_unwind(|| world(seed).run());
        assert!(result.is_ok(), "seed {seed} fails");
    }
}
