//! The floor of the benchmarks: a minimal server, as a yardstick for full servers.
//!
//! ```text
//! cargo run --release -p nbd-proto --example floor -- SOCKET|ADDRESS:PORT [FILE]
//! ```
//!
//! The path of a socket contains a slash. One thread for each connection takes a batch of requests with one `recv` and replies
//! with one `writev`. Without a file, reads return zeroes and writes are dropped; with a file, they become `pread` and `pwrite`.
//! It checks nothing: do not use it as a server.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;

use nbd_proto::wire::TransmissionFlags;
use nbd_proto::{BlockSizes, Catalog, Export, Handshake, Offer, Refusal, Step};

/// Most bytes of one `recv`.
const STAGING: usize = 1 << 20;
/// Most replies in one `writev`: each has two pieces, and the kernel takes 1024.
const BATCH: usize = 500;
/// Longest request, and the memory for the reads of one batch.
const REQUEST_MAX: usize = 32 << 20;
const READS: usize = 64 << 20;

const HEADER: usize = 28;
const REPLY_MAGIC: [u8; 4] = 0x6744_6698u32.to_be_bytes();

struct OneDisk {
    size: u64,
}

impl Catalog for OneDisk {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        each("", "the floor");
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Export, Refusal> {
        Ok(Export {
            name: name.into(),
            description: String::new(),
            size: self.size,
            flags: TransmissionFlags::SEND_FLUSH.with(TransmissionFlags::CAN_MULTI_CONN),
            block: BlockSizes::default(),
            contexts: Vec::new(),
            block_size_required: false,
        })
    }
}

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().ok_or_else(|| io::Error::other("usage: floor SOCKET|ADDRESS:PORT [FILE]"))?;
    let file = args.next().map(|path| OpenOptions::new().read(true).write(true).open(path)).transpose()?;
    let file = file.map(Arc::new);
    if address.contains('/') {
        for stream in UnixListener::bind(address)?.incoming() {
            start(stream?, file.clone());
        }
    } else {
        for stream in TcpListener::bind(address)?.incoming() {
            let stream = stream?;
            stream.set_nodelay(true)?;
            start(stream, file.clone());
        }
    }
    Ok(())
}

fn start<S: Read + Write + Send + 'static>(mut stream: S, file: Option<Arc<File>>) {
    // A client that disconnects ends its thread; there is no need to report it.
    thread::spawn(move || serve(&mut stream, file.as_deref()));
}

fn serve(stream: &mut (impl Read + Write), file: Option<&File>) -> io::Result<()> {
    shake_hands(stream, file.map_or(Ok(1 << 30), |file| file.metadata().map(|m| m.len()))?)?;
    let mut staging = vec![0; STAGING];
    let mut payload = vec![0; REQUEST_MAX];
    let mut reads = vec![0; if file.is_some() { READS } else { REQUEST_MAX }];
    let mut heads = [[0; 16]; BATCH];
    // For each reply, its range of `reads`.
    let mut parts = Vec::with_capacity(BATCH);
    let (mut have, mut at, mut used) = (0, 0, 0);
    loop {
        if have - at < HEADER || parts.len() == BATCH {
            answer(stream, &heads, &parts, &reads)?;
            parts.clear();
            used = 0;
            staging.copy_within(at..have, 0);
            (have, at) = (have - at, 0);
            if have < HEADER {
                match stream.read(&mut staging[have..])? {
                    0 => return Ok(()),
                    n => have += n,
                }
                continue;
            }
        }
        let header = &staging[at..at + HEADER];
        let number = |at: usize, len: usize| header[at..at + len].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let (kind, offset, len) = (number(6, 2), number(16, 8), number(24, 4) as usize);
        let head = &mut heads[parts.len()];
        head[..4].copy_from_slice(&REPLY_MAGIC);
        head[8..].copy_from_slice(&header[8..16]);
        at += HEADER;
        match kind {
            0 => {
                if used + len > reads.len() || file.is_none() {
                    // The overwritten data may still be waiting to be sent. For a benchmark that does not matter.
                    used = 0;
                }
                if let Some(file) = file {
                    file.read_exact_at(&mut reads[used..used + len], offset)?;
                }
                parts.push(used..used + len);
                used += len;
            }
            1 => {
                // First the part that arrived with the header, then the rest directly.
                let rode = len.min(have - at);
                let mut data = &staging[at..at + rode];
                if rode < len {
                    payload[..rode].copy_from_slice(data);
                    stream.read_exact(&mut payload[rode..len])?;
                    data = &payload[..len];
                }
                if let Some(file) = file {
                    file.write_all_at(data, offset)?;
                }
                at += rode;
                parts.push(0..0);
            }
            2 => return Ok(()),
            _ => parts.push(0..0),
        }
    }
}

fn answer(
    stream: &mut impl Write,
    heads: &[[u8; 16]],
    parts: &[std::ops::Range<usize>],
    reads: &[u8],
) -> io::Result<()> {
    let mut slices = Vec::with_capacity(2 * parts.len());
    for (head, part) in heads.iter().zip(parts) {
        slices.extend([IoSlice::new(head), IoSlice::new(&reads[part.clone()])]);
    }
    let mut left = &mut slices[..];
    while !left.is_empty() {
        let sent = stream.write_vectored(left)?;
        IoSlice::advance_slices(&mut left, sent);
    }
    Ok(())
}

fn shake_hands(stream: &mut (impl Read + Write), size: u64) -> io::Result<()> {
    let mut out = Vec::new();
    let offer = Offer { structured: false, extended: false, ..Offer::default() };
    let mut handshake = Handshake::new(offer, &mut out);
    let mut input = [0; 4096];
    loop {
        stream.write_all(&out)?;
        out.clear();
        let n = stream.read(&mut input)?;
        match handshake.next(&mut &input[..n], &OneDisk { size }, &mut out).map_err(io::Error::other)? {
            Step::More if n > 0 => {}
            Step::Done(_) => return stream.write_all(&out),
            _ => return Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }
}
