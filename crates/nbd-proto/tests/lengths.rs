//! False lengths: every 32-bit length inside an option, at every value that has harmed a server (CVE-2022-26495, CVE-2022-26496,
//! CVE-2017-15118, CVE-2017-15119). The option gets an error, and the next one is parsed normally.

mod common;

use common::{Server, option, option_of};
use nbd_proto::Offer;

const EXPORT_NAME: u32 = 1;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const LIST_META: u32 = 9;
const SET_META: u32 = 10;

const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

fn lengths(len: usize) -> Vec<u32> {
    let len = u32::try_from(len).unwrap();
    let mut all = vec![0, 1, 4095, 4096, 4097, 1 << 31, u32::MAX - 1, u32::MAX];
    all.extend((0..12).map(|n| len.wrapping_sub(n)));
    all.extend((1..6).map(|n| len + n));
    all
}

/// Types of the replies to the option. After it, LIST must get its replies.
fn replies(option: &[u8]) -> Vec<u32> {
    let mut server = Server::new(Offer::default());
    server.feed(&[0, 0, 0, 3]);
    server.feed(&common::option(8, &[]));
    server.out.clear();
    server.feed(option);
    let answered = std::mem::take(&mut server.out);
    let types = types(&answered);
    server.feed(&common::option(LIST, &[]));
    assert_eq!(self::types(&server.out), [2, 2, 1], "LIST is answered after {option:02x?}: {:?}", server.log);
    types
}

fn types(mut out: &[u8]) -> Vec<u32> {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut types = Vec::new();
    while !out.is_empty() {
        types.push(number(&out[12..16]));
        out = &out[20 + number(&out[16..20]) as usize..];
    }
    types
}

#[test]
fn the_name_of_info() {
    // A name of n bytes, no kinds, in an option of n + 6 bytes.
    for n in [0, 1, 4, 255, 256, 257, 4095, 4096, 4097, 5000] {
        for said in lengths(n + 6) {
            let data = [&said.to_be_bytes(), "a".repeat(n).as_bytes(), &[0, 0]].concat();
            let expected: &[u32] = match n {
                _ if said as usize != n => &[INVALID],
                4097.. => &[INVALID],
                // The default export exists.
                0 => &[3, 1],
                _ => &[UNKNOWN],
            };
            // A shorter length can be valid too: the bytes after the name then count as kinds, and 0x6161 of them are not there.
            assert_eq!(replies(&option(INFO, &data)), expected, "a name of {n} bytes, said to be {said}");
        }
    }
}

#[test]
fn the_count_of_kinds() {
    for count in [0u16, 1, 2, 3, 4, 255, 256, 0x7fff, 0x8000, 0xffff] {
        let data = [&4u32.to_be_bytes(), b"disk".as_slice(), &count.to_be_bytes(), &[0, 1, 0, 2, 0, 3]].concat();
        let expected: &[u32] = if count == 3 { &[3, 3, 3, 3, 1] } else { &[INVALID] };
        assert_eq!(replies(&option(INFO, &data)), expected, "{count} kinds");
    }
}

#[test]
fn the_name_of_a_context_option() {
    for opt in [LIST_META, SET_META] {
        for n in [0, 4, 256, 4096, 4097] {
            for said in lengths(n + 8) {
                let data = [&said.to_be_bytes(), "a".repeat(n).as_bytes(), &[0; 4]].concat();
                let expected: &[u32] = match n {
                    _ if said as usize != n => &[INVALID],
                    4097.. => &[INVALID],
                    0 if opt == LIST_META => &[4, 4, 4, 1],
                    0 => &[1],
                    _ => &[UNKNOWN],
                };
                assert_eq!(
                    replies(&option(opt, &data)),
                    expected,
                    "option {opt}, a name of {n} bytes, said to be {said}"
                );
            }
        }
    }
}

#[test]
fn the_queries_of_a_context_option() {
    let query = b"base:allocation";
    for opt in [LIST_META, SET_META] {
        let with = |count: u32, len: u32| {
            let parts: [&[u8]; 5] = [&4u32.to_be_bytes(), b"disk", &count.to_be_bytes(), &len.to_be_bytes(), query];
            option(opt, &parts.concat())
        };
        for len in lengths(query.len()) {
            let expected: &[u32] = if len == 15 { &[4, 1] } else { &[INVALID] };
            assert_eq!(replies(&with(1, len)), expected, "option {opt}, a query said to be {len}");
        }
        for count in lengths(1) {
            let expected: &[u32] = if count == 1 { &[4, 1] } else { &[INVALID] };
            assert_eq!(replies(&with(count, 15)), expected, "option {opt}, {count} queries");
        }
    }
}

#[test]
fn the_length_of_an_option() {
    // The option has all its data, but the server does not parse it.
    for (opt, len, code) in [
        (INFO, 65_536, INVALID),
        (INFO, 65_537, TOO_BIG),
        (GO, 1 << 20, TOO_BIG),
        (LIST_META, 1 << 20, TOO_BIG),
        (SET_META, 70_000, TOO_BIG),
        (LIST, 1 << 20, INVALID),
        (0x77, 32 << 20, 0x8000_0001),
    ] {
        assert_eq!(replies(&option(opt, &vec![0xff; len])), [code], "option {opt} of {len} bytes");
    }
    // No honest client sends that much.
    for len in [(32 << 20) + 1, 1 << 31, u32::MAX] {
        for opt in [LIST, INFO, GO, LIST_META, SET_META, 0x77] {
            let mut server = Server::new(Offer::default());
            server.feed(&[0, 0, 0, 3]);
            server.feed(&option_of(opt, len, &[]));
            assert!(
                server.is_over() && server.log[0].starts_with("Fatal"),
                "option {opt} of {len} bytes: {:?}",
                server.log
            );
        }
    }
}

#[test]
fn the_length_of_export_name() {
    for len in [0, 1, 4, 4096, 4097, 1 << 31, u32::MAX] {
        let mut server = Server::new(Offer::default());
        server.feed(&[0, 0, 0, 3]);
        server.feed(&option_of(EXPORT_NAME, len, &[]));
        match len {
            0 => assert!(server.mode().is_some(), "the default export"),
            1..=4096 => {
                server.feed(&vec![b'a'; len as usize]);
                assert_eq!(server.log, ["Fatal export name refused with ERR_UNKNOWN"]);
            }
            _ => assert_eq!(server.log, ["Fatal export name refused with ERR_INVALID"], "before its data is read"),
        }
    }
}

/// A client that only sends options and never starts transmission.
#[test]
fn options_are_counted() {
    let mut server = Server::new(Offer::default());
    server.feed(&[0, 0, 0, 3]);
    for i in 0..300 {
        server.feed(&option(0x99, &[]));
        assert_eq!(server.is_over(), i >= 256, "after {i} options");
    }
    let mut server = Server::new(Offer::default());
    server.feed(&[0, 0, 0, 3]);
    let long = option(0x99, &vec![0; 20 << 20]);
    for i in 0..4 {
        server.feed(&long);
        assert_eq!(server.is_over(), i >= 3, "after {i} options of 20 MiB");
    }
}

/// A long list that is requested often finally gets an error, in step.
#[test]
fn lists_are_bounded() {
    use nbd_proto::{Catalog, Export, Handshake, Refusal, Step, limits};
    struct Many;
    impl Catalog for Many {
        fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
            for i in 0..1000 {
                each(&format!("{i:0>500}"), &"d".repeat(500));
            }
            // Strings that are too long for the protocol are omitted or cut.
            each(&"n".repeat(4097), "");
            each("nul\0", "");
            each("long", &"d".repeat(5000));
            Ok(())
        }
        fn find(&self, name: &str) -> Result<Export, Refusal> {
            Err(Refusal::unknown(name))
        }
    }
    let mut out = Vec::new();
    let mut handshake = Handshake::new(Offer::default(), &mut out);
    let mut total = 0;
    for round in 0..20 {
        out.clear();
        let said = if round == 0 { [vec![0, 0, 0, 3], option(LIST, &[])].concat() } else { option(LIST, &[]) };
        assert_eq!(handshake.next(&mut said.as_slice(), &Many, &mut out), Ok(Step::More));
        let types = types(&out);
        match round {
            0..4 => assert!(types.len() == 1002 && types[1001] == 1, "round {round}: {} replies", types.len()),
            _ => assert_eq!(types.last(), Some(&TOO_BIG), "round {round}"),
        }
        total += out.len();
    }
    assert!(total < limits::REPLIES_MAX + 20 * 10_000, "{total} bytes");
}

/// A client that asks about each of many exports gets replies if the server has set the number of options accordingly. This test
/// needs more options, more bytes of options and more bytes of lists than the limits for a single export.
#[test]
fn the_limits_grow_with_the_number_of_exports() {
    use nbd_proto::{Catalog, Export, Handshake, Refusal, Step, limits};
    struct Many;
    impl Catalog for Many {
        fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
            (0..COUNT).for_each(|n| each(&name(n), ""));
            Ok(())
        }
        fn find(&self, name: &str) -> Result<Export, Refusal> {
            common::Exports.find("disk").map(|export| Export { name: name.to_owned(), ..export })
        }
    }
    const COUNT: u32 = 9000;
    fn name(n: u32) -> String {
        format!("{n:0>400}")
    }
    let mut out = Vec::new();
    let options_max = limits::OPTIONS_MAX + 8 * COUNT;
    let mut handshake = Handshake::new(Offer { options_max, ..Offer::default() }, &mut out);
    let mut ask = |said: &[u8]| {
        let mut out = Vec::new();
        assert_eq!(handshake.next(&mut &said[..], &Many, &mut out), Ok(Step::More));
        types(&out)
    };
    ask(&[&[0, 0, 0, 3], &option(8, &[])[..]].concat());
    assert_eq!(ask(&option(LIST, &[])).last(), Some(&1));
    for n in 0..COUNT {
        let name = [&400u32.to_be_bytes()[..], name(n).as_bytes()].concat();
        let query = [&name[..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
        let info = [&name[..], &1000u16.to_be_bytes(), &[0x7f; 2000]].concat();
        for what in [LIST_META, SET_META, LIST_META, SET_META] {
            assert_eq!(ask(&option(what, &query)), [4, 1], "option {what} for export {n}");
        }
        for _ in 0..3 {
            assert_eq!(ask(&option(INFO, &info)), [3, 1], "INFO for export {n}");
        }
    }
}
