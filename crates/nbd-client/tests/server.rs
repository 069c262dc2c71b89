//! The client against the server of this workspace: every call, in every mode, over every transport.

mod common;

use std::{
    net::TcpListener,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::Arc,
    time::Duration,
};

use blkdev::memory::Memory;
use common::{MODES, PATIENCE, Running, SIZE, options};
use nbd_client::{
    Address, AllocationFlags, BASE_ALLOCATION, Client, Engine, Error, Listed, Mode, Rep, Request, Uri, info, list,
};
use nbd_server_core::{Export, Limits, Listener, Server};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, bind, getsockname, listen, socket},
};

#[test]
fn every_call_in_every_mode() {
    let server = Running::start();
    for mode in MODES {
        for uri in [server.unix(), server.tcp()] {
            let options = options().mode(mode).context(BASE_ALLOCATION).context("x-none:y");
            let mut client = Client::connect(&uri, &options).unwrap();
            assert_eq!((client.size(), client.export().mode()), (SIZE, mode), "{uri}");
            every_call(&mut client);
            client.disconnect().unwrap();
        }
    }
}

#[test]
fn every_kind_of_address() {
    let serve = |listener: Listener| {
        let export = Export::new("a b", Arc::new(Memory::new(1 << 20)));
        Server::start(vec![export], vec![listener], None, Limits::default()).unwrap()
    };
    let check =
        |uri: &str| assert_eq!(Client::connect(&uri.parse().unwrap(), &options()).unwrap().size(), 1 << 20, "{uri}");

    let name = format!("nbd-client-abstract-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let server = serve(UnixListener::bind_addr(&address).unwrap().into());
    check(&format!("nbd+unix:///a%20b?socket=@{name}"));
    check(&format!("nbd+unix:///?socket=%00{name}"));
    drop(server);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = serve(listener.into());
    check(&format!("nbd://localhost:{port}/a%20b"));
    drop(server);

    // A machine may have no IPv6, and no vsock.
    if let Ok(listener) = TcpListener::bind("[::1]:0") {
        let port = listener.local_addr().unwrap().port();
        let _server = serve(listener.into());
        check(&format!("nbd://[::1]:{port}/a%20b"));
    }
    let vsock = || -> nix::Result<(OwnedFd, u32)> {
        let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &VsockAddr::new(u32::MAX, u32::MAX))?;
        listen(&listener, Backlog::new(8)?)?;
        let port = getsockname::<VsockAddr>(listener.as_raw_fd())?.port();
        Ok((listener, port))
    };
    let Ok((listener, port)) = vsock() else { return };
    let _server = serve(Listener::inherited(listener).unwrap());
    let uri = format!("nbd+vsock://1:{port}/a%20b").parse().unwrap();
    // Not every kernel connects to itself; then it is silent, or says so.
    match Client::connect(&uri, &options().connect_timeout(Some(Duration::from_millis(200)))) {
        Ok(client) => assert_eq!(client.size(), 1 << 20),
        Err(Error::Timeout { what, .. } | Error::Io { what, .. }) => {
            assert_eq!(what, format!("connecting to vsock 1:{port}"));
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn every_call(client: &mut Client) {
    let pattern: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 7) as u8).collect();
    client.write(12345, &pattern).unwrap();
    let mut back = vec![1; pattern.len() + 2];
    client.read(12344, &mut back).unwrap();
    assert!(back[0] == 0 && back[1..=pattern.len()] == pattern && back[pattern.len() + 1] == 0);
    client.zero(20000, 100_000).unwrap();
    client.call(Request::Zero { at: 20000, len: 10, no_hole: true, fast: true, fua: true }).unwrap();
    client.flush().unwrap();
    client.cache(0, SIZE).unwrap();
    client.read(19999, &mut back[..100_002]).unwrap();
    assert!(back[0] == pattern[19999 - 12345] && back[1..=100_000].iter().all(|byte| *byte == 0));
    client.read(0, &mut []).unwrap();
    client.write(0, &[]).unwrap();
    if client.export().mode() == Mode::Simple {
        assert!(client.export().contexts().is_empty() && !client.export().can_df());
        assert_invalid(client.block_status(0, 1), "BLOCK_STATUS of 1 bytes at 0: no metadata context was selected");
    } else {
        assert_eq!(client.export().contexts(), [BASE_ALLOCATION.into()]);
        let status = client.block_status(SIZE / 2, SIZE / 2).unwrap();
        assert_eq!((status.len(), &*status[0].context), (1, BASE_ALLOCATION));
        let hole = AllocationFlags::HOLE.with(AllocationFlags::ZERO).0;
        assert!(status[0].extents.iter().all(|extent| extent.flags == hole));
        assert_eq!(status[0].extents.iter().map(|extent| extent.len).sum::<u64>(), SIZE / 2);
        let one = client.call(Request::Status { at: 0, len: 100, one: true }).unwrap();
        assert!(one.status[0].extents.len() == 1 && one.status[0].extents[0].len <= 100);
        client.call(Request::Read { at: 0, buffer: vec![0; 60_000], df: true }).unwrap();
    }
    client.trim(0, SIZE).unwrap();
    client.call(Request::Write { at: SIZE - 1, data: vec![7], fua: true }).unwrap();
    client.zero(0, SIZE).unwrap();
}

fn assert_invalid<T>(outcome: Result<T, Error>, text: &str) {
    match outcome.map(drop).unwrap_err() {
        error @ Error::Invalid(_) => assert_eq!(error.to_string(), text),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_the_export_does_not_allow_is_not_sent() {
    let server = Running::start();
    let mut client = Client::connect(&server.unix(), &options().mode(Mode::Structured)).unwrap();
    let export = client.export();
    assert!(export.can_write() && export.can_flush() && export.can_fua() && export.can_trim() && export.can_zero());
    assert!(export.can_fast_zero() && export.can_df() && export.can_cache() && export.can_multi_conn());
    assert!(!export.is_rotational());
    let too_long = Request::Read { at: 0, buffer: vec![0; (32 << 20) + 1], df: false };
    assert_invalid(
        client.call(too_long),
        "READ of 33554433 bytes at 0: the server takes at most 33554432 bytes in a READ or WRITE",
    );
    let text = "READ of 2 bytes at 67108863: the export ends at 67108864";
    assert_invalid(client.read(SIZE - 1, &mut [0; 2]), text);
    let text = "TRIM of 18446744073709551615 bytes at 1: the export ends at 67108864";
    assert_invalid(client.trim(1, u64::MAX), text);
    assert_invalid(client.trim(1, 0), "TRIM of 0 bytes at 1: the length is 0, which has no meaning in the protocol");
    client.read(0, &mut [0; 1]).unwrap();

    let mut client = Client::connect(&server.unix(), &options().export("blocks")).unwrap();
    assert_eq!((client.export().block_sizes().min, client.export().block_sizes().preferred), (4096, 8192));
    let text = "READ of 512 bytes at 0: the server takes multiples of 4096 bytes only";
    assert_invalid(client.read(0, &mut [0; 512]), text);
    client.read(4096, &mut [0; 4096]).unwrap();

    let mut client = Client::connect(&server.unix(), &options().export("fixed")).unwrap();
    assert!(!client.export().can_write() && !client.export().can_trim() && !client.export().can_zero());
    assert_invalid(client.write(0, b"x"), "WRITE of 1 bytes at 0: the export is read-only");
    assert_invalid(client.zero(0, 1), "WRITE_ZEROES of 1 bytes at 0: the export is read-only");
    client.flush().unwrap();
}

#[test]
fn a_request_that_is_refused_comes_back() {
    let server = Running::start();
    let mut engine = Engine::connect(&server.unix(), &options()).unwrap();
    let rejection = engine.submit(Request::write(SIZE, b"data".to_vec())).unwrap_err();
    assert_eq!(rejection.request, Request::write(SIZE, b"data".to_vec()));
    assert!(matches!(rejection.error, Error::Invalid(_)));
    assert!(engine.in_flight() == 0 && !engine.interest().writable);
}

#[test]
fn a_server_is_asked_without_opening_an_export() {
    let server = Running::start();
    let listed = |name: &str, description: &str| Listed { name: name.into(), description: description.into() };
    let all = [listed("disk", "64 MiB of memory"), listed("blocks", ""), listed("fixed", "")];
    for uri in [server.unix(), server.tcp()] {
        assert_eq!(list(&uri, &options()).unwrap(), all);
        for mode in MODES {
            let export = info(&uri, &options().mode(mode)).unwrap();
            assert_eq!((export.size(), export.mode()), (SIZE, mode));
            assert_eq!((export.name(), export.description()), (Some("disk"), Some("64 MiB of memory")));
            assert_eq!(export.contexts().len(), usize::from(mode != Mode::Simple));
        }
        let export = info(&Uri { export: "fixed".into(), ..uri }, &options()).unwrap();
        assert!(!export.can_write() && export.size() == 1 << 20);
    }
    let none = Uri { export: "none".into(), ..server.unix() };
    for error in [info(&none, &options()).unwrap_err(), Client::connect(&none, &options()).unwrap_err()] {
        assert!(matches!(error, Error::Refused { code: Rep::ERR_UNKNOWN, .. }), "{error:?}");
    }
}

#[test]
fn servers_that_cannot_be_reached() {
    let uri = Uri::new(Address::Unix("/nonexistent/nbd.sock".into()));
    let error = Client::connect(&uri, &options()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert!(error.to_string().starts_with("connecting to /nonexistent/nbd.sock: "), "{error}");
    // A port that was free a moment ago, and an abstract name.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = Client::connect(&Uri::new(Address::Tcp { host: "127.0.0.1".into(), port }), &options());
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    let name = format!("nbd-client-none-{}", std::process::id()).into_bytes();
    let refused = Client::connect(&Uri::new(Address::Abstract(name)), &options());
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    let tls = Client::connect(&Uri { tls: true, ..uri }, &options());
    assert!(matches!(&tls, Err(Error::Uri { reason, .. }) if reason.contains("tls-certificates=DIR")), "{tls:?}");
    let long = Client::connect(&Uri::new(Address::Unix("/s".into())), &options().export("x".repeat(5000)));
    assert!(matches!(long, Err(Error::Invalid(_))), "{long:?}");
}

#[test]
fn silent_servers_time_out() {
    let soon = Some(Duration::from_millis(20));
    // One that takes the connection and says nothing.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let outcome = Client::over(ours.into(), &options().handshake_timeout(soon));
    assert!(matches!(&outcome, Err(Error::Timeout { what, .. }) if what == "handshake"), "{outcome:?}");
    // One that has no room for the connection.
    let name = format!("nbd-client-full-{}", std::process::id()).into_bytes();
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new_abstract(&name).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let uri = Uri::new(Address::Abstract(name));
    let options = options().connect_timeout(soon).handshake_timeout(soon);
    let mut full = Vec::new();
    loop {
        match Engine::connect(&uri, &options) {
            Err(Error::Timeout { what, .. }) if what.starts_with("connecting to @nbd-client-full") => break,
            Err(Error::Timeout { .. }) => {
                let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
                full.push(socket);
                assert!(full.len() < 10, "the backlog fills up");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_server_that_stops_ends_everything_in_flight() {
    let server = Running::start();
    let mut engine = Engine::connect(&server.unix(), &options()).unwrap();
    let mut client = Client::connect(&server.tcp(), &options()).unwrap();
    let written = Request::write(0, vec![1; 4096]);
    let cookies: Vec<_> = (0..20).map(|_| engine.submit(written.clone()).unwrap()).collect();
    drop(server);
    let mut done = Vec::new();
    let error = loop {
        match engine.progress(&mut done) {
            Ok(()) => assert!(engine.wait(Some(PATIENCE)).unwrap()),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Closed), "{error:?}");
    let mut ended: Vec<_> = done.iter().map(|done| done.cookie).collect();
    ended.sort();
    assert_eq!(ended, cookies, "each request completes once");
    for done in &done {
        assert_eq!(done.request, written, "memory comes back");
        assert!(matches!(done.result, Ok(()) | Err(Error::Closed | Error::Server { .. })), "{done:?}");
    }
    assert!(engine.is_closed() && engine.in_flight() == 0);
    assert!(matches!(engine.progress(&mut done), Err(Error::Closed)));
    assert!(matches!(engine.submit(Request::Flush).unwrap_err().error, Error::Closed));
    assert!(matches!(client.flush(), Err(Error::Closed)));
}

#[test]
fn an_engine_disconnects_after_its_requests() {
    let server = Running::start();
    for mode in MODES {
        let mut engine = Engine::connect(&server.unix(), &options().mode(mode)).unwrap();
        let mut done = Vec::new();
        engine.submit(Request::write(0, vec![1; 1 << 20])).unwrap();
        while engine.in_flight() > 0 {
            engine.progress(&mut done).unwrap();
            assert!(engine.in_flight() == 0 || engine.wait(Some(PATIENCE)).unwrap());
        }
        engine.disconnect();
        assert!(engine.submit(Request::Flush).is_err());
        while !engine.is_closed() {
            engine.progress(&mut done).unwrap();
            assert!(engine.is_closed() || engine.wait(Some(PATIENCE)).unwrap());
        }
        assert!(done.len() == 1 && done[0].result.is_ok());
        assert!(!engine.interest().readable && !engine.interest().writable);
    }
}

#[test]
fn two_connections_share_one_loop() {
    let server = Running::start();
    let connect = || Engine::connect(&server.unix(), &options()).unwrap();
    let (mut engines, mut left) = ([connect(), connect()], [200_u64; 2]);
    let mut done = Vec::new();
    for (engine, n) in engines.iter_mut().zip(0..) {
        for i in 0..8 {
            engine.submit(Request::write((n * 8 + i) << 20, vec![n as u8 + 1; 1 << 20])).unwrap();
        }
    }
    while left != [0, 0] {
        for (engine, left) in engines.iter_mut().zip(&mut left) {
            engine.progress(&mut done).unwrap();
            for done in done.drain(..) {
                done.result.unwrap();
                *left -= 1;
                if *left >= 8 {
                    engine.submit(done.request).unwrap();
                }
            }
        }
        let events = engines.each_ref().map(|engine| {
            let interest = engine.interest();
            PollFlags::POLLIN | if interest.writable { PollFlags::POLLOUT } else { PollFlags::empty() }
        });
        let [a, b] = &engines;
        let busy = left != [0, 0];
        let mut fds = [PollFd::new(a.as_fd(), events[0]), PollFd::new(b.as_fd(), events[1])];
        assert!(!busy || poll(&mut fds, PollTimeout::from(60_000_u16)).unwrap() > 0, "nothing comes any more");
    }
    let mut client = Client::connect(&server.tcp(), &options()).unwrap();
    let mut back = vec![0; 16 << 20];
    client.read(0, &mut back).unwrap();
    assert!(back[..8 << 20].iter().all(|byte| *byte == 1) && back[8 << 20..].iter().all(|byte| *byte == 2));
}
