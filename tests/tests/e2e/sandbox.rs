//! The sandbox of a running server: its threads are confined, and everything still works. The unit tests of `nbdblk` show what a
//! confined thread cannot do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use nbdblk_tests::raw::{Mode, Raw};
use nbdblk_tests::{Dir, Export, Nbdblk, Output, Qsd, eventually, nbdblk, nbdinfo};
use nix::unistd::geteuid;

use crate::{MIB, NOBODY};

/// Fields of /proc/PID/task/TID/status.
type Status = BTreeMap<String, String>;

fn fields(text: &str) -> Status {
    let line = |line: &str| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(line).collect()
}

/// The status of each thread, with its name.
fn threads(pid: u32) -> Vec<(String, Status)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end in the meantime.
    let texts = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    texts.map(|text| fields(&text)).map(|status| (status["Name"].clone(), status)).collect()
}

/// Threads that open devices for a reload, execute the next program and remove files.
const TRUSTED: [&str; 3] = ["nbdblk", "signals", "announce"];

/// Waits until all threads have begun: the first that they do is to confine themselves.
fn settle(server: &Nbdblk) {
    let is_confined = |(_, status): &(String, Status)| status["Seccomp"] == "2";
    eventually("all threads are confined", || threads(server.pid()).iter().all(is_confined));
}

#[test]
fn every_thread_is_confined() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let control = dir.text("control.sock");
    let options = ["--control", &control, "--metrics", "tcp:0", "--sandbox", "require"];
    let server = Nbdblk::unix(&dir, &[&["io_uring=disk.raw"], &options[..]].concat());
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    client.write(0, &[7; 4096]);
    assert_eq!(client.read(0, 4096), [7; 4096]);
    nbdblk().args(["status", "--control", &control]).ok();
    settle(&server);
    let threads = threads(server.pid());
    for name in ["worker 0", "door", "control", "metrics", "log", "signals"] {
        assert!(threads.iter().any(|(other, _)| other == name), "{name} in {threads:?}");
    }
    for (name, status) in &threads {
        assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"), "{name}");
        if !TRUSTED.contains(&name.as_str()) {
            for key in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(status[key].trim_start_matches('0'), "", "{key} of {name}");
            }
        }
        // CAP_SYS_MODULE, CAP_SYS_CHROOT, CAP_SYS_BOOT, CAP_NET_ADMIN.
        let kept = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        assert_eq!(kept & (1 << 16 | 1 << 18 | 1 << 22 | 1 << 12), 0, "{name}");
    }
}

#[test]
fn without_a_sandbox_nothing_is_confined() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M", "--sandbox=off"]);
    for (name, status) in threads(server.pid()) {
        assert_eq!(status["Seccomp"], fields(&fs::read_to_string("/proc/self/status").unwrap())["Seccomp"], "{name}");
    }
}

#[test]
fn the_command_of_run_is_not_confined() {
    let dir = Dir::new();
    let run = "cat /proc/self/status; touch made; exec nbdinfo --size \"$uri\"";
    let args = ["serve", "memory=1M", "--sandbox", "require", "--run", run];
    let output = nbdblk().args(args).within(dir.path()).ok().out;
    let (own, status) = (fields(&fs::read_to_string("/proc/self/status").unwrap()), fields(&output));
    for key in ["NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd", "Uid", "Groups"] {
        assert_eq!(status[key], own[key], "{key}");
    }
    assert!(dir.at("made").exists() && output.ends_with("1048576\n"), "{output}");
}

/// A directory that every user can search.
fn open_dir() -> Dir {
    let dir = Dir::new();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn the_server_changes_its_user_once_the_devices_are_open() {
    if !geteuid().is_root() {
        let Output { status, err, .. } = nbdblk().args(["serve", "null=1M", "-U", "s", "--user", "0"]).run();
        assert!(status.code() == Some(1) && err.contains("need root"), "{err}");
        return;
    }
    let dir = open_dir();
    for name in ["private.raw", "public.raw"] {
        dir.sparse(name, MIB);
        fs::set_permissions(dir.at(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    chown(dir.at("public.raw"), Some(NOBODY), None).unwrap();
    let export = |name: &str| format!("[[export]]\nname = \"{name}\"\ndevice = \"io_uring={name}.raw\"\n");
    let head = "control = \"control.sock\"\nuser = \"nobody\"\nsandbox = \"require\"\n".to_owned();
    fs::write(dir.at("n.toml"), head.clone() + &export("private")).unwrap();
    let server = Nbdblk::unix(&dir, &["--config", "n.toml"]);
    settle(&server);
    for (name, status) in threads(server.pid()) {
        let ids = NOBODY.to_string();
        for key in ["Uid", "Gid"] {
            assert!(status[key].split_whitespace().all(|id| id == ids), "{key} of {name}: {}", status[key]);
        }
        assert_eq!((status["Groups"].as_str(), status["CapPrm"].trim_start_matches('0')), (ids.as_str(), ""), "{name}");
    }
    assert_eq!(nbdinfo(&server.uri_of("private"))["exports"][0]["export-size"], MIB);
    let reload = || nbdblk().args(["reload", "--control", "control.sock"]).within(dir.path()).run();
    fs::write(dir.at("n.toml"), head.clone() + &export("private") + &export("public")).unwrap();
    let Output { status, out, err } = reload();
    assert!(status.success() && out.contains("added: \"public\""), "{out}{err}");
    dir.sparse("root.raw", MIB);
    fs::set_permissions(dir.at("root.raw"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(dir.at("n.toml"), head + &export("private") + &export("root")).unwrap();
    let Output { status, err, .. } = reload();
    assert!(status.code() == Some(1) && err.contains("root.raw") && err.contains("Permission denied"), "{err}");
    assert!(server.terminate().success());
}

#[test]
fn users_that_cannot_be_changed_to_are_refused() {
    for (args, words) in [
        (&["--user", "no-such-user"][..], "no user of that name"),
        (&["--group", "no-such-group"], "no group of that name"),
        (&["--user", "123456"], "set --group too"),
        (&["--sandbox", "maybe"], "maybe"),
    ] {
        let Output { status, err, .. } = nbdblk().args(["serve", "null=1M", "-U", "s"]).args(args).run();
        assert!(status.code() == Some(1) && err.lines().count() == 1 && err.contains(words), "{args:?}: {err}");
    }
}

#[test]
fn a_back_end_comes_back_to_a_server_that_has_changed_its_user() {
    if !geteuid().is_root() {
        return;
    }
    let dir = open_dir();
    dir.sparse("disk.raw", MIB);
    let start = || {
        let qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
        fs::set_permissions(dir.at("vhost.sock"), fs::Permissions::from_mode(0o777)).unwrap();
        qsd
    };
    let qsd = start();
    let spec = qsd.spec();
    let control = dir.text("control.sock");
    let server = Nbdblk::unix(&dir, &[&spec, "--user=nobody", "--sandbox=require", "--control", &control]);
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    client.write(0, &[5; 4096]);
    qsd.kill();
    let _qsd = start();
    assert_eq!(client.read(0, 4096), [5; 4096]);
    // The next program opens the device as that user, and confines itself in turn.
    let said = nbdblk().args(["upgrade", "--control", &control]).ok().out;
    assert!(said.contains("was replaced by"), "{said}");
    assert_eq!(client.read(0, 4096), [5; 4096]);
    settle(&server);
    for (name, status) in threads(server.pid()) {
        assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"), "{name}");
        assert!(status["Uid"].starts_with(&NOBODY.to_string()), "{name}: {}", status["Uid"]);
    }
}

/// The configuration in the manifest for Kubernetes is valid.
#[test]
fn the_manifest_for_kubernetes_has_a_valid_configuration() {
    let dir = Dir::new();
    let manifest = fs::read_to_string(nbdblk_tests::root().join("dist/kubernetes/nbdblk.yaml")).unwrap();
    let (_, rest) = manifest.split_once("nbdblk.toml: |\n").expect("it has a configuration");
    let lines = rest.lines().take_while(|line| *line != "---");
    let config: String = lines.map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line))).collect();
    fs::write(dir.at("nbdblk.toml"), &config).unwrap();
    let said = nbdblk().args(["check", "nbdblk.toml"]).within(dir.path()).ok();
    assert_eq!(said.err, "", "{config}");
    for part in ["readOnlyRootFilesystem: true", "drop: [\"ALL\"]", "runAsNonRoot: true"] {
        assert!(manifest.contains(part), "{part}");
    }
}
