//! The bodies of the fuzz targets, as plain functions: the fuzzer calls them, and an ordinary test replays the corpus through them.

use std::{
    cell::RefCell,
    collections::HashMap,
    io::{Read, Write},
    sync::{Arc, LazyLock},
};

use blkdev::fuzz::Script;
use rustls::{
    ClientConfig, ClientConnection, ServerConfig,
    version::{TLS12, TLS13},
};

use super::{
    cheap,
    engine::{Engine, PLAIN_MAX, REST_MAX},
    psk,
    records::Records,
};
use crate::received::STAGING_MIN;

/// Most actions of one run.
const ACTIONS: usize = 200;

thread_local! {
    /// The staging memory of the last run of this thread: the sanitizer takes long for new memory of this size.
    static STAGING: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Sides {
    server: Arc<ServerConfig>,
    /// For TLS 1.2 and 1.3.
    clients: [Arc<ClientConfig>; 2],
    keys: psk::Offer,
}

static SIDES: LazyLock<Sides> = LazyLock::new(|| Sides {
    server: cheap::server(),
    clients: [&TLS12, &TLS13].map(cheap::client),
    keys: psk::Offer::of(HashMap::from([("user".into(), vec![7; 32])])).expect("a context"),
});

/// The text that is sent.
static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| (0..TEXT_MAX as u64 + 256).map(|n| (n ^ n >> 8) as u8).collect());

/// Longest text that is sent at once.
const TEXT_MAX: usize = 50_000;

/// Bytes before the end of a handshake, in pieces, to either library.
pub fn handshake(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else { return };
    let mut engine: Box<dyn Engine> = match first & 1 {
        0 => Box::new(Records::new(&SIDES.server).expect("a connection")),
        _ => Box::new(psk::Connection::new(&SIDES.keys).expect("a connection")),
    };
    let piece = match first >> 1 {
        0 => rest.len().max(1),
        len => len.into(),
    };
    let (mut early, mut out) = (Vec::new(), Vec::new());
    for bytes in rest.chunks(piece) {
        match engine.shake(bytes, &mut early, &mut out) {
            Ok(over) => assert!(!over, "no key was agreed on"),
            Err(_) => break,
        }
    }
    engine.close(&mut out);
}

/// A client of rustls, the network between, and the server's side. The network may change bytes.
struct Session {
    script: Script,
    client: ClientConnection,
    engine: Box<dyn Engine>,
    is_over: bool,
    /// Nothing was changed on the way.
    is_honest: bool,
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    staging: Vec<u8>,
    /// Data that was sent and not received yet, by the client and by the server.
    from_client: Vec<u8>,
    from_server: Vec<u8>,
    has_closed: bool,
    /// The server has seen that, or has failed.
    has_ended: bool,
    client_has_failed: bool,
    /// Changes of the client's keys without data between them.
    updates: u32,
}

/// A whole connection: data in both directions, keys that change, a network that delivers in pieces and damages bytes.
pub fn session(data: &[u8]) {
    let script = Script::new(data);
    let config = script.pick(&SIDES.clients);
    let client = ClientConnection::new(Arc::clone(config), "localhost".try_into().expect("a name"));
    let mut session = Session {
        client: client.expect("a connection"),
        engine: Box::new(Records::new(&SIDES.server).expect("a connection")),
        script,
        is_over: false,
        is_honest: true,
        to_server: Vec::new(),
        to_client: Vec::new(),
        staging: STAGING.take(),
        from_client: Vec::new(),
        from_server: Vec::new(),
        has_closed: false,
        has_ended: false,
        client_has_failed: false,
        updates: 0,
    };
    // As new memory.
    session.staging.clear();
    session.staging.resize(STAGING_MIN, 0);
    for _ in 0..ACTIONS {
        if session.script.is_over() || !session.act() {
            break;
        }
    }
    session.finish();
}

impl Session {
    /// `false`: the connection has ended.
    fn act(&mut self) -> bool {
        match self.script.below(16) {
            0..=4 => return self.server_receives(),
            5..=8 => return self.client_receives(),
            9 | 10 => self.client_writes(),
            11 | 12 => return self.server_writes(),
            13 => {
                if self.is_over {
                    // TLS 1.2 cannot.
                    let _ = self.client.refresh_traffic_keys();
                    // Without data between them, the server refuses the 33rd.
                    self.updates += 1;
                    self.is_honest &= self.updates <= 32;
                }
            }
            14 => self.damage(),
            _ => {
                if self.script.one_in(4) {
                    self.client.send_close_notify();
                    self.has_closed = true;
                }
            }
        }
        true
    }

    fn collect(&mut self) {
        while self.client.wants_write() {
            self.client.write_tls(&mut self.to_server).expect("memory takes everything");
        }
    }

    fn server_receives(&mut self) -> bool {
        if self.has_ended {
            return false;
        }
        self.collect();
        let mut out = Vec::new();
        let room = self.staging.len() - PLAIN_MAX - REST_MAX;
        let len = match self.script.below(4) {
            0 => self.to_server.len(),
            _ => self.script.below(self.to_server.len() as u64 + 1) as usize,
        };
        let bytes: Vec<u8> = self.to_server.drain(..len.min(room)).collect();
        let received = if self.is_over {
            let start = PLAIN_MAX + self.engine.load(&mut self.staging);
            self.staging[start..start + bytes.len()].copy_from_slice(&bytes);
            self.engine.open(&mut self.staging, start + bytes.len(), &mut out).map(|opening| {
                assert!(!opening.has_ended || self.has_closed || !self.is_honest, "nobody has ended it");
                self.has_ended = opening.has_ended;
                self.staging[..opening.plain].to_vec()
            })
        } else {
            let mut early = Vec::new();
            self.engine.shake(&bytes, &mut early, &mut out).map(|over| {
                self.is_over = over;
                early
            })
        };
        self.to_client.extend(out);
        match received {
            Ok(text) => {
                assert!(self.engine.rest() <= REST_MAX || !self.is_over, "the rest is bounded");
                assert!(self.from_client.starts_with(&text), "the server got other data than was sent");
                self.from_client.drain(..text.len());
                true
            }
            Err(error) => {
                assert!(!self.is_honest || self.has_closed, "an honest client was refused: {error}");
                self.has_ended = true;
                false
            }
        }
    }

    fn client_receives(&mut self) -> bool {
        // rustls asserts that a side which has closed its direction never fails.
        if self.client_has_failed || self.has_closed {
            return self.has_closed;
        }
        let mut input = &self.to_client[..];
        while !input.is_empty() {
            if self.client.read_tls(&mut input).expect("memory can be read") == 0 {
                break;
            }
            if let Err(error) = self.client.process_new_packets() {
                assert!(!self.is_honest, "the server sent nonsense: {error}");
                self.client_has_failed = true;
                return false;
            }
            let mut text = Vec::new();
            // An end without a closure alert is no matter here.
            let _ = self.client.reader().read_to_end(&mut text);
            assert!(self.from_server.starts_with(&text), "the client got other data than was sent");
            self.from_server.drain(..text.len());
        }
        self.to_client.clear();
        true
    }

    fn text(&self) -> Vec<u8> {
        let len = match self.script.below(32) {
            // Several records.
            0 => self.script.below(TEXT_MAX as u64),
            1 | 2 => self.script.below(5000),
            _ => self.script.below(300),
        } as usize;
        TEXT[len % 256..][..len].to_vec()
    }

    fn client_writes(&mut self) {
        if self.client.is_handshaking() || self.has_closed {
            return;
        }
        let text = self.text();
        let taken = self.client.writer().write(&text).expect("memory takes everything");
        self.from_client.extend(&text[..taken]);
        self.updates = if taken > 0 { 0 } else { self.updates };
    }

    fn server_writes(&mut self) -> bool {
        if !self.is_over {
            return true;
        }
        let (mut text, mut out) = (self.text(), Vec::new());
        self.from_server.extend(&text);
        while !text.is_empty() {
            let fill = &mut |room: &mut [u8]| {
                let len = room.len().min(text.len());
                room[..len].copy_from_slice(&text[..len]);
                text.drain(..len);
                len
            };
            let sealed = match self.engine.seal(&mut self.staging, fill, &mut out) {
                Ok(sealed) => sealed,
                Err(error) => {
                    assert!(!self.is_honest || self.has_closed, "an honest client got no reply: {error}");
                    return false;
                }
            };
            self.to_client.append(&mut out);
            self.to_client.extend(sealed);
        }
        true
    }

    /// Changes bytes on their way to the server.
    fn damage(&mut self) {
        self.collect();
        let at = self.script.below(self.to_server.len() as u64 + 1) as usize;
        match self.script.below(4) {
            // Usually it does nothing.
            0 | 1 => return,
            2 => match self.to_server.get_mut(at) {
                Some(byte) => *byte ^= 1 << self.script.below(8),
                None => return,
            },
            _ => {
                let junk: Vec<u8> = (0..self.script.below(40)).map(|_| self.script.any()).collect();
                self.to_server.splice(at..at, junk);
            }
        }
        self.is_honest = false;
    }

    /// Delivers everything. Between honest sides nothing is lost.
    fn finish(&mut self) {
        for _ in 0..8 {
            if !self.server_receives() || !self.client_receives() {
                return;
            }
        }
        if self.is_honest && self.is_over && !self.has_closed {
            assert!(self.from_server.is_empty(), "the client misses data");
            assert!(self.from_client.is_empty() || !self.to_server.is_empty(), "the server misses data");
        }
        let mut out = Vec::new();
        self.engine.close(&mut out);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        STAGING.set(std::mem::take(&mut self.staging));
    }
}

#[cfg(test)]
mod tests {
    use blkdev::fuzz::replay;

    #[test]
    fn handshake() {
        replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/tls_handshake"), 2000, super::handshake);
    }

    #[test]
    fn session() {
        replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/tls_session"), 400, super::session);
    }
}
