//! Golden conversations. They are fed turn by turn, as a whole, cut at every byte, and byte by byte. Both sides must send and
//! understand the same every time.

mod common;

use std::collections::HashMap;

use common::Server;
use common::golden::{self, Golden};
use nbd_proto::Mode;
use nbd_proto::client;
use nbd_proto::wire::{CommandKind, Opt};

/// The server's output and events when the parts arrive in these pieces.
fn serve(golden: &Golden, cut: &dyn Fn(&[u8]) -> Vec<Vec<u8>>) -> (Vec<u8>, Vec<String>) {
    let mut server = Server::new(golden.offer);
    for (i, part) in golden.parts().iter().enumerate() {
        if i > 0 {
            server.secure();
        }
        for piece in cut(part) {
            server.feed(&piece);
        }
    }
    (server.out, server.log)
}

#[test]
fn turn_by_turn_the_server_sends_the_golden_bytes() {
    for golden in golden::all() {
        let mut server = Server::new(golden.offer);
        for (i, turn) in golden.turns.iter().enumerate() {
            if turn.tls {
                server.secure();
            }
            server.feed(&turn.client);
            let said = std::mem::take(&mut server.out);
            assert_eq!(hex(&said), hex(&turn.server), "{}, turn {i}", golden.file);
        }
        let lines: Vec<_> = server.log.iter().map(String::as_str).collect();
        assert_eq!(lines, golden.log, "{}\n{}", golden.file, server.log.join("\nE "));
    }
}

#[test]
fn every_cut_gives_the_same() {
    for golden in golden::all() {
        let said = golden.server();
        let longest = golden.parts().iter().map(Vec::len).max().unwrap();
        for at in 0..=longest {
            // A cut inside 64 KiB of filler shows nothing new, and takes time.
            if at > 3000 && at % 4099 != 0 && longest - at > 600 {
                continue;
            }
            let (out, log) = serve(&golden, &|part| {
                let (a, b) = part.split_at(at.min(part.len()));
                vec![a.to_vec(), b.to_vec()]
            });
            assert!(out == said, "{}, cut at {at}", golden.file);
            assert_eq!(log, golden.log, "{}, cut at {at}", golden.file);
        }
    }
}

#[test]
fn whole_and_byte_by_byte_give_the_same() {
    for golden in golden::all() {
        for step in [usize::MAX, 1, 3, 17] {
            let (out, log) = serve(&golden, &|part| part.chunks(step).map(<[u8]>::to_vec).collect());
            assert!(out == golden.server(), "{}, in steps of {step}", golden.file);
            assert_eq!(log, golden.log, "{}, in steps of {step}", golden.file);
        }
    }
}

/// CVE-2011-1925, CVE-2017-9524: a client may disconnect after every byte. Nothing panics, and the server sends no reply without
/// a request.
#[test]
fn a_client_may_disconnect_at_any_time() {
    for golden in golden::all() {
        let parts = golden.parts();
        for len in 0..=parts[0].len().min(3000) {
            let mut server = Server::new(golden.offer);
            server.feed(&parts[0][..len]);
            assert!(golden.server().starts_with(&server.out), "{}, the first {len} bytes", golden.file);
        }
    }
}

/// The client side sends the bytes of the golden client, and understands the golden server in the same way at every cut.
#[test]
fn the_client_half_replays_it() {
    for golden in golden::all() {
        if golden.file.contains("fatal") || golden.turns[0].client != [0, 0, 0, 3] {
            continue;
        }
        let (asks, requests) = questions(&golden);
        let said = golden.server();
        let whole = client_log(&said, &mut [said.as_slice()].into_iter(), &asks, &requests);
        assert_eq!(whole.1.len(), asks.len(), "{}: every question is answered\n{:#?}", golden.file, whole.0);
        for at in 1..said.len() {
            let (a, b) = said.split_at(at);
            let cut = client_log(&said, &mut [a, b].into_iter(), &asks, &requests);
            assert_eq!(cut, whole, "{}, cut at {at}", golden.file);
        }
        assert_eq!(client_log(&said, &mut said.chunks(1), &asks, &requests), whole, "{}", golden.file);
    }
}

/// Options and their data, in order; and the length of every READ, by cookie.
type Questions = (Vec<(Opt, Vec<u8>)>, HashMap<u64, u32>);

fn questions(golden: &Golden) -> Questions {
    let client: Vec<u8> = golden.parts().concat();
    let (mut rest, mut asks, mut reads) = (&client[4..], Vec::new(), HashMap::new());
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
    while rest.starts_with(b"IHAVEOPT") {
        let len = number(&rest[12..16]) as usize;
        asks.push((Opt(number(&rest[8..12]) as u32), rest[16..16 + len].to_vec()));
        rest = &rest[16 + len..];
    }
    // Any 28 bytes that look like a compact READ are enough: only simple replies need it.
    for head in rest.windows(28).filter(|head| head.starts_with(&[0x25, 0x60, 0x95, 0x13])) {
        if number(&head[6..8]) == u64::from(CommandKind::READ.0) {
            reads.insert(number(&head[8..16]), number(&head[24..28]) as u32);
        }
    }
    (asks, reads)
}

/// The client's events, and its reply to each question.
fn client_log(
    said: &[u8],
    pieces: &mut dyn Iterator<Item = &[u8]>,
    asks: &[(Opt, Vec<u8>)],
    reads: &HashMap<u64, u32>,
) -> (Vec<String>, Vec<Vec<u8>>) {
    let (mut handshake, mut decoder) = (client::Handshake::new(), None);
    let (mut log, mut spoken, mut todo) = (Vec::new(), Vec::new(), asks.iter());
    let (mut mode, mut asked, mut data) = (Mode::Simple, Opt(0), Vec::new());
    let mut taken = 0;
    for mut piece in pieces {
        let before = piece.len();
        while decoder.is_none() {
            let mut out = Vec::new();
            let Some(answer) = handshake.next(&mut piece, &mut out).unwrap() else { break };
            let over = match &answer {
                client::Answer::Greeted(_) => {
                    assert_eq!(out, [0, 0, 0, 3]);
                    true
                }
                client::Answer::Ack | client::Answer::Refused(_) | client::Answer::Export { .. } => true,
                _ => false,
            };
            match (&answer, asked) {
                (client::Answer::Ack, Opt::STRUCTURED_REPLY) => mode = Mode::Structured,
                (client::Answer::Ack, Opt::EXTENDED_HEADERS) => mode = Mode::Extended,
                (client::Answer::Ack, Opt::STARTTLS) => mode = Mode::Simple,
                (client::Answer::Ack, Opt::GO) | (client::Answer::Export { .. }, _) => {
                    decoder = Some(client::Decoder::new(mode));
                }
                _ => {}
            }
            log.push(format!("{answer:?}"));
            if let (true, Some((opt, bytes))) = (over, todo.next()) {
                asked = *opt;
                let mut out = Vec::new();
                let name;
                let ask = match *opt {
                    Opt::EXPORT_NAME => {
                        name = String::from_utf8(bytes.clone()).unwrap();
                        client::Ask::ExportName(&name)
                    }
                    opt => client::Ask::Other(opt, bytes),
                };
                handshake.ask(ask, &mut out);
                assert_eq!(out, common::option(opt.0, bytes));
                spoken.push(out);
            }
        }
        while let Some(decoder) = &mut decoder {
            match decoder.next(&mut piece).unwrap() {
                Some(client::Event::Payload(bytes)) => {
                    data.extend_from_slice(bytes);
                    if decoder.payload_left() == 0 {
                        log.push(format!("{:?}", std::mem::take(&mut data)));
                    }
                }
                Some(event) => {
                    log.push(format!("{event:?}"));
                    if let client::Event::Simple(cookie, Ok(())) = event {
                        decoder.expect_payload(reads.get(&cookie.0).copied().unwrap_or(0));
                    }
                }
                None => break,
            }
        }
        taken += before - piece.len();
    }
    assert_eq!(taken, said.len(), "everything is understood");
    (log, spoken)
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| if byte.is_ascii_graphic() { format!(" {}", *byte as char) } else { format!("{byte:02x}") })
        .collect()
}
