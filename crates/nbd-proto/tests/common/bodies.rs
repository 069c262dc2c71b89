//! The bodies of the fuzz targets, as plain functions: the fuzzer calls them, and an ordinary test replays the corpus through
//! them.

use nbd_proto::wire::{CommandFlags, CommandKind, TransmissionFlags};
use nbd_proto::{BlockSizes, ContextSet, Event, Mode, Offer, Receiver, Terms, Tls, client};

use super::{ALL, SIZE, Seed, Server};

/// A whole server. Its events and replies are the same however the client's bytes are cut. The first byte selects the offer.
pub fn handshake(data: &[u8]) {
    let Some((&head, said)) = data.split_first() else { return };
    let tls = [Tls::Off, Tls::Optional, Tls::Required, Tls::Off][usize::from(head >> 2 & 3)];
    let offer = Offer {
        structured: head & 1 == 0,
        extended: head & 2 == 0,
        tls,
        block_size_required: head & 16 != 0,
        enforce_alignment: head & 32 != 0,
        ..Offer::default()
    };
    let whole = serve(offer, &mut [said].into_iter());
    // With TLS, the end of a piece has a meaning: data after STARTTLS in the same piece is refused.
    if !whole.0.iter().any(|line| line == "StartTls") {
        assert_eq!(whole, serve(offer, &mut pieces(said)), "cuts change nothing");
    }
}

fn serve(offer: Offer, pieces: &mut dyn Iterator<Item = &[u8]>) -> (Vec<String>, Vec<u8>) {
    let mut server = Server::new(offer);
    for piece in pieces {
        server.feed(piece);
        assert!(server.out.len() < 64 << 20, "replies are bounded");
    }
    (server.log, server.out)
}

/// The receiver alone. The first two bytes select the terms. Every byte that it takes belongs to a request that it reported.
pub fn receiver(data: &[u8]) {
    let Some((&[a, b], stream)) = data.split_first_chunk() else { return };
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended, Mode::Extended][usize::from(a & 3)];
    let terms = Terms {
        mode,
        flags: if a & 4 == 0 { ALL } else { ALL.with(TransmissionFlags::READ_ONLY) }
            .without(TransmissionFlags(u16::from(b & 0xf) << 5)),
        size: SIZE,
        block: BlockSizes { min: 512, preferred: 4096, payload_max: 1 << 16 },
        enforce_alignment: a & 8 != 0,
        contexts: if a & 16 == 0 { [0, 3, 63].into_iter().collect() } else { ContextSet::EMPTY },
    };
    let whole = receive(terms, stream, &mut [stream].into_iter(), b);
    assert_eq!(whole, receive(terms, stream, &mut pieces(stream), b), "cuts change nothing");
}

/// The receiver's events. Also checks that it counts bytes like this small parser of headers.
fn receive(terms: Terms, stream: &[u8], pieces: &mut dyn Iterator<Item = &[u8]>, how: u8) -> Vec<String> {
    let head = if terms.mode == Mode::Extended { 32 } else { 28 };
    let field = |at: usize, len: usize| stream[at..at + len].iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let mut receiver = Receiver::new(terms);
    let (mut log, mut fed, mut accounted, mut payload) = (Vec::new(), 0, 0, 0);
    for mut piece in pieces {
        fed += piece.len();
        loop {
            let event = match receiver.next(&mut piece) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(fatal) => {
                    log.push(format!("{fatal}"));
                    return log;
                }
            };
            if let Event::Payload(bytes) = event {
                assert!(!bytes.is_empty() && bytes.len() <= payload, "payload has the length of its request");
                payload -= bytes.len();
                assert_eq!(receiver.payload_left() as usize, payload);
                continue;
            }
            assert_eq!(payload, 0, "a payload ends before the next event");
            let cookie = match event {
                Event::Command(cookie, _) | Event::Write(cookie, _) | Event::Reject(cookie, _) => cookie,
                Event::Disconnect => {
                    log.push("Disconnect".into());
                    return log;
                }
                Event::Payload(_) => unreachable!("taken above"),
            };
            assert_eq!(cookie.0, field(accounted + 8, 8), "an event for each request, in order");
            let (flags, kind) = (field(accounted + 4, 2), field(accounted + 6, 2));
            let len = field(accounted + 24, head - 24);
            let has_payload = kind == u64::from(CommandKind::WRITE.0)
                || (head == 32 && flags & u64::from(CommandFlags::PAYLOAD_LEN.0) != 0);
            accounted += head + if has_payload { len as usize } else { 0 };
            log.push(format!("{event:?}"));
            if let Event::Write(_, write) = event {
                assert_eq!(u64::from(write.len), len);
                payload = write.len as usize;
                // One write in four is abandoned.
                match how >> 4 & 3 {
                    1 if payload > 0 => {
                        receiver.skip_payload();
                        payload = 0;
                    }
                    _ => {}
                }
            } else {
                assert!(fed - piece.len() >= accounted, "an event comes after its request");
                assert_eq!(fed - piece.len(), accounted, "all bytes taken were reported");
            }
        }
        assert!(piece.is_empty(), "None takes everything");
    }
    log
}

/// The client's decoder with any data from a server. The first byte selects the mode.
pub fn decoder(data: &[u8]) {
    let Some((&head, said)) = data.split_first() else { return };
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended, Mode::Extended][usize::from(head & 3)];
    assert_eq!(decode(mode, &mut [said].into_iter()), decode(mode, &mut pieces(said)), "cuts change nothing");
    assert_eq!(ask(&mut [said].into_iter()), ask(&mut pieces(said)), "cuts change nothing");
}

pub fn decode(mode: Mode, pieces: &mut dyn Iterator<Item = &[u8]>) -> Vec<String> {
    let mut decoder = client::Decoder::new(mode);
    let mut log: Vec<String> = Vec::new();
    let mut data = 0;
    for mut piece in pieces {
        loop {
            match decoder.next(&mut piece) {
                Ok(Some(client::Event::Payload(bytes))) => {
                    assert!(!bytes.is_empty(), "a payload event has bytes");
                    data += bytes.len();
                    if decoder.payload_left() == 0 {
                        log.push(format!("payload of {}", std::mem::take(&mut data)));
                    }
                }
                Ok(Some(event)) => {
                    log.push(format!("{event:?}"));
                    if let client::Event::Simple(cookie, Ok(())) = event {
                        // The cookie contains the length of the read.
                        decoder.expect_payload((cookie.0 & 0x1f) as u32);
                    }
                }
                Ok(None) => break,
                Err(fatal) => {
                    log.push(format!("{fatal}"));
                    return log;
                }
            }
        }
        assert!(piece.is_empty(), "None takes everything");
    }
    log
}

/// The client's handshake with any data from a server: the usual options.
pub fn ask(pieces: &mut dyn Iterator<Item = &[u8]>) -> (String, Vec<u8>) {
    let wish = client::Wish {
        name: "disk".into(),
        mode: Mode::Extended,
        contexts: vec!["base:allocation".into()],
        tls: false,
    };
    let (mut course, mut out) = (client::Negotiation::new(wish), Vec::new());
    for mut piece in pieces {
        match course.next(&mut piece, &mut out) {
            Ok(client::Step::More) => {}
            other => return (format!("{other:?}"), out),
        }
    }
    ("More".into(), out)
}

/// The same bytes in pieces of one to some dozen bytes, cut by a seed that depends on the bytes.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut seed =
        Seed(bytes.iter().take(64).fold(bytes.len() as u64, |n, &byte| n.wrapping_mul(31) ^ u64::from(byte)));
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let most = if seed.chance(4) { 64 } else { 4 };
        let (piece, after) = rest.split_at((1 + seed.below(most) as usize).min(rest.len()));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}
