//! Payloads: exactly the bytes of a WRITE leave the stream, whatever happens to the request; and no case needs memory.

mod common;

use common::{ALL, SIZE, Seed};
use nbd_proto::client::Encoder;
use nbd_proto::wire::{CommandKind, TransmissionFlags};
use nbd_proto::{BlockSizes, Command, ContextSet, Cookie, Event, Fatal, Mode, Receiver, Rejection, Terms, WireError};

fn terms() -> Terms {
    Terms {
        mode: Mode::Simple,
        flags: ALL,
        size: SIZE,
        block: BlockSizes { min: 512, preferred: 4096, payload_max: 1 << 16 },
        enforce_alignment: false,
        contexts: ContextSet::EMPTY,
    }
}

/// A WRITE of `len` bytes, and a FLUSH.
fn write_and_flush(at: u64, len: u32) -> Vec<u8> {
    let encoder = Encoder::new(Mode::Simple);
    let mut stream = Vec::new();
    encoder.write_head(&mut stream, Cookie(1), at, len, false);
    stream.resize(stream.len() + len as usize, 0xee);
    encoder.flush(&mut stream, Cookie(2));
    stream
}

const FLUSH: Event<'_> = Event::Command(Cookie(2), Command::Flush { at: 0 });

/// Other servers disconnect at 33 MiB, or lose step. Here 33 MiB and 64 MiB get an error, in step.
#[test]
fn a_refused_write_is_swallowed_in_step() {
    let too_long = "write longer than the maximum payload";
    for (at, len, error, text) in [
        (0, (1 << 16) + 1, WireError::Inval, too_long),
        (SIZE, 1, WireError::NoSpc, "range ends past the export"),
        (u64::MAX, 512, WireError::NoSpc, "range ends past the export"),
        (0, 33 << 20, WireError::NoSpc, "range ends past the export"),
        (0, 64 << 20, WireError::NoSpc, "range ends past the export"),
    ] {
        let stream = write_and_flush(at, len);
        for step in [stream.len(), 1 << 16, if len > 1 << 20 { 1_000_003 } else { 1009 }] {
            let mut receiver = Receiver::new(terms());
            let mut seen = Vec::new();
            for mut piece in stream.chunks(step) {
                while let Some(event) = receiver.next(&mut piece).unwrap() {
                    assert!(!matches!(event, Event::Payload(_)), "this payload is discarded");
                    seen.push(format!("{event:?}"));
                }
                assert!(piece.is_empty());
            }
            let rejection = Rejection { kind: CommandKind::WRITE, at, error, text };
            assert_eq!(seen, [format!("{:?}", Event::Reject(Cookie(1), rejection)), format!("{FLUSH:?}")]);
        }
    }
}

#[test]
fn a_huge_payload_ends_the_connection() {
    for (len, payload_max, fatal) in [
        ((64 << 20) + 1, 1 << 16, true),
        (u32::MAX, 1 << 16, true),
        (u32::MAX, u32::MAX, false),
        (65 << 20, 65 << 20, false),
    ] {
        let block = BlockSizes { payload_max, ..BlockSizes::default() };
        let mut head = Vec::new();
        Encoder::new(Mode::Simple).write_head(&mut head, Cookie(1), 0, len, false);
        let outcome = Receiver::new(Terms { block, size: 1 << 40, ..terms() }).next(&mut head.as_slice());
        match fatal {
            true => assert_eq!(outcome, Err(Fatal::PayloadLength(len.into()))),
            false => assert!(matches!(outcome, Ok(Some(Event::Write(Cookie(1), write))) if write.len == len)),
        }
    }
}

/// A READ of 4 GiB less a byte from a server without a limit: its length would not fit one structured chunk.
#[test]
fn a_read_fits_one_chunk() {
    let block = BlockSizes { payload_max: u32::MAX, ..BlockSizes::default() };
    for (len, fits) in [(u32::MAX - 8, true), (u32::MAX - 7, false), (u32::MAX, false)] {
        let terms = Terms { block, size: 1 << 40, mode: Mode::Structured, ..terms() };
        let mut head = Vec::new();
        Encoder::new(Mode::Structured).read(&mut head, Cookie(1), 0, len);
        let event = Receiver::new(terms).next(&mut head.as_slice()).unwrap().unwrap();
        assert_eq!(matches!(event, Event::Command(..)), fits, "{len}");
        if fits {
            nbd_proto::Replier::new(terms).read_head(&mut head, Cookie(1), 0, len);
        }
    }
}

/// Part of the payload arrives with the header; the caller receives the rest directly.
#[test]
fn the_rest_of_a_payload_may_be_received_directly() {
    let stream = write_and_flush(0, 1000);
    for ridden in 0..=1000 {
        let mut receiver = Receiver::new(terms());
        let mut input = &stream[..28 + ridden];
        assert!(matches!(receiver.next(&mut input), Ok(Some(Event::Write(..)))));
        if ridden > 0 {
            assert_eq!(receiver.next(&mut input), Ok(Some(Event::Payload(&stream[28..28 + ridden]))));
        }
        assert_eq!(receiver.next(&mut input), Ok(None), "and nothing happens without bytes");
        assert_eq!(receiver.payload_left() as usize, 1000 - ridden);
        // In two pieces, the second of which may be empty.
        let left = receiver.payload_left();
        receiver.payload_placed(left / 3);
        assert_eq!(receiver.payload_left(), left - left / 3);
        receiver.payload_placed(left - left / 3);
        assert_eq!(receiver.payload_left(), 0);
        assert_eq!(receiver.next(&mut &stream[1028..]), Ok(Some(FLUSH)));
        assert!(receiver.is_idle());
    }
}

/// The owner may abandon a WRITE at any time. The receiver discards the rest, and reports the error if the owner wants that.
#[test]
fn a_write_may_be_abandoned() {
    for len in [0u32, 1, 2, 1000] {
        let stream = write_and_flush(512, len);
        for taken in 0..=len as usize {
            for reject in [false, true] {
                let mut receiver = Receiver::new(terms());
                let mut input = &stream[..28 + taken];
                assert!(matches!(receiver.next(&mut input), Ok(Some(Event::Write(..)))));
                if taken > 0 {
                    assert!(matches!(receiver.next(&mut input), Ok(Some(Event::Payload(_)))));
                }
                match reject {
                    true => receiver.reject_payload(WireError::NoSpc, "full"),
                    false => receiver.skip_payload(),
                }
                assert_eq!(receiver.payload_left(), 0);
                let mut rest = &stream[28 + taken..];
                if reject {
                    let rejection =
                        Rejection { kind: CommandKind::WRITE, at: 512, error: WireError::NoSpc, text: "full" };
                    assert_eq!(receiver.next(&mut rest), Ok(Some(Event::Reject(Cookie(1), rejection))));
                    assert_eq!(rest.len(), 28, "reported after the payload");
                }
                assert_eq!(receiver.next(&mut rest), Ok(Some(FLUSH)));
                assert_eq!(receiver.next(&mut rest), Ok(None));
            }
        }
    }
}

#[test]
#[should_panic(expected = "2 bytes were placed of a payload of 1")]
fn more_cannot_be_placed_than_is_left() {
    let stream = write_and_flush(0, 1);
    let mut receiver = Receiver::new(terms());
    receiver.next(&mut &stream[..28]).unwrap();
    receiver.payload_placed(2);
}

#[test]
fn the_size_may_change() {
    let mut receiver = Receiver::new(terms());
    let read = |receiver: &mut Receiver, at| {
        let mut head = Vec::new();
        Encoder::new(Mode::Simple).read(&mut head, Cookie(1), at, 512);
        matches!(receiver.next(&mut head.as_slice()), Ok(Some(Event::Command(..))))
    };
    assert!(!read(&mut receiver, SIZE));
    receiver.set_size(SIZE + 512);
    assert!(read(&mut receiver, SIZE));
    receiver.set_size(SIZE);
    assert!(!read(&mut receiver, SIZE));
    receiver.set_size(0);
    assert!(!read(&mut receiver, 0));
}

#[test]
fn nothing_comes_after_disc() {
    let encoder = Encoder::new(Mode::Simple);
    let mut stream = Vec::new();
    encoder.disconnect(&mut stream, Cookie(9));
    encoder.flush(&mut stream, Cookie(2));
    let mut receiver = Receiver::new(terms());
    let mut input = stream.as_slice();
    assert_eq!(receiver.next(&mut input), Ok(Some(Event::Disconnect)));
    for _ in 0..3 {
        assert_eq!(receiver.next(&mut input), Ok(None));
        assert_eq!(input.len(), 28, "and nothing is taken");
    }
    assert!(receiver.is_idle());
}

/// Flags that the mode does not allow are removed, whatever the owner set.
#[test]
fn flags_depend_on_the_mode() {
    use TransmissionFlags as Flag;
    let told = |mode, flags: Flag, contexts: &[u32]| {
        Terms { mode, flags, contexts: contexts.iter().copied().collect(), ..terms() }.told().flags
    };
    let all = Flag::KNOWN;
    assert_eq!(
        told(Mode::Simple, all, &[0]),
        all.without(Flag::SEND_DF).without(Flag::SEND_RESIZE).without(Flag::BLOCK_STATUS_PAYLOAD)
    );
    assert_eq!(told(Mode::Structured, all, &[0]), all.without(Flag::SEND_RESIZE).without(Flag::BLOCK_STATUS_PAYLOAD));
    assert_eq!(told(Mode::Extended, all, &[]), all.without(Flag::SEND_RESIZE).without(Flag::BLOCK_STATUS_PAYLOAD));
    assert_eq!(told(Mode::Extended, all, &[0]), all.without(Flag::SEND_RESIZE));
    assert_eq!(told(Mode::Simple, Flag::SEND_FAST_ZERO, &[]), Flag::HAS_FLAGS);
    assert!(
        Terms { contexts: [1].into_iter().collect(), ..terms() }.told().contexts.is_empty(),
        "no status in simple replies"
    );
}

/// Events until the input is used up. Payload is counted, because its pieces depend on the input's.
fn drain(receiver: &mut Receiver, mut input: &[u8], events: &mut Vec<String>, payload: &mut usize) {
    while let Some(event) = receiver.next(&mut input).unwrap() {
        match event {
            Event::Payload(bytes) => *payload += bytes.len(),
            event => events.push(format!("{event:?}")),
        }
    }
}

/// Wherever a decoder stops, another one that continues at its position gives the same events.
#[test]
fn another_decoder_continues_at_any_position() {
    let contexts: ContextSet = [0, 1].into_iter().collect();
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let (encoder, mut stream) = (Encoder::new(mode), Vec::new());
        encoder.read(&mut stream, Cookie(1), 512, 512);
        for (at, len) in [(0, 40), (SIZE, 30), (0, (1 << 16) + 1)] {
            encoder.write_head(&mut stream, Cookie(at + u64::from(len)), at, len, false);
            stream.resize(stream.len() + len as usize, 3);
        }
        if mode == Mode::Extended {
            for (cookie, ids) in [(5, &[1][..]), (6, &[0, 1]), (7, &[0, 9, 1]), (8, &[1, 1, 0])] {
                encoder.status_of(&mut stream, Cookie(cookie), 512, 4096, cookie % 2 == 0, ids);
            }
        }
        encoder.flush(&mut stream, Cookie(2));
        encoder.disconnect(&mut stream, Cookie(4));
        let terms = Terms { mode, contexts, ..terms() };
        let (mut expected, mut bytes) = (Vec::new(), 0);
        drain(&mut Receiver::new(terms), &stream, &mut expected, &mut bytes);
        assert!(bytes == 40 && expected.len() > 5, "{expected:?}");
        for cut in 0..=stream.len() {
            let (mut events, mut payload) = (Vec::new(), 0);
            let mut first = Receiver::new(terms);
            drain(&mut first, &stream[..cut], &mut events, &mut payload);
            if first.payload_left() > 0 {
                continue;
            }
            let position = first.position();
            let mut second = Receiver::continued(terms, &position);
            drain(&mut second, &position.taken, &mut events, &mut payload);
            assert_eq!(second.position(), position, "nothing is lost if it stops again");
            drain(&mut second, &stream[cut..], &mut events, &mut payload);
            assert_eq!((events, payload), (expected.clone(), bytes), "{mode:?}, after {cut} bytes");
        }
    }
}

/// A long stream of random requests from seeds, in random pieces, gives the same events as the whole stream.
#[test]
fn random_streams_are_cut_at_random() {
    for seed in 0..30 {
        let mut seed = Seed(seed);
        let mut data = vec![seed.next() as u8, seed.next() as u8];
        let encoder =
            Encoder::new([Mode::Simple, Mode::Structured, Mode::Extended, Mode::Extended][usize::from(data[0] & 3)]);
        for _ in 0..100 {
            let kind = CommandKind([0, 1, 1, 3, 4, 5, 6, 7, 7, 8, 0xffff][seed.below(11) as usize]);
            let flags = nbd_proto::wire::CommandFlags(if seed.chance(2) { 32 } else { seed.below(64) as u16 });
            let (at, len) =
                (seed.below(SIZE + 100), [0, 8, 12, 20, 512, seed.below(3000), 70_000][seed.below(7) as usize]);
            encoder.request(&mut data, Cookie(seed.next()), kind, flags, at, len);
            if kind == CommandKind::WRITE || (data[0] & 2 != 0 && flags.0 & 32 != 0) {
                data.extend((0..len).map(|i| if i < 12 { 0 } else { 3 }));
            }
        }
        common::bodies::receiver(&data);
    }
}
