//! The handshake at the level of bytes: every error leaves the stream in step, and none ends the server.

use nbdblk_tests::raw::{Mode, Raw, cmd, errno, info_query, info_query_bytes, meta_query, opt, option_bytes, rep};
use nbdblk_tests::{Address, Dir, Nbdblk};

use crate::MIB;

fn server(dir: &Dir) -> Nbdblk {
    Nbdblk::unix(dir, &["disk:memory=1M", "second:memory=2M"])
}

/// The names in the reply to LIST, which shows that the stream is in step.
fn list(raw: &mut Raw) -> Vec<String> {
    let mut replies = raw.ask(opt::LIST, b"");
    assert_eq!(replies.pop(), Some((rep::ACK, vec![])), "LIST ends with an ACK");
    let name = |(kind, data): (u32, Vec<u8>)| {
        assert_eq!(kind, rep::SERVER);
        let len = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
        String::from_utf8(data[4..4 + len].to_vec()).unwrap()
    };
    replies.into_iter().map(name).collect()
}

fn check_in_step(raw: &mut Raw) {
    assert_eq!(list(raw), ["disk", "second"]);
}

/// Sends an option, checks the kind of its last reply, and that the next option works.
fn check(raw: &mut Raw, option: u32, data: &[u8], expected: &[u32]) {
    let kind = raw.ask_kind(option, data);
    let shown = &data[..data.len().min(40)];
    assert!(expected.contains(&kind), "option {option} {shown:?}: reply {kind:#x}, not one of {expected:x?}");
    check_in_step(raw);
}

#[test]
fn malformed_options_are_refused_in_step() {
    const INVALID: &[u32] = &[rep::ERR_INVALID];
    const UNSUP: &[u32] = &[rep::ERR_UNSUP];
    const UNKNOWN: &[u32] = &[rep::ERR_UNKNOWN];
    const TOO_LONG: &[u32] = &[rep::ERR_INVALID, rep::ERR_TOO_BIG];
    const BAD_NAME: &[u32] = &[rep::ERR_INVALID, rep::ERR_UNKNOWN];
    let dir = Dir::new();
    let server = server(&dir);
    let raw = &mut Raw::greeted(server.address());
    check(raw, opt::LIST, b"data", INVALID);
    check(raw, 0x1234, &[0; 4096], UNSUP);
    check(raw, 0xffff_ffff, b"", UNSUP);
    check(raw, 0, b"", UNSUP);
    check(raw, opt::PEEK_EXPORT, b"", UNSUP);
    check(raw, opt::STARTTLS, b"", &[rep::ERR_UNSUP, rep::ERR_POLICY]);
    check(raw, opt::STARTTLS, b"data", &[rep::ERR_UNSUP, rep::ERR_POLICY, rep::ERR_INVALID]);
    check(raw, opt::EXTENDED_HEADERS, b"data", &[rep::ERR_INVALID, rep::ERR_UNSUP]);
    // Metadata contexts need structured replies first.
    check(raw, opt::SET_META_CONTEXT, &meta_query("disk", &["base:allocation"]), INVALID);
    check(raw, opt::STRUCTURED_REPLY, b"data", INVALID);
    raw.negotiate_structured();
    check(raw, opt::STRUCTURED_REPLY, b"", &[rep::ACK, rep::ERR_INVALID]);
    for option in [opt::INFO, opt::GO] {
        check(raw, option, b"", INVALID);
        check(raw, option, b"\0\0", INVALID);
        check(raw, option, b"\0\0\0\x04dis\0\0", INVALID);
        for len in [0_u32, 1, 3, 5, 4096, 4097, 1 << 31, u32::MAX - 1, u32::MAX] {
            let data = [&len.to_be_bytes()[..], b"nono\0\0"].concat();
            check(raw, option, &data, INVALID);
        }
        check(raw, option, &[&info_query("disk", &[])[..], b"junk"].concat(), INVALID);
        // It announces one information request, but has none.
        check(raw, option, b"\0\0\0\x04disk\0\x01", INVALID);
        check(raw, option, b"\0\0\0\x04disk\xff\xff", INVALID);
        for len in [256, 257, 4096] {
            check(raw, option, &info_query(&"n".repeat(len), &[]), &[rep::ERR_UNKNOWN, rep::ERR_INVALID]);
        }
        for len in [4097, 5000] {
            check(raw, option, &info_query(&"n".repeat(len), &[]), TOO_LONG);
        }
        check(raw, option, &info_query_bytes(b"di\0sk", &[]), BAD_NAME);
        check(raw, option, &info_query_bytes(b"\xff\xfe", &[]), BAD_NAME);
        check(raw, option, &info_query("nosuch", &[]), UNKNOWN);
        check(raw, option, &info_query("%s%n%3000d", &[]), UNKNOWN);
    }
    for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        check(raw, option, b"", INVALID);
        check(raw, option, b"\0\0\0\x04disk", INVALID);
        check(raw, option, b"\0\0\0\x05disk\0\0\0\0", INVALID);
        for count in [1_u32, 2, 1 << 31, u32::MAX] {
            let data = [&b"\0\0\0\x04disk"[..], &count.to_be_bytes()].concat();
            check(raw, option, &data, TOO_LONG);
        }
        for len in [1_u32, 4097, 1 << 31, u32::MAX - 3, u32::MAX] {
            let data = [&b"\0\0\0\x04disk\0\0\0\x01"[..], &len.to_be_bytes()].concat();
            check(raw, option, &data, TOO_LONG);
        }
        check(raw, option, &[&meta_query("disk", &["base:"])[..], b"junk"].concat(), INVALID);
        check(raw, option, &meta_query(&"n".repeat(4097), &[]), TOO_LONG);
        check(raw, option, &meta_query("nosuch", &["base:allocation"]), UNKNOWN);
        check(raw, option, &meta_query("disk", &["x-nobody:knows"]), &[rep::ACK]);
    }
    raw.go("disk");
    assert_eq!(raw.read(0, 512), [0; 512]);
}

#[test]
fn a_client_flag_that_was_not_offered_ends_the_connection() {
    let dir = Dir::new();
    let server = server(&dir);
    for flags in [4_u32, 0x80, 1 << 31] {
        let mut raw = Raw::connect(server.address());
        raw.send(&(3 | flags).to_be_bytes());
        raw.await_close();
    }
    check_in_step(&mut Raw::greeted(server.address()));
}

#[test]
fn a_bad_option_magic_ends_the_connection() {
    let dir = Dir::new();
    let server = server(&dir);
    let mut raw = Raw::greeted(server.address());
    let _ = raw.try_send(b"IHAVEOPS\0\0\0\x03\0\0\0\0");
    raw.await_close();
    check_in_step(&mut Raw::greeted(server.address()));
}

#[test]
fn a_huge_option_uses_no_memory() {
    let dir = Dir::new();
    let server = server(&dir);
    let before = server.resident_private();
    for len in [1_u32 << 20, 1 << 31, u32::MAX] {
        let mut raw = Raw::greeted(server.address());
        let mut bytes = option_bytes(opt::GO, b"");
        bytes[12..].copy_from_slice(&len.to_be_bytes());
        raw.send(&bytes);
        // A part of the announced data: the server may discard it or disconnect, but must not keep it.
        for _ in 0..16 {
            if raw.try_send(&vec![0; 1 << 20]).is_err() {
                break;
            }
        }
    }
    check_in_step(&mut Raw::greeted(server.address()));
    let grown = server.resident_private().saturating_sub(before);
    assert!(grown < 8 * MIB, "resident memory grew by {grown} bytes");
}

#[test]
fn export_name_of_any_length_is_served_or_ends_the_connection() {
    let dir = Dir::new();
    let server = server(&dir);
    for len in [1, 256, 257, 4096, 4097, 5000] {
        let mut raw = Raw::greeted(server.address());
        raw.option(opt::EXPORT_NAME, "n".repeat(len).as_bytes());
        assert_eq!(raw.await_close(), b"", "an unknown name of {len} bytes");
    }
    for name in [&b"di\0sk"[..], b"\xff\xfe"] {
        let mut raw = Raw::greeted(server.address());
        raw.option(opt::EXPORT_NAME, name);
        assert_eq!(raw.await_close(), b"");
    }
    for (name, size) in [("", MIB), ("disk", MIB), ("second", 2 * MIB)] {
        assert_eq!(Raw::enter(server.address(), Mode::Plain, name).size, size);
    }
}

#[test]
fn export_name_without_no_zeroes_is_followed_by_124_zeroes() {
    let dir = Dir::new();
    let server = server(&dir);
    // FIXED_NEWSTYLE only, and a client without flags.
    for flags in [1_u32, 0] {
        let mut raw = Raw::connect(server.address());
        raw.send(&flags.to_be_bytes());
        raw.option(opt::EXPORT_NAME, b"disk");
        assert_eq!(raw.receive(8), MIB.to_be_bytes());
        raw.receive(2);
        assert_eq!(raw.receive(124), [0; 124]);
        assert_eq!(raw.read(0, 512), [0; 512]);
    }
}

#[test]
fn abort_is_acknowledged_and_the_connection_ends() {
    let dir = Dir::new();
    let server = server(&dir);
    for data in [&b""[..], b"goodbye"] {
        let mut raw = Raw::greeted(server.address());
        assert_eq!(raw.ask_kind(opt::ABORT, data), rep::ACK);
        assert_eq!(raw.await_close(), b"");
    }
}

#[test]
fn info_and_go_in_every_order_and_with_differing_names() {
    let dir = Dir::new();
    let server = server(&dir);
    let names = ["", "disk", "second", "nosuch"];
    for a in names {
        for b in names {
            for option in [opt::INFO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
                let mut raw = Raw::greeted(server.address());
                raw.negotiate_structured();
                let data =
                    if option == opt::INFO { info_query(a, &[0, 1, 2, 3, 99]) } else { meta_query(a, &["base:"]) };
                let kind = raw.ask_kind(option, &data);
                assert_eq!(kind, if a == "nosuch" { rep::ERR_UNKNOWN } else { rep::ACK }, "{option} {a:?}");
                // A failed GO does not end the handshake.
                assert_eq!(raw.ask_kind(opt::GO, &info_query("nosuch", &[])), rep::ERR_UNKNOWN);
                check_in_step(&mut raw);
                if b == "nosuch" {
                    continue;
                }
                raw.go(b);
                assert_eq!(raw.size, if b == "second" { 2 * MIB } else { MIB }, "{a:?} then {b:?}");
                assert_eq!(raw.read(0, 512), [0; 512]);
            }
        }
    }
}

#[test]
fn info_then_go_return_the_same() {
    let dir = Dir::new();
    let server = server(&dir);
    let mut raw = Raw::greeted(server.address());
    let query = info_query("second", &[0, 1, 2, 3]);
    let info = raw.ask(opt::INFO, &query);
    assert_eq!(info, raw.ask(opt::GO, &query));
    let kinds: Vec<u8> = info.iter().filter(|reply| reply.0 == rep::INFO).map(|reply| reply.1[1]).collect();
    assert!(kinds.contains(&0) && kinds.contains(&3), "INFO_EXPORT and INFO_BLOCK_SIZE: {kinds:?}");
}

#[test]
fn meta_contexts_are_listed() {
    let dir = Dir::new();
    let server = server(&dir);
    let mut raw = Raw::greeted(server.address());
    raw.negotiate_structured();
    for (queries, count) in [
        (&[][..], 1),
        (&["base:"], 1),
        (&["base:allocation"], 1),
        (&["base:allocation", "base:allocation"], 1),
        (&["x-other:", "qemu:dirty-bitmap:b"], 0),
    ] {
        let replies = raw.ask(opt::LIST_META_CONTEXT, &meta_query("disk", queries));
        assert_eq!(replies.last().unwrap().0, rep::ACK, "{queries:?}");
        assert_eq!(replies.len(), count + 1, "{queries:?}: {replies:?}");
    }
    // SET without a query selects nothing, and replaces the previous selection.
    raw.negotiate_context("disk");
    assert_eq!(raw.ask(opt::SET_META_CONTEXT, &meta_query("disk", &[])), [(rep::ACK, vec![])]);
    raw.go("disk");
    let answer = raw.call(0, cmd::BLOCK_STATUS, 0, 4096, b"");
    assert_eq!(answer.error, errno::EINVAL, "BLOCK_STATUS without a context");
}

/// All bytes that a client sends until the transmission phase.
fn whole_handshake() -> Vec<u8> {
    [
        &3_u32.to_be_bytes()[..],
        &option_bytes(opt::STRUCTURED_REPLY, b""),
        &option_bytes(opt::SET_META_CONTEXT, &meta_query("disk", &["base:allocation"])),
        &option_bytes(opt::LIST, b""),
        &option_bytes(opt::GO, &info_query("disk", &[3])),
    ]
    .concat()
}

#[test]
fn a_client_may_disconnect_at_every_byte_of_the_handshake() {
    let dir = Dir::new();
    for server in [server(&dir), Nbdblk::tcp(&dir, &["disk:memory=1M", "second:memory=2M"])] {
        check_in_step(&mut Raw::greeted(server.address()));
        let fds = server.fds();
        let bytes = whole_handshake();
        for cut in 0..=bytes.len() {
            Raw::connect(server.address()).send(&bytes[..cut]);
        }
        check_in_step(&mut Raw::greeted(server.address()));
        nbdblk_tests::eventually("the descriptors are closed", || server.fds() <= fds);
        assert!(server.terminate().success());
    }
}

#[test]
fn clients_that_fail_in_every_way_leave_the_server_to_others() {
    let dir = Dir::new();
    let mut server = server(&dir);
    for n in 0..100_u32 {
        let mut raw = Raw::greeted(server.address());
        match n % 5 {
            0 => raw.option(opt::EXPORT_NAME, b"nosuch"),
            1 => assert_eq!(raw.ask_kind(opt::GO, &info_query("nosuch", &[])), rep::ERR_UNKNOWN),
            2 => raw.option(opt::GO, &info_query("disk", &[])),
            3 => raw.send(b"IHAVENOT"),
            _ => raw.option(n, &[0; 100]),
        }
    }
    assert!(server.is_alive());
    assert_eq!(Raw::enter(server.address(), Mode::Simple, "disk").read(0, 512), [0; 512]);
}

#[test]
fn a_handshake_byte_by_byte_is_a_handshake() {
    let dir = Dir::new();
    let server = server(&dir);
    let mut raw = Raw::connect(server.address());
    for byte in whole_handshake() {
        raw.send(&[byte]);
    }
    for option in [opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, opt::LIST, opt::GO] {
        assert_eq!(raw.replies(option).last().unwrap().0, rep::ACK);
    }
}

#[test]
fn two_hundred_clients_idle_in_every_phase_and_one_more_is_served() {
    let dir = Dir::new();
    let mut server = server(&dir);
    let address: &Address = server.address();
    let connections: Vec<Raw> = (0..200)
        .map(|n| match n % 4 {
            0 => Raw::connect(address),
            1 => Raw::greeted(address),
            2 => Raw::enter(address, Mode::Simple, "disk"),
            _ => Raw::enter(address, Mode::Structured, "second"),
        })
        .collect();
    let mut one_more = Raw::enter(address, Mode::Structured, "disk");
    one_more.write(0, &[7; 4096]);
    assert_eq!(one_more.read(0, 4096), [7; 4096]);
    assert!(server.is_alive());
    // With all of them still connected, the server ends.
    assert!(server.terminate().success());
    drop(connections);
}
