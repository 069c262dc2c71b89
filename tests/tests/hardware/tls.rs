//! TLS in the kernel, which only the machine's kernel supports. Keys need no tool, unlike certificates.

use nbdblk_tests::{Dir, Nbdblk, Version, assert_equal, eventually, tool, write_runs};

use crate::target::check;

const SIZE: u64 = 24 << 20;

#[test]
fn in_the_kernel() {
    check("tls", exchange);
}

fn exchange() {
    let dir = Dir::new();
    let keys = dir.text("keys.psk");
    std::fs::write(&keys, "alice:00112233445566778899aabbccddeeff\n").unwrap();
    let (image, copy) = (dir.text("image.raw"), dir.text("copy.raw"));
    write_runs(image.as_ref(), SIZE, [(0, SIZE - 4096)]);
    let server = Nbdblk::tcp(&dir, &["-v", &format!("memory={SIZE}"), "--tls=require", "--tls-psk", &keys]);
    let uri = server.printed_uri().replace("//", "//alice@");
    for (version, other, ways) in [
        (Version::Tls12, "disabled-version = tls1.3", "both ways in the kernel"),
        (Version::Tls13, "", "sent by the kernel"),
    ] {
        let config = dir.text("gnutls");
        std::fs::write(&config, format!("[overrides]\n{other}\n")).unwrap();
        let nbdcopy = || tool("nbdcopy").env("GNUTLS_SYSTEM_PRIORITY_FILE", &config);
        nbdcopy().args([&image, &uri]).ok();
        nbdcopy().args([&uri, &copy]).ok();
        assert_equal(image.as_ref(), copy.as_ref());
        let says = |line: &str| line.contains(&format!("{version:?}")) && line.ends_with(ways);
        eventually("the log says how", || server.log().lines().any(says));
    }
    assert!(server.terminate().success());
}
