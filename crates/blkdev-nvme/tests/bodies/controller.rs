//! [`Machine`]: an NVMe controller whose behaviour comes from a script.
//!
//! It acts only in calls: when the driver writes a doorbell, and when the client lets it act.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blkdev::{
    Mapping,
    fuzz::{Dma, Kind, Ledger, Script},
};
use blkdev_nvme::{
    blkdev_vfio::{Bar, PciDevice},
    spec::{Completion, IDENTIFY_LEN, Status, admin, cns, io as nvm},
};

/// Offsets of fields in the Identify structures.
const FIELDS: [usize; 24] =
    [0, 1, 3, 4, 8, 24, 25, 26, 27, 29, 33, 64, 68, 77, 84, 88, 92, 99, 128, 130, 516, 520, 525, 536];

/// A controller, with its registers and its memory.
#[derive(Debug)]
pub(super) struct Machine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    script: Script,
    ledger: Arc<Ledger>,
    dma: Dma,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    cap: u64,
    version: u32,
    bar_len: usize,
    vectors_max: u16,
    config: u32,
    status: u32,
    /// Number of reads of the status register before it has the value that the driver waits for.
    lag: u8,
    command: u16,
    aqa: u32,
    asq: u64,
    acq: u64,
    pairs: BTreeMap<u16, Pair>,
    vectors: Vec<OwnedFd>,
    blocks: u64,
    block_shift: u8,
    has_sgl: bool,
    /// Identifiers of event requests.
    events: Vec<u16>,
    is_bad: bool,
    /// Data structures and results are wrong as well.
    is_odd: bool,
}

/// A submission queue and its completion queue.
#[derive(Debug)]
struct Pair {
    submission: u64,
    completion: u64,
    size: u16,
    head: u16,
    tail: u16,
    next: u16,
    acknowledged: u16,
    phase: bool,
    vector: u16,
    /// Commands received and not completed: identifier, and the client's request.
    held: Vec<(u16, Option<u64>)>,
}

impl Pair {
    fn new(submission: u64, completion: u64, size: u16, vector: u16) -> Self {
        let (head, tail, next, acknowledged, phase) = (0, 0, 0, 0, true);
        Self { submission, completion, size, head, tail, next, acknowledged, phase, vector, held: Vec::new() }
    }
}

impl Machine {
    pub(super) fn new(script: &Script, ledger: &Arc<Ledger>) -> Arc<Self> {
        let temper: u8 = script.any();
        // NVM and I/O command sets, 1 second to become ready, contiguous queues of 64 entries.
        let mut cap = 1 << 37 | 1 << 43 | 2 << 24 | 1 << 16 | 63;
        if temper & 8 != 0 {
            cap = cap & !0xffff | u64::from(script.any::<u16>());
        }
        if temper & 16 != 0 {
            cap ^= script.number() & !(0xff << 24);
        }
        let state = State {
            cap,
            version: if temper & 32 != 0 { script.any() } else { 2 << 16 },
            bar_len: if temper & 64 != 0 { (script.number() % 0x8_0000) as usize / 4 * 4 + 4 } else { 0x2000 },
            vectors_max: if temper & 128 != 0 { script.any() } else { 5 },
            config: 0,
            status: 0,
            lag: 0,
            command: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            pairs: BTreeMap::new(),
            vectors: Vec::new(),
            blocks: 4096,
            block_shift: *script.pick(&[9, 12, 9, 16, 10]),
            has_sgl: temper & 1 != 0,
            events: Vec::new(),
            is_bad: temper & 2 != 0,
            is_odd: temper & 4 != 0,
        };
        let (script, ledger, dma) = (script.clone(), Arc::clone(ledger), Dma::default());
        Arc::new(Self { shared: Arc::new(Shared { script, ledger, dma, state: Mutex::new(state) }) })
    }

    /// Something that the controller does on its own.
    pub(super) fn step(&self) {
        let shared = &*self.shared;
        let mut state = shared.state();
        let ids: Vec<u16> = state.pairs.keys().copied().collect();
        for id in ids {
            shared.serve(&mut state, id);
        }
        match shared.script.below(64) {
            60 if !state.events.is_empty() => {
                let id = state.events.remove(0);
                if shared.script.one_in(2) {
                    state.blocks = shared.script.below(8192);
                }
                // A changed namespace, or any event.
                let event = if shared.script.one_in(2) { shared.script.any() } else { 2 | 4 << 16 };
                shared.put(&mut state, 0, id, Status::SUCCESS, event);
            }
            61 if state.is_bad => state.status |= 2,
            62 if state.is_bad => state.status = u32::MAX,
            63 if state.is_bad => state.status &= !1,
            _ => {}
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn can_act(state: &State) -> bool {
        state.config & 1 != 0 && state.status & 3 == 1 && state.command & 4 != 0
    }

    /// Takes commands, and completes some of those that it has.
    fn serve(&self, state: &mut State, id: u16) {
        while Self::can_act(state)
            && let Some(pair) = state.pairs.get_mut(&id).filter(|pair| pair.head != pair.tail)
        {
            let mut bytes = [0; 64];
            let is_there = self.dma.read(pair.submission.wrapping_add(64 * u64::from(pair.head)), &mut bytes);
            assert!(is_there || self.ledger.lies(), "the submission queue is in registered memory");
            pair.head = (pair.head + 1) % pair.size;
            let words = std::array::from_fn(|n| u32::from_le_bytes(std::array::from_fn(|k| bytes[4 * n + k])));
            if id == 0 { self.administer(state, &words) } else { self.receive(state, id, &words) }
        }
        let Some(pair) = state.pairs.get(&id).filter(|_| Self::can_act(state)) else { return };
        let mut left = pair.held.len() - self.script.below(pair.held.len() as u64 + 1) as usize;
        while left > 0
            && let Some(pair) = state.pairs.get_mut(&id).filter(|pair| !pair.held.is_empty())
        {
            let command = pair.held.remove(self.script.below(pair.held.len() as u64) as usize);
            if state.is_bad && self.script.one_in(4) {
                self.lie(state, id, command);
            } else {
                if let Some(tag) = command.1 {
                    self.ledger.execute(tag, &self.dma);
                }
                self.put(state, id, command.0, Status::SUCCESS, 0);
            }
            left -= 1;
        }
    }

    /// Completes a command wrongly.
    fn lie(&self, state: &mut State, queue: u16, (id, tag): (u16, Option<u64>)) {
        if let Some(tag) = tag {
            self.ledger.answer(tag);
        }
        match self.script.below(8) {
            0..=2 => self.put(state, queue, id, Status(self.script.any::<u16>() & 0x7fff), self.script.any()),
            // Never, or later.
            3 | 4 => {
                self.ledger.unanswer(tag);
                if let Some(pair) = state.pairs.get_mut(&queue).filter(|_| self.script.one_in(2)) {
                    pair.held.push((id, tag));
                }
            }
            5 => {
                self.ledger.lie();
                self.put(state, queue, self.script.number() as u16, Status::SUCCESS, 0);
            }
            6 => {
                self.ledger.lie();
                self.put(state, queue, id, Status::SUCCESS, 0);
                self.put(state, queue, id, Status::SUCCESS, 0);
            }
            _ => {
                self.ledger.lie();
                let Some(pair) = state.pairs.get(&queue) else { return };
                let at = pair.completion.wrapping_add(4 * self.script.below(4 * u64::from(pair.size)));
                let _ = self.dma.write(at, &self.script.any::<u32>().to_le_bytes());
            }
        }
    }

    /// Writes a completion and raises its interrupt.
    fn put(&self, state: &mut State, queue: u16, id: u16, status: Status, result: u32) {
        let (is_odd, is_bad) = (state.is_odd, state.is_bad);
        let State { pairs, vectors, .. } = state;
        let Some(pair) = pairs.get_mut(&queue) else { return };
        let following = (pair.next + 1) % pair.size;
        if following == pair.acknowledged {
            assert!(self.ledger.lies() || is_bad, "completions are acknowledged before the queue is full");
            return;
        }
        let mut entry = Completion { result, sq_head: pair.head, sq: queue, id, status };
        if is_odd && self.script.one_in(32) {
            // A controller that does not know its own position.
            self.ledger.lie();
            (entry.sq_head, entry.sq) = (self.script.any(), queue ^ self.script.any::<u16>());
        }
        let (low, high) = entry.halves(pair.phase);
        let bytes = u128::from(low) | u128::from(high) << 64;
        let is_there = self.dma.write(pair.completion.wrapping_add(16 * u64::from(pair.next)), &bytes.to_le_bytes());
        assert!(is_there || self.ledger.lies(), "the completion queue is in registered memory");
        pair.next = following;
        pair.phase ^= following == 0;
        if let Some(fd) = vectors.get(usize::from(pair.vector)) {
            blkdev::wake::ring(fd.as_fd());
        }
    }

    fn administer(&self, state: &mut State, words: &[u32; 16]) {
        let id = (words[0] >> 16) as u16;
        if words[0] as u8 == admin::ASYNC_EVENT_REQUEST {
            return state.events.push(id);
        }
        let (mut status, mut result) = self.command(state, words);
        if state.is_odd && self.script.one_in(8) {
            match self.script.below(8) {
                0..=3 => result = self.script.number() as u32,
                4..=6 => status = Status(self.script.any::<u16>() & 0x7fff),
                // No answer.
                _ => return,
            }
        }
        self.put(state, 0, id, status, result);
    }

    /// Executes an admin command.
    fn command(&self, state: &mut State, words: &[u32; 16]) -> (Status, u32) {
        let prp = u64::from(words[6]) | u64::from(words[7]) << 32;
        let (id, size) = (words[10] as u16, (words[10] >> 16) as u16);
        match words[0] as u8 {
            admin::IDENTIFY => {
                let mut bytes = self.identify(state, words[10] as u8);
                if state.is_odd && self.script.one_in(4) {
                    for _ in 0..1 + self.script.below(4) {
                        let (at, len) = (*self.script.pick(&FIELDS), *self.script.pick(&[1, 2, 4, 8]));
                        bytes[at..at + len].copy_from_slice(&self.script.number().to_le_bytes()[..len]);
                    }
                }
                assert!(self.dma.write(prp, &bytes) || self.ledger.lies(), "data goes to registered memory");
            }
            admin::GET_LOG_PAGE => {
                let bytes = vec![self.script.any(); (usize::from(size) + 1) * 4];
                assert!(self.dma.write(prp, &bytes) || self.ledger.lies(), "data goes to registered memory");
            }
            admin::SET_FEATURES => return (Status::SUCCESS, 3 | 3 << 16),
            admin::CREATE_CQ => {
                let before =
                    state.pairs.insert(id, Pair::new(0, prp, size.wrapping_add(1).max(1), (words[11] >> 16) as u16));
                assert!(before.is_none() || self.is_wild(state), "a queue is created once");
            }
            admin::CREATE_SQ => match state.pairs.get_mut(&id) {
                Some(pair) => pair.submission = prp,
                None => assert!(self.is_wild(state), "the completion queue is created first"),
            },
            admin::DELETE_SQ => {}
            admin::DELETE_CQ => drop(state.pairs.remove(&id)),
            admin::ABORT => {
                let found = state.pairs.get_mut(&id).and_then(|pair| {
                    let at = pair.held.iter().position(|(known, _)| *known == size)?;
                    Some(pair.held.remove(at))
                });
                let Some((command, tag)) = found else { return (Status::SUCCESS, 1) };
                tag.inspect(|tag| self.ledger.abort(*tag));
                self.put(state, id, command, Status::new(0, 7), 0);
            }
            opcode => panic!("the driver sent admin command {opcode:#x}"),
        }
        (Status::SUCCESS, 0)
    }

    /// Whether wrong data may have led the driver to anything.
    fn is_wild(&self, state: &State) -> bool {
        state.is_odd || state.is_bad || self.ledger.lies()
    }

    fn identify(&self, state: &State, what: u8) -> [u8; IDENTIFY_LEN] {
        let mut bytes = [0; IDENTIFY_LEN];
        match what {
            cns::CONTROLLER => {
                bytes[4..64].fill(b' ');
                bytes[4..9].copy_from_slice(b"FUZZ1");
                // Transfers of at most 16 pages, events, discards and zeroes, a write cache, one namespace.
                (bytes[77], bytes[93], bytes[516], bytes[520], bytes[525]) = (4, 1, 1, 1 << 2 | 1 << 3, 1);
                bytes[536] = state.has_sgl.into();
            }
            cns::NAMESPACE => {
                bytes[..8].copy_from_slice(&state.blocks.to_le_bytes());
                (bytes[24], bytes[33], bytes[64], bytes[68], bytes[130]) =
                    (1 << 4, 1 | 1 << 3, 7, 7, state.block_shift);
            }
            cns::ACTIVE_NAMESPACES => bytes[0] = 1,
            _ => {}
        }
        bytes
    }

    /// Checks an I/O command, and finds the client's request.
    fn receive(&self, state: &mut State, queue: u16, words: &[u32; 16]) {
        let tag = match self.understand(state, words) {
            Ok((kind, at, len, pieces)) => self.ledger.take(kind, at, len, &pieces),
            Err(why) => {
                assert!(self.ledger.lies(), "the driver sent no proper command: {why}: {words:x?}");
                None
            }
        };
        if let Some(pair) = state.pairs.get_mut(&queue) {
            pair.held.push(((words[0] >> 16) as u16, tag));
        }
    }

    #[expect(clippy::type_complexity, reason = "the parameters of `Ledger::take`")]
    fn understand(&self, state: &State, words: &[u32; 16]) -> Result<(Kind, u64, u64, Vec<(u64, u64)>), &'static str> {
        // As the driver was told, which may not be what this controller would say.
        let shift = self.ledger.block_shift().unwrap_or(state.block_shift.into());
        let at = (u64::from(words[10]) | u64::from(words[11]) << 32) << shift;
        let len = (u64::from(words[12] & 0xffff) + 1) << shift;
        let [first, second] = [6, 8].map(|n| u64::from(words[n]) | u64::from(words[n + 1]) << 32);
        let kind = match words[0] as u8 {
            nvm::READ => Kind::Read,
            nvm::WRITE => Kind::Write,
            nvm::WRITE_ZEROES => return Ok((Kind::Zero, at, len, Vec::new())),
            nvm::FLUSH => return Ok((Kind::Flush, 0, 0, Vec::new())),
            nvm::DATASET_MANAGEMENT => {
                let (mut start, mut end) = (None, 0);
                for n in 0..u64::from(words[10] & 0xff) + 1 {
                    let mut range = [0; 16];
                    if !self.dma.read(first.wrapping_add(16 * n), &mut range) {
                        return Err("no memory for the ranges");
                    }
                    let range = u128::from_le_bytes(range);
                    let (block, blocks) = ((range >> 64) as u64, (range >> 32) as u32);
                    if start.is_some() && block != end {
                        return Err("ranges with gaps");
                    }
                    start = start.or(Some(block));
                    end = block.wrapping_add(blocks.into());
                }
                let start = start.unwrap_or(0);
                return Ok((Kind::Discard, start << shift, end.wrapping_sub(start) << shift, Vec::new()));
            }
            _ => return Err("an unknown opcode"),
        };
        if words[0] >> 14 & 3 == 1 {
            return Ok((kind, at, len, vec![(first, words[8].into())]));
        }
        let page = 1_u64 << (12 + (state.config >> 7 & 0xf));
        let mut pieces = vec![(first, len.min(page - first % page))];
        let mut left = len - pieces[0].1;
        if left > 0 && left <= page {
            pieces.push((second, left));
        } else if left > 0 {
            for n in 0..left.div_ceil(page) {
                let mut entry = [0; 8];
                if !self.dma.read(second.wrapping_add(8 * n), &mut entry) {
                    return Err("no memory for the list");
                }
                pieces.push((u64::from_le_bytes(entry), left.min(page)));
                left -= left.min(page);
            }
        }
        Ok((kind, at, len, pieces))
    }

    fn configure(&self, state: &mut State, value: u32) {
        let before = std::mem::replace(&mut state.config, value);
        if value & 1 == 0 {
            return self.disable(state);
        }
        if before & 1 == 0 {
            let (size, vector) = (((state.aqa & 0xfff) + 1) as u16, 0);
            state.pairs.insert(0, Pair::new(state.asq, state.acq, size, vector));
            state.status = 1;
            // Rarely, because the driver sleeps between two looks.
            state.lag = self.script.one_in(32).into();
            if state.is_odd && self.script.one_in(16) {
                state.status = *self.script.pick(&[3, 2, u32::MAX]);
            }
        }
        if value >> 14 & 3 != 0 {
            state.status |= 2 << 2;
        }
    }

    fn disable(&self, state: &mut State) {
        if state.pairs.len() > 1 {
            self.ledger.reset();
        }
        (state.config, state.status) = (0, 0);
        state.pairs.clear();
        state.events.clear();
    }
}

impl PciDevice for Machine {
    fn address(&self) -> &str {
        "fuzz"
    }

    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()> {
        let mut space = [0; 256];
        space[4..6].copy_from_slice(&self.shared.state().command.to_le_bytes());
        space[9..12].copy_from_slice(&[2, 8, 1]);
        bytes.copy_from_slice(&space[at.into()..usize::from(at) + bytes.len()]);
        Ok(())
    }

    fn write_config(&self, at: u16, bytes: &[u8]) -> io::Result<()> {
        if let (4, &[low, high]) = (at, bytes) {
            self.shared.state().command = u16::from_le_bytes([low, high]);
        }
        Ok(())
    }

    fn bar(&self, _index: u8) -> io::Result<Arc<dyn Bar>> {
        Ok(Arc::clone(&self.shared) as Arc<dyn Bar>)
    }

    fn dma_map(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.dma.register(mapping);
        Ok(())
    }

    fn dma_unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.dma.unregister(mapping);
        Ok(())
    }

    fn vectors(&self) -> u16 {
        self.shared.state().vectors_max
    }

    fn enable_vectors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut state = self.shared.state();
        assert!(fds.len() <= usize::from(state.vectors_max), "no more vectors than there are");
        state.vectors = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        Ok(())
    }

    fn set_vector(&self, _index: u16, _fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn watch_removal(&self, _fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        let mut state = self.shared.state();
        if state.is_odd && self.shared.script.one_in(4) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.shared.disable(&mut state);
        Ok(())
    }
}

impl Bar for Shared {
    fn len(&self) -> usize {
        self.state().bar_len
    }

    fn read8(&self, _at: usize) -> u8 {
        panic!("NVMe has no registers of 8 bits")
    }

    fn read16(&self, _at: usize) -> u16 {
        panic!("NVMe has no registers of 16 bits")
    }

    fn read32(&self, at: usize) -> u32 {
        let mut state = self.state();
        assert!(at + 4 <= state.bar_len, "the register lies in the BAR");
        match at {
            0x00 => state.cap as u32,
            0x04 => (state.cap >> 32) as u32,
            0x08 => state.version,
            0x14 => state.config,
            0x1c if state.lag > 0 => {
                state.lag -= 1;
                0
            }
            0x1c => state.status,
            _ => panic!("register {at:#x} is not read"),
        }
    }

    fn read64(&self, at: usize) -> u64 {
        u64::from(self.read32(at)) | u64::from(self.read32(at + 4)) << 32
    }

    fn write8(&self, _at: usize, _value: u8) {
        panic!("NVMe has no registers of 8 bits")
    }

    fn write16(&self, _at: usize, _value: u16) {
        panic!("NVMe has no registers of 16 bits")
    }

    fn write32(&self, at: usize, value: u32) {
        let mut state = self.state();
        assert!(at + 4 <= state.bar_len, "the register lies in the BAR");
        let low = |old: u64| old >> 32 << 32 | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            0x14 => self.configure(&mut state, value),
            0x24 => state.aqa = value,
            0x28 => state.asq = low(state.asq),
            0x2c => state.asq = high(state.asq),
            0x30 => state.acq = low(state.acq),
            0x34 => state.acq = high(state.acq),
            0x1000.. => {
                let stride = 4 << (state.cap >> 32 & 0xf);
                let (bell, value) = ((at - 0x1000) / stride, value as u16);
                let id = (bell / 2) as u16;
                // Without a pair, the driver has not noticed a reset yet.
                let Some(pair) = state.pairs.get_mut(&id) else { return };
                assert!(value < pair.size, "a doorbell lies in its queue");
                if bell.is_multiple_of(2) {
                    pair.tail = value;
                    self.serve(&mut state, id);
                } else {
                    pair.acknowledged = value;
                }
            }
            _ => panic!("register {at:#x} is not written"),
        }
    }

    fn write64(&self, at: usize, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }
}
