//! TLS clients of other projects, each limited to a version, that transfer data and change keys in the middle of it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use crate::raw::{Mode, cmd, opt, option_bytes};
use crate::{Address, Cmd, Dir, Nbdblk, Pki, Version, tool};

/// The size of the export that clients read and write.
pub const SIZE: u64 = 64 << 20;

/// The page with the table of clients.
const PAGE: &str = include_str!("../../docs/security.md");

/// Runs each client that the table in docs/security.md says "yes" of, in the column `column` of the table.
///
/// # Panics
/// If one of them fails, or a client is missing from the table.
pub fn check_column(column: &str, dir: &Dir, server: &Nbdblk, credentials: Credentials<'_>, version: Version) {
    let cells = |line: &'static str| line.split('|').map(str::trim).collect::<Vec<_>>();
    let mut lines = PAGE.lines().skip_while(|line| !line.starts_with("| client | TLS"));
    let head = cells(lines.next().expect("the page has the table"));
    let at = head.iter().position(|cell| *cell == column).unwrap_or_else(|| panic!("the table has no column {column}"));
    let rows: Vec<_> = lines.take_while(|line| line.starts_with('|')).map(cells).collect();
    for client in Client::ALL {
        let row = rows.iter().find(|row| row[1] == client.name()).unwrap_or_else(|| panic!("no row for {client:?}"));
        match row[at] {
            "yes" => client.exchange(dir, server, credentials, version),
            cell => assert_eq!((cell, client), ("no", Client::GnuTls), "only a client with a defect may fail"),
        }
    }
}

/// How clients and server prove who they are.
#[derive(Debug, Clone, Copy)]
pub enum Credentials<'a> {
    /// Certificates of both sides.
    Certificates(&'a Pki),
    /// The file `keys.psk` in a directory, with a key for the users `alice` and `qemu`.
    Keys(&'a Dir),
}

/// A client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// nbdsh and nbdcopy, on GnuTLS.
    Libnbd,
    /// qemu-io, on GnuTLS.
    Qemu,
    /// The nbd plugin of nbdkit, on GnuTLS.
    Nbdkit,
    /// `openssl s_client`. It changes its keys, and requests the same of the server.
    OpenSsl,
    /// `gnutls-cli`. It changes its keys, and requests the same of the server.
    GnuTls,
}

impl Client {
    /// Every client.
    pub const ALL: [Self; 5] = [Self::Libnbd, Self::Qemu, Self::Nbdkit, Self::OpenSsl, Self::GnuTls];

    /// Its name in the documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::Libnbd => "libnbd",
            Self::Qemu => "QEMU",
            Self::Nbdkit => "nbdkit",
            Self::OpenSsl => "openssl s_client",
            Self::GnuTls => "gnutls-cli",
        }
    }

    /// Transfers data to and from a server on TCP with an export of [`SIZE`] bytes.
    ///
    /// # Panics
    /// If that fails.
    pub fn exchange(self, dir: &Dir, server: &Nbdblk, credentials: Credentials<'_>, version: Version) {
        let Address::Tcp(address) = server.address() else { panic!("the server listens on TCP") };
        match self {
            Self::Libnbd => libnbd(dir, *address, credentials, version),
            Self::Qemu => qemu(dir, *address, credentials, version),
            Self::Nbdkit => nbdkit(dir, *address, credentials, version),
            Self::OpenSsl => openssl(dir, *address, credentials, version),
            Self::GnuTls => gnutls(dir, *address, credentials, version),
        }
    }
}

/// A program that uses GnuTLS, limited to a version.
pub fn limited(dir: &Dir, name: &str, version: Version) -> Cmd {
    let config = dir.text(&format!("gnutls-{version:?}"));
    // It uses the highest version of both sides. Disabling 1.2 would also disable parts that 1.3 needs.
    let disabled = if version == Version::Tls12 { "disabled-version = tls1.3" } else { "" };
    std::fs::write(&config, format!("[overrides]\n{disabled}\n")).expect("the directory is writable");
    tool(name).env("GNUTLS_SYSTEM_PRIORITY_FILE", config)
}

/// One at a time, of odd sizes, and 64 at a time.
pub const ROUND_TRIPS: &str = "
import os
assert h.get_tls_negotiated()
for at, n in (0, 1), (4095, 16384), (70000, 1 << 20), ((40 << 20) + 1, 20 << 20):
    data = os.urandom(n); h.pwrite(data, at); assert h.pread(n, at) == data
writes = [h.aio_pwrite(bytes([n]) * 100000, n * 100000) for n in range(64)]
while h.aio_in_flight(): h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in writes)
buffers = [nbd.Buffer(100000) for n in range(64)]
reads = [h.aio_pread(buffer, n * 100000) for n, buffer in enumerate(buffers)]
while h.aio_in_flight(): h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in reads)
for n, buffer in enumerate(buffers): assert buffer.to_bytearray() == bytes([n]) * 100000
h.shutdown()";

/// The URI of the server for libnbd.
fn uri(address: SocketAddr, credentials: Credentials<'_>) -> String {
    let port = address.port();
    match credentials {
        Credentials::Certificates(pki) => format!("nbds://localhost:{port}/?tls-certificates={}", pki.dir()),
        Credentials::Keys(dir) => format!("nbds://alice@localhost:{port}/?tls-psk-file={}", dir.text("keys.psk")),
    }
}

fn libnbd(dir: &Dir, address: SocketAddr, credentials: Credentials<'_>, version: Version) {
    let uri = uri(address, credentials);
    let connect = format!("h.set_uri_allow_local_file(True); h.set_strict_mode(0); h.connect_uri({uri:?})");
    limited(dir, "nbdsh", version).args(["-c", &connect, "-c", ROUND_TRIPS]).ok();
}

fn qemu(dir: &Dir, address: SocketAddr, credentials: Credentials<'_>, version: Version) {
    let object = match credentials {
        Credentials::Certificates(pki) => format!("tls-creds-x509,id=tls,endpoint=client,dir={}", pki.dir()),
        Credentials::Keys(dir) => {
            format!("tls-creds-psk,id=tls,endpoint=client,dir={},username=qemu", dir.path().display())
        }
    };
    let options = format!("driver=nbd,host=localhost,port={},tls-creds=tls", address.port());
    let commands = ["write -P 7 8k 1M", "read -P 7 8k 1M", "aio_write -P 9 2M 4M", "aio_flush", "read -P 9 2M 4M"];
    let qemu_io = limited(dir, "qemu-io", version).args(["--object", &object, "--image-opts", &options]);
    let said = commands.iter().fold(qemu_io, |qemu_io, command| qemu_io.args(["-c", command])).ok().out;
    assert!(!said.contains("failed"), "{said}");
}

fn nbdkit(dir: &Dir, address: SocketAddr, credentials: Credentials<'_>, version: Version) {
    let nbdkit = limited(dir, "nbdkit", version).args(["-U", "-", "nbd", "hostname=localhost", "tls=require"]);
    let credentials = match credentials {
        Credentials::Certificates(pki) => vec![format!("tls-certificates={}", pki.dir())],
        Credentials::Keys(dir) => vec![format!("tls-psk={}", dir.text("keys.psk")), "tls-username=alice".into()],
    };
    let run = r#"nbdsh -u "$uri" -c 'h.pwrite(b"\7" * 100000, 8192); assert h.pread(100000, 8192) == b"\7" * 100000'"#;
    nbdkit.args(credentials).args([&format!("port={}", address.port()), "--run", run]).ok();
}

/// The path of a file in the directory of the certificates.
fn file(pki: &Pki, name: &str) -> String {
    format!("{}/{name}", pki.dir())
}

/// The key of `alice`, as hexadecimal digits.
fn key(dir: &Dir) -> String {
    let keys = std::fs::read_to_string(dir.at("keys.psk")).expect("the keys are there");
    keys.lines().find_map(|line| line.strip_prefix("alice:")).expect("alice has a key").to_owned()
}

fn openssl(dir: &Dir, address: SocketAddr, credentials: Credentials<'_>, version: Version) {
    let place = after_starttls(address).to_string();
    let protocol = if version == Version::Tls12 { "-tls1_2" } else { "-tls1_3" };
    let client = tool("openssl").args(["s_client", "-connect", &place, protocol, "-servername", "localhost"]);
    let client = match credentials {
        Credentials::Certificates(pki) => client
            .args(["-verify_return_error", "-CAfile", &file(pki, "ca-cert.pem")])
            .args(["-cert", &file(pki, "client-cert.pem"), "-key", &file(pki, "client-key.pem")]),
        Credentials::Keys(dir) => {
            let ciphers = ["-cipher", "PSK", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"];
            client.args(["-psk_identity", "alice", "-psk", &key(dir)]).args(ciphers)
        }
    };
    read_and_change_keys(dir, client, version, "K", "KEYUPDATE");
}

fn gnutls(dir: &Dir, address: SocketAddr, credentials: Credentials<'_>, version: Version) {
    let place = after_starttls(address);
    let client = limited(dir, "gnutls-cli", version).args(["--inline-commands", "-p", &place.port().to_string()]);
    let client = match credentials {
        Credentials::Certificates(pki) => client.args([
            format!("--x509cafile={}", file(pki, "ca-cert.pem")),
            format!("--x509certfile={}", file(pki, "client-cert.pem")),
            format!("--x509keyfile={}", file(pki, "client-key.pem")),
        ]),
        Credentials::Keys(dir) => client.args([
            "--pskusername=alice".into(),
            format!("--pskkey={}", key(dir)),
            "--priority=NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK".into(),
        ]),
    };
    read_and_change_keys(dir, client.args(["localhost"]), version, "^rekey^", "Rekey was completed");
}

/// Returns the address of a relay. It does the start of the NBD handshake on each connection that it accepts, up to STARTTLS: these
/// clients know TLS, but not NBD.
fn after_starttls(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = listener.local_addr().expect("a listener has an address");
    thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("the client connects");
        let mut server = TcpStream::connect(server).expect("the server listens");
        server.write_all(&[&3_u32.to_be_bytes()[..], &option_bytes(opt::STARTTLS, b"")].concat()).expect("it reads");
        server.read_exact(&mut [0; 18 + 20]).expect("the server answers");
        let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor is free");
        let (mut from, mut to) = (clone(&server), clone(&client));
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
        let _ = std::io::copy(&mut client, &mut server);
        let _ = server.shutdown(Shutdown::Write);
    });
    address
}

/// Speaks NBD through a client that knows only TLS. `command` makes it change its keys, and `answer` is what it says then.
fn read_and_change_keys(dir: &Dir, client: Cmd, version: Version, command: &str, answer: &str) {
    // The last byte of a request is one of its length: a line feed, because gnutls-cli takes a command at the start of a line.
    const LEN: usize = 0x700 + b'\n' as usize;
    // Text that the client prints as it is.
    let block = |n: u64| format!("{n:04} of the blocks\n").repeat(100)[..LEN].to_owned();
    let mode = Mode::Simple;
    let write = |n: u64| mode.request(0, cmd::WRITE, n, n << 16, LEN as u64, block(n).as_bytes());
    let read = |n: u64| mode.request(0, cmd::READ, n, n << 16, LEN as u64, b"");
    let mut client = client.spawn(dir.at("client.log"));
    client.type_bytes(&[option_bytes(opt::EXPORT_NAME, b""), write(1), read(1)].concat());
    client.await_text(&block(1));
    for n in 2..6 {
        if version == Version::Tls13 {
            client.type_line(command);
            client.await_that("the new keys", |log| log.matches(answer).count() as u64 == n - 1);
        }
        client.type_bytes(&[write(n), read(n)].concat());
        client.await_text(&block(n));
    }
    client.type_bytes(&mode.request(0, cmd::DISC, 9, 0, 0, b""));
    client.await_end();
}
