//! Ill-behaved clients: slow readers, slow writers, users of much memory, clients that vanish. They compare nothing, and run
//! until they are killed.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use nbd_client::{Engine, Error, Mode, Options, Request, Uri};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::place;
use super::report::{BadClients, Behaviour};
use super::rng::Rng;

/// Length of their requests.
const LONG: usize = 1 << 20;
/// Requests in flight on a connection.
const MANY: usize = 8;
/// Longest wait for the server.
const PATIENCE: Duration = Duration::from_secs(4);
/// Pause after an error. The export may be gone, or the server.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs until it is killed.
pub(crate) fn run(work: &str) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("asking for the end with the parent")?;
    let work: BadClients = serde_json::from_str(work).context("the work of a client")?;
    std::thread::scope(|scope| {
        for n in 0..work.count {
            let (work, mut rng) = (&work, Rng::of(work.seed, n as u64));
            scope.spawn(move || {
                loop {
                    // A connection may end in any way.
                    let _ = connection(work, &mut rng);
                    sleep(PAUSE);
                }
            });
        }
    });
    Ok(())
}

fn connection(work: &BadClients, rng: &mut Rng) -> Result<(), Error> {
    match work.kind {
        Behaviour::ReadSlowly => read_slowly(work, rng),
        Behaviour::WriteSlowly => write_slowly(work, rng),
        Behaviour::UseMemory => use_memory(work, rng),
        Behaviour::Vanish => vanish(work, rng),
    }
}

fn engine(work: &BadClients, rng: &mut Rng, mode: Mode) -> Result<Engine, Error> {
    let uri: Uri = place::uri(&work.dir, &work.export, rng.chance(50)).parse()?;
    let options = Options::default().mode(mode).connect_timeout(Some(PATIENCE)).handshake_timeout(Some(PATIENCE));
    Engine::connect(&uri, &options)
}

fn long_read(engine: &Engine, rng: &mut Rng) -> Request {
    let pages = engine.export().size().saturating_sub(LONG as u64) / 4096;
    Request::read(rng.below(pages.max(1)) * 4096, LONG)
}

/// Requests much, and takes what has come only now and then.
fn read_slowly(work: &BadClients, rng: &mut Rng) -> Result<(), Error> {
    let mut engine = engine(work, rng, Mode::Extended)?;
    for _ in 0..4 * MANY {
        let request = long_read(&engine, rng);
        engine.submit(request)?;
    }
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.progress(&mut done)?;
        done.clear();
        sleep(Duration::from_millis(rng.between(200, 3_000)));
    }
    Ok(())
}

/// Sends a part of a payload, and then a little now and then.
fn write_slowly(work: &BadClients, rng: &mut Rng) -> Result<(), Error> {
    let engine = engine(work, rng, Mode::Simple)?;
    let fault = |source| Error::Io { what: "a slow writer".into(), source };
    // Any stream socket will do: only reads and writes follow.
    let mut stream = UnixStream::from(engine.as_fd().try_clone_to_owned().map_err(fault)?);
    stream.set_nonblocking(false).map_err(fault)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(fault)?;
    let at = work.at + rng.below((work.size - LONG as u64) / 4096) * 4096;
    let mut message = Vec::with_capacity(28 + LONG);
    message.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
    message.extend_from_slice(&1_u32.to_be_bytes());
    message.extend_from_slice(&7_u64.to_be_bytes());
    message.extend_from_slice(&at.to_be_bytes());
    message.extend_from_slice(&(LONG as u32).to_be_bytes());
    message.resize(28 + rng.below(LONG as u64) as usize, 0x5a);
    stream.write_all(&message).map_err(fault)?;
    loop {
        sleep(Duration::from_millis(rng.between(100, 1_000)));
        stream.write_all(&[0x5a; 100]).map_err(fault)?;
    }
}

/// Has many long requests in flight all the time.
fn use_memory(work: &BadClients, rng: &mut Rng) -> Result<(), Error> {
    let mut engine = engine(work, rng, Mode::Extended)?;
    let mut done = Vec::new();
    loop {
        while engine.in_flight() < MANY {
            let request = if rng.chance(70) {
                long_read(&engine, rng)
            } else {
                let at = work.at + rng.below((work.size - LONG as u64) / 4096) * 4096;
                Request::write(at, vec![0xa5; LONG])
            };
            engine.submit(request)?;
        }
        engine.progress(&mut done)?;
        for completion in done.drain(..) {
            completion.result?;
        }
        engine.wait(Some(PATIENCE))?;
    }
}

/// Leaves at any point.
fn vanish(work: &BadClients, rng: &mut Rng) -> Result<(), Error> {
    let fault = |source| Error::Io { what: "a client that vanishes".into(), source };
    if rng.chance(30) {
        let mut stream = UnixStream::connect(place::socket(&work.dir)).map_err(fault)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(fault)?;
        let mut greeting = vec![0; rng.below(19) as usize];
        stream.read_exact(&mut greeting).map_err(fault)?;
        let nonsense: Vec<u8> = (0..rng.below(40)).map(|_| rng.next() as u8).collect();
        return stream.write_all(&nonsense).map_err(fault);
    }
    let mut engine = engine(work, rng, Mode::Structured)?;
    for _ in 0..rng.below(MANY as u64) {
        let request = long_read(&engine, rng);
        engine.submit(request)?;
    }
    engine.progress(&mut Vec::new())
}
