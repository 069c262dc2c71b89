//! 64 requests in flight at random, against a vector that does the same.

mod common;

use std::collections::HashMap;

use common::{MODES, PATIENCE, Running, Seed, options};
use nbd_client::{Cookie, Engine, Request};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

const DEPTH: usize = 64;

/// Bytes for each of the requests in flight, since requests that overlap have no order.
const AREA: u64 = 96 << 10;

#[test]
fn sixty_four_random_requests_in_flight() {
    let server = Running::start();
    for (n, mode) in MODES.into_iter().enumerate() {
        for uri in [server.unix(), server.tcp()] {
            let engine = Engine::connect(&uri, &options().mode(mode)).unwrap();
            let wait = |engine: &Engine| engine.wait(Some(PATIENCE)).unwrap();
            run(engine, &mut Seed(n as u64), 4000, wait);
        }
    }
}

/// With edge triggers an event comes once: what was not done then is never done.
#[test]
fn edge_triggers_do() {
    let server = Running::start();
    for (n, mode) in MODES.into_iter().enumerate() {
        let engine = Engine::connect(&server.unix(), &options().mode(mode)).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&engine, EpollEvent::new(flags, 0)).unwrap();
        let wait = |_: &Engine| epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(60_000_u16)).unwrap() > 0;
        run(engine, &mut Seed(n as u64 + 10), 4000, wait);
    }
}

/// Starts from zeroes.
fn run(mut engine: Engine, seed: &mut Seed, mut left: u32, wait: impl Fn(&Engine) -> bool) {
    let mut model = vec![0; DEPTH * AREA as usize];
    let mut flying: HashMap<Cookie, (usize, Vec<u8>)> = HashMap::new();
    // What other runs have left is zeroed first.
    let zero = Request::Zero { at: 0, len: model.len() as u64, no_hole: false, fast: false, fua: false };
    let mut done = Vec::new();
    engine.submit(zero).unwrap();
    while done.is_empty() {
        engine.progress(&mut done).unwrap();
        assert!(!done.is_empty() || wait(&engine), "nothing comes any more");
    }
    done.pop().unwrap().result.unwrap();
    for area in 0..DEPTH {
        let (request, data) = request(seed, area, &mut model);
        flying.insert(engine.submit(request).unwrap(), (area, data));
    }
    while !flying.is_empty() {
        engine.progress(&mut done).unwrap();
        for done in done.drain(..) {
            done.result.unwrap();
            let (area, expected) = flying.remove(&done.cookie).expect("each request completes once");
            match done.request {
                Request::Read { at, buffer, .. } => {
                    assert!(buffer == expected, "READ of {} bytes at {at} has other data", buffer.len());
                }
                Request::Write { data, .. } => assert!(data == expected, "memory comes back"),
                _ => {}
            }
            if left > 0 {
                left -= 1;
                let (request, data) = request(seed, area, &mut model);
                flying.insert(engine.submit(request).unwrap(), (area, data));
            }
        }
        assert_eq!(engine.in_flight(), flying.len());
        // What was just submitted is sent before the next wait.
        engine.progress(&mut done).unwrap();
        assert!(flying.is_empty() || !done.is_empty() || wait(&engine), "nothing comes any more");
    }
}

/// A request within an area, done to the model; and the data that it writes or must read.
fn request(seed: &mut Seed, area: usize, model: &mut [u8]) -> (Request, Vec<u8>) {
    let most = [1, 512, 4096, AREA][seed.below(4) as usize];
    let len = 1 + seed.below(most);
    let at = area as u64 * AREA + seed.below(AREA - len + 1);
    let range = at as usize..(at + len) as usize;
    match seed.below(5) {
        0 | 1 => (Request::read(at, len as usize), model[range].to_vec()),
        2 | 3 => {
            let first = seed.next() as u8;
            let data: Vec<u8> = (0..len).map(|n| first.wrapping_add((n / 3) as u8)).collect();
            model[range].copy_from_slice(&data);
            (Request::Write { at, data: data.clone(), fua: seed.below(8) == 0 }, data)
        }
        _ => {
            model[range].fill(0);
            (Request::Zero { at, len, no_hole: seed.below(2) == 0, fast: false, fua: false }, Vec::new())
        }
    }
}
