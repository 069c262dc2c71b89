//! The client's half against servers that break the protocol: it says so, and never panics or gathers more than it may.

mod common;

use common::{Server, option};
use nbd_proto::client::{Answer, Ask, Decoder, Failure, Handshake, Negotiation, Step, Wish};
use nbd_proto::wire::{InfoKind, Rep};
use nbd_proto::{Fatal, Mode, Offer, Tls};

fn hex(text: &str) -> Vec<u8> {
    let text: String = text.split_whitespace().collect();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn replies_that_cannot_be() {
    let structured = Mode::Structured;
    let extended = Mode::Extended;
    for (mode, reply, what) in [
        (Mode::Simple, "67446699 00000000 0000000000000001", "a reply with another magic"),
        (Mode::Simple, "668e33ef 0001 0000 0000000000000001 00000000", "a reply with another magic"),
        (
            extended,
            "67446698 00000000 0000000000000001 00000000 00000000 00000000 00000000",
            "a reply with another magic",
        ),
        (structured, "668e33ef 0000 0000 0000000000000001 00000000", "a malformed chunk"), // NONE without DONE
        (structured, "668e33ef 0001 0000 0000000000000001 00000001", "a malformed chunk"), // NONE with data
        (structured, "668e33ef 0001 0001 0000000000000001 00000008", "a malformed chunk"), // data of 0 bytes
        (structured, "668e33ef 0001 0001 0000000000000001 00000000", "a malformed chunk"),
        (structured, "668e33ef 0001 0002 0000000000000001 0000000d", "a malformed chunk"), // a hole of a wrong length
        (structured, "668e33ef 0001 0002 0000000000000001 0000000c 0000000000000000 00000000", "a malformed chunk"),
        (structured, "668e33ef 0001 0005 0000000000000001 00000004", "a malformed chunk"), // no extent
        (structured, "668e33ef 0001 0005 0000000000000001 0000000d", "a malformed chunk"),
        (structured, "668e33ef 0001 0005 0000000000000001 0000000c 00000000 00000000 00000000", "a malformed chunk"),
        (structured, "668e33ef 0001 0005 0000000000000001 fffffffc", "a malformed chunk"), // more than is gathered
        (structured, "668e33ef 0001 0006 0000000000000001 00000018", "a malformed chunk"), // only with extended headers
        (structured, "668e33ef 0001 8001 0000000000000001 00000005", "a malformed chunk"),
        (structured, "668e33ef 0001 8001 0000000000000001 00000006 00000000 0000", "a malformed chunk"), // no error
        (structured, "668e33ef 0001 8001 0000000000000001 00000007 00000005 0000 00", "a malformed chunk"), // left over
        (structured, "668e33ef 0001 8001 0000000000000001 00000006 00000005 0001", "a malformed chunk"), // text too long
        (structured, "668e33ef 0001 8002 0000000000000001 00000006 00000005 0000", "a malformed chunk"), // no offset
        (structured, "668e33ef 0001 8001 0000000000000001 00010001", "a malformed chunk"),
        (structured, "668e33ef 0001 0003 0000000000000001 00000000", "a chunk of an unknown kind"),
        (extended, "6e8a278c 0001 0005 0000000000000001 0000000000000000 000000000000000c", "a malformed chunk"),
        (
            extended,
            "6e8a278c 0001 0001 0000000000000001 0000000000000000 0000000100000008 0000000000000000",
            "a malformed chunk",
        ),
        (
            extended, // a count that is not that of the extents
            "6e8a278c 0001 0006 0000000000000001 0000000000000000 0000000000000018 00000001 00000002 0000000000000001 00*8",
            "a malformed chunk",
        ),
    ] {
        let bytes = hex(&reply.replace("00*8", "0000000000000000"));
        let outcome = Decoder::new(mode).next(&mut bytes.as_slice());
        assert!(matches!(outcome, Err(Fatal::Server(said, _)) if said == what), "{reply}: {outcome:?}");
    }
}

#[test]
fn an_unknown_error_is_an_error() {
    use nbd_proto::client::{Chunk, Event};
    let bytes = hex("668e33ef 0001 8777 0000000000000001 00000009 000000ff 0001 78 0000");
    let event = Decoder::new(Mode::Structured).next(&mut bytes.as_slice()).unwrap().unwrap();
    let Event::Chunk { chunk: Chunk::Error { error, text, at: None }, .. } = event else { panic!("{event:?}") };
    assert_eq!((error, text.as_str()), (nbd_proto::WireError::Inval, "x"));
}

#[test]
fn greetings() {
    for (greeting, what) in [
        ("4e42444d41474944 49484156454f5054 0003", "a greeting that is not NBD's"),
        ("4e42444d41474943 0000420281861253 0000", "an oldstyle greeting"),
        ("4e42444d41474943 1111111111111111 0000", "a greeting of an unknown style"),
    ] {
        let outcome = Handshake::new().next(&mut hex(greeting).as_slice(), &mut Vec::new());
        assert!(matches!(outcome, Err(Fatal::Server(said, _)) if said == what), "{greeting}: {outcome:?}");
    }
    // Only what is offered is taken.
    for flags in 0..4u8 {
        let (mut handshake, mut out) = (Handshake::new(), Vec::new());
        let greeting = [b"NBDMAGICIHAVEOPT".as_slice(), &[0xff, 0xfc | flags]].concat();
        assert!(matches!(handshake.next(&mut greeting.as_slice(), &mut out), Ok(Some(Answer::Greeted(_)))));
        assert_eq!(out, [0, 0, 0, flags]);
    }
}

#[test]
fn answers_that_cannot_be() {
    let magic = "0003e889045565a9";
    for (reply, what) in [
        ("0003e889045565aa 00000003 00000001 00000000".to_owned(), "an option reply with another magic"),
        (format!("{magic} 00000004 00000001 00000000"), "a reply to another option"),
        (format!("{magic} 00000003 00000001 00010001"), "an option reply that is too long"),
        (format!("{magic} 00000003 00000001 ffffffff"), "an option reply that is too long"),
        (format!("{magic} 00000003 00000001 00000001 00"), "a malformed option reply"),
        (format!("{magic} 00000003 00000009 00000000"), "a malformed option reply"),
        (format!("{magic} 00000003 00000002 00000004 00000001"), "a malformed option reply"),
        (format!("{magic} 00000003 00000002 00000006 00000002 00ff"), "a malformed option reply"),
        (format!("{magic} 00000003 00000003 00000001 00"), "a malformed option reply"),
        (format!("{magic} 00000003 00000003 0000000b 0000 00000000 00000000 00"), "a malformed option reply"),
        (format!("{magic} 00000003 00000004 00000003 000000"), "a malformed option reply"),
    ] {
        let (mut handshake, mut out) = (Handshake::new(), Vec::new());
        handshake.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
        handshake.ask(Ask::List, &mut out);
        let outcome = handshake.next(&mut hex(&reply).as_slice(), &mut out);
        assert!(matches!(outcome, Err(Fatal::Server(said, _)) if said == what), "{reply}: {outcome:?}");
    }
}

/// What the questions look like, against the bytes that the server's tests send.
#[test]
fn questions() {
    let kinds = [InfoKind::NAME, InfoKind::BLOCK_SIZE];
    for (ask, expected) in [
        (Ask::Abort, option(2, &[])),
        (Ask::List, option(3, &[])),
        (Ask::StartTls, option(5, &[])),
        (Ask::Info { name: "", kinds: &[] }, option(6, &[0; 6])),
        (Ask::Go { name: "ab", kinds: &kinds }, option(7, b"\0\0\0\x02ab\0\x02\0\x01\0\x03")),
        (Ask::StructuredReply, option(8, &[])),
        (Ask::ListContexts { name: "x", queries: &[] }, option(9, b"\0\0\0\x01x\0\0\0\0")),
        (
            Ask::SetContexts { name: "", queries: &["a:", "b:c"] },
            option(10, b"\0\0\0\0\0\0\0\x02\0\0\0\x02a:\0\0\0\x03b:c"),
        ),
        (Ask::ExtendedHeaders, option(11, &[])),
        (Ask::ExportName("disk"), option(1, b"disk")),
    ] {
        let (mut handshake, mut out) = (Handshake::new(), Vec::new());
        handshake.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
        out.clear();
        handshake.ask(ask, &mut out);
        assert_eq!(out, expected, "{ask:?}");
    }
}

/// Runs a course against the server.
fn course(wish: Wish, offer: Offer) -> Result<Step, Failure> {
    let (mut server, mut course, mut out) = (Server::new(offer), Negotiation::new(wish), Vec::new());
    for _ in 0..20 {
        match course.next(&mut std::mem::take(&mut server.out).as_slice(), &mut out)? {
            Step::More => {}
            Step::StartTls(upgrade) => {
                assert_eq!(out, [], "nothing is to be sent before TLS");
                server.secure();
                course = upgrade.resume(&mut out);
            }
            done @ Step::Done(_) => return Ok(done),
        }
        server.feed(&std::mem::take(&mut out));
    }
    panic!("the course has an end: {:?}", server.log);
}

#[test]
fn a_course_fails_in_words() {
    let wish = |name: &str, tls| Wish { name: name.into(), mode: Mode::Extended, contexts: Vec::new(), tls };
    for (wish, tls, text) in [
        (wish("nope", false), Tls::Off, "server refused GO with ERR_UNKNOWN: no export named \"nope\""),
        (wish("late", false), Tls::Off, "server refused GO with ERR_SHUTDOWN: going away"),
        (wish("disk", true), Tls::Off, "server refused STARTTLS with ERR_POLICY: TLS is not configured"),
        (wish("disk", false), Tls::Required, "server refused GO with ERR_TLS_REQD: TLS must be started first"),
        (wish("tls", false), Tls::Optional, "server refused GO with ERR_TLS_REQD: this export is only served over TLS"),
    ] {
        assert_eq!(course(wish, Offer { tls, ..Offer::default() }).unwrap_err().to_string(), text);
    }
}

/// Plain text that was put behind the server's answer to STARTTLS by somebody in the middle.
#[test]
fn plain_text_after_starttls_is_refused() {
    let mut course = Negotiation::new(Wish { tls: true, ..Wish::default() });
    let mut out = Vec::new();
    course.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
    let ack = hex("0003e889045565a9 00000005 00000001 00000000");
    let outcome = course.next(&mut [ack.as_slice(), b"x"].concat().as_slice(), &mut out);
    assert!(matches!(outcome, Err(Failure::Fatal(Fatal::Server("plain text after the answer to STARTTLS", _)))));
}

/// What comes after STARTTLS cannot be sent in plain text: the caller does not have it.
#[test]
fn nothing_is_asked_between_starttls_and_tls() {
    let mut course = Negotiation::new(Wish { tls: true, ..Wish::default() });
    let mut out = Vec::new();
    course.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
    out.clear();
    let ack = hex("0003e889045565a9 00000005 00000001 00000000");
    let Ok(Step::StartTls(upgrade)) = course.next(&mut ack.as_slice(), &mut out) else { panic!("TLS begins") };
    assert_eq!(out, []);
    for mut said in [b"".as_slice(), b"NBDMAGICIHAVEOPT\0\x03"] {
        assert!(matches!(course.next(&mut said, &mut out), Err(Failure::NotResumed)));
        assert_eq!(out, []);
    }
    let mut course = upgrade.resume(&mut out);
    assert_eq!(out, option(7, b"\0\0\0\0\0\x03\0\x01\0\x02\0\x03"));
    assert!(matches!(course.next(&mut b"".as_slice(), &mut out), Ok(Step::More)));
}

/// A server that selects contexts without end, or one twice, is stopped.
#[test]
fn the_number_of_contexts_is_bounded() {
    for (same, last, what) in [(true, 1, "two contexts with one id"), (false, 256, "too many contexts")] {
        let contexts = vec!["x-test:".to_owned()];
        let mut course = Negotiation::new(Wish { mode: Mode::Structured, contexts, ..Wish::default() });
        let mut out = Vec::new();
        course.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
        let ack = hex("0003e889045565a9 00000008 00000001 00000000");
        course.next(&mut ack.as_slice(), &mut out).unwrap();
        for n in 0..=last {
            let id = if same { 7 } else { n };
            let context = hex(&format!("0003e889045565a9 0000000a 00000004 00000005 {id:08x} 78"));
            let outcome = course.next(&mut context.as_slice(), &mut out);
            if n < last {
                assert!(matches!(outcome, Ok(Step::More)), "{outcome:?}");
            } else {
                assert!(matches!(outcome, Err(Failure::Fatal(Fatal::Server(said, _))) if said == what), "{outcome:?}");
            }
        }
    }
}

/// Servers without GO, and without fixed newstyle.
#[test]
fn older_servers() {
    let mut course = Negotiation::new(Wish { name: "disk".into(), ..Wish::default() });
    let mut out = Vec::new();
    course.next(&mut b"NBDMAGICIHAVEOPT\0\x01".as_slice(), &mut out).unwrap();
    out.clear();
    course.next(&mut hex("0003e889045565a9 00000007 80000001 00000000").as_slice(), &mut out).unwrap();
    assert_eq!(out, option(1, b"disk"));
    // This one did not offer NO_ZEROES.
    let mut answer = hex("0000000000100000 0001");
    answer.resize(10 + 124, 0);
    let Ok(Step::Done(agreed)) = course.next(&mut answer.as_slice(), &mut out) else { panic!("no export") };
    assert_eq!((agreed.terms.size, agreed.terms.mode), (1 << 20, Mode::Simple));

    let wish = |tls| Wish { name: "disk".into(), tls, ..Wish::default() };
    let mut course = Negotiation::new(wish(false));
    out.clear();
    course.next(&mut b"NBDMAGICIHAVEOPT\0\0".as_slice(), &mut out).unwrap();
    assert_eq!(out, [[0; 4].as_slice(), &option(1, b"disk")].concat());
    // CVE-2019-14842: no TLS, no service.
    let outcome = Negotiation::new(wish(true)).next(&mut b"NBDMAGICIHAVEOPT\0\0".as_slice(), &mut out);
    assert!(matches!(outcome, Err(Failure::Refused(_, refusal)) if refusal.code == Rep::ERR_UNSUP));
}

#[test]
#[should_panic(expected = "one question at a time")]
fn one_question_at_a_time() {
    let (mut handshake, mut out) = (Handshake::new(), Vec::new());
    handshake.next(&mut b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &mut out).unwrap();
    handshake.ask(Ask::List, &mut out);
    handshake.ask(Ask::Abort, &mut out);
}
