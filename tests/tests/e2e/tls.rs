//! TLS: all clients, both versions, and errors that must not affect other clients.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use nbdblk_tests::raw::{Mode, Raw, cmd, errno, info_query, meta_query, opt, option_bytes, rep};
use nbdblk_tests::tls_clients::{self, Credentials, ROUND_TRIPS, check_column, limited as client};
use nbdblk_tests::{
    Address, Dir, Nbdblk, Pki, Rng, Version, assert_equal, eventually, nbdblk, tls_records, tool, write_runs,
};

use crate::MIB;

/// A server with certificates, used as `mode` requires, with its authority, and an image of 64 MiB.
struct Stand {
    server: Nbdblk,
    pki: Pki,
    dir: Dir,
}

impl Stand {
    fn new(listen: fn(&Dir, &[&str]) -> Nbdblk, mode: &str, args: &[&str]) -> Self {
        let dir = Dir::new();
        let pki = Pki::new(&dir, "pki");
        write_runs(&dir.at("disk.raw"), 64 * MIB, [(0, 20 * MIB), (30 * MIB, 10 * MIB + 77)]);
        let tls = ["--tls", mode, "--tls-certificates", pki.dir(), "--handshake-timeout=3s"];
        let server = listen(&dir, &[&["-v", "io_uring=disk.raw"], &tls[..], args].concat());
        Self { server, pki, dir }
    }

    fn require(listen: fn(&Dir, &[&str]) -> Nbdblk) -> Self {
        Self::new(listen, "require", &["--tls-verify-peer"])
    }

    fn raw(&self, version: Version) -> Raw {
        Raw::greeted(self.server.address()).start_tls(&self.pki, version)
    }

    /// The URI for a client with the certificates in `dir`.
    fn uri(&self, dir: &str) -> String {
        uri(&self.server, dir)
    }
}

/// The printed URI names the directory of the server's certificates, which has the client's as well.
fn uri(server: &Nbdblk, dir: &str) -> String {
    let printed = server.printed_uri();
    let (place, _) = printed.split_once("tls-certificates=").unwrap_or_else(|| panic!("no certificates in {printed}"));
    format!("{place}tls-certificates={dir}")
}

/// nbdsh with permission to read the certificates, connected as `h`.
fn nbdsh(dir: &Dir, version: Version, uri: &str, script: &str) -> String {
    let connect = format!("h.set_uri_allow_local_file(True); h.set_strict_mode(0); h.connect_uri({uri:?})");
    client(dir, "nbdsh", version).args(["-c", &connect, "-c", script]).ok().out
}

fn every_client(stand: &Stand) {
    let Stand { server, pki, dir } = stand;
    let (image, copy, uri) = (dir.text("disk.raw"), dir.text("copy.raw"), server.printed_uri());
    // QEMU does not support nbds: URIs.
    let place = match server.address() {
        Address::Unix(path) => format!("path={}", path.display()),
        Address::Tcp(address) => format!("host=localhost,port={}", address.port()),
    };
    let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", pki.dir());
    let options = format!("driver=nbd,{place},tls-creds=tls,tls-hostname=localhost");
    for version in Version::BOTH {
        let client = |name| client(dir, name, version);
        let info = client("nbdinfo").args(["--json", uri]).ok().out;
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        server.await_log(&format!("opens export \"\": {version}"));
        assert_eq!((&info["TLS"], &info["exports"][0]["export-size"]), (&true.into(), &(64 * MIB).into()));
        client("nbdcopy").args(["--connections=4", uri, &copy]).ok();
        assert_equal(image.as_ref(), copy.as_ref());
        client("nbdcopy").args(["--connections=4", "--flush", &copy, uri]).ok();
        assert_equal(image.as_ref(), copy.as_ref());

        nbdsh(dir, version, uri, ROUND_TRIPS);

        let commands = ["write -P 7 8k 1M", "read -P 7 8k 1M", "aio_write -P 9 2M 4M", "aio_flush", "read -P 9 2M 4M"];
        let qemu_io = client("qemu-io").args(["--object", &object, "--image-opts", &options]);
        let said = commands.iter().fold(qemu_io, |qemu_io, command| qemu_io.args(["-c", command])).ok().out;
        assert!(!said.contains("failed"), "{said}");
        client("qemu-img").args(["convert", "--object", &object, "--image-opts", &options, "-O", "raw", &copy]).ok();
        assert_equal(image.as_ref(), copy.as_ref());

        let place = match server.address() {
            Address::Unix(path) => vec![format!("socket={}", path.display())],
            Address::Tcp(address) => vec!["hostname=localhost".into(), format!("port={}", address.port())],
        };
        let nbdkit = client("nbdkit").args(["-U", "-", "nbd"]).args(place).args(["tls=require"]);
        let run = r#"nbdinfo --size "$uri" && nbdsh -u "$uri" -c 'assert h.pread(8, 8192) == b"\7" * 8'"#;
        let size = nbdkit.args([&format!("tls-certificates={}", pki.dir()), "--run", run]).ok().out;
        assert_eq!(size.trim(), (64 * MIB).to_string(), "{version:?}");
    }
}

#[test]
fn the_table_of_clients_is_true() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let keys = dir.text("keys.psk");
    ["alice", "qemu"].iter().for_each(|user| drop(tool("psktool").args(["-u", user, "-p", &keys]).ok()));
    let serve = |tls: &[&str]| {
        let memory = format!("memory={}", tls_clients::SIZE);
        Nbdblk::tcp(&dir, &[&["-v", &memory, "--tls=require"], tls].concat())
    };
    let certificates = serve(&["--tls-verify-peer", "--tls-certificates", pki.dir()]);
    let psk = serve(&["--tls-psk", &keys]);
    for version in Version::BOTH {
        let check = |what: &str, server, credentials| {
            check_column(&format!("{version}, {what}"), &dir, server, credentials, version);
        };
        check("certificates", &certificates, Credentials::Certificates(&pki));
        check("keys", &psk, Credentials::Keys(&dir));
    }
}

#[test]
fn every_client_over_tcp() {
    every_client(&Stand::require(Nbdblk::tcp));
}

#[test]
fn every_client_over_unix() {
    every_client(&Stand::require(Nbdblk::unix));
}

#[test]
fn only_clients_without_a_valid_certificate_are_refused() {
    let stand = Stand::require(Nbdblk::tcp);
    let Stand { server, pki, dir } = &stand;
    let others = Pki::new(dir, "others");
    // Both trust the server: this test is not about that.
    let (none, wrong) = (dir.text("none"), dir.text("wrong"));
    for (to, files) in [(&none, &[][..]), (&wrong, &["client-cert.pem", "client-key.pem"])] {
        std::fs::create_dir(to).unwrap();
        std::fs::copy(format!("{}/ca-cert.pem", pki.dir()), format!("{to}/ca-cert.pem")).unwrap();
        files.iter().for_each(|file| drop(std::fs::copy(format!("{}/{file}", others.dir()), format!("{to}/{file}"))));
    }
    for version in Version::BOTH {
        for bad in [&none, &wrong] {
            let output = client(dir, "nbdinfo", version).args(["--size", &stand.uri(bad)]).run();
            assert!(!output.status.success(), "{version:?}: a client with {bad} got in");
        }
        let good = client(dir, "nbdinfo", version).args(["--size", server.printed_uri()]).ok().out;
        assert_eq!(good.trim(), (64 * MIB).to_string());
    }
    pki.revoke_client();
    let tls = ["--tls=require", "--tls-verify-peer", "--tls-certificates", pki.dir()];
    let strict = Nbdblk::tcp(dir, &[&["memory=1M"], &tls[..]].concat());
    assert!(!tool("nbdinfo").args(["--size", &uri(&strict, pki.dir())]).run().status.success(), "it is revoked");
}

#[test]
fn where_tls_is_required_plain_text_gets_nothing() {
    let stand = Stand::require(Nbdblk::unix);
    let address = stand.server.address();
    let refused = tool("nbdinfo").args([&stand.server.uri()]).run();
    assert!(!refused.status.success() && !refused.out.contains("size"), "{refused:?}");
    let mut raw = Raw::greeted(address);
    let query = info_query("", &[]);
    let context = meta_query("", &["base:allocation"]);
    let options: [(u32, &[u8]); 8] = [
        (opt::LIST, b""),
        (opt::INFO, &query),
        (opt::GO, &query),
        (opt::STRUCTURED_REPLY, b""),
        (opt::EXTENDED_HEADERS, b""),
        (opt::LIST_META_CONTEXT, &context),
        (opt::SET_META_CONTEXT, &context),
        (0x1234, b"data"),
    ];
    for (option, data) in options {
        let replies = raw.ask(option, data);
        assert_eq!((replies.len(), replies[0].0), (1, rep::ERR_TLS_REQD), "option {option}");
    }
    assert_eq!(raw.ask_kind(opt::STARTTLS, b"data"), rep::ERR_INVALID);
    let mut raw = raw.start_tls(&stand.pki, Version::Tls13);
    assert_eq!(raw.ask_kind(opt::STARTTLS, b""), rep::ERR_INVALID, "it was started already");
    raw.entered(Mode::Structured, "").read(0, 1);

    let mut raw = Raw::greeted(address);
    assert_eq!(raw.ask_kind(opt::ABORT, b""), rep::ACK);
    assert_eq!(raw.await_close(), b"");
    let mut raw = Raw::greeted(address);
    raw.option(opt::EXPORT_NAME, b"");
    assert_eq!(raw.await_close(), b"");
}

#[test]
fn state_from_before_starttls_is_cleared() {
    let stand = Stand::new(Nbdblk::tcp, "on", &[]);
    for version in Version::BOTH {
        let mut raw = Raw::greeted(stand.server.address());
        assert_eq!(raw.ask_kind(opt::STRUCTURED_REPLY, b""), rep::ACK);
        assert_eq!(raw.ask_kind(opt::SET_META_CONTEXT, &meta_query("", &["base:allocation"])), rep::ACK);
        // Under TLS, Raw refuses a structured reply if it has not negotiated it.
        let mut raw = raw.start_tls(&stand.pki, version).entered(Mode::Simple, "");
        assert_eq!(raw.read(0, 70_000).len(), 70_000);
        assert_eq!(raw.call(0, cmd::BLOCK_STATUS, 0, 4096, b"").error, errno::EINVAL);
        // A client that does not use TLS needs none here.
        Raw::enter(stand.server.address(), Mode::Structured, "").read(0, 1);
    }
}

#[test]
fn plain_text_right_after_starttls_ends_the_connection() {
    let stand = Stand::new(Nbdblk::unix, "on", &[]);
    let mut raw = Raw::greeted(stand.server.address());
    raw.send(&[option_bytes(opt::STARTTLS, b""), option_bytes(opt::STRUCTURED_REPLY, b"")].concat());
    assert_eq!(raw.await_close(), b"");
}

#[test]
fn a_refused_write_is_drained_through_tls() {
    for args in [&["--tls-verify-peer", "--read-only"][..], &["--tls-verify-peer"]] {
        let stand = Stand::new(Nbdblk::tcp, "require", args);
        for (version, mode) in Version::BOTH.into_iter().flat_map(|version| Mode::ALL.map(|mode| (version, mode))) {
            let mut raw = stand.raw(version).entered(mode, "");
            let before = raw.read(0, 4096);
            // Read-only, or past the end: refused in both cases, with a payload of 33 MiB.
            let write = raw.request(0, cmd::WRITE, 60 * MIB, 33 * MIB as u32, &vec![7; 33 * MIB as usize]);
            let read = raw.request(0, cmd::READ, 0, 4096, b"");
            let (refused, answer) = (raw.answer(), raw.answer());
            assert!(refused.cookie == write && [errno::EPERM, errno::ENOSPC].contains(&refused.error), "{refused:?}");
            assert!(answer.cookie == read && answer.data == before, "{version:?} {mode:?}");
        }
    }
}

#[test]
fn records_may_be_of_any_size_and_keys_may_change() {
    let stand = Stand::require(Nbdblk::tcp);
    for version in Version::BOTH {
        let mut raw = stand.raw(version).entered(Mode::Simple, "");
        let mut rng = Rng(7);
        for round in 0..20_u64 {
            let data = rng.bytes(1 + (round * 3001) as usize);
            let header = Mode::Simple.header(0, cmd::WRITE, 1000 + round, round * 70_000, data.len() as u64);
            // A record for each byte of the header, and for each piece of the payload.
            header.chunks(1).chain(data.chunks(1 + round as usize * 777)).for_each(|piece| raw.send(piece));
            let answer = raw.answer();
            assert_eq!((answer.cookie, answer.error), (1000 + round, 0));
            if version == Version::Tls13 {
                raw.change_keys();
            }
            assert!(raw.read(round * 70_000, data.len() as u32) == data, "{version:?} round {round}");
        }
    }
}

#[test]
fn records_that_no_honest_client_sends_end_their_connection_only() {
    for listen in [Nbdblk::tcp, Nbdblk::unix] {
        let stand = Stand::require(listen);
        Version::BOTH.into_iter().for_each(|version| tls_records::check(&stand.server, &stand.pki, version));
        assert!(stand.server.terminate().success());
    }
}

#[test]
fn a_client_that_reads_late_gets_all_replies() {
    let stand = Stand::require(Nbdblk::tcp);
    for version in Version::BOTH {
        let before = stand.server.resident_private();
        let mut slow: Vec<Raw> = (0..8).map(|_| stand.raw(version).entered(Mode::Simple, "")).collect();
        let reads: Vec<(u64, u32)> = (0..32).map(|n| (n * MIB, MIB as u32)).collect();
        slow.iter_mut().for_each(|raw| _ = raw.request_reads(&reads));
        let mut other = stand.raw(version).entered(Mode::Structured, "");
        (0..50).for_each(|n| other.write(50 * MIB + n * 4096, &[n as u8; 4096]));
        let grown = stand.server.resident_private().saturating_sub(before);
        assert!(grown < 64 * MIB, "memory is not bounded: {grown} bytes more");
        let image = std::fs::read(stand.dir.at("disk.raw")).unwrap();
        let mut raw = slow.remove(0);
        for _ in &reads {
            let answer = raw.answer();
            assert_eq!((answer.error, answer.data.len()), (0, MIB as usize));
            let at = (answer.cookie - 1) * MIB;
            assert!(answer.data == image[at as usize..][..MIB as usize], "{version:?} at {at}");
        }
    }
    assert!(stand.server.terminate().success());
}

#[test]
fn garbage_and_broken_handshakes_are_harmless() {
    let stand = Stand::require(Nbdblk::tcp);
    let Address::Tcp(address) = stand.server.address() else { unreachable!("it listens on TCP") };
    let settled = |version| stand.raw(version).entered(Mode::Simple, "").read(0, 1);
    settled(Version::Tls12);
    eventually("the first client is gone", || stand.server.fds() < 100);
    let fds = stand.server.fds();
    let starttls = [&3_u32.to_be_bytes()[..], &option_bytes(opt::STARTTLS, b"")].concat();
    let begin = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&starttls).unwrap();
        let mut greeting = [0; 18 + 20];
        stream.read_exact(&mut greeting).unwrap();
        stream
    };
    // A silent client is disconnected at the deadline; the others do not wait for it.
    let (mut silent, start) = (begin(), Instant::now());
    silent.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();

    let mut hello = Vec::new();
    stand.pki.connection(Version::Tls13).write_tls(&mut hello).unwrap();
    let mut rng = Rng(5);
    for n in 0..hello.len() {
        begin().write_all(&hello[..n]).unwrap();
        let mut changed = hello.clone();
        changed[n] ^= 1 << (n % 8);
        let mut stream = begin();
        stream.write_all(&changed).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // Whatever the reply is, the connection ends.
        let _ = stream.read_to_end(&mut Vec::new());
        drop(begin().write_all(&rng.bytes(n * 100)));
    }
    Version::BOTH.into_iter().for_each(|version| drop(settled(version)));
    silent.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let end = silent.read_to_end(&mut Vec::new());
    assert!(end.is_ok() || start.elapsed() < Duration::from_secs(60), "the server did not disconnect a silent client");
    eventually("the descriptors are closed", || stand.server.fds() <= fds);
    assert!(stand.server.terminate().success());
}

#[test]
fn clients_that_vanish_leave_nothing_and_cost_nothing() {
    let stand = Stand::require(Nbdblk::tcp);
    stand.raw(Version::Tls13).entered(Mode::Simple, "").read(0, 1);
    let fds = stand.server.fds();
    for n in 0..60 {
        let mode = Mode::ALL[n % 4];
        let mut raw = stand.raw(Version::BOTH[n % 2]).entered(mode, "");
        match n / 4 % 4 {
            0 => _ = raw.request_reads(&[(0, MIB as u32); 8]),
            1 => raw.send(&[mode.header(0, cmd::WRITE, 1, 0, MIB), vec![0; n * 1000]].concat()),
            2 => raw.send(&mode.header(0, cmd::READ, 1, 0, 512)[..n % 28]),
            _ => {}
        }
    }
    eventually("the descriptors are closed", || stand.server.fds() <= fds);
    let before = stand.server.cpu_time();
    std::thread::sleep(Duration::from_millis(500));
    let spent = stand.server.cpu_time() - before;
    assert!(spent < Duration::from_millis(250), "idle, and yet it took {spent:?} of the CPU in half a second");
}

/// The names that LIST gives.
fn listed(raw: &mut Raw) -> Vec<String> {
    let replies = raw.ask(opt::LIST, b"");
    let names = replies.iter().filter(|(kind, _)| *kind == rep::SERVER);
    names.map(|(_, data)| String::from_utf8(data[4..].split_at(data[3].into()).0.to_vec()).unwrap()).collect()
}

#[test]
fn an_export_that_needs_tls_is_invisible_without() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let args = ["open:memory=1M", "secret:memory=2M", "--tls-only=secret", "--tls-certificates", pki.dir()];
    let server = Nbdblk::unix(&dir, &args);
    let mut raw = Raw::greeted(server.address());
    assert_eq!(listed(&mut raw), ["open"]);
    // The reply does not show whether the export exists.
    for (name, option) in [("secret", opt::INFO), ("secret", opt::GO), ("nosuch", opt::INFO), ("nosuch", opt::GO)] {
        assert_eq!(raw.ask_kind(option, &info_query(name, &[])), rep::ERR_TLS_REQD, "{name}");
    }
    let query = meta_query("secret", &["base:allocation"]);
    assert_eq!(raw.ask_kind(opt::STRUCTURED_REPLY, b""), rep::ACK);
    assert_eq!(raw.ask_kind(opt::LIST_META_CONTEXT, &query), rep::ERR_POLICY, "TLS_REQD is for INFO and GO");
    let mut raw = raw.start_tls(&pki, Version::Tls13);
    assert_eq!(listed(&mut raw), ["open", "secret"]);
    assert_eq!(raw.ask_kind(opt::INFO, &info_query("nosuch", &[])), rep::ERR_UNKNOWN);
    assert_eq!(raw.entered(Mode::Structured, "secret").size, 2 * MIB);
    assert_eq!(Raw::enter(server.address(), Mode::Plain, "open").size, MIB);
    let mut raw = Raw::greeted(server.address());
    raw.option(opt::EXPORT_NAME, b"secret");
    assert_eq!(raw.await_close(), b"");
    crate::cli::check_refused(&dir, &["memory=1M", "--tls=on", "--tls-certificates=pki", "--tls-only=no"], &["no"]);
    crate::cli::check_refused(&dir, &["a:memory=1M", "--tls-only=a"], &["--tls-only", "--tls"]);
}

#[test]
fn an_export_for_one_certificate_is_open_to_its_owner_only() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let rules =
        ["--allow=his:dn=CN=client,O=Example", "--allow=named:san=DNS:client.example", "--allow=hers:dn=CN=other"];
    let tls = ["--tls-verify-peer", "--tls-certificates", pki.dir()];
    let exports = ["his:memory=1M", "named:memory=2M", "hers:memory=3M"];
    let server = Nbdblk::tcp(&dir, &[&exports[..], &rules, &tls].concat());
    for version in Version::BOTH {
        let mut raw = Raw::greeted(server.address());
        assert!(listed(&mut raw).is_empty());
        let mut raw = raw.start_tls(&pki, version);
        assert_eq!(listed(&mut raw), ["his", "named"]);
        assert_eq!(raw.ask_kind(opt::GO, &info_query("hers", &[])), rep::ERR_UNKNOWN);
        assert_eq!(raw.entered(Mode::Simple, "named").size, 2 * MIB);
    }
}

#[test]
fn pre_shared_keys() {
    let dir = Dir::new();
    write_runs(&dir.at("disk.raw"), 64 * MIB, [(0, 20 * MIB)]);
    // QEMU reads keys.psk in a directory, and looks for a user in it.
    let keys = dir.text("keys.psk");
    for user in ["alice", "qemu"] {
        tool("psktool").args(["-u", user, "-p", &keys]).ok();
    }
    let others = dir.text("others.psk");
    tool("psktool").args(["-u", "alice", "-p", &others]).ok();
    let args = ["-v", "his:io_uring=disk.raw", "hers:memory=1M", "--allow=his:psk=alice", "--allow=his:psk=qemu"];
    let tls = ["--allow=hers:psk=nobody", "--tls=require", "--tls-psk", &keys];
    let server = Nbdblk::tcp(&dir, &[&args[..], &tls].concat());
    let Address::Tcp(address) = server.address() else { unreachable!("it listens on TCP") };
    let uri = |user: &str, keys: &str, name: &str| {
        format!("nbds://{user}@localhost:{}/{name}?tls-psk-file={keys}", address.port())
    };
    for version in Version::BOTH {
        nbdsh(&dir, version, &uri("alice", &keys, "his"), ROUND_TRIPS);
        server.await_log(&format!("(\"alice\") opens export \"his\": {version}"));
        let object = format!("tls-creds-psk,id=tls,endpoint=client,dir={},username=qemu", dir.path().display());
        let options = format!("driver=nbd,host=localhost,port={},export=his,tls-creds=tls", address.port());
        let qemu_io = client(&dir, "qemu-io", version).args(["--object", &object, "--image-opts", &options]);
        let said = qemu_io.args(["-c", "write -P 7 8k 1M", "-c", "read -P 7 8k 1M"]).ok().out;
        assert!(!said.contains("failed"), "{said}");
        let nbdkit = ["-U", "-", "nbd", "hostname=localhost", "export=his", "tls=require", "tls-username=alice"];
        let more = [format!("port={}", address.port()), format!("tls-psk={keys}")];
        let run = ["--run", "nbdinfo --size \"$uri\""];
        assert_eq!(client(&dir, "nbdkit", version).args(nbdkit).args(more).args(run).ok().out.trim(), "67108864");
        for refused in [
            uri("alice", &others, "his"),
            uri("mallory", &keys, "his"),
            uri("alice", &keys, "hers"),
            format!("nbd://{address}/his"),
        ] {
            let output = client(&dir, "nbdinfo", version).args(["--size", &refused]).run();
            assert!(!output.status.success(), "{refused} {version:?}: {output:?}");
        }
    }
    assert!(server.terminate().success());
    std::fs::write(dir.at("bad.psk"), "alice:xyz").unwrap();
    crate::cli::check_refused(&dir, &["memory=1M", "--tls-psk=bad.psk"], &["bad.psk", "line 1"]);
    crate::cli::check_refused(&dir, &["memory=1M", "--tls-psk=nosuch.psk"], &["nosuch.psk"]);
}

#[test]
fn errors_in_the_files_are_reported_at_start() {
    let dir = Dir::new();
    let (pki, others) = (Pki::new(&dir, "pki"), Pki::new(&dir, "others"));
    std::fs::create_dir(dir.at("empty")).unwrap();
    let check =
        |args: &[&str], words: &[&str]| crate::cli::check_refused(&dir, &[&["memory=1M"], args].concat(), words);
    check(&["--tls=require", "--tls-certificates=empty"], &["empty/server-cert.pem"]);
    check(&["--tls=perhaps"], &["perhaps", "require"]);
    check(&["--tls-verify-peer"], &["--tls-verify-peer", "--tls"]);
    std::fs::copy(format!("{}/server-key.pem", others.dir()), format!("{}/server-key.pem", pki.dir())).unwrap();
    check(&["--tls-certificates", pki.dir()], &["server-cert.pem", "key"]);
    std::fs::remove_file(format!("{}/ca-cert.pem", others.dir())).unwrap();
    check(&["--tls-certificates", others.dir(), "--tls-verify-peer"], &["ca-cert.pem"]);
    std::fs::write(format!("{}/server-key.pem", others.dir()), "no key").unwrap();
    check(&["--tls-certificates", others.dir()], &["server-key.pem"]);
}

/// GnuTLS 3.7's certtool writes half of its keys on curves with a leading zero.
#[test]
fn the_error_for_a_malformed_key_names_the_command_that_rewrites_it() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let key = format!("{}/server-key.pem", pki.dir());
    let (der, pem) = (dir.text("key.der"), dir.text("key.base64"));
    tool("openssl").args(["ec", "-in", &key, "-outform", "der", "-out", &der]).ok();
    let mut malformed = std::fs::read(&der).unwrap();
    // ECPrivateKey (RFC 5915, 3): a sequence with the version, and an octet string of 32 bytes, which becomes one of 33.
    assert_eq!(malformed[2..7], [2, 1, 1, 4, 32]);
    (malformed[1], malformed[6]) = (malformed[1] + 1, 33);
    malformed.insert(7, 0);
    std::fs::write(&der, &malformed).unwrap();
    tool("openssl").args(["base64", "-in", &der, "-out", &pem]).ok();
    let text = std::fs::read_to_string(&pem).unwrap();
    std::fs::write(&key, format!("-----BEGIN EC PRIVATE KEY-----\n{text}-----END EC PRIVATE KEY-----\n")).unwrap();

    let command = format!("openssl pkey -in {key} -out {key}.new && mv {key}.new {key}");
    let args = ["memory=1M", "--tls=require", "--tls-certificates", pki.dir()];
    crate::cli::check_refused(&dir, &args, &["server-key.pem", &command]);
    tool("sh").args(["-c", &command]).ok();
    assert!(Nbdblk::tcp(&dir, &args).terminate().success());
}

#[test]
fn certificates_are_found_where_nbdkit_looks() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    std::fs::create_dir(dir.at(".pki")).unwrap();
    std::fs::rename(pki.dir(), dir.at(".pki/nbdkit")).unwrap();
    let command = r#"echo "$tls $tls_certificates"; nbdinfo --size "$uri""#;
    let serve = nbdblk().args(["serve", "memory=1M", "--tls=require", "--tls-verify-peer", "--run", command]);
    let out = serve.env("HOME", dir.path()).ok().out;
    assert_eq!(out, format!("require {}\n1048576\n", dir.at(".pki/nbdkit").display()));
}
