//! The server reads its file of exports again while it serves real clients.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Dir, Nbdblk, Output, Pki, Version, eventually, nbdblk, nbdinfo, nbdsh, tool};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::MIB;

/// ESHUTDOWN, as on the wire.
const SHUTDOWN: u32 = 108;

/// A server with a file of exports; the first export stays.
struct Fleet {
    dir: Dir,
    server: Nbdblk,
}

impl Fleet {
    fn start(exports: &str) -> Self {
        let dir = Dir::new();
        dir.sparse("disk.raw", 16 * MIB);
        write(&dir, exports);
        let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
        Self { dir, server }
    }

    /// `nbdblk reload`, with these exports in the file.
    fn reload(&self, exports: &str) -> Output {
        write(&self.dir, exports);
        nbdblk().args(["reload", "nbdblk.toml"]).within(self.dir.path()).run()
    }

    /// The new exports are accepted, with these changes.
    #[track_caller]
    fn change(&self, exports: &str, changes: &str) {
        let Output { status, out, err } = self.reload(exports);
        assert_eq!((status.code(), out.trim_end(), err.as_str()), (Some(0), changes, ""));
    }

    /// They are refused, with all these words.
    #[track_caller]
    fn refuse(&self, exports: &str, words: &[&str]) {
        let Output { status, out, err } = self.reload(exports);
        assert_eq!((status.code(), out.as_str(), err.lines().count()), (Some(1), "", 1), "{err}");
        for word in words {
            assert!(err.contains(word), "{word} in {err}");
        }
    }

    fn enter(&self, name: &str) -> Raw {
        Raw::enter(self.server.address(), Mode::Structured, name)
    }

    fn has(&self, name: &str) -> bool {
        tool("nbdinfo").args(["--size", &self.server.uri_of(name)]).run().status.success()
    }
}

fn write(dir: &Dir, exports: &str) {
    let stays = "[[export]]\nname = \"stays\"\ndevice = \"io_uring=disk.raw\"\n";
    std::fs::write(dir.at("new.toml"), format!("control = \"control.sock\"\n{stays}{exports}")).unwrap();
    // Atomically, so that the server never reads half of it.
    std::fs::rename(dir.at("new.toml"), dir.at("nbdblk.toml")).unwrap();
}

fn export(name: &str, device: &str, more: &str) -> String {
    format!("[[export]]\nname = \"{name}\"\ndevice = \"{device}\"\n{more}\n")
}

#[test]
fn exports_come_change_and_go_while_fio_works_on_another() {
    let fleet = Fleet::start("");
    let fio = tool("fio")
        .args([
            "--name=busy",
            "--ioengine=nbd",
            "--thread",
            "--rw=randrw",
            "--bsrange=4k-64k",
            "--size=16m",
            "--loops=20",
        ])
        .args(["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
        .args([format!("--uri={}", fleet.server.uri_of("stays"))]);
    let mut fio = fio.within(fleet.dir.path()).spawn(fleet.dir.at("fio.log"));
    let mut rounds = 0;
    while fio.is_alive() {
        for removal in ["hide", "soft", "hard"] {
            let words = format!("on-remove = \"{removal}\"");
            fleet.change(&export("x", "memory=1M", &words), "added: \"x\"");
            assert_eq!(nbdinfo(&fleet.server.uri_of("x"))["exports"][0]["export-size"], MIB);
            let mut client = fleet.enter("x");
            client.write(0, b"old");
            fleet.change(&export("x", "memory=2M", &words), "reopened: \"x\"");
            assert_eq!(nbdinfo(&fleet.server.uri_of("x"))["exports"][0]["export-size"], 2 * MIB);
            match removal {
                "hide" => assert_eq!(client.read(0, 3), b"old"),
                "soft" => assert_eq!(client.call(0, cmd::READ, 0, 3, b"").error, SHUTDOWN),
                _ => drop(client.await_close()),
            }
            fleet.change("", &format!("removed: \"x\" ({removal})"));
            assert!(!fleet.has("x"));
        }
        rounds += 1;
    }
    let (status, log) = fio.await_end();
    assert!(status.success() && rounds > 0, "{rounds} rounds\n{log}");
    assert!(fleet.server.terminate().success());
    assert!(!fleet.dir.at("control.sock").exists());
}

#[test]
fn changed_properties_apply_to_new_clients() {
    let fleet = Fleet::start(&export("x", "memory=1M", "on-remove = \"hard\""));
    let mut client = fleet.enter("x");
    let words =
        "on-remove = \"hard\"\ndescription = \"new\"\nallow = [\"uid=0\", \"uid=4294967294\", \"ip=10.0.0.0/8\"]";
    fleet.change(&export("x", "memory=1M", words), "updated: \"x\"");
    client.write(0, b"goes on");
    // Only clients that match a rule can see it; other clients do not notice.
    fleet.change(&export("x", "memory=1M", "allow = \"uid=4294967294\""), "updated: \"x\"");
    assert!(!fleet.has("x"));
    assert_eq!(client.read(0, 7), b"goes on");
    fleet.change(&export("x", "memory=1M", ""), "updated: \"x\"");
    fleet.change(&export("x", "memory=1M", ""), "nothing has changed");
    assert_eq!(nbdsh(&fleet.server.uri_of("x"), "print(h.pread(7, 0))").trim(), "bytearray(b'goes on')");
}

#[test]
fn an_invalid_file_changes_nothing() {
    let x = export("x", "memory=1M", "");
    let fleet = Fleet::start(&x);
    let mut client = fleet.enter("x");
    let mode = std::fs::metadata(fleet.dir.at("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "no other user may request a reload");
    let wrong = [
        ("[[export]]\nname = \"y\"\ndevice = \"memory=1M\"\n[[export]]\nname = 7\n", "9:8", "TOML integer"),
        ("[[export]]\nname = \"y\"\ndevice = \"io_uring=gone.raw\"\n", "7:10", "gone.raw"),
        (
            "[[export]]\nname = \"x\"\ndevice = \"memory=2M\"\ncolour = 1\n",
            "8:1",
            "unknown setting of an export \"colour\"",
        ),
    ];
    for (exports, place, words) in wrong {
        fleet.refuse(exports, &[&format!("nbdblk.toml:{place}: "), words]);
        client.write(0, b"still");
        assert!(fleet.has("x") && !fleet.has("y"));
    }
    fleet.change(&x, "nothing has changed");
    fleet.change(&format!("{x}{}", export("y", "null=1M", "")), "added: \"y\"");
    // A setting that does not concern exports.
    let text = std::fs::read_to_string(fleet.dir.at("nbdblk.toml")).unwrap();
    std::fs::write(fleet.dir.at("nbdblk.toml"), format!("threads = 1\nmemory = \"2M\"\n{text}")).unwrap();
    let told = nbdblk().args(["reload", "--control", "control.sock"]).within(fleet.dir.path()).ok().out;
    assert_eq!(told.trim_end(), "not before the next start: threads, memory");

    let Fleet { dir, server } = fleet;
    assert!(server.terminate().success());
    let Output { status, err, .. } = nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).run();
    assert!(status.code() == Some(1) && err.contains("cannot reach the server at control.sock"), "{err}");
}

#[test]
fn renewed_certificates_are_used() {
    let dir = Dir::new();
    let (old, new) = (Pki::new(&dir, "old"), Pki::new(&dir, "new"));
    let write = |tls: &str| {
        let text = format!("control = \"control.sock\"\n{tls}\n[[export]]\ndevice = \"memory=1M\"\n");
        std::fs::write(dir.at("nbdblk.toml"), text).unwrap();
    };
    let reload = || nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).run();
    let enter = |server: &Nbdblk, pki| {
        let mut client = Raw::greeted(server.address()).start_tls(pki, Version::Tls13);
        client.go("");
        client
    };
    write("tls = \"require\"\ntls-certificates = \"old\"");
    let server = Nbdblk::tcp(&dir, &["--config", "nbdblk.toml"]);
    let mut first = enter(&server, &old);
    // With the same names, like renewed certificates.
    std::fs::rename(dir.at("old"), dir.at("past")).unwrap();
    std::fs::rename(dir.at("new"), dir.at("old")).unwrap();
    assert_eq!(reload().out.trim_end(), "nothing has changed");
    first.write(0, b"goes on");
    let ask = |name: &str| {
        let ca = dir.text(name);
        let uri = server.printed_uri().replace(&dir.text("old"), &ca);
        let connect = format!("h.set_uri_allow_local_file(True); h.connect_uri({uri:?}); print(h.pread(7, 0))");
        tool("nbdsh").args(["-c", &connect]).run()
    };
    assert_eq!(ask("old").out.trim_end(), "bytearray(b'goes on')", "{}", server.log());
    assert!(!ask("past").status.success(), "a client with the old authority does not trust the new one");
    // Missing certificates leave everything unchanged, and TLS can be switched off.
    write("tls = \"require\"\ntls-certificates = \"gone\"");
    let refused = reload();
    assert!(refused.status.code() == Some(1) && refused.err.contains("nbdblk.toml:2:1: TLS with"), "{}", refused.err);
    assert!(ask("old").status.success());
    write("");
    assert_eq!(reload().out.trim_end(), "set: tls, tls-certificates");
    assert_eq!(Raw::enter(server.address(), Mode::Structured, "").read(0, 7), b"goes on");
    first.write(0, b"still");
    drop((new, server));
}

#[test]
fn many_reloads_disturb_no_client_and_leak_nothing() {
    let fleet = Fleet::start("");
    let hang_up = |exports: &str| {
        write(&fleet.dir, exports);
        kill(Pid::from_raw(fleet.server.pid() as i32), Signal::SIGHUP).unwrap();
    };
    let storm = |reloads: usize| {
        for n in 0..reloads {
            hang_up(&export("x", ["memory=1M", "memory=2M", "null=1M"][n % 3], ""));
            std::thread::sleep(Duration::from_millis(15));
        }
        hang_up(&export("last", "null=1M", ""));
        eventually("the last reload is done", || fleet.has("last"));
        hang_up("");
        eventually("the last export has gone", || !fleet.has("last"));
    };
    let fio = tool("fio")
        .args(["--name=busy", "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-64k", "--size=16m"])
        .args(["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--loops=1000"])
        .args(["--time_based", "--runtime=5", &format!("--uri={}", fleet.server.uri_of("stays"))]);
    let mut fio = fio.within(fleet.dir.path()).spawn(fleet.dir.at("fio.log"));
    storm(20);
    let (fds, memory) = (fleet.server.fds(), fleet.server.resident_private());
    storm(60);
    assert!(fio.is_alive(), "it is over too soon");
    eventually("all descriptors of what has gone are closed", || fleet.server.fds() <= fds);
    let grown = fleet.server.resident_private().saturating_sub(memory);
    assert!(grown < MIB, "{grown} bytes more than before");
    let (status, log) = fio.await_end();
    assert!(status.success(), "{log}");
    let reloads = || fleet.server.log().matches("reloaded: reopened: \"x\"").count();
    eventually("40 reloads", || reloads() >= 40);
    assert!(fleet.server.terminate().success());
}

#[test]
fn sighup_reloads_the_file() {
    let fleet = Fleet::start(&export("x", "memory=1M", "on-remove = \"soft\""));
    let hang_up = |exports: &str, said: &str| {
        write(&fleet.dir, exports);
        kill(Pid::from_raw(fleet.server.pid() as i32), Signal::SIGHUP).unwrap();
        eventually(said, || fleet.server.log().contains(said));
    };
    hang_up("[[export]]\n", "not reloaded, and nothing has changed: nbdblk.toml:5:1: the export has no device");
    assert!(fleet.has("x"));
    hang_up(&export("y", "null=1M", ""), "reloaded: added: \"y\"; removed: \"x\" (soft)");
    assert!(fleet.has("y") && !fleet.has("x"));
    // libnbd's view of a soft removal: it gets an error and disconnects.
    let script = format!(
        "import os, errno
text = open({path:?}).read()
open({path:?}, 'w').write(text.replace('name = \"y\"', 'name = \"z\"'))
h.pread(512, 0)
os.kill({pid}, 1)
while True:
    try:
        h.pread(512, 0)
    except nbd.Error as e:
        print(e.errno)
        break
h.shutdown()",
        path = fleet.dir.text("nbdblk.toml"),
        pid = fleet.server.pid(),
    );
    hang_up(&export("y", "null=1M", "on-remove = \"soft\""), "reloaded: nothing has changed");
    assert_eq!(nbdsh(&fleet.server.uri_of("y"), &script).trim(), "ESHUTDOWN");
    assert!(fleet.has("z"));
    assert!(fleet.server.terminate().success());
    assert!(!Path::new(&fleet.dir.at("control.sock")).exists());
}
