//! The client under TLS, against the server of this workspace.
#![cfg(feature = "tls")]

mod common;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use common::{MODES, PATIENCE, Running, SIZE, options};
use nbd_client::{Address, Certificates, Client, Engine, Error, Opt, Rep, Request, Tls, Uri, info, list};
use nbd_server_core::tls;

/// A directory with an authority, a server's certificate for `localhost` and 127.0.0.1, and a client's.
struct Pki(PathBuf);

impl Pki {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("nbd-client-pki-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let pki = Self(dir);
        pki.make("ca", "basicConstraints=critical,CA:TRUE", None);
        pki.make("server", "subjectAltName=DNS:localhost,IP:127.0.0.1", Some("ca"));
        pki.make("client", "subjectAltName=DNS:client.example", Some("ca"));
        pki
    }

    /// A key, and a certificate that is signed by its own key or by that of an authority.
    fn make(&self, who: &str, extension: &str, authority: Option<&str>) {
        let (key, certificate) = (format!("{who}-key.pem"), format!("{who}-cert.pem"));
        let mut openssl = Command::new("openssl");
        openssl.current_dir(&self.0).args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        openssl.args(["-nodes", "-days", "3650", "-subj", &format!("/CN={who}"), "-addext", extension]);
        openssl.args(["-keyout", &key, "-out", &certificate]);
        if let Some(authority) = authority {
            openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
            openssl.args(["-CA", &format!("{authority}-cert.pem"), "-CAkey", &format!("{authority}-key.pem")]);
        }
        let output = openssl.output().expect("these tests need the program openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn server(&self, verify_peer: bool) -> Running {
        let files = tls::Certificates::within(&self.0, verify_peer);
        Running::with(Some(tls::Tls::with_certificates(&files).unwrap().required(true)))
    }

    fn over_tls(&self, uri: Uri) -> Uri {
        Uri { tls: true, tls_certificates: Some(self.0.clone()), ..uri }
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn requests_of_all_lengths_go_through_tls() {
    let pki = Pki::new();
    for verify_peer in [false, true] {
        let server = pki.server(verify_peer);
        for mode in MODES {
            for uri in [server.unix(), server.tcp()] {
                let uri: Uri = pki.over_tls(uri).to_string().parse().unwrap();
                let mut client = Client::connect(&uri, &options().mode(mode)).unwrap();
                let mut back = Vec::new();
                for len in [1, 100, 16384, 16385, 1 << 20, 5_000_000] {
                    let data: Vec<u8> = (0..len).map(|n: u32| (n / 5) as u8 ^ len as u8).collect();
                    client.write(77, &data).unwrap();
                    back.resize(data.len(), 0);
                    client.read(77, &mut back).unwrap();
                    assert!(back == data, "{len} bytes, {mode:?}");
                }
                client.disconnect().unwrap();
            }
        }
        assert_eq!(list(&pki.over_tls(server.unix()), &options()).unwrap().len(), 3);
        assert_eq!(info(&pki.over_tls(server.tcp()), &options()).unwrap().size(), SIZE);
    }
}

#[test]
fn many_requests_in_flight_both_ways() {
    let pki = Pki::new();
    let server = pki.server(false);
    let mut engine = Engine::connect(&pki.over_tls(server.tcp()), &options()).unwrap();
    for n in 0..32_u64 {
        engine.submit(Request::write(n << 20, vec![n as u8; 1 << 20])).unwrap();
        engine.submit(Request::read(SIZE / 2 + (n << 20), 1 << 20)).unwrap();
    }
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.progress(&mut done).unwrap();
        assert!(engine.in_flight() == 0 || engine.wait(Some(PATIENCE)).unwrap(), "nothing comes any more");
    }
    assert!(done.len() == 64 && done.iter().all(|done| done.result.is_ok()));
    drop(engine);
    let mut client = Client::connect(&pki.over_tls(server.unix()), &options()).unwrap();
    for n in 0..32 {
        let mut byte = [0];
        client.read((n << 20) + 999, &mut byte).unwrap();
        assert_eq!(byte, [n as u8]);
    }
}

#[test]
fn who_is_not_trusted_gets_no_connection() {
    let (pki, other) = (Pki::new(), Pki::new());
    let server = pki.server(true);
    let refused = |uri: &Uri, options| match Client::connect(uri, &options) {
        Err(Error::Io { what, source }) => format!("{what}: {source}"),
        Err(Error::Closed) => "closed".into(),
        other => panic!("{other:?}"),
    };
    // A server of an authority that is not ours.
    let stranger = Uri { tls_certificates: Some(other.0.clone()), ..pki.over_tls(server.tcp()) };
    assert!(refused(&stranger, options()).starts_with("TLS handshake: "), "{}", refused(&stranger, options()));
    // A server of another name.
    let named = Uri { tls_hostname: Some("other.example".into()), ..pki.over_tls(server.tcp()) };
    assert!(refused(&named, options()).contains("other.example"), "{}", refused(&named, options()));
    let tls = Tls::with_certificates(&Certificates::within(&pki.0)).unwrap();
    assert!(refused(&server.tcp(), options().tls(tls.clone().server_name("other.example"))).contains("other.example"));
    Client::connect(&server.tcp(), &options().tls(tls.server_name("localhost"))).unwrap();
    // A client without a certificate, where the server wants one. It may learn that after its own handshake.
    let nobody = Certificates { client: None, ..Certificates::within(&pki.0) };
    let nobody = Tls::with_certificates(&nobody).unwrap();
    let text = refused(&server.tcp(), options().tls(nobody));
    assert!(text == "closed" || text.contains("ertificate"), "{text}");
    // Plain text, where the server wants TLS.
    let plain = Client::connect(&server.tcp(), &options());
    assert!(matches!(&plain, Err(Error::Refused { code: Rep::ERR_TLS_REQD, .. })), "{plain:?}");
}

#[test]
fn a_server_without_tls_gets_no_plain_text() {
    let (pki, server) = (Pki::new(), Running::start());
    for outcome in [
        Client::connect(&pki.over_tls(server.unix()), &options()).map(drop),
        list(&pki.over_tls(server.tcp()), &options()).map(drop),
    ] {
        assert!(matches!(&outcome, Err(Error::Refused { option: Opt::STARTTLS, .. })), "{outcome:?}");
    }
}

/// What a third party put behind the server's answer, before TLS has begun.
#[test]
fn plain_text_between_starttls_and_tls_is_refused() {
    let pki = Pki::new();
    let tls = Tls::with_certificates(&Certificates::within(&pki.0)).unwrap();
    let ack = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], b"\0\0\0\x05\0\0\0\x01\0\0\0\0"].concat();
    let said = [b"NBDMAGICIHAVEOPT\0\x03".as_slice(), &ack, &ack].concat();
    let refused = |outcome: Result<(), Error>| match outcome {
        Err(Error::Protocol(text)) => assert!(text.contains("plain text after the answer to STARTTLS"), "{text}"),
        other => panic!("{other:?}"),
    };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&said).unwrap();
    refused(Client::over(ours.into(), &options().tls(tls.clone())).map(drop));
    let path = pki.0.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            socket.write_all(&said).unwrap();
            let _ = socket.read_to_end(&mut Vec::new());
        });
        refused(list(&Uri::new(Address::Unix(path.clone())), &options().tls(tls)).map(drop));
    });
}

#[test]
fn certificates_that_cannot_be_read_are_named() {
    let pki = Pki::new();
    let without = |ca: &Path| Tls::with_certificates(&Certificates { ca: ca.into(), client: None }).unwrap_err();
    let error = without(&pki.0.join("none.pem")).to_string();
    assert!(error.contains("none.pem: "), "{error}");
    let error = without(&pki.0.join("ca-key.pem")).to_string();
    assert!(error.contains("ca-key.pem: there is no certificate in it"), "{error}");
}
