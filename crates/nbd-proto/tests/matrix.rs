//! Every command, with every combination of flags, in every mode, on every kind of export. The receiver must agree with a small
//! oracle, which is written from the tables of the protocol, independently of the receiver.

mod common;

use nbd_proto::wire::{CommandFlags, CommandKind, TransmissionFlags};
use nbd_proto::{BlockSizes, Command, ContextSet, Cookie, Event, Mode, Receiver, Terms, WireError, client};

const SIZE: u64 = 1 << 20;
const AT: u64 = 4096;
const LEN: u64 = 20;

/// The required outcome of a request.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Accepted,
    Refused(u32),
    Gone,
}

/// One line for each rule, with the numbers of the specification.
fn oracle(kind: u16, flags: u16, mode: Mode, export: u16, contexts: bool) -> Fate {
    const EPERM: u32 = 1;
    const EINVAL: u32 = 22;
    let (fua, no_hole, df, req_one, fast, payload_len) = (1, 2, 4, 8, 16, 32);
    let has = |bit: u16| export & (1 << bit) != 0;
    let (extended, chunks) = (mode == Mode::Extended, mode != Mode::Simple);
    if kind == 2 {
        return Fate::Gone;
    }
    if kind >= 8 {
        return Fate::Refused(EINVAL);
    }
    let mut allowed = 0;
    if has(3) {
        allowed |= fua;
    }
    if kind == 0 && chunks && has(7) {
        allowed |= df;
    }
    if kind == 1 && extended {
        allowed |= payload_len;
    }
    if kind == 6 {
        allowed |= no_hole;
        if has(6) && has(11) {
            allowed |= fast;
        }
    }
    if kind == 7 {
        allowed |= req_one;
        if extended && contexts && has(12) {
            allowed |= payload_len;
        }
    }
    if flags & !allowed != 0 {
        return Fate::Refused(EINVAL);
    }
    if matches!(kind, 1 | 4 | 6) && has(1) {
        return Fate::Refused(EPERM);
    }
    let bit = [None, None, None, Some(2), Some(5), Some(10), Some(6), None][usize::from(kind)];
    if bit.is_some_and(|bit| !has(bit)) {
        return Fate::Refused(EINVAL);
    }
    if kind == 7 && !(contexts && chunks) {
        return Fate::Refused(EINVAL);
    }
    Fate::Accepted
}

fn terms(mode: Mode, export: u16, contexts: bool) -> Terms {
    Terms {
        mode,
        flags: TransmissionFlags(export),
        size: SIZE,
        block: BlockSizes::default(),
        enforce_alignment: false,
        contexts: if contexts { [0, 1, 5].into_iter().collect() } else { ContextSet::EMPTY },
    }
}

#[test]
fn every_command_flag_mode_and_export() {
    let mut rows = 0;
    // Each flag of an export removed in turn, all set, none set; each of these read-only too.
    let mut exports = vec![0x1ffd, 0x0001];
    exports.extend((2..13).map(|bit| 0x1ffd & !(1 << bit)));
    exports.extend((2..13).map(|bit| 0x0001 | 1 << bit));
    let read_only: Vec<u16> = exports.iter().map(|export| export | 2).collect();
    exports.extend(read_only);
    let flags: Vec<u16> = (0..64).chain([64, 65, 0x8000, 0xffff]).collect();
    let kinds: Vec<u16> = (0..10).chain([11, 255, 256, 0x7fff, 0xffff]).collect();
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        for contexts in [false, true] {
            for &export in &exports {
                for &kind in &kinds {
                    for &flags in &flags {
                        check(mode, export, contexts, kind, flags);
                        rows += 1;
                    }
                }
            }
        }
    }
    assert_eq!(rows, 3 * 2 * 48 * 15 * 68);
}

/// Sends the request, its payload if any, and a FLUSH. The FLUSH must be parsed whatever the outcome of the request.
fn check(mode: Mode, export: u16, contexts: bool, kind: u16, flags: u16) {
    let row = || format!("{mode:?} export {export:04x} contexts {contexts} command {kind} flags {flags:02x}");
    let terms = terms(mode, export, contexts);
    let mut stream = Vec::new();
    let encoder = client::Encoder::new(mode);
    encoder.request(&mut stream, Cookie(7), CommandKind(kind), CommandFlags(flags), AT, LEN);
    if kind == 1 || (mode == Mode::Extended && flags & 32 != 0) {
        // 512 bytes, and the contexts 1, 0 and 5.
        stream.extend_from_slice(&512u64.to_be_bytes());
        for id in [1u32, 0, 5] {
            stream.extend_from_slice(&id.to_be_bytes());
        }
    }
    encoder.flush(&mut stream, Cookie(8));
    let mut input = stream.as_slice();
    let mut receiver = Receiver::new(terms);
    let event = receiver.next(&mut input).unwrap().expect("the request is whole");
    let fate = match event {
        Event::Command(Cookie(7), command) => {
            assert_eq!(command.at(), AT, "{}", row());
            right_command(command, kind, flags, mode);
            Fate::Accepted
        }
        Event::Write(Cookie(7), write) => {
            assert_eq!((write.at, u64::from(write.len), write.fua), (AT, LEN, flags & 1 != 0), "{}", row());
            let Some(Event::Payload(bytes)) = receiver.next(&mut input).unwrap() else { panic!("{}", row()) };
            assert_eq!(bytes.len() as u64, LEN, "{}", row());
            Fate::Accepted
        }
        Event::Reject(Cookie(7), rejection) => {
            assert_eq!((rejection.kind.0, rejection.at), (kind, AT), "{}", row());
            assert!(!rejection.text.is_empty());
            Fate::Refused(rejection.error.code())
        }
        Event::Disconnect => Fate::Gone,
        other => panic!("{}: {other:?}", row()),
    };
    assert_eq!(fate, oracle(kind, flags, mode, export, contexts), "{}", row());
    if fate == Fate::Gone {
        assert_eq!(receiver.next(&mut input), Ok(None));
        return;
    }
    match receiver.next(&mut input).unwrap() {
        Some(Event::Command(Cookie(8), Command::Flush { at: 0 })) => assert!(export & 4 != 0, "{}", row()),
        Some(Event::Reject(Cookie(8), rejection)) => {
            assert!(
                rejection.kind == CommandKind::FLUSH && rejection.error == WireError::Inval && export & 4 == 0,
                "{}",
                row()
            );
        }
        other => panic!("{}: out of step, {other:?}", row()),
    }
    assert!(input.is_empty() && receiver.is_idle(), "{}", row());
}

/// An accepted command has the fields of the request.
fn right_command(command: Command, kind: u16, flags: u16, mode: Mode) {
    let is = |bit: u16| flags & bit != 0;
    let expected = match kind {
        0 => Command::Read { at: AT, len: 20, df: is(4) },
        3 => Command::Flush { at: AT },
        4 => Command::Trim { at: AT, len: LEN, fua: is(1) },
        5 => Command::Cache { at: AT, len: LEN },
        6 => Command::Zero { at: AT, len: LEN, unmap: !is(2), fast: is(16), fua: is(1) },
        7 => Command::Status {
            at: AT,
            len: if mode == Mode::Extended && is(32) { 512 } else { LEN },
            one: is(8),
            contexts: [0, 1, 5].into_iter().collect(),
        },
        other => panic!("command {other} was accepted"),
    };
    assert_eq!(command, expected);
    assert_eq!(command.kind().0, kind);
}

/// Ranges around the end of the export and around the largest numbers, for every command that has a range.
#[test]
fn every_range() {
    let edges = |n: u64| [n.wrapping_sub(1), n, n.wrapping_add(1)];
    let numbers: Vec<u64> =
        [0, 512, SIZE, 1 << 31, 1 << 32, 1 << 63, 0u64.wrapping_sub(1)].into_iter().flat_map(edges).collect();
    for kind in [0, 1, 4, 5, 6, 7] {
        for &at in &numbers {
            for &len in &numbers {
                let payload = kind == 1;
                let mut receiver = Receiver::new(terms(Mode::Extended, 0x1ffd, true));
                let mut stream = Vec::new();
                let flags = CommandFlags(if payload { 32 } else { 0 });
                client::Encoder::new(Mode::Extended).request(&mut stream, Cookie(1), CommandKind(kind), flags, at, len);
                if payload && len > 64 << 20 {
                    assert!(receiver.next(&mut stream.as_slice()).is_err(), "a payload of {len}");
                    continue;
                }
                stream.resize(stream.len() + if payload { len as usize } else { 0 }, 0);
                // Wide enough that nothing can wrap.
                let inside = u128::from(at) + u128::from(len) <= u128::from(SIZE);
                let expected = match kind {
                    1 | 6 if !inside => Some(WireError::NoSpc),
                    _ if !inside => Some(WireError::Inval),
                    7 if len == 0 => Some(WireError::Inval),
                    _ => None,
                };
                let found = match receiver.next(&mut stream.as_slice()).unwrap() {
                    Some(Event::Reject(_, rejection)) => Some(rejection.error),
                    Some(_) => None,
                    None => panic!("no event"),
                };
                assert_eq!(found, expected, "command {kind} at {at:#x} len {len:#x}");
            }
        }
    }
}

#[test]
fn alignment_is_enforced_only_when_asked() {
    for enforce_alignment in [false, true] {
        let block = BlockSizes { min: 512, ..BlockSizes::default() };
        let terms = Terms { block, enforce_alignment, ..terms(Mode::Simple, 0x1ffd, false) };
        for (at, len) in [(0, 512), (512, 1024), (1, 512), (0, 511), (256, 256), (0, 0)] {
            for kind in [CommandKind::READ, CommandKind::TRIM, CommandKind::WRITE_ZEROES, CommandKind::CACHE] {
                let mut stream = Vec::new();
                client::Encoder::new(Mode::Simple).request(&mut stream, Cookie(1), kind, CommandFlags::NONE, at, len);
                let event = Receiver::new(terms).next(&mut stream.as_slice()).unwrap().unwrap();
                let refused = matches!(event, Event::Reject(_, rejection) if rejection.error == WireError::Inval);
                assert_eq!(refused, enforce_alignment && (at % 512 != 0 || len % 512 != 0), "{kind} at {at} len {len}");
            }
        }
    }
}
