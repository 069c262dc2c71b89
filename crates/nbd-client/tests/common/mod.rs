//! A server over memory, for tests, and a source of numbers that look random.
#![allow(dead_code, reason = "each test uses its part")]

use std::{
    net::TcpListener,
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use blkdev::memory::Memory;
use nbd_client::{Address, Mode, Options, Uri};
use nbd_server_core::{Export, Limits, Server, tls::Tls};

/// No wait of these tests is longer, unless something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// All modes, the oldest first.
pub(crate) const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Bytes of the export `disk`.
pub(crate) const SIZE: u64 = 64 << 20;

/// A server on a Unix socket and on TCP. The default export is `disk`; `blocks` has blocks of 4096 bytes; `fixed` is
/// read-only.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) server: Server,
    pub(crate) path: PathBuf,
    pub(crate) port: u16,
}

impl Running {
    pub(crate) fn start() -> Self {
        Self::with(None)
    }

    pub(crate) fn with(tls: Option<Tls>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nbd-client-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let mut disk = Export::new("disk", Arc::new(Memory::new(SIZE)));
        disk.description = "64 MiB of memory".into();
        let blocks = Memory::new(1 << 20).with(|info| (info.block_size, info.preferred_block_size) = (4096, 8192));
        let mut fixed = Export::new("fixed", Arc::new(Memory::new(1 << 20)));
        fixed.read_only = true;
        let exports = vec![disk, Export::new("blocks", Arc::new(blocks)), fixed];
        let server = Server::start(exports, vec![unix.into(), tcp.into()], tls, Limits::default()).unwrap();
        Self { server, path, port }
    }

    pub(crate) fn unix(&self) -> Uri {
        Uri::new(Address::Unix(self.path.clone()))
    }

    pub(crate) fn tcp(&self) -> Uri {
        Uri::new(Address::Tcp { host: "127.0.0.1".into(), port: self.port })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Options under which a test that hangs fails.
pub(crate) fn options() -> Options {
    Options::default().connect_timeout(Some(PATIENCE)).handshake_timeout(Some(PATIENCE)).call_timeout(Some(PATIENCE))
}

/// Numbers from a seed (splitmix64).
#[derive(Debug)]
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
