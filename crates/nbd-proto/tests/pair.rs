//! The client side against the server side, in memory, with every message cut at random. The data that comes back must be that of
//! a plain vector.

mod common;

use std::collections::HashMap;

use common::{SIZE, Seed, Server};
use nbd_proto::client::{Chunk, Decoder, Encoder, Event, Negotiation, Step, Wish};
use nbd_proto::wire::{BASE_ALLOCATION, CommandFlags};
use nbd_proto::{Cookie, Mode, Offer, Tls, WireError};

/// The required result of a request.
enum Expected {
    Done,
    Error(WireError),
    Data(Vec<u8>),
    Status { contexts: usize, len: u64, one: bool },
}

/// The result so far.
#[derive(Default)]
struct Brought {
    data: Vec<u8>,
    contexts: Vec<u32>,
}

#[test]
fn a_client_and_a_server_understand_each_other() {
    for seed in 0..60 {
        let mut seed = Seed(seed);
        let mode = [Mode::Simple, Mode::Structured, Mode::Extended][seed.below(3) as usize];
        let tls = *seed.pick(&[Tls::Off, Tls::Optional, Tls::Required]);
        run(&mut seed, Offer { tls, ..Offer::default() }, mode, mode);
    }
}

/// An older server grants less, and the client works with it.
#[test]
fn a_client_works_with_an_older_server() {
    for (structured, extended, wish, got) in [
        (false, false, Mode::Extended, Mode::Simple),
        (true, false, Mode::Extended, Mode::Structured),
        (false, true, Mode::Extended, Mode::Extended),
        (false, true, Mode::Structured, Mode::Simple),
        (true, true, Mode::Simple, Mode::Simple),
    ] {
        run(&mut Seed(7), Offer { structured, extended, ..Offer::default() }, wish, got);
    }
}

fn run(seed: &mut Seed, offer: Offer, wish: Mode, mode: Mode) {
    let mut server = Server::new(offer);
    let tls = offer.tls != Tls::Off && (offer.tls == Tls::Required || seed.chance(2));
    let contexts = vec![BASE_ALLOCATION.to_owned(), "x-test:depth".to_owned(), "x-none:y".to_owned()];
    let mut course = Negotiation::new(Wish { name: "disk".into(), mode: wish, contexts, tls });
    let mut to_server = Vec::new();
    let agreed = 'shaken: loop {
        let said = std::mem::take(&mut server.out);
        assert!(!said.is_empty(), "the handshake goes on");
        for mut piece in pieces(seed, &said) {
            match course.next(&mut piece, &mut to_server).unwrap() {
                Step::More => {}
                Step::StartTls(upgrade) => {
                    server.secure();
                    course = upgrade.resume(&mut to_server);
                }
                Step::Done(agreed) => break 'shaken agreed,
            }
        }
        for piece in pieces(seed, &std::mem::take(&mut to_server)) {
            server.feed(piece);
        }
    };
    assert_eq!((agreed.terms.mode, server.mode()), (mode, Some(mode)));
    assert_eq!((agreed.terms.size, agreed.terms.block.payload_max), (SIZE, 1 << 16));
    assert_eq!((agreed.name.as_deref(), agreed.description.as_deref()), (Some("disk"), Some("a RAM disk")));
    assert_eq!(agreed.contexts.len(), if mode == Mode::Simple { 0 } else { 2 });

    let mut model: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8).collect();
    let (encoder, mut decoder) = (Encoder::new(mode), Decoder::new(mode));
    for round in 0..8 {
        let mut expected = HashMap::new();
        for i in 0..seed.below(10) {
            let cookie = Cookie(seed.next() << 8 | i);
            expected.insert(cookie, request(seed, encoder, cookie, mode, &mut model, &mut to_server));
        }
        for piece in pieces(seed, &std::mem::take(&mut to_server)) {
            server.feed(piece);
        }
        let said = std::mem::take(&mut server.out);
        let mut brought: HashMap<Cookie, Brought> = HashMap::new();
        let mut reading = Cookie(0);
        for mut piece in pieces(seed, &said) {
            while let Some(event) = decoder.next(&mut piece).unwrap() {
                take(event, &mut decoder, &mut expected, &mut brought, &mut reading);
            }
        }
        assert!(expected.is_empty(), "round {round}: {} requests were not answered: {:?}", expected.len(), server.log);
    }
    encoder.disconnect(&mut to_server, Cookie(0));
    server.feed(&to_server);
    assert!(server.is_over() && server.log.last().unwrap() == "Disconnect");
}

fn request(
    seed: &mut Seed,
    encoder: Encoder,
    cookie: Cookie,
    mode: Mode,
    model: &mut [u8],
    out: &mut Vec<u8>,
) -> Expected {
    let len = seed.below(5000);
    let at = seed.below(SIZE - len);
    let range = at as usize..(at + len) as usize;
    match seed.below(9) {
        0 | 1 => {
            encoder.read(out, cookie, at, len as u32);
            Expected::Data(model[range].to_vec())
        }
        2 | 3 => {
            let fill = seed.next() as u8;
            encoder.write_head(out, cookie, at, len as u32, seed.chance(2));
            out.resize(out.len() + len as usize, fill);
            model[range].fill(fill);
            Expected::Done
        }
        4 => {
            encoder.zero(out, cookie, at, len, CommandFlags::NO_HOLE);
            model[range].fill(0);
            Expected::Done
        }
        5 => {
            encoder.trim(out, cookie, at, len, true);
            Expected::Done
        }
        6 if mode == Mode::Extended => {
            encoder.status_of(out, cookie, at, len + 1, true, &[2]);
            Expected::Status { contexts: 1, len: len + 1, one: true }
        }
        6 | 7 if mode != Mode::Simple => {
            encoder.status(out, cookie, at, len + 1, false);
            Expected::Status { contexts: 2, len: len + 1, one: false }
        }
        7 => {
            encoder.write_head(out, cookie, SIZE - 1, 70_000, false);
            out.resize(out.len() + 70_000, 0xbb);
            Expected::Error(WireError::NoSpc)
        }
        _ => {
            encoder.cache(out, cookie, SIZE, 1);
            Expected::Error(WireError::Inval)
        }
    }
}

fn take(
    event: Event<'_>,
    decoder: &mut Decoder,
    expected: &mut HashMap<Cookie, Expected>,
    brought: &mut HashMap<Cookie, Brought>,
    reading: &mut Cookie,
) {
    match event {
        Event::Simple(cookie, Err(error)) => {
            assert!(matches!(expected.remove(&cookie), Some(Expected::Error(wanted)) if wanted == error));
        }
        Event::Simple(cookie, Ok(())) => match &expected[&cookie] {
            Expected::Data(data) if !data.is_empty() => {
                decoder.expect_payload(data.len() as u32);
                *reading = cookie;
                brought.insert(cookie, Brought::default());
            }
            Expected::Data(_) | Expected::Done => drop(expected.remove(&cookie)),
            _ => panic!("a simple success"),
        },
        Event::Payload(bytes) => {
            let brought = brought.get_mut(reading).unwrap();
            brought.data.extend_from_slice(bytes);
            if decoder.payload_left() == 0 {
                assert!(matches!(expected.remove(reading), Some(Expected::Data(data)) if data == brought.data));
            }
        }
        Event::Chunk { cookie, done, chunk, .. } => match (chunk, &expected[&cookie]) {
            (Chunk::None, Expected::Done | Expected::Data(_)) => drop(expected.remove(&cookie)),
            (Chunk::Data { len, .. }, Expected::Data(data)) => {
                assert!(done && len as usize == data.len());
                *reading = cookie;
                brought.insert(cookie, Brought::default());
            }
            (Chunk::Error { error, text, at: None }, Expected::Error(wanted)) => {
                assert!(done && error == *wanted && !text.is_empty());
                expected.remove(&cookie);
            }
            (Chunk::Status { context, extents }, Expected::Status { contexts, len, one }) => {
                let all: u64 = extents.iter().map(|extent| extent.len).sum();
                assert!(if *one { extents.len() == 1 && all <= *len } else { all == *len });
                let brought = brought.entry(cookie).or_default();
                assert!(!brought.contexts.contains(&context), "each context once");
                brought.contexts.push(context);
                assert_eq!(done, brought.contexts.len() == *contexts);
                if done {
                    expected.remove(&cookie);
                }
            }
            (chunk, _) => panic!("{chunk:?}"),
        },
    }
}

fn pieces<'a>(seed: &mut Seed, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let most = *seed.pick(&[1, 7, 64, 5000, 1 << 20]);
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at((1 + seed.below(most) as usize).min(bytes.len()));
        all.push(piece);
        bytes = rest;
    }
    all
}
