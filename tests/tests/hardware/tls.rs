//! TLS in the kernel, which only the machine's kernel supports.

use nbdblk_tests::raw::{Mode, Raw};
use nbdblk_tests::tls_clients::{self, Credentials, check_column};
use nbdblk_tests::{Dir, Nbdblk, Pki, Version, nbdblk, tls_records};

use crate::target::check;

#[test]
fn in_the_kernel() {
    check("tls", exchange);
}

/// A server on TCP, for clients with a certificate.
fn start(dir: &Dir, pki: &Pki, args: &[&str]) -> Nbdblk {
    let tls = ["--tls=require", "--tls-verify-peer", "--tls-certificates", pki.dir()];
    Nbdblk::tcp(dir, &[args, &tls].concat())
}

fn exchange() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let memory = format!("memory={}", tls_clients::SIZE);
    let server = start(&dir, &pki, &["-v", &memory]);
    for version in Version::BOTH {
        let credentials = Credentials::Certificates(&pki);
        check_column(&format!("{version}, kernel"), &dir, &server, credentials, version);
        tls_records::check(&server, &pki, version);
    }
    let log = server.log();
    let opened: Vec<_> = log.lines().filter(|line| line.contains(" opens export ")).collect();
    assert!(!opened.is_empty() && opened.iter().all(|line| line.ends_with(" in the kernel")), "{opened:#?}");
    assert!(server.terminate().success());
}

/// When the server is replaced, the kernel still has the keys, so clients go on. Only a key that must change ends a connection.
#[test]
fn clients_in_the_kernel_survive_an_upgrade() {
    check("tls", upgraded);
}

fn upgraded() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    dir.sparse("disk.raw", 4 << 20);
    let server = start(&dir, &pki, &["io_uring=disk.raw", "--control", "control.sock"]);
    let enter = |version| Raw::greeted(server.address()).start_tls(&pki, version).entered(Mode::Structured, "");
    let mut clients = Version::BOTH.map(enter);
    for round in 0..3_u8 {
        for (client, n) in clients.iter_mut().zip(0..) {
            client.write(n << 20, &[round + 1; 300_000]);
        }
        let upgrade = nbdblk().args(["upgrade", "--control", "control.sock"]).within(dir.path());
        let said = upgrade.ok().out;
        assert!(said.contains("2 clients go on") && !said.contains("disconnected"), "{said}");
        for (client, n) in clients.iter_mut().zip(0..) {
            assert!(client.read(n << 20, 300_000).iter().all(|&byte| byte == round + 1), "round {round}");
        }
    }
    for (mut client, version) in clients.into_iter().zip(Version::BOTH) {
        if version == Version::Tls13 {
            client.change_keys();
            let _ = client.try_send(&[0; 28]);
            client.await_end().expect_err("the server ends such a connection");
        }
        assert!(enter(version).read(0, 4096).iter().all(|&byte| byte == 3));
    }
    assert!(server.terminate().success());
}
