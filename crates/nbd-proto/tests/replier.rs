//! Headers of replies, byte by byte, and as a client parses them.

use nbd_proto::client::{Chunk, Decoder, Event};
use nbd_proto::limits::{EXTENTS_MAX, HEAD_MAX};
use nbd_proto::wire::{CommandKind, TransmissionFlags};
use nbd_proto::{BlockSizes, ContextSet, Cookie, Extent, Mode, Replier, Terms, WireError};

const C: Cookie = Cookie(0x0102_0304_0506_0708);
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn replier(mode: Mode) -> Replier {
    Replier::new(Terms {
        mode,
        flags: TransmissionFlags::HAS_FLAGS,
        size: 1 << 40,
        block: BlockSizes { min: 4096, ..BlockSizes::default() },
        enforce_alignment: false,
        contexts: ContextSet::EMPTY,
    })
}

#[track_caller]
fn check(expected: &str, put: impl FnOnce(&mut Vec<u8>)) {
    let mut out = Vec::new();
    put(&mut out);
    let found: String = out.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found, expected.replace(' ', ""));
}

#[test]
fn heads_of_reads() {
    let at = 0x1122_3344;
    check("67446698 00000000 0102030405060708", |out| replier(Mode::Simple).read_head(out, C, at, 512));
    check("668e33ef 0001 0001 0102030405060708 00000208 0000000011223344", |out| {
        replier(Mode::Structured).read_head(out, C, at, 512);
    });
    check("6e8a278c 0001 0001 0102030405060708 0000000011223344 0000000000000208 0000000011223344", |out| {
        replier(Mode::Extended).read_head(out, C, at, 512);
    });
    // Of no bytes: complete.
    check("67446698 00000000 0102030405060708", |out| replier(Mode::Simple).read_head(out, C, at, 0));
    check("668e33ef 0001 0000 0102030405060708 00000000", |out| replier(Mode::Structured).read_head(out, C, at, 0));
    check("6e8a278c 0001 0000 0102030405060708 0000000011223344 0000000000000000", |out| {
        replier(Mode::Extended).read_head(out, C, at, 0);
    });
}

#[test]
fn parts_of_reads() {
    check(
        "668e33ef 0000 0001 0102030405060708 00000208 0000000000000200
         668e33ef 0000 0002 0102030405060708 0000000c 0000000000000400 00000600
         668e33ef 0001 8002 0102030405060708 00000010 00000005 0002 6869 0000000000000a00"
            .replace('\n', "")
            .as_str(),
        |out| {
            let replier = replier(Mode::Structured);
            replier.data_chunk(out, C, 0x200, 0x200, 512, false);
            replier.hole_chunk(out, C, 0x200, 0x400, 0x600, false);
            replier.error_offset(out, C, 0x200, 0xa00, WireError::Io, "hi");
        },
    );
    check(
        "6e8a278c 0000 0002 0102030405060708 0000000000000200 000000000000000c 0000000000000400 00000600
         6e8a278c 0001 0001 0102030405060708 0000000000000200 0000000000000009 0000000000000a00"
            .replace('\n', "")
            .as_str(),
        |out| {
            let replier = replier(Mode::Extended);
            replier.hole_chunk(out, C, 0x200, 0x400, 0x600, false);
            replier.data_chunk(out, C, 0x200, 0xa00, 1, true);
        },
    );
}

#[test]
fn done_is_simple_where_it_may_be() {
    let none = "668e33ef 0001 0000 0102030405060708 00000000";
    let simple = "67446698 00000000 0102030405060708";
    let extended = "6e8a278c 0001 0000 0102030405060708 0000000000000200 0000000000000000";
    for kind in (0..8).map(CommandKind) {
        check(simple, |out| replier(Mode::Simple).done(out, C, 0x200, kind));
        let chunks = kind == CommandKind::READ || kind == CommandKind::BLOCK_STATUS;
        check(if chunks { none } else { simple }, |out| replier(Mode::Structured).done(out, C, 0x200, kind));
        check(extended, |out| replier(Mode::Extended).done(out, C, 0x200, kind));
    }
}

#[test]
fn errors_have_their_numbers() {
    use WireError::{Inval, Io, NoMem, NoSpc, NotSup, Overflow, Perm, Shutdown};
    for (error, code) in
        [(Perm, 1), (Io, 5), (NoMem, 12), (Inval, 22), (NoSpc, 28), (Overflow, 75), (NotSup, 95), (Shutdown, 108)]
    {
        assert_eq!((error.code(), WireError::from_code(code)), (code, Some(error)));
        check(&format!("67446698 {code:08x} 0102030405060708"), |out| {
            replier(Mode::Simple).error(out, C, 0, error, "no room for text");
        });
        check(&format!("668e33ef 0001 8001 0102030405060708 00000009 {code:08x} 0003 616263"), |out| {
            replier(Mode::Structured).error(out, C, 0, error, "abc");
        });
        check(
            &format!("6e8a278c 0001 8001 0102030405060708 0000000000000200 0000000000000006 {code:08x} 0000"),
            |out| replier(Mode::Extended).error(out, C, 0x200, error, ""),
        );
    }
    assert_eq!(WireError::from_code(0), None);
    assert_eq!(WireError::from_code(11), Some(Inval), "an unknown number counts as EINVAL");
}

/// CVE-2020-10761: a text that is longer than the protocol allows.
#[test]
fn texts_are_cut() {
    for (text, len) in
        [("x".repeat(5000), 4096), ("ä".repeat(3000), 4096), ("€".repeat(3000), 4095), ("a\0b".into(), 1)]
    {
        let mut out = Vec::new();
        replier(Mode::Structured).error(&mut out, C, 0, WireError::Io, &text);
        assert_eq!(out.len(), 20 + 6 + len);
        let event = Decoder::new(Mode::Structured).next(&mut out.as_slice()).unwrap().unwrap();
        let Event::Chunk { chunk: Chunk::Error { text: found, .. }, .. } = event else { panic!("{event:?}") };
        assert_eq!(found, text[..len]);
    }
}

fn status(mode: Mode, extents: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let extents = extents.iter().map(|&(len, flags)| Extent { len, flags });
    replier(mode).status(&mut out, C, 0, 9, extents, true);
    let mut input = out.as_slice();
    let event = Decoder::new(mode).next(&mut input).unwrap().unwrap();
    assert!(input.is_empty());
    let Event::Chunk { chunk: Chunk::Status { context: 9, extents }, done: true, cookie: C, .. } = event else {
        panic!()
    };
    extents.iter().map(|extent| (extent.len, extent.flags)).collect()
}

/// CVE-2025-47711, CVE-2025-47712: extents around 4 GiB. The cut one is a multiple of the minimum block, and the last.
#[test]
fn extents_around_4_gib() {
    let longest = 0xffff_f000;
    for (extents, structured) in [
        (vec![(4096, 3), (8192, 0)], vec![(4096, 3), (8192, 0)]),
        (vec![(longest, 1)], vec![(longest, 1)]),
        (vec![(longest + 4096, 1)], vec![(longest, 1)]),
        (vec![(u64::MAX, 3)], vec![(longest, 3)]),
        (vec![(4096, 0), (1 << 40, 3), (4096, 0)], vec![(4096, 0), (longest, 3)]),
        (vec![(4096, 0x1_0000_0002)], vec![(4096, 2)]),
        (vec![(0, 1), (4096, 2), (0, 3)], vec![(4096, 2)]),
    ] {
        assert_eq!(status(Mode::Structured, &extents), structured);
        let whole: Vec<_> = extents.into_iter().filter(|extent| extent.0 > 0).collect();
        assert_eq!(status(Mode::Extended, &whole), whole);
    }
}

#[test]
fn extents_are_limited() {
    let extents: Vec<_> = (0..EXTENTS_MAX as u64 + 5).map(|i| (512, i & 1)).collect();
    for mode in [Mode::Structured, Mode::Extended] {
        assert_eq!(status(mode, &extents).len(), EXTENTS_MAX);
    }
}

#[test]
fn a_header_is_at_most_head_max_long() {
    for mode in MODES {
        let mut out = Vec::new();
        replier(mode).read_head(&mut out, C, u64::MAX, u32::MAX - 8);
        assert!(out.len() <= HEAD_MAX);
    }
}
