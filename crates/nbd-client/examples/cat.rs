//! Copies an export to standard output, with 32 requests in flight: `cargo run -p nbd-client --example cat -- nbd://localhost > disk.raw`.

use std::{
    collections::{BTreeMap, VecDeque},
    error::Error,
    io::{self, Write},
    process::ExitCode,
};

use nbd_client::{Cookie, Engine, Options, Request};

/// Requests in flight, or complete and waiting for those before them.
const DEPTH: usize = 32;

/// Bytes of each request, unless the server wants less.
const LEN: u64 = 256 << 10;

fn main() -> ExitCode {
    match copy() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cat: {error}");
            ExitCode::FAILURE
        }
    }
}

fn copy() -> Result<(), Box<dyn Error>> {
    let uri = std::env::args().nth(1).ok_or("usage: cat URI")?.parse()?;
    let mut engine = Engine::connect(&uri, &Options::default())?;
    let (size, block) = (engine.export().size(), engine.export().block_sizes());
    let len = LEN.max(block.min.into()).min(block.payload_max.into()) / u64::from(block.min) * u64::from(block.min);
    let mut out = io::stdout().lock();
    // The order of output, and what came out of that order.
    let (mut order, mut ready) = (VecDeque::<Cookie>::new(), BTreeMap::<Cookie, Vec<u8>>::new());
    let (mut at, mut done) = (0, Vec::new());
    loop {
        while at < size && order.len() < DEPTH {
            let part = len.min(size - at);
            order.push_back(engine.submit(Request::read(at, usize::try_from(part)?))?);
            at += part;
        }
        if order.is_empty() {
            return Ok(out.flush()?);
        }
        engine.progress(&mut done)?;
        for completion in done.drain(..) {
            completion.result?;
            if let Request::Read { buffer, .. } = completion.request {
                ready.insert(completion.cookie, buffer);
            }
        }
        while let Some(data) = order.front().and_then(|cookie| ready.remove(cookie)) {
            out.write_all(&data)?;
            order.pop_front();
        }
        // Only when there is nothing else to do.
        if order.len() == DEPTH || at == size && !order.is_empty() {
            engine.wait(None)?;
        }
    }
}
