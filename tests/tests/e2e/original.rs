//! The example that the project began with, unchanged except for the program's name.

use std::net::TcpListener;

use nbdblk_tests::{Cmd, Dir, nbdblk, tool};

const SCRIPT: &str = r#"print("%r" % h.pread(512,0))"#;

#[test]
fn a_qcow2_behind_vhost_user_is_read_from_python_by_two_clients_at_once() {
    let dir = Dir::new();
    std::fs::create_dir(dir.at("files")).unwrap();
    std::fs::write(dir.at("files/hello"), "hello from inside\n").unwrap();
    let here = |program: &str, args: &[&str]| tool(program).args(args).within(dir.path()).ok();
    here("mkfs.ext4", &["-q", "-L", "e2e", "-d", "files", "disk.raw", "64M"]);
    let boot: Vec<u8> = b"the first sector ".iter().copied().cycle().take(512).collect();
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(dir.at("disk.raw")).unwrap(),
        &boot,
        0,
    )
    .unwrap();
    here("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);

    let mut qsd = tool("qemu-storage-daemon")
        .args(["--blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"])
        .args(["--export", "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=sock,writable=on"])
        .args(["--pidfile", "qsd.pid"])
        .within(dir.path())
        .spawn(dir.at("qsd.log"));
    qsd.await_that("its pid file", |_| dir.at("qsd.pid").exists());

    // The default port may be in use on this machine. Then use another one, and keep everything else.
    let free = TcpListener::bind("127.0.0.1:10809").is_ok();
    let mut server =
        nbdblk().args(["serve", "vhost-user=sock", "--print-uri"]).args(if free { vec![] } else { vec!["-p", "0"] });
    server = server.within(dir.path());
    let mut server = server.spawn(dir.at("nbdblk.log"));
    server.await_text("nbd://");
    let uri = if free {
        "nbd://localhost".to_owned()
    } else {
        server.log().lines().find(|line| line.starts_with("nbd://")).expect("the URI is printed").to_owned()
    };

    // Newer libraries print bytes, older ones a bytearray.
    let expected = format!("b'{}'", String::from_utf8(boot).unwrap());
    let nbdsh = |script: &str| -> Cmd { tool("nbdsh").args(["-u", &uri, "-c", script]) };
    // The first client reads and stays connected. It reads again after the second has connected, read and left.
    let mut first = nbdsh(&format!("{SCRIPT}\nimport sys; sys.stdout.flush(); input()\n{SCRIPT}\nprint('the end')"))
        .spawn(dir.at("first.log"));
    first.await_text(&expected);
    assert!(nbdsh(SCRIPT).ok().out.contains(&expected));
    first.type_line("go on");
    first.await_text("the end");
    assert!(first.await_end().0.success());

    // And the file is in it.
    here("nbdcopy", &[&uri, "copy.raw"]);
    assert_eq!(here("debugfs", &["-R", "cat /hello", "copy.raw"]).out, "hello from inside\n");

    server.signal(nix::sys::signal::Signal::SIGTERM);
    let (status, log) = server.await_end();
    assert!(status.success(), "{status}: {log}");
}
