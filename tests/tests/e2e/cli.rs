//! The command line: its output, its errors, and its exit status.

use std::os::unix::net::UnixListener;

use nbdblk_tests::{Dir, Nbdblk, nbdblk, tool};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::MIB;

/// The command fails at once with status 1 and one line that contains all `words`, and nothing listens.
pub(crate) fn check_refused(dir: &Dir, args: &[&str], words: &[&str]) {
    let socket = dir.text("refused.sock");
    // Without a backtrace, which the environment may request.
    let output = nbdblk()
        .args(["serve"])
        .args(args)
        .args(["--unix", &socket])
        .env("RUST_BACKTRACE", "1")
        .within(dir.path())
        .run();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    assert_eq!(output.err.trim_end().lines().count(), 1, "{args:?}: one line, not\n{}", output.err);
    for word in words {
        assert!(output.err.contains(word), "{args:?}: no {word:?} in {:?}", output.err);
    }
    assert!(output.out.is_empty(), "{args:?}: {output:?}");
    assert!(!dir.at("refused.sock").exists(), "{args:?}: something listens");
}

#[test]
fn devices_that_cannot_be_served_are_errors_at_start() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    std::fs::create_dir(dir.at("dir")).unwrap();
    let rows: &[(&[&str], &[&str])] = &[
        (&["nosuch=disk.raw"], &["nosuch"]),
        (&["disk.raw"], &["did you mean io_uring=disk.raw?"]),
        (&["file=disk.raw"], &["did you mean io_uring=disk.raw?"]),
        (&["io_uring=a,b.raw"], &["write \",,\" for a comma in a value: io_uring=a,,b.raw"]),
        (&["io_uring=a,b=c.raw"], &["write \",,\" for a comma in a value: io_uring=a,,b=c.raw"]),
        (&["io_uring=nosuch.raw"], &["nosuch.raw"]),
        (&["io_uring=nosuch/disk.raw"], &["nosuch/disk.raw"]),
        (&["io_uring=dir"], &["dir"]),
        (&["io_uring=/dev/null"], &["/dev/null"]),
        (&["io_uring="], &["io_uring"]),
        (&["io_uring=disk.raw,nosuch=1"], &["nosuch"]),
        (&["io_uring=disk.raw,direct=perhaps"], &["direct", "perhaps"]),
        (&["io_uring=disk.raw,num-entries=many"], &["num-entries", "many"]),
        (&["vhost-user=nosuch.sock"], &["nosuch.sock"]),
        (&["vhost-user=disk.raw"], &["disk.raw"]),
        (&["vhost-user=disk.raw,num-queues=none"], &["num-queues", "none"]),
        (&["vhost-user=disk.raw,queue-size=3"], &["queue-size"]),
        (&["memory=plenty"], &["plenty"]),
        (&["memory=99999999999999999999"], &["99999999999999999999"]),
        (&["a:memory=1M", "a:memory=2M"], &["a"]),
        (&["memory=1M", "io_uring=nosuch.raw"], &["nosuch.raw"]),
    ];
    rows.iter().for_each(|(args, words)| check_refused(&dir, args, words));
}

#[test]
fn an_unwritable_file_is_served_read_only_or_refused_with_its_name() {
    let dir = Dir::new();
    let path = dir.sparse("disk.raw", MIB);
    let mut permissions = std::fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).unwrap();
    // With -r it is always served. Root may write anything, so there is no other check.
    let server = Nbdblk::unix(&dir, &["-r", "io_uring=disk.raw"]);
    assert_eq!(nbdblk_tests::nbdinfo(&server.uri())["exports"][0]["is_read_only"], true);
}

#[test]
fn a_socket_that_never_answers_is_an_error_in_bounded_time() {
    let dir = Dir::new();
    let _listener = UnixListener::bind(dir.at("mute.sock")).unwrap();
    check_refused(&dir, &["vhost-user=mute.sock"], &["mute.sock"]);
}

#[test]
fn an_address_in_use_is_an_error() {
    let dir = Dir::new();
    let server = Nbdblk::tcp(&dir, &["memory=1M"]);
    let nbdblk_tests::Address::Tcp(address) = server.address() else { unreachable!("a TCP server") };
    let output = nbdblk().args(["serve", "memory=1M", "--port", &address.port().to_string()]).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.err.contains(&address.port().to_string()), "{output:?}");
    // A unix socket is not taken from a server that listens on it.
    let server = Nbdblk::unix(&dir, &["memory=1M"]);
    let nbdblk_tests::Address::Unix(path) = server.address() else { unreachable!("a unix server") };
    let output = nbdblk().args(["serve", "memory=2M", "--unix", path.to_str().unwrap()]).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(tool("nbdinfo").args(["--size", &server.uri()]).ok().out.trim(), "1048576");
}

#[test]
fn run_gives_the_command_its_uri_and_ends_with_its_status() {
    let dir = Dir::new();
    let run = |command: &str| nbdblk().args(["serve", "memory=1M", "--run", command]).within(dir.path()).run();
    let output = run(r#"nbdinfo --size "$uri""#);
    assert_eq!((output.status.code(), output.out.trim()), (Some(0), "1048576"), "{output:?}");
    assert_eq!(run("exit 7").status.code(), Some(7));
    let output = run(r#"test -S "$unixsocket" && echo "$unixsocket""#);
    assert!(output.status.success(), "{output:?}");
    assert!(!std::path::Path::new(output.out.trim()).exists(), "the private socket is gone afterwards");
    // Killed by a signal: the status is that of a shell, or at least not success.
    assert!(!run("kill -9 $$").status.success());
}

#[test]
fn run_uses_the_given_listener() {
    let dir = Dir::new();
    let command = r#"nbdinfo --size "$uri"; echo "$uri""#;
    for listener in [&["--port", "0"][..], &["--unix", "here.sock"]] {
        let output =
            nbdblk().args(["serve"]).args(listener).args(["memory=1M", "--run", command]).within(dir.path()).ok();
        let (size, uri) = output.out.trim().split_once('\n').expect("two lines");
        assert_eq!(size, "1048576");
        assert_eq!(uri.starts_with("nbd+unix"), listener[0] == "--unix", "{uri}");
    }
}

#[test]
fn the_unix_socket_is_removed_at_the_end_and_a_stale_one_is_taken_over() {
    let dir = Dir::new();
    drop(UnixListener::bind(dir.at("stale.sock")).unwrap());
    let mut server = nbdblk()
        .args(["serve", "memory=1M", "--print-uri", "-U", "stale.sock"])
        .within(dir.path())
        .spawn(dir.at("log"));
    server.await_text("nbd+unix:");
    assert!(
        tool("nbdinfo").args(["--size", "nbd+unix:///?socket=stale.sock"]).within(dir.path()).run().status.success()
    );
    server.signal(Signal::SIGINT);
    let (status, log) = server.await_end();
    assert!(status.success(), "{status}: {log}");
    assert!(!dir.at("stale.sock").exists());
}

#[test]
fn a_relative_path_works_and_so_do_the_names_of_libblkio() {
    let dir = Dir::new();
    std::fs::create_dir(dir.at("sub")).unwrap();
    let image = dir.sparse("sub/disk.raw", 3 * MIB);
    let qsd = nbdblk_tests::Qsd::start(&dir, &image, nbdblk_tests::Export::default());
    for spec in [
        "io_uring=sub/disk.raw",
        "io_uring=sub/disk.raw,num-queues=1",
        "io_uring=sub/disk.raw,num-queues=1,num-entries=64",
        "io_uring=sub/disk.raw,read-only=true",
        "vhost-user=vhost.sock",
        "virtio-blk-vhost-user=vhost.sock",
        "virtio-blk-vhost-user=vhost.sock,num-queues=1,queue-size=64",
    ] {
        let server = Nbdblk::unix(&dir, &[spec]);
        assert_eq!(tool("nbdinfo").args(["--size", &server.uri()]).ok().out.trim(), (3 * MIB).to_string(), "{spec}");
        assert!(server.terminate().success());
    }
    drop(qsd);
}

#[test]
fn it_listens_on_the_given_address() {
    let dir = Dir::new();
    let server = Nbdblk::tcp(&dir, &["memory=1M", "-i", "127.0.0.1"]);
    assert_eq!(tool("nbdinfo").args(["--size", &server.uri()]).ok().out.trim(), "1048576");
    let server = Nbdblk::tcp(&dir, &["memory=1M", "--ip-addr", "0.0.0.0"]);
    assert_eq!(tool("nbdinfo").args(["--size", &server.uri()]).ok().out.trim(), "1048576");
    let output = nbdblk().args(["serve", "memory=1M", "-i", "300.1.1.1"]).run();
    assert!(!output.status.success(), "{output:?}");
}

#[test]
fn help_and_version() {
    let version = nbdblk().args(["--version"]).ok().out;
    assert!(version.starts_with("nbdblk 0."), "{version}");
    let help = nbdblk().args(["serve", "--help"]).ok().out;
    for word in
        ["--unix", "--port", "--ip-addr", "--read-only", "--print-uri", "--run", "vhost-user", "io_uring", "nbdsh"]
    {
        assert!(help.contains(word), "no {word} in the help:\n{help}");
    }
}

#[test]
fn drivers_are_listed_with_their_properties() {
    let text = nbdblk().args(["drivers"]).ok().out;
    for driver in ["io_uring", "vhost-user", "memory", "null"] {
        assert!(text.contains(driver), "{text}");
        let json = nbdblk().args(["drivers", driver, "--json"]).ok().out;
        serde_json::from_str::<Value>(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
    }
    let properties = nbdblk().args(["drivers", "io_uring"]).ok().out;
    for word in ["direct", "num-entries", "read-only", "false"] {
        assert!(properties.contains(word), "no {word} in\n{properties}");
    }
    assert_eq!(nbdblk().args(["drivers", "nosuch"]).run().status.code(), Some(1));
}

#[test]
fn info_prints_limits() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 5 * MIB);
    let text = nbdblk().args(["info", "io_uring=disk.raw"]).within(dir.path()).ok().out;
    assert!(text.contains("5242880"), "{text}");
    let json = nbdblk().args(["info", "io_uring=disk.raw", "--json"]).within(dir.path()).ok().out;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["properties"]["capacity"], 5 * MIB, "{json:#}");
    let output = nbdblk().args(["info", "io_uring=nosuch.raw"]).within(dir.path()).run();
    assert_eq!((output.status.code(), output.err.trim_end().lines().count()), (Some(1), 1), "{output:?}");
}

#[test]
fn a_path_may_have_any_bytes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let dir = Dir::new();
    for (name, spec) in [(&b"a,b\xff.raw"[..], &b"io_uring=a,,b\xff.raw"[..]), (b"\xfe", b"x:io_uring,path=\xfe")] {
        let file = std::fs::File::create(dir.path().join(OsStr::from_bytes(name))).unwrap();
        file.set_len(MIB).unwrap();
        let spec = OsStr::from_bytes(spec);
        let run = [OsStr::new("--run"), OsStr::new("nbdinfo --size \"$uri\"")];
        let output = nbdblk().args(["serve"]).args([spec]).args(run).within(dir.path()).ok();
        assert_eq!(output.out.trim(), "1048576", "{output:?}");
        if name.len() > 1 {
            let text = nbdblk().args(["info"]).args([spec]).within(dir.path()).ok().out;
            assert!(text.contains("1048576"), "{text}");
        }
    }
    let gone = OsStr::from_bytes(b"io_uring=\xff.gone");
    let output = nbdblk().args(["info"]).args([gone]).within(dir.path()).run();
    assert!(output.status.code() == Some(1) && output.err.contains(".gone"), "{output:?}");
}

#[test]
fn an_image_in_a_format_is_served_with_a_warning() {
    let dir = Dir::new();
    for format in ["qcow2", "vmdk", "vdi", "vhdx", "qed", "vpc", "luks", "raw"] {
        let path = dir.text(format);
        let mut create = vec!["create", "-q", "-f", format];
        if format == "luks" {
            create.extend(["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]);
        }
        tool("qemu-img").args(create).args([path.as_str(), "1M"]).ok();
        let spec = format!("io_uring={path}");
        let output = nbdblk().args(["serve", &spec, "--run", "nbdinfo --size \"$uri\""]).ok();
        assert_eq!(output.out.trim(), std::fs::metadata(&path).unwrap().len().to_string());
        let warns = output.err.contains("qemu-storage-daemon") && output.err.contains(&path);
        assert_eq!(warns, format != "raw", "{format}: {}", output.err);
        assert!(format == "raw" || output.err.contains(format), "{format}: {}", output.err);
    }
}
