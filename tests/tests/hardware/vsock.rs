//! Clients on vsock. The machine's kernel can connect to itself with CID 1.

use nbdblk_tests::{Dir, Nbdblk, assert_equal, nbdsh, tool, write_runs};

use crate::target::check;

const SIZE: u64 = 24 << 20;
const PORT: u32 = 20809;

#[test]
fn vsock() {
    check("vsock", exchange);
}

#[test]
fn a_client_survives_an_upgrade() {
    check("vsock", upgraded);
}

fn upgraded() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 1 << 20);
    let port = PORT + 1;
    let args = ["io_uring=disk.raw", "--control", "control.sock", &format!("--vsock={port}")];
    let server = Nbdblk::unix(&dir, &args);
    let script = format!(
        "import os, subprocess\n\
         for n in range(1, 4):\n  \
           h.pwrite(bytes([n]) * 65536, 0)\n  \
           subprocess.check_call([os.environ['NBDBLK_BIN'], 'upgrade', '--control', '{}'], stdout=subprocess.DEVNULL)\n  \
           assert h.pread(65536, 0) == bytes([n]) * 65536\n\
         print('went on')",
        dir.text("control.sock")
    );
    assert_eq!(nbdsh(&format!("nbd+vsock://1:{port}"), &script).trim(), "went on");
    assert!(server.terminate().success());
}

fn exchange() {
    let dir = Dir::new();
    let (image, copy) = (dir.text("image.raw"), dir.text("copy.raw"));
    write_runs(image.as_ref(), SIZE, [(0, SIZE - 4096)]);
    let exports = [format!("memory={SIZE}"), "mine:memory=1M".into(), "others:memory=2M".into()];
    let options = [&format!("--vsock={PORT}"), "--allow=mine:cid=1", "--allow=others:cid=2"];
    let server = Nbdblk::unix(&dir, &[&exports.each_ref().map(String::as_str)[..], &options].concat());
    let uri = format!("nbd+vsock://1:{PORT}");
    assert!(server.log().contains(&format!("\n{uri}\n")), "{}", server.log());
    // Requests of 4 MiB need many turns of the socket's buffer, which has 256 KiB.
    for size in ["--request-size=4096", "--request-size=4194304"] {
        copied(&[size, &image, &uri]);
        copied(&[size, &uri, &copy]);
        assert_equal(image.as_ref(), copy.as_ref());
    }
    assert_eq!(nbdsh(&format!("{uri}/mine"), "print(h.get_size())").trim(), "1048576");
    for refused in [format!("{uri}/others"), server.uri_of("mine")] {
        let output = tool("nbdinfo").args(["--size", &refused]).run();
        assert!(!output.status.success(), "{refused}: {output:?}");
    }
    assert!(server.terminate().success());
}

/// Copies with nbdcopy. At its end, nbdcopy may find that the server has closed the connection first: after shutdown() by a
/// client, Linux (6.12, `vsock_shutdown`) forgets that the other side has closed in an orderly way.
fn copied(args: &[&str]) {
    let output = tool("nbdcopy").args(args).run();
    let hung_up = output.err.ends_with("nbd_shutdown: recv: Transport endpoint is not connected\n");
    assert!(output.status.success() || hung_up, "nbdcopy {args:?}: {}", output.err);
}
