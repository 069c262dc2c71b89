//! docs/conformance.md: the replies to invalid and unusual input, observed on the wire and compared with the specification;
//! and the tests that keep the bugs of other servers out of nbdblk.

use std::fmt::Write;

use nbdblk_tests::raw::{
    Answer, Mode, Raw, cmd, errno, flag, info_query, info_query_bytes, meta_query, opt, option_bytes, rep,
};
use nbdblk_tests::{Dir, Nbdblk, Pki, Version, root, write_runs};

use crate::{KIB, MIB};

/// The exports, as LIST returns them.
const EXPORTS: [&str; 2] = ["disk", "read-only"];

/// Bytes of each export: more than one request may carry.
const SIZE: u64 = 64 * MIB;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];
const CHUNKS: &[Mode] = &[Mode::Structured, Mode::Extended];
const EXTENDED: &[Mode] = &[Mode::Extended];

/// One line of the table.
struct Case {
    what: &'static str,
    /// The observed replies of nbdkit 1.42.3, qemu-nbd 10.0 and nbd-server 3.26.1.
    others: [&'static str; 3],
    /// The rule of the specification, and every reply that it allows.
    book: &'static str,
    right: &'static [&'static str],
    modes: &'static [Mode],
    transports: &'static [Transport],
    see: fn(&Stand) -> String,
}

/// A server, and the connection parameters.
struct Stand {
    server: Nbdblk,
    transport: Transport,
    mode: Mode,
    pki: Pki,
    dir: Dir,
}

/// The transport of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    /// To a server without TLS.
    Plain,
    /// To a server that offers TLS.
    Tls(Version),
}

const TLS: &[Transport] = &[Transport::Tls(Version::Tls12), Transport::Tls(Version::Tls13)];
const TRANSPORTS: &[Transport] = &[Transport::Plain, TLS[0], TLS[1]];

impl Stand {
    fn new(transport: Transport) -> Self {
        let dir = Dir::new();
        write_runs(&dir.at("disk.raw"), SIZE, []);
        let pki = Pki::new(&dir, "pki");
        let exports = ["disk:memory=64M", "read-only:io_uring=disk.raw,read-only=true"];
        let tls = ["--tls", "on", "--tls-certificates", pki.dir()];
        let tls = if transport == Transport::Plain { &tls[..0] } else { &tls };
        let server = Nbdblk::unix(&dir, &[&exports, tls].concat());
        Self { server, transport, mode: Mode::Simple, pki, dir }
    }

    /// A connection on which the server has greeted, in plain text.
    fn connect(&self) -> Raw {
        Raw::connect(self.server.address())
    }

    /// A connection in its handshake.
    fn greeted(&self) -> Raw {
        let raw = Raw::greeted(self.server.address());
        match self.transport {
            Transport::Plain => raw,
            Transport::Tls(version) => raw.start_tls(&self.pki, version),
        }
    }

    /// A connection in its handshake, with the replies of the mode negotiated.
    fn options(&self) -> Raw {
        let mut raw = self.greeted();
        raw.negotiate(self.mode);
        raw
    }

    /// A connection in the transmission phase.
    fn requests(&self, name: &str) -> Raw {
        let mut raw = self.options();
        if self.mode != Mode::Simple {
            raw.negotiate_context(name);
        }
        raw.go(name);
        raw
    }
}

const NOT_SEEN: [&str; 3] = ["", "", ""];

/// Every case, handshake first.
fn cases() -> Vec<Case> {
    let case =
        |what, others, book, right, see| Case { what, others, book, right, modes: &MODES, transports: TRANSPORTS, see };
    vec![
        // The handshake.
        case("unknown client flag 0x80", ["close", "close", "**continues**"], "MUST close", &["close"], |stand| {
            let mut raw = stand.connect();
            raw.send(&0x83_u32.to_be_bytes());
            close(raw)
        }),
        case("no client flag, then EXPORT_NAME", NOT_SEEN, "MUST be served, with 124 zeroes", &["served"], |stand| {
            let mut raw = stand.connect();
            raw.send(&0_u32.to_be_bytes());
            raw.option(opt::EXPORT_NAME, b"disk");
            let told = raw.receive(8 + 2 + 124);
            let served = told[..8] == SIZE.to_be_bytes() && told[10..] == [0; 124] && raw.read(0, 1) == [0];
            if served { "served".into() } else { format!("{told:x?}") }
        }),
        case(
            "LIST with data, then another option",
            ["INVALID; next ok", "INVALID+text; next ok", "INVALID **and then the list**: out of sync from there"],
            "SHOULD be INVALID",
            &["INVALID; next ok"],
            |stand| asked(stand.options(), opt::LIST, b"data"),
        ),
        case(
            "unknown option with 4 KiB of data",
            ["UNSUP; next ok", "UNSUP+text; next ok", "UNSUP; next ok"],
            "MUST be UNSUP, in sync",
            &["UNSUP; next ok"],
            |stand| asked(stand.options(), 0x1234, &[0; 4096]),
        ),
        case(
            "INFO with a payload of 2 bytes",
            ["INVALID; next ok", "INVALID; next ok", "**hangs**"],
            "INVALID",
            &["INVALID; next ok"],
            |stand| asked(stand.options(), opt::INFO, b"\0\0"),
        ),
        case(
            "INFO with a name longer than the option",
            ["INVALID; next ok", "INVALID; next ok", "**hangs**"],
            "INVALID",
            &["INVALID; next ok"],
            |stand| asked(stand.options(), opt::INFO, b"\0\0\0\xffdisk\0\0"),
        ),
        case(
            "INFO with a name of 5000 bytes",
            ["INVALID+text", "INVALID+text", "**hangs**"],
            "INVALID or TOO_BIG: names have at most 4096 bytes",
            &["INVALID; next ok", "TOO_BIG; next ok"],
            |stand| asked(stand.options(), opt::INFO, &info_query(&"n".repeat(5000), &[])),
        ),
        case(
            "INFO with an unknown name of 4096 bytes",
            NOT_SEEN,
            "UNKNOWN, and the text MUST NOT be longer than 4096 bytes",
            &["UNKNOWN; next ok"],
            // `Raw` checks the length of the text in every reply.
            |stand| asked(stand.options(), opt::INFO, &info_query(&"\u{1}".repeat(4096), &[])),
        ),
        case(
            "a name with NUL",
            ["INVALID", "INVALID", "UNKNOWN"],
            "MUST NOT be sent",
            &["INVALID; next ok", "UNKNOWN; next ok"],
            |stand| asked(stand.options(), opt::INFO, &info_query_bytes(b"di\0sk", &[])),
        ),
        case(
            "a name that is not UTF-8",
            ["served", "UNKNOWN (raw bytes in the text)", "UNKNOWN"],
            "MUST NOT be sent",
            &["INVALID; next ok", "UNKNOWN; next ok"],
            |stand| asked(stand.options(), opt::INFO, &info_query_bytes(b"\xff\xfe", &[])),
        ),
        case(
            "INFO with more data than its fields need",
            ["INVALID", "INVALID", "accepted"],
            "INVALID",
            &["INVALID; next ok"],
            |stand| asked(stand.options(), opt::INFO, &[&info_query("disk", &[])[..], b"junk"].concat()),
        ),
        case("INFO that asks for unknown kinds", NOT_SEEN, "MUST be ignored", &["ACK; next ok"], |stand| {
            asked(stand.options(), opt::INFO, &info_query("disk", &[99, 0xffff]))
        }),
        Case {
            modes: CHUNKS,
            ..case(
                "a second STRUCTURED_REPLY",
                ["INVALID", "INVALID", "INVALID"],
                "MAY be INVALID; EXT_HEADER_REQD after extended headers",
                &["INVALID; next ok", "EXT_HEADER_REQD; next ok"],
                |stand| asked(stand.options(), opt::STRUCTURED_REPLY, b""),
            )
        },
        Case {
            modes: EXTENDED,
            ..case(
                "a second EXTENDED_HEADERS / one with data",
                NOT_SEEN,
                "MAY be INVALID / INVALID",
                &["INVALID; next ok / INVALID; next ok"],
                |stand| {
                    let twice = asked(stand.options(), opt::EXTENDED_HEADERS, b"");
                    format!("{twice} / {}", asked(stand.greeted(), opt::EXTENDED_HEADERS, b"data"))
                },
            )
        },
        Case {
            modes: &[Mode::Simple],
            ..case(
                "SET_META_CONTEXT without structured replies",
                ["INVALID", "INVALID", "UNSUP"],
                "SHOULD be INVALID",
                &["INVALID; next ok"],
                |stand| asked(stand.options(), opt::SET_META_CONTEXT, &meta_query("disk", &["base:allocation"])),
            )
        },
        Case {
            modes: CHUNKS,
            ..case(
                "SET_META_CONTEXT with a query longer than the option",
                NOT_SEEN,
                "MUST be INVALID, and no context stays selected",
                &["INVALID; BLOCK_STATUS EINVAL"],
                |stand| {
                    let mut raw = stand.options();
                    raw.negotiate_context("disk");
                    let query = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\xffbase:allocation";
                    let reply = reply(&mut raw, opt::SET_META_CONTEXT, query);
                    raw.go("disk");
                    format!("{reply}; BLOCK_STATUS {}", error(&raw.call(0, cmd::BLOCK_STATUS, 0, 512, b""), stand.mode))
                },
            )
        },
        case(
            "GO for an unknown name, then for a known one",
            NOT_SEEN,
            "UNKNOWN, in sync",
            &["UNKNOWN; next ok; served"],
            |stand| {
                let mut raw = stand.options();
                let reply = reply(&mut raw, opt::GO, &info_query("nosuch", &[]));
                let next = next(&mut raw);
                raw.go("disk");
                raw.read(0, 1);
                format!("{reply}; {next}; served")
            },
        ),
        case("EXPORT_NAME of an unknown export", NOT_SEEN, "MUST close", &["close"], |stand| {
            let mut raw = stand.options();
            raw.option(opt::EXPORT_NAME, b"nosuch");
            close(raw)
        }),
        Case {
            modes: EXTENDED,
            ..case("EXPORT_NAME after extended headers", NOT_SEEN, "MUST NOT be used", &["close"], |stand| {
                let mut raw = stand.options();
                raw.option(opt::EXPORT_NAME, b"disk");
                close(raw)
            })
        },
        case("ABORT with data", NOT_SEEN, "SHOULD ignore the data; MUST be ACK", &["ACK, close"], |stand| {
            let mut raw = stand.options();
            let reply = reply(&mut raw, opt::ABORT, b"goodbye");
            format!("{reply}, {}", close(raw))
        }),
        Case {
            transports: &[Transport::Plain],
            ..case("STARTTLS to a server without TLS", NOT_SEEN, "POLICY or UNSUP", &["POLICY; next ok"], |stand| {
                asked(stand.options(), opt::STARTTLS, b"")
            })
        },
        Case {
            transports: TLS,
            ..case(
                "STARTTLS with data / a second STARTTLS",
                ["INVALID; next ok / INVALID; next ok", "**close** / INVALID; next ok", "– / INVALID; next ok"],
                "SHOULD be INVALID / MUST be INVALID",
                &["INVALID; next ok / INVALID; next ok"],
                |stand| {
                    let with_data = asked(Raw::greeted(stand.server.address()), opt::STARTTLS, b"data");
                    format!("{with_data} / {}", asked(stand.options(), opt::STARTTLS, b""))
                },
            )
        },
        Case {
            transports: TLS,
            ..case(
                "STARTTLS, followed by plain text in the same segment",
                ["close", "close", "–"],
                "MUST NOT be read as plain text",
                &["close"],
                |stand| {
                    let mut raw = Raw::greeted(stand.server.address());
                    raw.send(&[option_bytes(opt::STARTTLS, b""), option_bytes(opt::LIST, b"")].concat());
                    close(raw)
                },
            )
        },
        Case {
            modes: CHUNKS,
            transports: TLS,
            ..case(
                "structured replies negotiated before STARTTLS, then SET_META_CONTEXT",
                NOT_SEEN,
                "MUST be forgotten, so INVALID",
                &["INVALID; next ok"],
                |stand| {
                    let Transport::Tls(version) = stand.transport else { unreachable!("only under TLS") };
                    let mut raw = Raw::greeted(stand.server.address());
                    raw.negotiate(stand.mode);
                    let raw = raw.start_tls(&stand.pki, version);
                    asked(raw, opt::SET_META_CONTEXT, &meta_query("disk", &["base:allocation"]))
                },
            )
        },
        Case {
            modes: &[Mode::Simple],
            transports: TLS,
            ..case(
                "plain text to a server that requires TLS: any option but STARTTLS and ABORT / ABORT / EXPORT_NAME",
                ["TLS_REQD / – / –", "TLS_REQD / **TLS_REQD**, close / –", "TLS_REQD / – / –"],
                "MUST be TLS_REQD / ACK / close",
                &["TLS_REQD / ACK / close"],
                |stand| {
                    let args = ["disk:memory=1M", "--tls", "require", "--tls-certificates", stand.pki.dir()];
                    let server = Nbdblk::unix(&stand.dir, &args);
                    let mut raw = Raw::greeted(server.address());
                    let query = info_query("disk", &[]);
                    let meta = meta_query("disk", &[]);
                    let options: [(u32, &[u8]); 8] = [
                        (opt::LIST, b""),
                        (opt::INFO, &query),
                        (opt::GO, &query),
                        (opt::STRUCTURED_REPLY, b""),
                        (opt::LIST_META_CONTEXT, &meta),
                        (opt::SET_META_CONTEXT, &meta),
                        (opt::EXTENDED_HEADERS, b""),
                        (0x1234, b"data"),
                    ];
                    let told = options.map(|(option, data)| reply(&mut raw, option, data));
                    assert!(told.iter().all(|other| *other == told[0]), "{told:?}");
                    let abort = reply(&mut raw, opt::ABORT, b"");
                    let mut raw = Raw::greeted(server.address());
                    raw.option(opt::EXPORT_NAME, b"disk");
                    format!("{} / {abort} / {}", told[0], close(raw))
                },
            )
        },
        // Requests.
        case(
            "READ past the end",
            ["EINVAL", "EINVAL+text", "**EINVAL in a simple reply**, structured or not"],
            "SHOULD be EINVAL; in chunks if they were negotiated",
            &["EINVAL; next ok"],
            |stand| called(stand, "disk", 0, cmd::READ, SIZE - 512, 1024, b""),
        ),
        case(
            "READ with an unknown flag",
            ["EINVAL", "EINVAL+text", "**EINVAL in a simple reply**, structured or not"],
            "SHOULD be EINVAL; in chunks if they were negotiated",
            &["EINVAL; next ok"],
            |stand| called(stand, "disk", 1 << 15, cmd::READ, 0, 512, b""),
        ),
        case(
            "READ with DF",
            ["", "", "**EINVAL in a simple reply**, though DF was advertised"],
            "one chunk; without chunks EINVAL, because DF is not advertised",
            &["EINVAL; next ok", "ok; next ok"],
            |stand| {
                let offered = stand.requests("disk").flags & 1 << 7 != 0;
                assert_eq!(offered, stand.mode != Mode::Simple, "SEND_DF");
                called(stand, "disk", flag::DF, cmd::READ, 0, MIB, b"")
            },
        ),
        case(
            "WRITE past the end, and past 2⁶⁴",
            ["ENOSPC, payload drained", "**EINVAL**, payload drained", "ENOSPC"],
            "SHOULD be ENOSPC, in sync",
            &["ENOSPC; next ok / ENOSPC; next ok"],
            |stand| {
                let past = called(stand, "disk", 0, cmd::WRITE, SIZE - 512, 1024, &[1; 1024]);
                format!("{past} / {}", called(stand, "disk", 0, cmd::WRITE, u64::MAX - 511, 1024, &[1; 1024]))
            },
        ),
        case(
            "WRITE, TRIM and WRITE_ZEROES on a read-only export",
            ["EPERM (**WRITE under TLS: hangs**)", "**EINVAL**", "EPERM"],
            "MUST be EPERM",
            &["EPERM; next ok / EPERM; next ok / EPERM; next ok"],
            |stand| {
                let write = called(stand, "read-only", 0, cmd::WRITE, 0, 64 * KIB, &[1; 65536]);
                let trim = called(stand, "read-only", 0, cmd::TRIM, 0, 64 * KIB, b"");
                format!("{write} / {trim} / {}", called(stand, "read-only", 0, cmd::WRITE_ZEROES, 0, 64 * KIB, b""))
            },
        ),
        case(
            "FLUSH with an offset and a length",
            ["EINVAL", "ok", "ok"],
            "reserved, MUST be 0",
            &["ok; next ok", "EINVAL; next ok"],
            |stand| called(stand, "disk", 0, cmd::FLUSH, 512, 512, b""),
        ),
        case(
            "READ of 0 bytes",
            ["EINVAL", "ok", "ok"],
            "not specified; SHOULD NOT close",
            &["ok; next ok", "EINVAL; next ok"],
            |stand| called(stand, "disk", 0, cmd::READ, 0, 0, b""),
        ),
        case(
            "WRITE / TRIM of 0 bytes",
            ["ENOSPC / EINVAL", "ok / ok", "ok / ok"],
            "not specified; SHOULD NOT close",
            &["ok; next ok / ok; next ok", "EINVAL; next ok / EINVAL; next ok"],
            |stand| {
                let write = called(stand, "disk", 0, cmd::WRITE, 0, 0, b"");
                format!("{write} / {}", called(stand, "disk", 0, cmd::TRIM, 0, 0, b""))
            },
        ),
        case(
            "unknown command",
            ["EINVAL", "EINVAL+text", "EINVAL"],
            "SHOULD be EINVAL",
            &["EINVAL; next ok"],
            |stand| called(stand, "disk", 0, 99, 0, 512, b""),
        ),
        case("FUA on every command", NOT_SEEN, "valid once SEND_FUA is advertised", &["ok; next ok"], |stand| {
            let commands = [cmd::READ, cmd::FLUSH, cmd::TRIM, cmd::WRITE_ZEROES];
            let told = commands.map(|command| called(stand, "disk", flag::FUA, command, 0, 4096, b""));
            assert!(told.iter().all(|other| *other == told[0]), "{told:?}");
            told[0].clone()
        }),
        case("BLOCK_STATUS without a context", NOT_SEEN, "MUST be EINVAL", &["EINVAL; next ok"], |stand| {
            let mut raw = stand.options();
            raw.go("disk");
            answered(&mut raw, stand.mode, 0, cmd::BLOCK_STATUS, 0, 512, b"")
        }),
        case(
            "WRITE of 33 MiB, more than advertised",
            ["ok (up to 64 MiB)", "**close**", "ok"],
            "MAY be an error; with extended headers SHOULD close, but nbdblk replies with an error",
            &["EINVAL; next ok"],
            |stand| called(stand, "disk", 0, cmd::WRITE, 0, 33 * MIB, &vec![1; 33 << 20]),
        ),
        case("WRITE of 65 MiB", NOT_SEEN, "MAY close: such a client knows no limit", &["close"], |stand| {
            let mut raw = stand.requests("disk");
            let head = stand.mode.request(0, cmd::WRITE, 1, 0, 65 * MIB, b"");
            raw.send(&head);
            close(raw)
        }),
        case(
            "READ of 33 MiB, more than advertised",
            ["one chunk", "EINVAL", "one chunk"],
            "MAY be an error",
            &["EINVAL; next ok", "ok; next ok"],
            |stand| called(stand, "disk", 0, cmd::READ, 0, 33 * MIB, b""),
        ),
        Case {
            modes: CHUNKS,
            ..case(
                "READ of 33 MiB with DF",
                NOT_SEEN,
                "SHOULD be EOVERFLOW",
                &["EOVERFLOW; next ok", "ok; next ok"],
                |stand| called(stand, "disk", flag::DF, cmd::READ, 0, 33 * MIB, b""),
            )
        },
        case(
            "a request with a bad magic",
            ["close", "error, then close", "close"],
            "close: the stream is out of sync",
            &["close"],
            |stand| {
                let mut raw = stand.requests("disk");
                let mut bytes = stand.mode.header(0, cmd::READ, 1, 0, 512);
                bytes[0] ^= 1;
                raw.send(&bytes);
                close(raw)
            },
        ),
        Case {
            modes: EXTENDED,
            ..case("a compact request after extended headers", NOT_SEEN, "close", &["close"], |stand| {
                let mut raw = stand.requests("disk");
                raw.send(&Mode::Simple.header(0, cmd::READ, 1, 0, 512));
                raw.send(&[0; 4]);
                close(raw)
            })
        },
        Case {
            modes: EXTENDED,
            ..case(
                "TRIM with a payload",
                ["(no extended headers)", "EINVAL, payload drained", "(no extended headers)"],
                "SHOULD consume it, then EINVAL",
                &["EINVAL; next ok"],
                |stand| called(stand, "disk", 0, cmd::TRIM, 0, 512, &[0; 512]),
            )
        },
        Case {
            modes: EXTENDED,
            ..case(
                "WRITE without PAYLOAD_LEN",
                ["(no extended headers)", "read as a payload", "(no extended headers)"],
                "MUST NOT be sent; qemu's client does",
                &["ok; next ok"],
                |stand| {
                    let mut raw = stand.requests("disk");
                    let cookie = raw.expect_answer(cmd::WRITE, 0, 512);
                    raw.send(&stand.mode.header(0, cmd::WRITE, cookie, 0, 512));
                    raw.send(&[0; 512]);
                    let told = error(&raw.answer_to(cookie), stand.mode);
                    raw.read(0, 1);
                    format!("{told}; next ok")
                },
            )
        },
        Case {
            modes: EXTENDED,
            ..case(
                "BLOCK_STATUS payload that selects the context",
                NOT_SEEN,
                "SHOULD be served once BLOCK_STATUS_PAYLOAD is advertised",
                &["ok; next ok"],
                |stand| {
                    let payload = [&512_u64.to_be_bytes()[..], &[0; 4]].concat();
                    called(stand, "disk", 0, cmd::BLOCK_STATUS, 0, payload.len() as u64, &payload)
                },
            )
        },
        Case {
            modes: EXTENDED,
            ..case(
                "BLOCK_STATUS payload with a repeated id / an unknown id / a truncated id",
                NOT_SEEN,
                "MUST be EINVAL, in sync",
                &["EINVAL; next ok / EINVAL; next ok / EINVAL; next ok"],
                |stand| {
                    let status = |ids: &[u8]| {
                        let payload = [&512_u64.to_be_bytes()[..], ids].concat();
                        let len = payload.len() as u64;
                        called(stand, "disk", 0, cmd::BLOCK_STATUS, 0, len, &payload)
                    };
                    let (twice, unknown) = (status(&[0; 8]), status(&[0, 0, 0, 9]));
                    format!("{twice} / {unknown} / {}", status(&[0, 0]))
                },
            )
        },
        Case {
            modes: EXTENDED,
            ..case(
                "TRIM of 2⁶⁴−1 bytes",
                NOT_SEEN,
                "SHOULD NOT close; EINVAL past the end",
                &["EINVAL; next ok"],
                |stand| called(stand, "disk", 0, cmd::TRIM, 0, u64::MAX, b""),
            )
        },
        case("DISC with an offset and a length", NOT_SEEN, "no reply, close", &["close"], |stand| {
            let mut raw = stand.requests("disk");
            raw.send(&stand.mode.header(0, cmd::DISC, 1, 512, 512));
            close(raw)
        }),
    ]
}

/// Returns the reply to an option, and whether the next option works.
fn asked(mut raw: Raw, option: u32, data: &[u8]) -> String {
    let reply = reply(&mut raw, option, data);
    format!("{reply}; {}", next(&mut raw))
}

/// Returns the last reply to an option. Errors have a text.
fn reply(raw: &mut Raw, option: u32, data: &[u8]) -> &'static str {
    let (kind, text) = raw.ask(option, data).pop().expect("there is a last reply");
    assert_eq!(kind == rep::ACK, text.is_empty(), "an error has a text, an ACK has none");
    match kind {
        rep::ACK => "ACK",
        rep::ERR_UNSUP => "UNSUP",
        rep::ERR_POLICY => "POLICY",
        rep::ERR_INVALID => "INVALID",
        rep::ERR_TLS_REQD => "TLS_REQD",
        rep::ERR_UNKNOWN => "UNKNOWN",
        rep::ERR_TOO_BIG => "TOO_BIG",
        rep::ERR_EXT_HEADER_REQD => "EXT_HEADER_REQD",
        kind => panic!("reply {kind:#x}"),
    }
}

/// Returns whether LIST returns the exports.
fn next(raw: &mut Raw) -> &'static str {
    let mut replies = raw.ask(opt::LIST, b"");
    let ended = replies.pop() == Some((rep::ACK, vec![]));
    // The name comes after its length.
    let listed =
        |(reply, name): (&(u32, Vec<u8>), &str)| reply.0 == rep::SERVER && reply.1[4..].starts_with(name.as_bytes());
    let all = replies.len() == EXPORTS.len() && replies.iter().zip(EXPORTS).all(listed);
    if ended && all { "next ok" } else { "next wrong" }
}

/// Sends a request on a new connection, and returns the reply and whether the next request works.
fn called(stand: &Stand, name: &str, flags: u16, command: u16, at: u64, len: u64, payload: &[u8]) -> String {
    answered(&mut stand.requests(name), stand.mode, flags, command, at, len, payload)
}

/// Sends a request, and returns the reply and whether the next request works.
fn answered(raw: &mut Raw, mode: Mode, flags: u16, command: u16, at: u64, len: u64, payload: &[u8]) -> String {
    let answer = raw.call_long(flags, command, at, len, payload);
    assert!(flags & flag::DF == 0 || answer.chunks <= 1, "{} chunks under DF", answer.chunks);
    let told = error(&answer, mode);
    let read = raw.call(0, cmd::READ, SIZE - 1, 1, b"");
    format!("{told}; {}", if (read.error, &read.data[..]) == (0, &[0]) { "next ok" } else { "next wrong" })
}

/// Returns the name of the error. It has a text if the reply has room for one.
fn error(answer: &Answer, mode: Mode) -> &'static str {
    let room = mode == Mode::Extended || answer.chunks > 0;
    assert_eq!(room && answer.error != 0, !answer.text.is_empty(), "{answer:?}");
    match answer.error {
        0 => "ok",
        errno::EPERM => "EPERM",
        errno::EINVAL => "EINVAL",
        errno::ENOSPC => "ENOSPC",
        errno::EOVERFLOW => "EOVERFLOW",
        errno::ENOTSUP => "ENOTSUP",
        error => panic!("error {error} is not one of the protocol"),
    }
}

/// Waits until the server closes the connection.
fn close(raw: Raw) -> String {
    let said = raw.await_close();
    if said.is_empty() { "close".into() } else { format!("{said:x?}, close") }
}

/// A bug of another program, what its tests do, and the tests, as `file::name`.
type Lesson = (&'static str, &'static str, &'static [&'static str]);

const LESSONS: &[Lesson] = &[
    (
        "CVE-2005-3534, CVE-2011-0530: nbd-server, the length of a buffer does not include the header",
        "send requests of the maximum length, one byte less, one more, and far more",
        &[
            "requests::a_payload_at_the_limit_is_served_and_one_above_it_gets_a_reply_in_step",
            "receiver::a_read_fits_one_chunk",
            "receiver::a_huge_payload_ends_the_connection",
            "replier::a_header_is_at_most_head_max_long",
        ],
    ),
    (
        "CVE-2011-1925: nbd-server, a client disconnects during negotiation",
        "disconnect after each byte of a handshake",
        &[
            "handshake::a_client_may_disconnect_at_every_byte_of_the_handshake",
            "hostile::a_client_that_closes_at_any_byte_is_harmless",
            "golden::a_client_may_disconnect_at_any_time",
        ],
    ),
    (
        "CVE-2013-6410: nbd-server, an address is allowed because its beginning equals an allowed one",
        "use rules for an address and for a longer one that begins like it, networks, IPv4 in IPv6",
        &["access::networks", "peer::an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client"],
    ),
    (
        "nbdkit's filter ip: unknown socket families pass, and a denied client may LIST",
        "set a rule; a client that matches no rule sees nothing",
        &[
            "access::without_rules_every_client_is_admitted_and_with_rules_those_that_match_one",
            "server::a_forbidden_export_looks_like_a_missing_one_and_is_not_touched",
            "access::a_user_sees_only_permitted_exports",
            "access::a_network_sees_only_permitted_exports",
        ],
    ),
    (
        "CVE-2013-7441: nbd-server, the name of an unknown export ends the server",
        "fail in the handshake a hundred times, then get service",
        &["handshake::clients_that_fail_in_every_way_leave_the_server_to_others"],
    ),
    (
        "CVE-2015-0847: nbd-server, unsafe calls in signal handlers",
        "send signals under load, and while the server works; nbdblk uses no signal handlers",
        &[
            "hostile::sigterm_ends_the_server_under_load_in_every_phase",
            "reload::sighup_reloads_the_file",
            "reload::exports_come_change_and_go_while_fio_works_on_another",
        ],
    ),
    (
        "CVE-2022-26495, CVE-2017-15118: nbd-server and qemu, trust in the name lengths of a client",
        "set each length of each option to 0, 1, 256, 4096, 4097, the longest that fits ±1, 2³¹, 2³²−1",
        &[
            "handshake::malformed_options_are_refused_in_step",
            "handshake::export_name_of_any_length_is_served_or_ends_the_connection",
            "lengths::the_name_of_info",
            "lengths::the_count_of_kinds",
            "lengths::the_name_of_a_context_option",
            "lengths::the_queries_of_a_context_option",
            "lengths::the_length_of_export_name",
        ],
    ),
    (
        "CVE-2022-26496, CVE-2017-15119: nbd-server and qemu, option data of unbounded length",
        "announce gigabytes, and send endless options",
        &[
            "handshake::a_huge_option_uses_no_memory",
            "lengths::the_length_of_an_option",
            "lengths::options_are_counted",
            "lengths::lists_are_bounded",
        ],
    ),
    (
        "CVE-2017-7539: qemu, an assertion on a client's input",
        "replay every input that fuzzing found, with assertions enabled",
        &["corpus::handshake", "corpus::receiver", "hostile::garbage_on_the_port_is_harmless"],
    ),
    (
        "CVE-2017-9524: qemu-nbd, a port scan",
        "let two thousand clients connect and disconnect, and two hundred stay",
        &["hostile::idle_clients_and_short_ones_cost_nothing_afterwards"],
    ),
    (
        "CVE-2017-10664: qemu-nbd, SIGPIPE when a client disconnects",
        "disconnect in every phase, with replies in flight",
        &[
            "hostile::a_thousand_clients_killed_in_mid_request_leave_nothing_of_a_file",
            "hostile::a_thousand_clients_reset_over_tcp_leave_nothing",
        ],
    ),
    (
        "CVE-2019-14850: nbdkit, the device is opened for every connection",
        "count the requests that reach the device before GO: none",
        &[
            "server::nothing_reaches_the_device_before_a_client_is_served",
            "handshake::the_catalog_is_not_called_too_early",
        ],
    ),
    (
        "CVE-2019-14851: nbdkit, INFO and then GO on another name",
        "send INFO, LIST, contexts and GO in every order, with different names",
        &["handshake::info_and_go_in_every_order_and_with_differing_names", "handshake::every_order_of_options"],
    ),
    (
        "CVE-2020-10761: qemu, an error text above the maximum length of a string",
        "provoke errors about names of 4096 bytes",
        &["conformance::every_reply_is_valid_and_as_documented", "handshake::a_text_about_a_long_name_is_cut"],
    ),
    (
        "CVE-2021-3716: nbdkit, state negotiated before STARTTLS stays valid after it",
        "send options before STARTTLS, and plain text with it",
        &[
            "handshake::starttls_clears_all_state",
            "tls::state_from_before_starttls_is_cleared",
            "tls::plain_text_right_after_starttls_ends_the_connection",
        ],
    ),
    (
        "CVE-2019-14842: libnbd, TLS is required but not used",
        "connect without TLS to a server that requires it: nothing is served",
        &["tls::where_tls_is_required_plain_text_gets_nothing"],
    ),
    (
        "nbdkit 1.42: under TLS, a refused WRITE swallows the input after it",
        "provoke the refusal of a WRITE of 33 MiB, then read",
        &["tls::a_refused_write_is_drained_through_tls"],
    ),
    (
        "nbdkit up to 1.38: a documented check of certificates is missing",
        "connect with certificates of another authority, with revoked ones, without one",
        &["tls::only_clients_without_a_valid_certificate_are_refused", "access::identities_of_tls"],
    ),
    (
        "nbd 7a64238: an endless loop when a client disconnects under TLS",
        "let clients disconnect under TLS; afterwards they cost no CPU time",
        &["tls::clients_that_vanish_leave_nothing_and_cost_nothing"],
    ),
    (
        "CVE-2024-7409: qemu, a stop while clients are in their handshake",
        "stop with clients in every phase, with one that never finishes, with one too many",
        &[
            "hostile::sigterm_ends_the_server_under_load_in_every_phase",
            "handshake::two_hundred_clients_idle_in_every_phase_and_one_more_is_served",
            "server::a_handshake_has_a_deadline_and_room_for_so_many",
            "listen::connections_are_counted_and_handshakes_end_in_time",
            "changes::a_handshake_uses_the_exports_at_its_end",
            "changes::clients_of_a_hard_removed_export_are_disconnected_under_load",
        ],
    ),
    (
        "CVE-2025-47711, CVE-2025-47712: nbdkit, extents longer than 32 bits, and lengths that exceed 32 bits when rounded",
        "send BLOCK_STATUS over more than 4 GiB, and ranges next to 2³², 2⁶³ and 2⁶⁴",
        &[
            "replier::extents_around_4_gib",
            "requests::a_disk_beyond_four_gibibytes_is_described_and_zeroed",
            "requests::one_extended_request_reaches_over_six_tebibytes",
            "requests::commands_beyond_the_end_are_refused_and_their_payload_discarded",
            "matrix::every_range",
        ],
    ),
    (
        "nbdkit 1.44.1: a write of zeroes stops early, and old data stays readable",
        "zero more than any internal limit, and read all of it back",
        &["requests::seventeen_mebibytes_are_zeroed_and_so_are_a_hundred_and_twenty_eight"],
    ),
    (
        "nbd 9ca2974: a refused GO puts the stream out of sync",
        "send a GO that is refused, then LIST, then GO",
        &["handshake::info_and_go_in_every_order_and_with_differing_names"],
    ),
    (
        "CVE-2021-20286, CVE-2023-5215, CVE-2023-5871: libnbd, offsets beyond 2⁶³",
        "serve an export of 2⁶³ bytes: the server refuses it",
        &["golden::turn_by_turn_the_server_sends_the_golden_bytes"],
    ),
];

/// Directories of tests.
const PLACES: [&str; 5] = [
    "tests/tests/e2e",
    "crates/nbd-proto/tests",
    "crates/nbd-server-core/tests",
    "crates/nbd-server-core/tests/server",
    "crates/nbd-server-core/src",
];

/// The document.
fn render(cases: &[(Case, String)]) -> String {
    let mut text = String::from(HEAD);
    for (case, seen) in cases {
        let [a, b, c] = case.others.map(|cell| if cell.is_empty() { "–" } else { cell });
        writeln!(text, "| {} | {a} | {b} | {c} | {seen} | {} |", case.what, case.book).expect("text grows");
    }
    text.push_str(LESSONS_HEAD);
    for (whose, what, tests) in LESSONS {
        let tests: Vec<String> = tests.iter().map(|test| format!("`{test}`")).collect();
        writeln!(text, "| {whose} | {what} | {} |", tests.join(", ")).expect("text grows");
    }
    text
}

const HEAD: &str = "\
# Conformance

The replies of nbdblk to invalid and unusual input, compared with other servers.

`tests/tests/e2e/conformance.rs` writes this page. The test sends each input to the program in simple, structured and extended
mode, in plain text, under TLS 1.2 and under TLS 1.3. It fails if a reply violates the
[specification](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md) or differs from this page. This command writes
the page again: `NBDBLK_WRITE_CONFORMANCE=1 cargo test -p nbdblk-tests --test e2e conformance`.

*next ok*: the server understands and serves the next option or request. *in sync*: it finds the start of the next one. Names of option
errors omit `NBD_REP_ERR_`, those of request errors omit `NBD_`. Each error of nbdblk has a readable text if the reply has room for one.
The replies of nbdkit 1.42.3, qemu-nbd 10.0 and nbd-server 3.26.1 were observed by hand; violations are in bold.

| a client sends | nbdkit | qemu-nbd | nbd-server | nbdblk | the specification |
|---|---|---|---|---|---|
";

const LESSONS_HEAD: &str = "
## Bugs of other servers

Known bugs of NBD software, and the tests that keep them out of nbdblk.

| bug | what the tests do | tests |
|---|---|---|
";

/// The replies in a case, each with its modes.
type Seen = Vec<(String, Vec<&'static str>)>;

/// Returns the common reply of all modes, or the reply of each of them.
fn merge(seen: &Seen) -> String {
    match &seen[..] {
        [(text, _)] => text.clone(),
        _ => seen.iter().map(|(text, modes)| format!("{}: {text}", modes.join(", "))).collect::<Vec<_>>().join(" · "),
    }
}

#[test]
fn every_reply_is_valid_and_as_documented() {
    let mut cases: Vec<(Case, Seen)> = cases().into_iter().map(|case| (case, Vec::new())).collect();
    for &transport in TRANSPORTS {
        let mut stand = Stand::new(transport);
        for (case, seen) in cases.iter_mut().filter(|(case, _)| case.transports.contains(&transport)) {
            for &mode in case.modes {
                stand.mode = mode;
                eprintln!("{} ({transport:?}, {mode:?})", case.what);
                let answer = (case.see)(&stand);
                assert!(case.right.contains(&&*answer), "{answer:?} is wrong: {}", case.book);
                let mode = match mode {
                    Mode::Plain | Mode::Simple => "simple",
                    Mode::Structured => "structured",
                    Mode::Extended => "extended",
                };
                // The transport makes no difference.
                match seen.iter_mut().find(|(known, _)| *known == answer) {
                    Some((_, modes)) if modes.contains(&mode) => {}
                    Some((_, modes)) => modes.push(mode),
                    None => seen.push((answer, vec![mode])),
                }
            }
        }
        assert!(stand.server.terminate().success());
    }
    let cases: Vec<(Case, String)> = cases.into_iter().map(|(case, seen)| (case, merge(&seen))).collect();
    let (path, text) = (root().join("docs/conformance.md"), render(&cases));
    if std::env::var_os("NBDBLK_WRITE_CONFORMANCE").is_some() {
        std::fs::write(&path, &text).expect("the page can be written");
    }
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = page.lines().zip(text.lines()).find(|(page, text)| page != text);
    assert!(
        page == text,
        "docs/conformance.md differs from the replies: {differs:#?}; its head has the command to write it again"
    );
}

#[test]
fn the_tests_in_the_document_exist() {
    for test in LESSONS.iter().flat_map(|(_, _, tests)| *tests) {
        let (file, name) = test.split_once("::").expect("a test has a file and a name");
        let begins = format!("fn {name}()");
        let has = |source: String| {
            let lines: Vec<&str> = source.lines().map(str::trim).collect();
            lines.windows(2).any(|pair| pair[0] == "#[test]" && pair[1].starts_with(&begins))
        };
        let sources = PLACES.into_iter().flat_map(|place| {
            let path = root().join(place).join(file);
            [path.with_extension("rs"), path.join("main.rs")]
        });
        assert!(sources.flat_map(std::fs::read_to_string).any(has), "there is no test {test} below {PLACES:?}");
    }
}
