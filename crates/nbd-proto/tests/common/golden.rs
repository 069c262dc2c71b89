//! Golden conversations: text files with the bytes of both sides, in hexadecimal and in quotes, with a comment on every line.

use std::path::Path;

use nbd_proto::{Offer, Tls};

/// A whole connection. The client sends `turns[i].0`, and the server replies `turns[i].1`; the first reply is the greeting.
pub struct Golden {
    pub file: String,
    pub offer: Offer,
    pub turns: Vec<Turn>,
    /// The server's events, in order.
    pub log: Vec<String>,
}

pub struct Turn {
    pub client: Vec<u8>,
    pub server: Vec<u8>,
    /// TLS begins before this turn.
    pub tls: bool,
}

impl Golden {
    /// The client's bytes in parts, split where TLS begins.
    pub fn parts(&self) -> Vec<Vec<u8>> {
        let mut parts = vec![Vec::new()];
        for turn in &self.turns {
            if turn.tls {
                parts.push(Vec::new());
            }
            parts.last_mut().unwrap().extend_from_slice(&turn.client);
        }
        parts
    }

    pub fn server(&self) -> Vec<u8> {
        self.turns.iter().flat_map(|turn| turn.server.clone()).collect()
    }
}

/// All files of `tests/golden`, in order.
pub fn all() -> Vec<Golden> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "the golden conversations exist");
    files.iter().map(|file| parse(file)).collect()
}

fn parse(file: &Path) -> Golden {
    let text = std::fs::read_to_string(file).unwrap();
    let mut golden = Golden {
        file: file.file_name().unwrap().to_str().unwrap().to_owned(),
        offer: Offer::default(),
        turns: vec![Turn { client: Vec::new(), server: Vec::new(), tls: false }],
        log: Vec::new(),
    };
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (mark, rest) = line.split_once(' ').unwrap_or((line, ""));
        let last = golden.turns.last_mut().unwrap();
        match mark {
            "S" => last.server.extend(bytes(rest)),
            "C" if last.server.is_empty() && golden_has_said(last) => last.client.extend(bytes(rest)),
            "C" => golden.turns.push(Turn { client: bytes(rest), server: Vec::new(), tls: false }),
            "TLS" => golden.turns.push(Turn { client: Vec::new(), server: Vec::new(), tls: true }),
            "E" => golden.log.push(rest.to_owned()),
            "OFFER" => {
                for word in rest.split(' ') {
                    match word {
                        "no-structured" => golden.offer.structured = false,
                        "no-extended" => golden.offer.extended = false,
                        "tls-optional" => golden.offer.tls = Tls::Optional,
                        "tls-required" => golden.offer.tls = Tls::Required,
                        "block-size-required" => golden.offer.block_size_required = true,
                        "enforce-alignment" => golden.offer.enforce_alignment = true,
                        other => panic!("{}: unknown offer {other}", golden.file),
                    }
                }
            }
            other => panic!("{}: unknown mark {other}", golden.file),
        }
    }
    golden
}

fn golden_has_said(turn: &Turn) -> bool {
    !turn.client.is_empty() || turn.tls
}

/// `0003 "text" 00*124 # comment`
fn bytes(line: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() && !rest.starts_with('#') {
        if let Some(quoted) = rest.strip_prefix('"') {
            let (text, after) = quoted.split_once('"').expect("a quote ends");
            out.extend_from_slice(text.as_bytes());
            rest = after.trim_start();
            continue;
        }
        let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
        let (hex, times) = word.split_once('*').map_or((word, 1), |(hex, n)| (hex, n.parse().expect("a count")));
        let piece: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal")).collect();
        for _ in 0..times {
            out.extend_from_slice(&piece);
        }
        rest = after.trim_start();
    }
    out
}

/// The golden conversations as inputs of the fuzz targets: by name, for `bodies::handshake`.
pub fn handshakes() -> Vec<(String, Vec<u8>)> {
    all()
        .into_iter()
        .map(|golden| {
            let offer = golden.offer;
            let head = u8::from(!offer.structured)
                | u8::from(!offer.extended) << 1
                | (offer.tls as u8) << 2
                | u8::from(offer.block_size_required) << 4
                | u8::from(offer.enforce_alignment) << 5;
            (golden.file.clone(), [vec![head], golden.parts().concat()].concat())
        })
        .collect()
}

/// For `bodies::receiver`: the bytes after the handshake, with their mode.
pub fn requests() -> Vec<(String, Vec<u8>)> {
    live()
        .map(|(golden, mode)| {
            (golden.file.clone(), [vec![mode, 0], after(&golden.parts().concat(), &REQUESTS)].concat())
        })
        .collect()
}

/// For `bodies::decoder`.
pub fn replies() -> Vec<(String, Vec<u8>)> {
    live()
        .flat_map(|(golden, mode)| {
            let said = golden.server();
            let transmission = [vec![mode], after(&said, &REPLIES)].concat();
            [(format!("handshake-{}", golden.file), [vec![mode], said].concat()), (golden.file.clone(), transmission)]
        })
        .collect()
}

const REQUESTS: [[u8; 4]; 2] = [[0x25, 0x60, 0x95, 0x13], [0x21, 0xe4, 0x1c, 0x71]];
const REPLIES: [[u8; 4]; 3] = [[0x67, 0x44, 0x66, 0x98], [0x66, 0x8e, 0x33, 0xef], [0x6e, 0x8a, 0x27, 0x8c]];

fn live() -> impl Iterator<Item = (Golden, u8)> {
    all().into_iter().filter_map(|golden| {
        let done = golden.log.iter().find(|line| line.starts_with("Done"))?;
        let mode = ["Simple", "Structured", "Extended"].iter().position(|mode| done.contains(mode))?;
        Some((golden, mode as u8))
    })
}

/// From the first of these magics on.
fn after(bytes: &[u8], magics: &[[u8; 4]]) -> Vec<u8> {
    let start = bytes.windows(4).position(|window| magics.iter().any(|magic| window == magic));
    bytes[start.unwrap_or(bytes.len())..].to_vec()
}
