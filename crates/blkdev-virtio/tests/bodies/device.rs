//! [`Machine`]: a virtio-blk device whose behaviour comes from a script, and [`Wire`], the transport to it.
//!
//! It acts only in calls: when the driver rings, and when the client lets it act. So the same bytes give the same course.

use std::{
    collections::BTreeMap,
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blkdev::{
    Mapping,
    fuzz::{Dma, Kind, Ledger, Script},
};
use blkdev_virtio::{Doorbell, Liveness, Ring as Announced, Transport};

use super::ring::{Chain, Ring};

/// SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC, EVENT_IDX, VERSION_1.
const USUAL: u64 =
    1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 28 | 1 << 29 | 1 << 32;
const PACKED: u64 = 1 << 34;
const READ_ONLY: u64 = 1 << 5;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Offsets of the 4-byte fields in the configuration space, and of some that are shorter.
const FIELDS: [usize; 16] = [0, 4, 8, 12, 20, 24, 26, 28, 32, 34, 36, 40, 44, 48, 52, 56];

/// A device.
#[derive(Debug)]
pub(super) struct Machine {
    script: Script,
    ledger: Arc<Ledger>,
    dma: Dma,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    features: u64,
    accepted: u64,
    config: Vec<u8>,
    queues_max: u16,
    ring_max: u16,
    rings: BTreeMap<u16, Ring>,
    /// Serves requests at the doorbell, and not only when the client lets it act.
    is_prompt: bool,
    /// Breaks the protocol. Before that, the script decides only what a correct device may do.
    is_bad: bool,
    /// Does what it likes with control calls as well.
    is_fickle: bool,
    is_running: bool,
    refuses_features: bool,
}

impl Machine {
    pub(super) fn new(script: &Script, ledger: &Arc<Ledger>) -> Arc<Self> {
        let temper: u8 = script.any();
        let mut state = State {
            features: USUAL,
            accepted: 0,
            config: config(),
            queues_max: *script.pick(&[64, 1, 2, 0, u16::MAX]),
            ring_max: if script.one_in(16) { script.number() as u16 } else { u16::MAX },
            rings: BTreeMap::new(),
            is_prompt: temper & 1 == 0,
            is_bad: temper & 2 != 0,
            is_fickle: temper & 4 != 0,
            is_running: false,
            refuses_features: false,
        };
        if temper & 8 != 0 {
            state.features |= PACKED;
        }
        if temper & 16 != 0 {
            state.features ^= script.any::<u64>() & (USUAL | READ_ONLY) & !VERSION_1;
        }
        if temper & 32 != 0 {
            state.features ^= script.any::<u64>();
        }
        if temper & 64 != 0 {
            state.reconfigure(script);
            let len = script.below(state.config.len() as u64 + 1) as usize;
            state.config.truncate(if script.one_in(2) { len } else { usize::MAX });
        }
        Arc::new(Self {
            script: script.clone(),
            ledger: Arc::clone(ledger),
            dma: Dma::default(),
            state: Mutex::new(state),
        })
    }

    /// A correct device with any features and any configuration. It refuses the driver's features unless it `runs`.
    pub(super) fn with_config(script: &Script, ledger: &Arc<Ledger>, runs: bool) -> Arc<Self> {
        let mut config: Vec<u8> = config();
        match script.below(4) {
            0 => {}
            1 => config = (0..script.below(80)).map(|_| script.any()).collect(),
            _ => {
                for _ in 0..1 + script.below(6) {
                    let (at, value) = (*script.pick(&FIELDS), (script.number() as u32).to_le_bytes());
                    config[at..at + 4].copy_from_slice(&value);
                }
                config.truncate(if script.one_in(4) { script.below(61) as usize } else { usize::MAX });
            }
        }
        let state = State {
            features: if script.one_in(4) {
                script.any()
            } else {
                USUAL ^ script.any::<u64>() & (USUAL | READ_ONLY | PACKED)
            },
            accepted: 0,
            config,
            queues_max: *script.pick(&[64, 1, 0, u16::MAX]),
            ring_max: if script.one_in(4) { script.number() as u16 } else { u16::MAX },
            rings: BTreeMap::new(),
            is_prompt: true,
            is_bad: false,
            is_fickle: false,
            is_running: false,
            refuses_features: !runs,
        };
        Arc::new(Self {
            script: script.clone(),
            ledger: Arc::clone(ledger),
            dma: Dma::default(),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that the device does on its own.
    pub(super) fn step(&self) {
        let mut state = self.state();
        let State { rings, .. } = &mut *state;
        let indices: Vec<u16> = rings.keys().copied().collect();
        for index in indices {
            self.serve(&mut state, index);
        }
        if self.script.one_in(16) {
            state.reconfigure(&self.script);
        }
    }

    /// Takes requests, and answers some of those that it has.
    fn serve(&self, state: &mut State, index: u16) {
        let State { rings, is_bad, is_running, .. } = state;
        let Some(ring) = rings.get_mut(&index).filter(|_| *is_running) else { return };
        loop {
            match ring.take(&self.dma) {
                Ok(Some(chain)) => self.accept(ring, chain),
                Ok(None) => break,
                Err(why) => {
                    assert!(self.ledger.lies(), "the driver breaks the protocol: {why}");
                    break;
                }
            }
        }
        // Usually all. A correct device may answer in any order, and take its time.
        let mut left = ring.held.len() - self.script.below(ring.held.len() as u64 + 1) as usize;
        while left > 0 && !ring.held.is_empty() {
            let chain = ring.held.remove(self.script.below(ring.held.len() as u64) as usize);
            if *is_bad && self.script.one_in(4) {
                self.lie(ring, chain);
            } else {
                self.answer(ring, &chain);
            }
            left -= 1;
        }
        let suppress = self.script.one_in(32).then(|| self.script.any());
        if suppress.is_none() || *is_bad {
            ring.want(&self.dma, suppress);
        }
        ring.notify(&self.dma, self.script.one_in(32));
    }

    /// Checks a request against virtio 1.2, 5.2.6, and finds the client's request.
    fn accept(&self, ring: &mut Ring, mut chain: Chain) {
        match self.identify(&chain) {
            Ok(tag) => chain.tag = tag,
            Err(why) => assert!(self.ledger.lies(), "the driver sent no proper request: {why}: {chain:x?}"),
        }
        if ring.held.len() < usize::from(ring.size) {
            ring.held.push(chain);
        }
    }

    fn identify(&self, chain: &Chain) -> Result<Option<u64>, &'static str> {
        let [(header_at, 16, false), data @ .., (_, 1, true)] = &chain.parts[..] else {
            return Err("no header and status");
        };
        let mut header = [0; 16];
        if !self.dma.read(*header_at, &mut header) {
            return Err("no memory for the header");
        }
        let header = u128::from_le_bytes(header);
        let (code, at) = (header as u32, ((header >> 64) as u64).wrapping_mul(512));
        let kind = match code {
            0 => Kind::Read,
            1 => Kind::Write,
            4 => Kind::Flush,
            8 => return Ok(None),
            11 => Kind::Discard,
            13 => Kind::Zero,
            _ => return Err("an unknown kind"),
        };
        if data.iter().any(|(_, len, writes)| *writes != (kind == Kind::Read) || *len == 0) {
            return Err("data in the wrong direction");
        }
        let pieces: Vec<_> = data.iter().map(|(at, len, _)| (*at, u64::from(*len))).collect();
        let len = pieces.iter().map(|(_, len)| len).sum();
        match (kind, data) {
            (Kind::Read | Kind::Write, _) if self.is_probe(&pieces) => Ok(None),
            (Kind::Read | Kind::Write, _) => Ok(self.ledger.take(kind, at, len, &pieces)),
            (Kind::Flush, []) => Ok(self.ledger.take(kind, 0, 0, &[])),
            (Kind::Discard | Kind::Zero, [(segment_at, 16, _)]) => {
                let mut segment = [0; 16];
                if !self.dma.read(*segment_at, &mut segment) {
                    return Err("no memory for the segment");
                }
                let segment = u128::from_le_bytes(segment);
                let (at, len) = ((segment as u64).wrapping_mul(512), u64::from((segment >> 64) as u32) * 512);
                Ok(self.ledger.take(kind, at, len, &[]))
            }
            _ => Err("data of the wrong length"),
        }
    }

    /// Whether this is the read that the driver sends on its own during open: into ring memory.
    fn is_probe(&self, pieces: &[(u64, u64)]) -> bool {
        self.ledger.is_idle() && !pieces.is_empty()
    }

    fn answer(&self, ring: &mut Ring, chain: &Chain) {
        if let Some(tag) = chain.tag {
            self.ledger.execute(tag, &self.dma);
        }
        let written = chain.written();
        self.status(chain, 0);
        ring.give(&self.dma, chain.id.into(), written, chain.count, self.script.any::<u8>() & 1 == 0);
    }

    fn status(&self, chain: &Chain, status: u8) {
        if let Some((at, _, true)) = chain.parts.last() {
            assert!(self.dma.write(*at, &[status]) || self.ledger.lies(), "the status is in registered memory");
        }
    }

    /// Answers a request wrongly.
    fn lie(&self, ring: &mut Ring, chain: Chain) {
        let (script, dma, id) = (&self.script, &self.dma, u32::from(chain.id));
        let written = chain.written();
        if let Some(tag) = chain.tag {
            self.ledger.answer(tag);
        }
        match script.below(12) {
            // A status other than OK.
            0 | 1 => {
                self.status(&chain, script.any());
                ring.give(dma, id, written, chain.count, true);
            }
            // No status, or a wrong length.
            2 => ring.give(dma, id, written, chain.count, true),
            3 | 4 => {
                self.status(&chain, 0);
                ring.give(dma, id, script.number() as u32, chain.count, script.one_in(2));
            }
            // Never, and perhaps later after all.
            5 => {
                self.ledger.unanswer(chain.tag);
                ring.held.push(chain);
            }
            // From here on, no result can be predicted.
            6 => {
                self.ledger.lie();
                ring.give(dma, script.number() as u32, written, chain.count, true);
            }
            7 => {
                self.ledger.lie();
                ring.give(dma, id, written, chain.count, true);
                ring.give(dma, id, written, chain.count, true);
            }
            8 => {
                self.ledger.lie();
                ring.jump(dma, script.number() as u16);
            }
            9 => {
                self.ledger.lie();
                ring.give(dma, id, written, script.number() as u16, true);
            }
            _ => {
                self.ledger.lie();
                self.scribble(ring);
            }
        }
    }

    /// Writes over the ring and the slots behind it.
    fn scribble(&self, ring: &Ring) {
        let len = 16 * u64::from(ring.size) + 8 * u64::from(ring.size) + 4096;
        for _ in 0..1 + self.script.below(16) {
            let at = ring.descriptors + self.script.below(len / 2) * 2;
            let bytes = self.script.number().to_le_bytes();
            let _ = self.dma.write(at, &bytes[..*self.script.pick(&[8, 2, 4, 1])]);
        }
    }

    fn refuses(&self) -> bool {
        let is_fickle = self.state().is_fickle;
        is_fickle && self.script.one_in(16)
    }

    fn allow(&self, what: &str) -> io::Result<()> {
        if self.refuses() { Err(io::Error::other(format!("the script refuses {what}"))) } else { Ok(()) }
    }
}

impl State {
    fn reconfigure(&mut self, script: &Script) {
        for _ in 0..1 + script.below(4) {
            let (at, value) = (*script.pick(&FIELDS), (script.number() as u32).to_le_bytes());
            for (byte, value) in self.config.iter_mut().skip(at).zip(value) {
                *byte = value;
            }
        }
    }
}

/// 2 MiB in blocks of 512 bytes, and limits that are easily reached.
fn config() -> Vec<u8> {
    let mut config = vec![0; 60];
    let fields: [(usize, u32); 10] =
        [(0, 4096), (8, 8192), (12, 4), (20, 512), (32, 1 | 4 << 16), (36, 64), (40, 1), (44, 8), (48, 32), (52, 1)];
    for (at, value) in fields {
        config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    config
}

/// The transport. `RESTARTS`: queues can be started again.
#[derive(Debug)]
pub(super) struct Wire<const RESTARTS: bool> {
    machine: Arc<Machine>,
    life: Arc<Liveness>,
}

impl<const RESTARTS: bool> Wire<RESTARTS> {
    pub(super) fn new(machine: &Arc<Machine>) -> Self {
        Self { machine: Arc::clone(machine), life: Liveness::new("virtio fuzz".to_owned()) }
    }
}

impl<const RESTARTS: bool> Drop for Wire<RESTARTS> {
    fn drop(&mut self) {
        self.machine.state().rings.clear();
        self.machine.dma.clear();
    }
}

impl<const RESTARTS: bool> Transport for Wire<RESTARTS> {
    type Doorbell = Bell;

    const RESTARTS: bool = RESTARTS;

    const TRANSFER_MAX: u32 = if RESTARTS { 1 << 25 } else { 1 << 16 };

    fn driver(&self) -> &'static str {
        "virtio"
    }

    fn target(&self) -> &str {
        "fuzz"
    }

    fn life(&self) -> &Arc<Liveness> {
        &self.life
    }

    fn features(&self) -> u64 {
        self.machine.state().features
    }

    fn accept(&self, features: u64) -> io::Result<()> {
        self.machine.allow("the features")?;
        let mut state = self.machine.state();
        assert_eq!(features & !state.features, 0, "a driver accepts only offered features");
        state.accepted = features;
        if state.refuses_features {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    fn read_config(&self, bytes: &mut [u8], _needed: usize) -> io::Result<usize> {
        let state = self.machine.state();
        let len = state.config.len().min(bytes.len());
        bytes[..len].copy_from_slice(&state.config[..len]);
        Ok(len)
    }

    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.machine.allow("a write to the configuration")?;
        let mut state = self.machine.state();
        if let Some(config) = state.config.get_mut(at..at + bytes.len()) {
            config.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn queues_max(&self) -> u16 {
        self.machine.state().queues_max
    }

    fn ring_max(&self, _index: u16) -> u16 {
        self.machine.state().ring_max
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.machine.allow("memory")?;
        self.machine.dma.register(mapping);
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.machine.dma.unregister(mapping);
        Ok(())
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn start_queue(&self, index: u16, ring: &Announced<'_>) -> io::Result<Bell> {
        self.machine.allow("a queue")?;
        let mut state = self.machine.state();
        let event_idx = state.accepted & EVENT_IDX != 0;
        let before = state.rings.insert(index, Ring::new(ring, event_idx));
        assert!(before.is_none(), "a queue is started once");
        Ok(Bell { machine: Arc::clone(&self.machine), index })
    }

    fn run(&self) -> io::Result<()> {
        self.machine.allow("to run")?;
        self.machine.state().is_running = true;
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> io::Result<()> {
        assert!(RESTARTS, "these queues cannot be stopped");
        self.machine.allow("to stop")?;
        self.machine.state().rings.remove(&index);
        Ok(())
    }

    fn cut_off(&self) {
        self.machine.ledger.cut_off();
    }
}

/// Rings the device, which acts at once.
#[derive(Clone, Debug)]
pub(super) struct Bell {
    machine: Arc<Machine>,
    index: u16,
}

impl Doorbell for Bell {
    fn ring(&self) {
        assert!(!self.machine.ledger.is_cut_off(), "a dead device gets no more requests");
        let mut state = self.machine.state();
        if state.is_prompt || self.machine.ledger.is_idle() {
            self.machine.serve(&mut state, self.index);
        }
    }
}
