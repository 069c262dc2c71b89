//! TLS in the kernel, which only the machine's kernel supports.

use nbdblk_tests::tls_clients::{self, Credentials, check_column};
use nbdblk_tests::{Dir, Nbdblk, Pki, Version, tls_records};

use crate::target::check;

#[test]
fn in_the_kernel() {
    check("tls", exchange);
}

fn exchange() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let memory = format!("memory={}", tls_clients::SIZE);
    let tls = ["--tls=require", "--tls-verify-peer", "--tls-certificates", pki.dir()];
    let server = Nbdblk::tcp(&dir, &[&["-v", &memory], &tls[..]].concat());
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
