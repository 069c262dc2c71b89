//! Rules of the handshake that no single conversation shows: cleared state, calls that never reach the catalog, the order of
//! options.

mod common;

use std::cell::RefCell;

use common::{Exports, Seed, Server, option};
use nbd_proto::{Catalog, Export, Fatal, Handshake, Offer, Refusal, Step, Tls};

const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_META: u32 = 9;
const SET_META: u32 = 10;
const EXTENDED: u32 = 11;

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat()
}

/// INFO or GO with these kinds.
fn about(opt: u32, name: &str, kinds: &[u8]) -> Vec<u8> {
    let count = [0, kinds.len() as u8];
    let kinds: Vec<u8> = kinds.iter().flat_map(|&kind| [0, kind]).collect();
    option(opt, &[string(name), count.to_vec(), kinds].concat())
}

fn contexts(opt: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes();
    let queries: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    option(opt, &[string(name), count.to_vec(), queries].concat())
}

/// The names of the selected contexts after these options and a GO.
fn selected(options: &[Vec<u8>], name: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(Offer { tls: Tls::Optional, ..Offer::default() }, &mut out);
    let said = [vec![0, 0, 0, 3], options.concat(), about(GO, name, &[])].concat();
    match handshake.next(&mut said.as_slice(), &Exports, &mut out) {
        Ok(Step::Done(negotiated)) => {
            assert_eq!(negotiated.terms.contexts.len() as usize, negotiated.contexts.len());
            negotiated.contexts.into_iter().map(|(_, context)| context).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// proto.md, "NBD_OPT_SET_META_CONTEXT": it replaces the previous selection, even if it fails.
#[test]
fn a_selection_is_cleared() {
    let base = "base:allocation";
    let set = |queries: &[&str]| contexts(SET_META, "disk", queries);
    let start = [option(STRUCTURED, &[]), set(&[base])];
    let and = |more: Vec<u8>| selected(&[start.concat(), more], "disk");
    assert_eq!(and(Vec::new()), [base]);
    assert_eq!(and(set(&["x-test:depth"])), ["x-test:depth"], "another one");
    let none: [&str; 0] = [];
    assert_eq!(and(set(&[])), none, "by an empty one");
    assert_eq!(and(set(&["x-none:y"])), none, "by one that finds nothing");
    assert_eq!(and(set(&["base"])), none, "by an invalid query");
    assert_eq!(and(option(SET_META, &[1, 2, 3])), none, "by a malformed option");
    assert_eq!(and(option(SET_META, &[])), none, "by an empty option");
    assert_eq!(and(option(SET_META, &vec![0; 100_000])), none, "by one that is too big");
    assert_eq!(and(contexts(SET_META, "nope", &[base])), none, "by one for an unknown export");
    assert_eq!(and(contexts(SET_META, "", &[base])), none, "by one for another name");
    // Nothing else clears it.
    assert_eq!(and(contexts(LIST_META, "disk", &["x-test:depth"])), [base]);
    assert_eq!(and(option(EXTENDED, &[])), [base]);
    assert_eq!(and(about(INFO, "ro", &[])), [base]);
    assert_eq!(and(option(LIST, &[])), [base]);
}

/// CVE-2019-14851: an INFO about one export, a GO to another. Every order of options about different exports must work, and the
/// last selection counts.
#[test]
fn every_order_of_options() {
    let base = "base:allocation";
    let names = ["", "disk", "ro", "nope"];
    for seed in 0..3000 {
        let mut seed = Seed(seed);
        let (mut said, mut chosen, mut chunks) = (vec![0, 0, 0, 3], None, false);
        for _ in 0..seed.below(12) {
            let name = *seed.pick(&names);
            match seed.below(6) {
                0 => said.extend(about(INFO, name, &[3, 1])),
                1 => said.extend(contexts(LIST_META, name, &[])),
                2 => {
                    said.extend(contexts(SET_META, name, &[base]));
                    chosen = (chunks && name != "nope").then_some(name);
                }
                3 => {
                    said.extend(option(if seed.chance(2) { STRUCTURED } else { EXTENDED }, &[]));
                    chunks = true;
                }
                4 => said.extend(option(LIST, &[])),
                _ => said.extend(about(GO, "nope", &[0, 1, 2, 3])),
            }
        }
        let name = *seed.pick(&names[..3]);
        said.extend(about(GO, name, &[]));
        let mut out = Vec::new();
        let mut handshake = Handshake::new(Offer::default(), &mut out);
        let Ok(Step::Done(negotiated)) = handshake.next(&mut said.as_slice(), &Exports, &mut out) else {
            panic!("{seed:?} came to no end");
        };
        assert_eq!(negotiated.name, name);
        assert_eq!(!negotiated.contexts.is_empty(), chosen == Some(name), "{name:?}, and {chosen:?} was chosen");
    }
}

/// A catalog that records its calls.
#[derive(Default)]
struct Nosy(RefCell<Vec<String>>);

impl Catalog for Nosy {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        self.0.borrow_mut().push("list".into());
        Exports.list(each)
    }
    fn find(&self, name: &str) -> Result<Export, Refusal> {
        self.0.borrow_mut().push(format!("find {name}"));
        Exports.find(name)
    }
}

/// CVE-2019-14850: a client that has not started TLS, or sends malformed data, causes no calls to the catalog.
#[test]
fn the_catalog_is_not_called_too_early() {
    let all = [
        option(LIST, &[]),
        about(INFO, "disk", &[1, 2, 3]),
        about(GO, "disk", &[]),
        option(STRUCTURED, &[]),
        contexts(LIST_META, "disk", &[]),
        contexts(SET_META, "disk", &["base:allocation"]),
    ]
    .concat();
    let (nosy, mut out) = (Nosy::default(), Vec::new());
    let mut handshake = Handshake::new(Offer { tls: Tls::Required, ..Offer::default() }, &mut out);
    let said = [vec![0, 0, 0, 3], all].concat();
    assert_eq!(handshake.next(&mut said.as_slice(), &nosy, &mut out), Ok(Step::More));
    let outcome = handshake.next(&mut option(1, b"disk").as_slice(), &nosy, &mut out);
    assert!(matches!(outcome, Err(Fatal::ExportName(_))));

    let mut handshake = Handshake::new(Offer::default(), &mut out);
    let malformed = [
        option(LIST, &[0]),
        option(INFO, &[0; 5]),
        option(GO, &[0, 0, 0, 9, 0, 0]),
        contexts(SET_META, "disk", &["base:allocation"]),
        option(LIST_META, &[0xff; 8]),
        about(GO, &"n".repeat(4097), &[]),
    ]
    .concat();
    let said = [vec![0, 0, 0, 3], malformed].concat();
    assert_eq!(handshake.next(&mut said.as_slice(), &nosy, &mut out), Ok(Step::More));
    assert!(nosy.0.borrow().is_empty(), "{:?}", nosy.0);
    handshake.next(&mut about(GO, "disk", &[]).as_slice(), &nosy, &mut out).unwrap();
    assert_eq!(*nosy.0.borrow(), ["find disk"]);
}

/// CVE-2021-3716: data after STARTTLS is not read, and results from before it do not count.
#[test]
fn starttls_clears_all_state() {
    let said = [vec![0, 0, 0, 3], option(STARTTLS, &[]), about(GO, "disk", &[])].concat();
    let (mut input, mut out) = (said.as_slice(), Vec::new());
    let mut handshake = Handshake::new(Offer { tls: Tls::Optional, ..Offer::default() }, &mut out);
    assert_eq!(handshake.next(&mut input, &Exports, &mut out), Ok(Step::StartTls));
    assert_eq!(input, about(GO, "disk", &[]), "it is left to the caller");
    assert!(handshake.secure());

    // One of each kind of state, then TLS: the client must be like a new one.
    let mut server = Server::new(Offer { tls: Tls::Optional, block_size_required: true, ..Offer::default() });
    server.feed(&[0, 0, 0, 3]);
    server.feed(&option(EXTENDED, &[]));
    server.feed(&contexts(SET_META, "disk", &["base:allocation"]));
    server.feed(&about(INFO, "disk", &[3]));
    server.feed(&option(STARTTLS, &[]));
    server.secure();
    server.out.clear();
    server.feed(&about(GO, "disk", &[]));
    assert_eq!(server.out[20 + 14 + 12..][..4], [0x80, 0, 0, 8], "the block sizes must be asked for again");
    server.feed(&about(GO, "disk", &[3]));
    assert_eq!(server.log[1], r#"Done "disk" Simple flags=0d7d contexts=[] asked=true secure=true"#);
}

/// CVE-2020-10761: a name of the greatest length, in an error text about it.
#[test]
fn a_text_about_a_long_name_is_cut() {
    for name in ["n".repeat(4096), "ä".repeat(2048), "\u{1}".repeat(4096)] {
        let mut server = Server::new(Offer::default());
        server.feed(&[0, 0, 0, 3]);
        server.out.clear();
        server.feed(&about(INFO, &name, &[]));
        let len = u32::from_be_bytes(server.out[16..20].try_into().unwrap()) as usize;
        assert_eq!(server.out.len(), 20 + len);
        assert!(len <= 4096 && std::str::from_utf8(&server.out[20..]).is_ok());
    }
}

#[test]
fn a_handshake_ends_once() {
    for end in [about(GO, "disk", &[]), option(2, &[]), option(1, b"disk"), option(1, b"nope"), vec![0; 16]] {
        let (mut handshake, mut out) = (Handshake::new(Offer::default(), &mut Vec::new()), Vec::new());
        let said = [vec![0, 0, 0, 3], end, b"and more".to_vec()].concat();
        let mut input = said.as_slice();
        let first = handshake.next(&mut input, &Exports, &mut out);
        assert!(!matches!(first, Ok(Step::More | Step::StartTls)), "{first:?}");
        assert_eq!(input, b"and more", "what comes after it is left");
        assert_eq!(handshake.next(&mut input, &Exports, &mut out), Err(Fatal::Over));
        assert_eq!(input, b"and more");
    }
}
