//! `nbdblk status`, the metrics and the log report the state of a running server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, sleep};
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Cmd, Dir, Export, Nbdblk, Output, Qsd, eventually, nbdblk, tool};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{KIB, MIB};

const CONTROL: [&str; 2] = ["--control", "control.sock"];
const METRICS: [&str; 2] = ["--metrics", "unix:metrics.sock"];

/// A server with these arguments, a control socket and metrics.
fn serve(dir: &Dir, args: &[&str]) -> Nbdblk {
    Nbdblk::unix(dir, &[args, &CONTROL, &METRICS].concat())
}

fn command(dir: &Dir, args: &[&str]) -> Cmd {
    nbdblk().args(args).args(CONTROL).within(dir.path())
}

/// The report as JSON.
fn status(dir: &Dir) -> Value {
    let text = command(dir, &["status", "--json"]).ok().out;
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).expect("the status is JSON")
}

/// Sends an HTTP request. Returns the head and the body of the response.
fn ask(dir: &Dir, request: &str) -> (String, String) {
    let mut socket = UnixStream::connect(dir.at("metrics.sock")).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut response = Vec::new();
    // Bytes that the server has not read reset the connection, after its response.
    let _ = socket.read_to_end(&mut response);
    let response = String::from_utf8(response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").expect("a response has a head");
    (head.into(), body.into())
}

fn get(dir: &Dir, path: &str) -> (String, String) {
    ask(dir, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
}

/// The value of a metric with these labels, in the order of the text.
fn metric(page: &str, sample: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} in {page}")).parse().unwrap()
}

fn refused(output: &Output, words: &[&str]) {
    let Output { status, out, err } = output;
    assert_eq!((status.code(), out.as_str(), err.lines().count()), (Some(1), "", 1), "{err}");
    words.iter().for_each(|word| assert!(err.contains(word), "{word} in {err}"));
}

/// 200 clients read and write different amounts, and some of their requests are refused. Every figure is exact.
#[test]
fn all_figures_equal_what_200_clients_did() {
    let dir = Dir::new();
    let server = serve(&dir, &["a:memory=16M", "b:memory=16M", "--threads", "2"]);
    let mut clients = Vec::new();
    let (mut reads, mut read, mut written) = (0, 0, 0);
    for n in 0..200_u64 {
        let name = if n % 2 == 0 { "a" } else { "b" };
        let mut client = Raw::enter(server.address(), Mode::Structured, name);
        for m in 0..n % 7 {
            let len = 512 * (1 + (n + m) % 20);
            client.read(m * 512, len as u32);
            client.write(m * 64 * KIB, &vec![n as u8; 2 * len as usize]);
            if name == "a" {
                (reads, read, written) = (reads + 1, read + len, written + 2 * len);
            }
        }
        // Past the end.
        client.call(0, cmd::READ, 16 * MIB, 512, &[]);
        clients.push(client);
    }
    let report = status(&dir);
    let a = &report["exports"][0];
    assert_eq!(
        (&report["version"], &a["name"], &a["state"], &a["clients"]),
        (&1.into(), &"a".into(), &"working".into(), &100.into())
    );
    let operation = |name: &str| (&a["operations"][name]["requests"], &a["operations"][name]["bytes"]);
    assert_eq!(operation("read"), (&reads.into(), &read.into()));
    assert_eq!(operation("write"), (&reads.into(), &written.into()));
    assert_eq!((&a["refused"], &a["operations"]["read"]["in_flight"]), (&100.into(), &0.into()));
    let counted: u64 = a["operations"]["read"]["latency"]["buckets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bucket| bucket[1].as_u64().unwrap())
        .sum();
    assert_eq!(counted, reads);
    // Each client.
    let seen = report["clients"].as_array().unwrap();
    assert_eq!((seen.len(), &report["clients_served"]), (200, &200.into()));
    let sum = |key: &str| {
        let of_a = seen.iter().filter(|client| client["export"] == "a");
        of_a.map(|client| client[key].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((sum("bytes_read"), sum("bytes_written"), sum("failed"), sum("refused")), (read, written, 100, 100));
    assert_eq!(sum("requests"), 2 * reads + 100);
    // The metrics have the same figures.
    let (head, page) =
        ask(&dir, "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text, text/plain;q=0.5\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("application/openmetrics-text"), "{head}");
    assert!(page.ends_with("# EOF\n"), "{page}");
    let of = |name: &str, operation: &str| metric(&page, &format!("{name}{{export=\"a\",operation=\"{operation}\"}}"));
    assert_eq!(of("nbdblk_requests_total", "read"), reads as f64);
    assert_eq!(of("nbdblk_request_bytes_total", "read"), read as f64);
    assert_eq!(of("nbdblk_request_bytes_total", "write"), written as f64);
    assert_eq!(of("nbdblk_request_duration_seconds_count", "write"), reads as f64);
    assert_eq!(metric(&page, "nbdblk_clients{export=\"a\"}"), 100.0);
    assert_eq!(metric(&page, "nbdblk_requests_refused_total{export=\"a\"}"), 100.0);
    // The tables.
    let table = command(&dir, &["status", "--interval", "50ms"]).ok().out;
    assert!(table.contains("EXPORT") && table.lines().count() == 4 && table.contains("200 clients"), "{table}");
    let table = command(&dir, &["status", "--clients"]).ok().out;
    assert_eq!(table.lines().count(), 201, "{table}");
    drop(clients);
    eventually("no clients", || status(&dir)["clients"].as_array().unwrap().is_empty());
}

/// The device is throttled, and stops twice for a second, so latencies depend on it alone.
#[test]
fn percentiles_are_those_that_fio_reports() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 16 * MIB);
    let node =
        "driver=throttle,throttle-group=slow,node-name=disk,file.driver=file,file.locking=off,file.filename=disk.raw";
    let node = node.replace("disk.raw", &dir.at("disk.raw").display().to_string());
    let group = "throttle-group,id=slow,x-iops-total=100";
    let qsd = Qsd::start_behind(&dir, &["--object", group], &node, Export::default());
    let server = serve(&dir, &[&qsd.spec()]);
    let fio = tool("fio")
        .args([
            "--name=x",
            "--ioengine=nbd",
            "--rw=randread",
            "--bs=4k",
            "--iodepth=16",
            "--number_ios=500",
            "--size=16m",
        ])
        .args(["--output-format=json", "--thread", &format!("--uri={}", server.uri())]);
    let stop_twice = || {
        for at in [50, 300] {
            eventually("requests", || status(&dir)["exports"][0]["operations"]["read"]["requests"].as_u64() > Some(at));
            qsd.freeze();
            sleep(Duration::from_secs(1));
            qsd.thaw();
        }
    };
    let out = thread::scope(|scope| {
        scope.spawn(stop_twice);
        fio.within(dir.path()).ok().out
    });
    let json: Value = serde_json::from_str(&out[out.find('{').unwrap()..]).expect("fio prints JSON");
    let theirs = |q: &str| json["jobs"][0]["read"]["clat_ns"]["percentile"][q].as_f64().unwrap() / 1e9;
    let report = status(&dir);
    let ours = |q: &str| report["exports"][0]["operations"]["read"]["latency"][q].as_f64().unwrap();
    for (mine, other) in [("p50_seconds", "50.000000"), ("p90_seconds", "90.000000"), ("p99_seconds", "99.000000")] {
        let ratio = ours(mine) / theirs(other);
        assert!((0.85..1.15).contains(&ratio), "{mine}: {} and {}", ours(mine), theirs(other));
    }
}

#[test]
fn a_device_that_hangs_and_one_that_reconnects_are_seen() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 16 * MIB);
    let qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
    let server = serve(&dir, &[&qsd.spec(), "--slow", "1s", "-v"]);
    assert_eq!(get(&dir, "/healthz").1, "ok\n");
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    // The first request of all hangs.
    qsd.freeze();
    let cookie = client.request(0, cmd::READ, 8192, 4096, &[]);
    server.await_log("a slow request: read of 4096 bytes at 8192 has not ended for");
    assert!(server.log().contains("queue 0: 1 requests at the device, available"), "{}", server.log());
    let is_old = |age: &Value| age.as_f64().is_some_and(|age| age >= 1.0);
    eventually("the age of the request", || {
        let report = status(&dir);
        is_old(&report["exports"][0]["oldest_seconds"]) && is_old(&report["clients"][0]["oldest_seconds"])
    });
    assert!(metric(&get(&dir, "/metrics").1, "nbdblk_oldest_request_seconds{export=\"\"}") >= 1.0);
    // The positions in the ring of the queue that has it.
    let report = status(&dir);
    let busy: Vec<&Value> =
        report["exports"][0]["queues"].as_array().unwrap().iter().filter(|queue| queue["in_flight"] == 1).collect();
    let [queue] = busy[..] else { panic!("one queue has a request in flight: {report}") };
    let state = queue["state"].as_str().unwrap();
    assert!(state.contains("1 requests at the device, available index 1, used index 0"), "{state}");
    assert!(is_old(&queue["oldest_seconds"]));
    let table = command(&dir, &["status", "--queues"]).ok().out;
    assert!(table.starts_with("EXPORT") && table.contains("available index 1, used index 0"), "{table}");
    qsd.kill();
    eventually("the device is reconnecting", || status(&dir)["exports"][0]["state"] == "reconnecting");
    let (head, body) = get(&dir, "/healthz");
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    assert_eq!(body, "the device of export \"\" is reconnecting\n");
    let state = |state: &str| {
        metric(&get(&dir, "/metrics").1, &format!("nbdblk_device_state{{export=\"\",state=\"{state}\"}}"))
    };
    assert_eq!((state("reconnecting"), state("working")), (1.0, 0.0));
    let _qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
    assert_eq!(client.answer_to(cookie).error, 0);
    let report = status(&dir);
    assert_eq!(
        (&report["exports"][0]["state"], &report["exports"][0]["device"]["reconnects"]),
        (&"working".into(), &1.into())
    );
    assert_eq!(get(&dir, "/healthz").1, "ok\n");
}

#[test]
fn clients_are_disconnected_and_the_log_says_why() {
    let dir = Dir::new();
    let server = serve(&dir, &["a:memory=1M", "7:memory=1M", "-v"]);
    let mut all: Vec<Raw> =
        ["a", "a", "7"].iter().map(|name| Raw::enter(server.address(), Mode::Structured, name)).collect();
    all.iter_mut().for_each(|client| drop(client.read(0, 512)));
    let ids: Vec<u64> = status(&dir)["clients"].as_array().unwrap().iter().map(|c| c["id"].as_u64().unwrap()).collect();
    let id = ids[0].to_string();
    assert_eq!(command(&dir, &["disconnect", &id]).ok().out, format!("disconnected client {id}\n"));
    all.remove(0).await_close();
    server.await_log("it was disconnected by an operator; 1 requests (0 failed), 512 bytes read, 0 bytes written");
    refused(&command(&dir, &["disconnect", &id]).run(), &["there is no client"]);
    refused(&command(&dir, &["disconnect", "none"]).run(), &["there is no export \"none\""]);
    assert_eq!(command(&dir, &["disconnect", "7", "--export"]).ok().out, "disconnected 1 client of export \"7\"\n");
    all.pop().unwrap().await_close();
    // The other one is still served.
    all[0].read(0, 512);
    drop(all);
    server.await_log("leaves export \"a\"");
    server.await_log("it has closed the connection without a disconnect request");
}

/// A service has its control socket in its runtime directory (systemd.exec(5)), where `nbdblk status` finds it.
#[test]
fn a_service_is_found_without_its_name() {
    let dir = Dir::new();
    let runtime = dir.at("nbdblk");
    std::fs::create_dir(&runtime).unwrap();
    let serve = nbdblk().args(["serve", "memory=1M", "-U", "nbd.sock"]).env("RUNTIME_DIRECTORY", &runtime);
    let mut server = serve.within(dir.path()).spawn(dir.at("log"));
    server.await_text("serving at");
    let ours = |args: &[&str]| nbdblk().args(args).env("XDG_RUNTIME_DIR", dir.path());
    let out = ours(&["status", "--interval", "50ms"]).ok().out;
    // The table says which server it is.
    let socket = runtime.join("control.sock");
    assert!(out.contains(&format!(" at {}, process {},", socket.display(), server.pid())), "{out}");
    // A file without the setting names the service whose directory has its name.
    std::fs::create_dir(runtime.join("disks")).unwrap();
    std::fs::rename(&socket, runtime.join("disks/control.sock")).unwrap();
    std::fs::write(dir.at("disks.toml"), "[[export]]\ndevice = \"memory=1M\"\n").unwrap();
    let file = dir.text("disks.toml");
    assert!(ours(&["status", "--json", &file]).ok().out.contains("\"pid\":"), "by the file's name");
    // A reload and an upgrade find the only service, too; this server has no file, and its export is in memory.
    refused(&ours(&["reload"]).run(), &["--config"]);
    refused(&ours(&["upgrade"]).run(), &["memory"]);
    std::fs::rename(runtime.join("disks/control.sock"), &socket).unwrap();
    server.signal(Signal::SIGTERM);
    server.await_end();
    assert!(!runtime.join("control.sock").exists(), "the socket is removed");
}

/// While memory is short, the status and the metrics count the waiting clients.
#[test]
fn a_full_memory_is_seen() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 64 * MIB);
    let qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
    let server = serve(&dir, &[&qsd.spec(), "--memory", "1M", "--threads", "1"]);
    let mut clients: Vec<Raw> = (0..4).map(|_| Raw::enter(server.address(), Mode::Structured, "")).collect();
    clients[0].read(0, 4096);
    qsd.freeze();
    let cookies: Vec<u64> =
        clients.iter_mut().map(|client| client.request(0, cmd::READ, 0, MIB as u32 / 2 + 4096, &[])).collect();
    eventually("clients wait for memory", || {
        let memory = &status(&dir)["exports"][0]["memory"];
        memory["waiting"].as_u64() >= Some(1) && memory["used"].as_u64() >= Some(MIB / 2)
    });
    // Its only worker has all of it.
    let report = status(&dir);
    let used = |value: &Value| value["memory"]["used"].as_u64().filter(|used| *used >= MIB / 2);
    assert!(used(&report["workers"][0]).is_some(), "{report}");
    assert_eq!(used(&report["workers"][0]), used(&report["exports"][0]["queues"][0]));
    assert!(metric(&get(&dir, "/metrics").1, "nbdblk_memory_waiting_clients{export=\"\"}") >= 1.0);
    qsd.thaw();
    for (client, cookie) in clients.iter_mut().zip(cookies) {
        assert_eq!(client.answer_to(cookie).error, 0);
    }
    eventually("nothing is held", || {
        let memory = &status(&dir)["exports"][0]["memory"];
        (memory["waiting"].as_u64(), memory["used"].as_u64()) == (Some(0), Some(0))
    });
}

#[test]
fn a_file_is_judged_without_opening_anything() {
    let dir = Dir::new();
    let check = |text: &str| {
        std::fs::write(dir.at("nbdblk.toml"), text).unwrap();
        nbdblk().args(["check", "nbdblk.toml"]).within(dir.path()).run()
    };
    let export = "[[export]]\nname = \"a\"\ndevice = \"io_uring=absent.img\"\n";
    let Output { status, out, err } = check(export);
    assert_eq!((status.code(), out.as_str(), err.as_str()), (Some(0), "nbdblk.toml is valid: 1 export, \"a\"\n", ""));
    refused(&check(&format!("{export}size = 5\n")), &["nbdblk.toml:4:1: ", "size"]);
    refused(&check(&format!("metrics = \"vsock:1\"\n{export}")), &["nbdblk.toml:1:11: ", "metrics are served at"]);
}

#[test]
fn the_log_can_be_json() {
    let dir = Dir::new();
    let server = serve(&dir, &["memory=1M", "-v", "--log-format", "json"]);
    drop(Raw::enter(server.address(), Mode::Structured, ""));
    server.await_log("leaves export");
    // The URI is on stdout.
    for line in server.log().lines().filter(|line| !line.starts_with("nbd+unix:")) {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert!(object["time"].is_f64() && object["level"] == "info" && object["message"].is_string(), "{line}");
    }
}

/// Bad and slow HTTP clients harm no other client.
#[test]
fn a_bad_scraper_harms_no_other_one() {
    let dir = Dir::new();
    let server = serve(&dir, &["memory=1M"]);
    let silent: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(dir.at("metrics.sock")).unwrap()).collect();
    let status_of = |request: &str| ask(&dir, request).0.lines().next().unwrap_or_default().to_owned();
    assert_eq!(status_of("POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(status_of("nonsense\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    assert_eq!(status_of("GET /etc/passwd HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
    assert_eq!(
        status_of(&format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(20_000))),
        "HTTP/1.1 431 Request Header Fields Too Large"
    );
    let (head, body) = ask(&dir, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK") && body.is_empty(), "{head}");
    let (head, body) = get(&dir, "/");
    assert!(
        head.contains("Content-Security-Policy: default-src 'none'; script-src 'nonce-")
            && body.contains("<!DOCTYPE html>"),
        "{head}"
    );
    assert!(
        !body.contains("http://")
            || body.matches("http://").count() == body.matches("http://www.w3.org/2000/svg").count()
    );
    drop(silent);
    Raw::enter(server.address(), Mode::Structured, "").read(0, 512);
    assert!(server.terminate().success());
    assert!(!Path::new(&dir.at("metrics.sock")).exists(), "the socket is removed");
}
