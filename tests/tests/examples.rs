//! The examples of the libraries: each one is built and run, and does what its first lines say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nbdblk_tests::{Cmd, Daemon, Dir, Export, Nbdblk, Output, Pki, Qsd, assert_equal, cargo, eventually, nbdsh, tool};
use serde_json::Value;

/// An example of a library, and what it must do.
struct Row {
    package: &'static str,
    example: &'static str,
    /// Cargo features in addition to the default ones.
    features: &'static str,
    must: Must,
}

/// What an example must do, in a directory with the image `disk.img` ([`disk`]).
enum Must {
    /// Succeed with these arguments, and print these texts, in which `#` is any number.
    Print(&'static [&'static str], &'static [&'static str]),
    /// As `Print`, next to a qemu-storage-daemon that serves `disk.img` on `vhost.sock`.
    PrintBehindQsd(&'static [&'static str], &'static [&'static str]),
    /// Fail with these arguments and status 1, with one line on standard error, which contains the text. For hardware that no test
    /// machine has.
    Fail(&'static [&'static str], &'static str),
    /// Serve its clients.
    Serve(fn(&Dir, Cmd)),
}

use Must::{Fail, Print, PrintBehindQsd, Serve};

const fn row(package: &'static str, example: &'static str, must: Must) -> Row {
    Row { package, example, features: "", must }
}

/// A PCI address that no machine has: the last function of the last bus.
const NO_PCI: &str = "ffff:ff:1f.7";

const EXAMPLES: &[Row] = &[
    row("blkdev", "channel_cost", Print(&["10"], &[])),
    row(
        "blkdev",
        "ram_disk",
        Print(&[], &["\"what goes in comes out\" at byte 1000 of 1073741824\n", "Hole: # bytes"]),
    ),
    row("blkdev-drivers", "open", Print(&["io_uring=disk.img"], &["driver: \"io_uring\"", "\npath = disk.img\n"])),
    row("blkdev-drivers", "raw", Print(&["io_uring=disk.img", "read", "4096", "8", "1"], &["# #\n"])),
    row("blkdev-io-uring", "depth", Print(&["disk.img"], &["1000448 bytes, sum 125051953, # MiB/s\n"])),
    row(
        "blkdev-io-uring",
        "io_uring_qd",
        Print(&["disk.img"], &["# ns/op, # ns/op of CPU time, # operations, # sleeps\n"]),
    ),
    row("blkdev-io-uring", "io_uring_read", Print(&["disk.img"], &["1000448 bytes\n", "\n0010  10 11 12 13 "])),
    row(
        "blkdev-io-uring",
        "tokio",
        Print(
            &["disk.img", "disk.img"],
            &["disk.img: 1000448 bytes, sum 125051953\ndisk.img: 1000448 bytes, sum 125051953\n"],
        ),
    ),
    row("blkdev-libblkio", "baseline", Print(&["io_uring", "disk.img", "read", "4096", "8", "1"], &["# #\n"])),
    row("blkdev-libblkio", "libblkio_info", Print(&["io_uring", "path=disk.img"], &["1000448 bytes\n"])),
    row("blkdev-nvme", "nvme_info", Fail(&[NO_PCI], NO_PCI)),
    row("blkdev-ring", "count", Print(&["disk.img"], &["3986 of 1000448 bytes are zero\n"])),
    row("blkdev-vdpa", "vdpa_info", Fail(&["/dev/vhost-vdpa-9999"], "/dev/vhost-vdpa-9999")),
    row("blkdev-vfio", "registers", Fail(&[NO_PCI], NO_PCI)),
    row(
        "blkdev-vhost-user",
        "vhost_user_qd",
        PrintBehindQsd(&["vhost.sock", "4", "wake", "1"], &["depth 4: # ns a request, # ns of it in this process"]),
    ),
    row(
        "blkdev-vhost-user",
        "vhost_user_read",
        PrintBehindQsd(&["vhost.sock"], &["0000: 00 01 02 03 ", "\n01f0: f5 f6 "]),
    ),
    row("blkdev-virtio", "cost", Print(&["4", "packed", "10"], &["push: # ns a request", "reap: # ns a request"])),
    row("blkdev-virtio-pci", "virtio_pci_info", Fail(&[NO_PCI], NO_PCI)),
    row("nbd-client", "cat", Serve(cat)),
    row("nbd-proto", "codec_cost", Print(&["10"], &[])),
    row(
        "nbd-proto",
        "conversation",
        Print(&[], &["client gets data \"\\0\\0hello\\0\\0\"\n", "client gets an error for 4: "]),
    ),
    row("nbd-proto", "floor", Serve(floor)),
    Row { features: "tls", ..row("nbd-server-core", "exports", Serve(exports)) },
    row("nbd-server-core", "own_device", Serve(own_device)),
    row("nbd-server-core", "nbd_ram_disk", Serve(nbd_ram_disk)),
];

#[test]
fn every_example_does_what_it_says() {
    let packages: BTreeSet<&str> = EXAMPLES.iter().map(|row| row.package).collect();
    for package in packages {
        let rows: Vec<&Row> = EXAMPLES.iter().filter(|row| row.package == package).collect();
        // Package by package: a feature is one of a package.
        let programs = build(package, &rows);
        for row in rows {
            println!("{package}: {}", row.example);
            run(row, &programs[row.example]);
        }
    }
}

#[test]
fn every_example_of_a_library_is_run() {
    let found: BTreeSet<(String, String)> = examples().into_iter().map(|(package, name, _)| (package, name)).collect();
    let run = EXAMPLES.iter().map(|row| (row.package.to_owned(), row.example.to_owned())).collect();
    let missing: Vec<_> = found.difference(&run).collect();
    assert!(missing.is_empty(), "add a row to EXAMPLES for {missing:?}");
    let gone: Vec<_> = run.difference(&found).collect();
    assert!(gone.is_empty(), "EXAMPLES has rows for {gone:?}, which do not exist");
}

#[test]
fn every_example_begins_with_its_command_line() {
    for (package, name, source) in examples() {
        let text = fs::read_to_string(source).expect("cargo names files that are there");
        let doc: Vec<&str> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let (of, example) = (format!("-p {package} "), format!("--example {name}"));
        let is_command = |line: &&&str| line.contains("cargo run ") && line.contains(&of) && line.contains(&example);
        assert!(doc.iter().any(|line| is_command(&line)), "{package}: {name} does not show `cargo run {of}{example}`");
    }
}

/// The examples of the libraries: package, name and source, from `cargo metadata`.
fn examples() -> Vec<(String, String, PathBuf)> {
    static METADATA: OnceLock<Value> = OnceLock::new();
    let metadata = METADATA.get_or_init(|| {
        let output = cargo().args(["metadata", "--format-version=1", "--no-deps", "--locked"]).output();
        serde_json::from_slice(&output.expect("cargo runs the tests, so it is there").stdout).expect("it prints JSON")
    });
    let text = |value: &Value| value.as_str().expect("it is text").to_owned();
    let list = |value: &Value| value.as_array().expect("it is a list").clone();
    let libraries =
        list(&metadata["packages"]).into_iter().filter(|package| text(&package["manifest_path"]).contains("/crates/"));
    let examples = libraries.flat_map(|package| {
        let name = text(&package["name"]);
        let targets =
            list(&package["targets"]).into_iter().filter(|target| list(&target["kind"]).contains(&"example".into()));
        targets
            .map(|target| (name.clone(), text(&target["name"]), text(&target["src_path"]).into()))
            .collect::<Vec<_>>()
    });
    let examples: Vec<_> = examples.collect();
    assert!(!examples.is_empty(), "the libraries have examples");
    examples
}

/// Builds the examples of a package, with the features that the table gives. Returns the path of each.
fn build(package: &str, rows: &[&Row]) -> BTreeMap<String, PathBuf> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--locked", "-p", package, "--message-format=json-render-diagnostics"]);
    for row in rows {
        command.args(["--example", row.example, "--features", row.features]);
    }
    let output = command.output().expect("cargo runs the tests, so it is there");
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8_lossy(&output.stdout);
    let built = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some((message["target"]["name"].as_str()?.into(), message["executable"].as_str()?.into()))
    });
    built.collect()
}

fn run(row: &Row, program: &Path) {
    let dir = Dir::new();
    fs::write(dir.at("disk.img"), disk()).expect("a new file");
    let cmd = Cmd::new(program).within(dir.path());
    match row.must {
        Print(args, texts) => check_output(cmd, args, texts),
        PrintBehindQsd(args, texts) => {
            let _qsd = Qsd::start(&dir, &dir.at("disk.img"), Export::default());
            check_output(cmd, args, texts);
        }
        Fail(args, text) => {
            let output = cmd.args(args).run();
            let is_line = output.err.lines().count() == 1 && output.err.contains(text) && !output.err.contains('{');
            assert!(output.status.code() == Some(1) && is_line && output.out.is_empty(), "{args:?}: {output:?}");
        }
        Serve(check) => check(&dir, cmd),
    }
}

fn check_output(cmd: Cmd, args: &[&str], texts: &[&str]) {
    let Output { out, err, .. } = cmd.args(args).ok();
    for text in texts {
        assert!(contains(&out, text), "no {text:?} in {out:?}");
    }
    assert!(err.is_empty(), "{err}");
    assert!(!texts.is_empty() || out.is_empty(), "{out}");
}

/// Whether `out` contains `text`, in which `#` is any number.
fn contains(out: &str, text: &str) -> bool {
    let (first, _) = text.split_once('#').unwrap_or((text, ""));
    out.match_indices(first).any(|(at, _)| {
        let mut parts = text.split('#').skip(1);
        let end = parts.try_fold(&out[at + first.len()..], |rest, part| {
            let behind = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
            behind.strip_prefix(part).filter(|_| behind.len() < rest.len())
        });
        end.is_some()
    })
}

#[test]
fn texts_with_numbers_are_found() {
    for (out, text, expected) in [
        ("a 12 b 3.5 c\n", "a # b # c\n", true),
        ("a 12 b 3.5 c\n", "# c", true),
        ("a 12 b 3.5 c\n", "b # d", false),
        ("a x b\n", "a # b", false),
        ("7 a 8\n", "a 8\n", true),
        ("NaN inf\n", "# #\n", false),
    ] {
        assert_eq!(contains(out, text), expected, "{text:?} in {out:?}");
    }
}

/// The image: 1,000,448 bytes, which is no multiple of what the examples read at a time. The byte at `n` is `n` modulo 251.
fn disk() -> Vec<u8> {
    (0..1_000_448u32).map(|n| (n % 251) as u8).collect()
}

/// The size of an export, as nbdinfo sees it; `None`: it cannot be opened.
fn size(dir: &Dir, uri: &str) -> Option<u64> {
    let output = tool("nbdinfo").within(dir.path()).args(["--size", uri]).run();
    output.status.success().then(|| output.out.trim().parse().expect("a number"))
}

/// Starts a server that prints its URI. Returns it with the URI.
fn serving(dir: &Dir, cmd: Cmd) -> (Daemon, String) {
    let mut server = cmd.spawn(dir.at("log"));
    server.await_that("its URI", |log| log.starts_with("nbd") && log.ends_with('\n'));
    let uri = server.log().trim_end().to_owned();
    (server, uri)
}

fn floor(dir: &Dir, cmd: Cmd) {
    let (socket, copy) = (dir.at("floor.sock"), dir.at("copy.img"));
    let _server = cmd.args(["./floor.sock", "disk.img"]).spawn(dir.at("log"));
    eventually("that it listens", || UnixStream::connect(&socket).is_ok());
    tool("nbdcopy").args([&format!("nbd+unix:///?socket={}", socket.display())]).args([&copy]).ok();
    assert_equal(&dir.at("disk.img"), &copy);
}

fn nbd_ram_disk(dir: &Dir, cmd: Cmd) {
    let (_server, uri) = serving(dir, cmd.args([dir.at("nbd.sock")]));
    assert_eq!(size(dir, &uri), Some(1 << 30));
    nbdsh(&uri, "h.pwrite(b'x' * 1000, 77); assert h.pread(1002, 76) == b'\\0' + b'x' * 1000 + b'\\0'");
}

fn cat(dir: &Dir, cmd: Cmd) {
    let server = Nbdblk::unix(dir, &["disk:io_uring=disk.img"]);
    let copy = dir.at("copy.img");
    let cmd = cmd.args([server.uri_of("disk")]).stdout(fs::File::create(&copy).expect("a new file"));
    let (status, log) = cmd.spawn(dir.at("log")).await_end();
    assert!(status.success(), "{log}");
    assert_equal(&dir.at("disk.img"), &copy);
}

fn own_device(dir: &Dir, cmd: Cmd) {
    let (_server, uri) = serving(dir, cmd.args([dir.at("nbd.sock")]));
    let copy = tool("nbdcopy").args([&uri, "-"]).ok().out;
    for (n, line) in copy.lines().enumerate() {
        assert_eq!(line.trim_end(), format!("block {n}"));
    }
    assert_eq!(copy.lines().count(), 1 << 14);
}

fn exports(dir: &Dir, cmd: Cmd) {
    let pki = Pki::new(dir, "pki");
    let (mut server, private) = serving(dir, cmd.args([pki.dir(), "0"]));
    let mut line = |line: &str, reply: &str| {
        let before = server.log().len();
        server.type_line(line);
        server.await_that(reply, |log| log[before..].contains(reply));
    };
    let (place, _) = private.split_once("/private?").expect("the URI names the export");
    let plain = |name: &str| format!("{}/{name}", place.replace("nbds:", "nbd:"));
    let secure = |name: &str| private.replace("/private?", &format!("/{name}?"));

    // The client's certificate names client.example. Without TLS, the private export is not there.
    assert_eq!((size(dir, &secure("public")), size(dir, &private)), (Some(64 << 20), Some(64 << 20)));
    assert_eq!((size(dir, &plain("public")), size(dir, &plain("private"))), (Some(64 << 20), None));
    let list = tool("nbdinfo").args(["--list", &plain("")]).ok().out;
    assert!(list.contains("\"public\"") && !list.contains("private"), "{list}");

    assert_eq!(size(dir, &plain("disk")), None);
    line("add disk 1048576", "ok\n");
    assert_eq!((size(dir, &plain("disk")), size(dir, &secure("disk"))), (Some(1 << 20), Some(1 << 20)));
    line("list", "\ndisk: ");
    line("add disk 1", "error: two exports are named \"disk\"\n");
    line("add other much", "error: invalid digit found in string\n");
    line("remove disk", "ok\n");
    assert_eq!((size(dir, &plain("disk")), size(dir, &plain("public"))), (None, Some(64 << 20)));
    line("remove other", "error: no export is named \"other\"\n");
    line("what", "error: a line is: ");
    server.type_line("quit");
    let (status, log) = server.await_end();
    assert!(status.success(), "{log}");
}
