//! A verifying client: it writes versions of blocks, remembers which were acknowledged, and compares what it reads. It runs in a
//! process of its own, so that it can be killed and stopped.

use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nbd_client::{Completion, Engine, Error, Options, Request, Uri, WireError};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::clock::{Millis, now};
use super::journal::Journal;
use super::pattern::{BLOCK, Kind, Permitted, check, fill, is_fua, kind};
use super::place;
use super::report::{Job, Report, Wait};
use super::rng::Rng;

/// Interval of signs of life.
const TICK: Millis = 250;
/// A wait that is worth a report.
const SLOW: Millis = 500;
/// Pause before another attempt to connect.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest time for a connection and for the handshake.
const CONNECT: Duration = Duration::from_secs(4);

/// A request in flight.
#[derive(Debug)]
struct Flight {
    what: What,
    blocks: Range<u32>,
    from: Millis,
    /// Time that this process has lost, up to the begin of the request.
    own: Millis,
}

#[derive(Debug)]
enum What {
    /// What each block may have.
    Read(Vec<Permitted>),
    Change(u32),
    /// The versions that it makes durable.
    Flush(Vec<u32>),
}

/// Why a connection is over.
enum End {
    /// The region is compared, and nothing more is to be done.
    Done,
    /// Connect again.
    Again,
}

struct Client {
    job: Job,
    journal: Journal,
    rng: Rng,
    finish: Arc<AtomicBool>,
    flights: HashMap<u64, Flight>,
    busy: Vec<bool>,
    version: u32,
    /// First block of the quarter that gets most changes, so that the rest keeps what was acknowledged long ago.
    hot: u32,
    /// The next block to compare in order; the end of the region: all are compared.
    sweep: u32,
    /// Time that this process has lost in long steps.
    own: Millis,
    next_request: Millis,
    next_tick: Millis,
    compared: u64,
    acknowledged: u64,
    longest: Option<Wait>,
}

/// Runs a client until standard input ends.
pub(crate) fn run(job: &str) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("asking for the end with the parent")?;
    let job: Job = serde_json::from_str(job).context("the job of a client")?;
    let path = job.dir.join(format!("journal-{}", job.region));
    let journal = Journal::open(&path, job.blocks as usize, now()).context("opening the journal")?;
    let finish = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&finish);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ended.store(true, Ordering::Relaxed);
    });
    let (mut rng, version) = (Rng::of(job.seed, u64::from(job.region) ^ now() << 8), journal.newest());
    let hot = rng.below(4) as u32 * (job.blocks / 4);
    let busy = vec![false; job.blocks as usize];
    let flights = HashMap::new();
    let mut client = Client {
        job,
        journal,
        rng,
        finish,
        flights,
        busy,
        version,
        hot,
        sweep: 0,
        own: 0,
        next_request: 0,
        next_tick: 0,
        compared: 0,
        acknowledged: 0,
        longest: None,
    };
    loop {
        let finishing = client.finish.load(Ordering::Relaxed);
        if finishing {
            client.sweep = 0;
        }
        if let End::Done = client.connection(finishing)? {
            report(&Report::Done);
            return Ok(());
        }
    }
}

fn report(report: &Report) {
    println!("{}", serde_json::to_string(report).expect("a report is plain data"));
}

impl Client {
    /// One connection, from its begin to its end.
    fn connection(&mut self, finishing: bool) -> Result<End> {
        let from = now();
        let mut engine = match self.connect() {
            Ok(engine) => engine,
            Err(error) => {
                self.failed(self.wait("connecting".into(), from, self.own), &error);
                self.tick();
                std::thread::sleep(PAUSE);
                return Ok(End::Again);
            }
        };
        self.waited(self.wait("connecting".into(), from, self.own));
        if self.job.cached {
            self.journal.cache_lost()?;
        }
        let end = loop {
            match self.turn(&mut engine, finishing)? {
                Some(end) => break end,
                None if !finishing && self.flights.is_empty() && self.finish.load(Ordering::Relaxed) => {
                    break End::Again;
                }
                None => {}
            }
        };
        for flight in std::mem::take(&mut self.flights).into_values() {
            self.journal.connection_ended(flight.blocks, now())?;
        }
        self.busy.fill(false);
        if let End::Done = end {
            self.leave(engine.into());
        }
        Ok(end)
    }

    /// Flushes, so that the server keeps no changes for this client any more, and disconnects.
    fn leave(&self, mut client: nbd_client::Client) {
        let from = now();
        let flushed = if client.export().can_flush() { client.flush() } else { Ok(()) };
        if let Err(error) = flushed.and_then(|()| client.disconnect()) {
            self.failed(self.wait("disconnecting".into(), from, self.own), &error);
        }
    }

    fn connect(&self) -> Result<Engine, Error> {
        let uri: Uri = place::uri(&self.job.dir, &self.job.export, self.job.tcp).parse()?;
        let options = Options::default().connect_timeout(Some(CONNECT)).handshake_timeout(Some(CONNECT));
        Engine::connect(&uri, &options)
    }

    /// Sends and receives once.
    fn turn(&mut self, engine: &mut Engine, finishing: bool) -> Result<Option<End>> {
        let begin = now();
        let mut end = None;
        while end.is_none() && self.flights.len() < self.job.depth && now() >= self.next_request {
            if finishing && self.sweep == self.job.blocks {
                break;
            }
            // Without new requests, those in flight come to their end.
            if !finishing && self.finish.load(Ordering::Relaxed) {
                break;
            }
            if !self.submit(engine)? {
                end = Some(End::Again);
            }
        }
        let mut done = Vec::new();
        let progress = engine.progress(&mut done);
        for completion in done {
            if !self.complete(completion)? {
                end = Some(End::Again);
            }
        }
        if let Err(error) = progress {
            self.failed(self.wait("the connection".into(), now(), self.own), &error);
            end = Some(End::Again);
        }
        self.tick();
        let lost = now() - begin;
        self.own += if lost > 50 { lost } else { 0 };
        if end.is_some() {
            std::thread::sleep(PAUSE);
            return Ok(end);
        }
        if finishing && self.sweep == self.job.blocks && self.flights.is_empty() {
            return Ok(Some(End::Done));
        }
        let left = self.next_request.saturating_sub(now()).clamp(1, 50);
        let limit = if self.flights.len() < self.job.depth { left } else { 50 };
        // The next turn reports an error.
        let _ = engine.wait(Some(Duration::from_millis(limit)));
        Ok(None)
    }

    /// Sends a request. `false`: the export does not take it.
    fn submit(&mut self, engine: &mut Engine) -> Result<bool> {
        let calm = self.rng.chance(90);
        self.next_request = now() + self.rng.below(if calm { 4 } else { 60 });
        let sweeps = self.sweep < self.job.blocks;
        if !sweeps && self.rng.chance(3) && engine.export().can_flush() {
            let what = What::Flush(self.journal.acknowledged());
            return self.send(engine, Request::Flush, what, 0..0);
        }
        let reads = sweeps || self.rng.chance(50);
        let start = match reads || self.rng.chance(5) {
            _ if sweeps => self.sweep,
            true => self.rng.below(self.job.blocks.into()) as u32,
            false => self.hot + self.rng.below(u64::from(self.job.blocks / 4)) as u32,
        };
        let Some(blocks) = self.choose(start, sweeps) else { return Ok(true) };
        if reads {
            if sweeps {
                self.sweep = blocks.end;
            }
            let permitted = blocks.clone().map(|block| self.journal.permitted(block, now())).collect();
            let request = Request::read(self.offset(&blocks), blocks.len() * BLOCK);
            return self.send(engine, request, What::Read(permitted), blocks);
        }
        self.version += 1;
        self.journal.intend(blocks.clone(), self.version, self.kind(self.version)).context("writing the journal")?;
        let request = self.change(engine, &blocks);
        self.send(engine, request, What::Change(self.version), blocks)
    }

    /// Blocks from `start` on that no request in flight uses.
    fn choose(&mut self, start: u32, sweeps: bool) -> Option<Range<u32>> {
        let most = match self.rng.below(20) {
            _ if sweeps => 64,
            0 => 256,
            1..5 => 64,
            5..12 => 16,
            _ => 1,
        };
        let most = if sweeps { most } else { self.rng.between(1, most) };
        let ahead = &self.busy[start as usize..];
        let free = ahead.iter().take(most as usize).take_while(|busy| !**busy).count();
        (free > 0).then_some(start..start + free as u32)
    }

    /// A back end with a cache of its own may have any older content after a TRIM and a crash.
    fn kind(&self, version: u32) -> Kind {
        match kind(version) {
            Kind::Trim if self.job.cached => Kind::Zero,
            kind => kind,
        }
    }

    fn offset(&self, blocks: &Range<u32>) -> u64 {
        self.job.at + u64::from(blocks.start) * BLOCK as u64
    }

    /// The request for the present version.
    fn change(&self, engine: &Engine, blocks: &Range<u32>) -> Request {
        let (at, bytes, version) = (self.offset(blocks), blocks.len() * BLOCK, self.version);
        let (len, fua) = (bytes as u64, is_fua(version) && engine.export().can_fua());
        match self.kind(version) {
            Kind::Trim if engine.export().can_trim() => Request::Trim { at, len, fua },
            Kind::Data => {
                let mut data = vec![0; bytes];
                let each = data.chunks_exact_mut(BLOCK).zip(blocks.clone());
                each.for_each(|(bytes, block)| fill(self.job.region, block, version, bytes));
                Request::Write { at, data, fua }
            }
            _ if engine.export().can_zero() => Request::Zero { at, len, no_hole: version % 2 == 0, fast: false, fua },
            _ => Request::Write { at, data: vec![0; bytes], fua },
        }
    }

    fn send(&mut self, engine: &mut Engine, request: Request, what: What, blocks: Range<u32>) -> Result<bool> {
        let text = request.to_string();
        match engine.submit(request) {
            Ok(cookie) => {
                blocks.clone().for_each(|block| self.busy[block as usize] = true);
                self.flights.insert(cookie.0, Flight { what, blocks, from: now(), own: self.own });
                Ok(true)
            }
            Err(rejection) => {
                self.failed(self.wait(text, now(), self.own), &rejection.error);
                Ok(false)
            }
        }
    }

    /// Takes a reply. `false`: connect again.
    fn complete(&mut self, completion: Completion) -> Result<bool> {
        // Those of a connection that has ended have no reply.
        if let Err(Error::Closed) = completion.result {
            return Ok(false);
        }
        let flight = self.flights.remove(&completion.cookie.0).context("a reply to a request that was not sent")?;
        flight.blocks.clone().for_each(|block| self.busy[block as usize] = false);
        let wait = self.wait(completion.request.to_string(), flight.from, flight.own);
        if let Err(error) = completion.result {
            self.failed(wait, &error);
            return Ok(matches!(error, Error::Server { error: WireError::NoSpc, .. }));
        }
        self.waited(wait);
        self.acknowledged += 1;
        let blocks = flight.blocks;
        match (flight.what, completion.request) {
            (What::Read(permitted), Request::Read { buffer, .. }) => self.compare(&blocks, &permitted, &buffer),
            (What::Change(version), request) => {
                let is_fua = |request: &Request| match request {
                    Request::Write { fua, .. } | Request::Zero { fua, .. } | Request::Trim { fua, .. } => *fua,
                    _ => false,
                };
                let change = (version, self.kind(version));
                self.journal.acknowledge(blocks, change, is_fua(&request), now()).context("writing the journal")?;
            }
            (What::Flush(acknowledged), _) => self.journal.flushed(&acknowledged).context("writing the journal")?,
            (What::Read(_), _) => unreachable!("a read completes as a read"),
        }
        Ok(true)
    }

    fn compare(&mut self, blocks: &Range<u32>, permitted: &[Permitted], data: &[u8]) {
        for ((block, permitted), bytes) in blocks.clone().zip(permitted).zip(data.chunks_exact(BLOCK)) {
            self.compared += 1;
            let mut permitted = permitted.clone();
            if self.job.lossy {
                permitted = Permitted { versions: 0..=*permitted.versions.end(), zeroes: true, ..permitted };
            }
            if let Err(difference) = check(self.job.region, block, &permitted, bytes) {
                let at = self.job.at + u64::from(block) * BLOCK as u64;
                report(&Report::Wrong(format!("the block at {at} (block {block} of the region): {difference}")));
            }
        }
    }

    fn wait(&self, what: String, from: Millis, own: Millis) -> Wait {
        Wait { what, from, until: now(), own: self.own - own }
    }

    fn waited(&mut self, wait: Wait) {
        let length = |wait: &Wait| (wait.until - wait.from).saturating_sub(wait.own);
        if wait.until - wait.from >= SLOW {
            report(&Report::Slow(wait));
        } else if self.longest.as_ref().is_none_or(|longest| length(longest) < length(&wait)) {
            self.longest = Some(wait);
        }
    }

    fn failed(&self, wait: Wait, error: &Error) {
        if let Error::Protocol(_) = error {
            report(&Report::Wrong(format!("{}: {error}", wait.what)));
        }
        let no_space = matches!(error, Error::Server { error: WireError::NoSpc, .. });
        report(&Report::Failed { wait, error: error.to_string(), no_space });
    }

    fn tick(&mut self) {
        if now() < self.next_tick {
            return;
        }
        self.next_tick = now() + TICK;
        let oldest = self.flights.values().min_by_key(|flight| flight.from);
        let oldest = oldest.map(|flight| {
            let what = match &flight.what {
                What::Read(_) => "READ",
                What::Change(_) => "a change",
                What::Flush(_) => "FLUSH",
            };
            self.wait(format!("{what} of blocks {:?} of the region", flight.blocks), flight.from, flight.own)
        });
        let (compared, acknowledged) = (std::mem::take(&mut self.compared), std::mem::take(&mut self.acknowledged));
        report(&Report::Tick { compared, acknowledged, longest: self.longest.take(), oldest });
    }
}
