//! What Prometheus, Grafana and a browser get from `--metrics`: the real programs read the metrics, the page and the files in `dist`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nbdblk_tests::raw::{Mode, Raw};
use nbdblk_tests::{Daemon, Dir, Nbdblk, Output, eventually, nbdblk, root, tool};
use serde_json::Value;

/// A server with two exports and metrics on a TCP port that the kernel chooses.
struct Server {
    server: Nbdblk,
    /// Host and port of the metrics.
    metrics: String,
}

impl Server {
    fn start(dir: &Dir) -> Self {
        dir.sparse("disk.img", 16 << 20);
        let exports = ["disk:io_uring=disk.img", "scratch:memory=16M"];
        let options = ["--metrics", "tcp:127.0.0.1:0", "--control", "control.sock", "-v"];
        let server = Nbdblk::unix(dir, &[&exports[..], &options].concat());
        // The log has its own thread, and can come after the URI.
        server.await_log("metrics at http://");
        let log = server.log();
        let (_, rest) = log.split_once("metrics at http://").expect("the log has the address");
        let metrics = rest.split('/').next().expect("the address ends").to_owned();
        Self { server, metrics }
    }

    /// Reads, writes and flushes.
    fn load(&self) {
        for name in ["disk", "scratch"] {
            let uri = format!("--uri={}", self.server.uri_of(name));
            let job = ["--name=x", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--iodepth=4", "--fsync=16", "--thread"];
            tool("fio").args(job).args(["--size=16m", "--number_ios=500", &uri]).ok();
        }
    }

    fn get(&self, path: &str, accept: &str) -> (String, String) {
        get(&self.metrics, path, accept)
    }
}

/// The head and the body of a response. A client of HTTP 1.0 gets the body in one piece.
fn get(host: &str, path: &str, accept: &str) -> (String, String) {
    let mut socket = TcpStream::connect(host).expect("the server listens");
    write!(socket, "GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: {accept}\r\n\r\n").expect("it reads the request");
    let mut response = String::new();
    socket.read_to_string(&mut response).expect("it sends a response");
    let (head, body) = response.split_once("\r\n\r\n").expect("a response has a head");
    (head.into(), body.into())
}

/// The output of `nbdblk status --json`.
fn status(dir: &Dir) -> Value {
    let args = ["status", "--json", "--control", "control.sock"];
    serde_json::from_str(&nbdblk().args(args).within(dir.path()).ok().out).expect("the status is JSON")
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key} in {value}"))
}

/// A Prometheus that reads `dist/prometheus/scrape.yml`, with another server and more often.
struct Prometheus {
    daemon: Daemon,
    /// Host and port of its API.
    api: String,
}

impl Prometheus {
    fn start(dir: &Dir, server: &Server) -> Self {
        let dist = root().join("dist/prometheus");
        let config = fs::read_to_string(dist.join("scrape.yml")).expect("the example is there");
        assert!(config.contains("- localhost:9810\n") && config.contains("interval: 15s\n"), "{config}");
        let config = config.replace("localhost:9810", &server.metrics).replace("interval: 15s", "interval: 1s");
        fs::write(dir.at("scrape.yml"), config).expect("the directory can be written");
        fs::copy(dist.join("nbdblk-alerts.yml"), dir.at("nbdblk-alerts.yml")).expect("the rules are there");
        let args = ["--config.file=scrape.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"];
        let mut daemon = tool("prometheus").args(args).within(dir.path()).spawn(dir.at("prometheus.log"));
        daemon.await_that("it listens", |log| address(log).is_some());
        let api = address(&daemon.log()).expect("it listens").to_owned();
        eventually("Prometheus is ready", || get(&api, "/-/ready", "*/*").0.contains(" 200 OK"));
        Self { daemon, api }
    }

    /// The data of a response of its API.
    fn ask(&self, path: &str) -> Value {
        let (head, body) = get(&self.api, path, "application/json");
        let mut answer: Value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {head}\n{body}"));
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        answer["data"].take()
    }

    /// The present samples of an expression.
    fn query(&self, expression: &str) -> Vec<Value> {
        let coded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        list(&self.ask(&format!("/api/v1/query?query={coded}")), "result").to_vec()
    }

    /// The value of an expression that has one sample.
    fn value(&self, expression: &str) -> Option<f64> {
        let samples = self.query(expression);
        let [sample] = &samples[..] else { return None };
        sample["value"][1].as_str()?.parse().ok()
    }

    /// The alert rules that it has loaded.
    fn rules(&self) -> Vec<Value> {
        list(&self.ask("/api/v1/rules"), "groups").iter().flat_map(|group| list(group, "rules")).cloned().collect()
    }
}

/// Where Prometheus listens, in its log.
fn address(log: &str) -> Option<&str> {
    // Only whole lines count.
    let (whole, _) = log.rsplit_once('\n')?;
    let line = whole.lines().find(|line| line.contains("msg=\"Listening on\""))?;
    line.split(' ').find_map(|word| word.strip_prefix("address="))
}

/// The names of our metrics in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("nbdblk_")).collect()
}

/// The names of the samples on the page of metrics.
fn samples(page: &str) -> BTreeSet<&str> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next()).collect()
}

/// The expressions of a dashboard: those of its panels, and the queries of its variables.
fn expressions(value: &Value, panels: &mut Vec<String>, variables: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match (key.as_str(), value) {
                    ("expr", Value::String(text)) => panels.push(text.clone()),
                    ("definition", Value::String(text)) => variables.push(text.clone()),
                    _ => expressions(value, panels, variables),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, panels, variables)),
        _ => {}
    }
}

#[test]
fn both_formats_of_the_metrics_are_valid_and_say_the_same() {
    let dir = Dir::new();
    let server = Server::start(&dir);
    server.load();
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    for accept in ["text/plain", "*/*", "application/openmetrics-text;q=0, text/plain"] {
        let (head, page) = server.get("/metrics", accept);
        assert!(head.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{accept}: {head}");
        let said = tool("promtool").args(["check", "metrics"]).input(page.as_bytes()).ok();
        assert_eq!((said.out.as_str(), said.err.as_str()), ("", ""), "promtool finds nothing to improve");
    }
    let (head, open) = server.get("/metrics", prometheus);
    assert!(
        head.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
        "{head}"
    );
    let (_, classic) = server.get("/metrics", "text/plain");
    assert!(open.ends_with("\n# EOF\n") && !classic.contains("# EOF"), "{open}");
    // Without clients, only times change.
    let values = |page: &str| -> Vec<String> {
        let lines = page.lines().filter(|line| !line.starts_with('#') && !line.starts_with("nbdblk_worker"));
        lines.filter(|line| !line.starts_with("nbdblk_uptime")).map(str::to_owned).collect()
    };
    assert_eq!(values(&open), values(&classic));
    assert!(values(&open).len() > 100);
}

#[test]
fn alert_rules_are_valid_and_fire_when_they_must() {
    let run = |args: &[&str]| tool("promtool").args(args).within(&root().join("dist/prometheus")).ok();
    run(&["check", "config", "scrape.yml"]);
    run(&["check", "rules", "nbdblk-alerts.yml"]);
    run(&["test", "rules", "nbdblk-alerts-test.yml"]);
    // Each alert has a test in which it fires, and one in which it does not.
    let read = |name: &str| fs::read_to_string(root().join("dist/prometheus").join(name)).expect("it is there");
    let (rules, tests) = (read("nbdblk-alerts.yml"), read("nbdblk-alerts-test.yml"));
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 8, "{alerts:?}");
    for alert in alerts {
        let cases: Vec<&str> = tests.split("- alertname: ").filter(|case| case.starts_with(alert)).collect();
        let quiet = cases.iter().filter(|case| case.contains("exp_alerts: []\n")).count();
        assert!(quiet >= 1 && quiet < cases.len(), "{alert}: {} cases, {quiet} of them quiet", cases.len());
    }
}

#[test]
fn prometheus_reads_what_the_status_says() {
    let dir = Dir::new();
    let server = Server::start(&dir);
    let mut prometheus = Prometheus::start(&dir, &server);
    server.load();
    eventually("a scrape", || prometheus.value("up") == Some(1.0));
    let report = status(&dir);
    for export in list(&report, "exports") {
        let name = export["name"].as_str().expect("an export has a name");
        for operation in ["read", "write", "flush"] {
            let ours = export["operations"][operation]["requests"].as_f64().expect("a number");
            assert!(ours > 0.0, "{name}: {operation}");
            for metric in ["requests_total", "request_duration_seconds_count"] {
                let query = format!("nbdblk_{metric}{{export=\"{name}\",operation=\"{operation}\"}}");
                eventually(&format!("{query} is {ours}"), || prometheus.value(&query) == Some(ours));
            }
        }
    }
    // No rule is wrong or finds anything, until the server is gone.
    let states = |prometheus: &Prometheus| -> Vec<(String, String)> {
        let text = |rule: &Value, key: &str| rule[key].as_str().unwrap_or_default().to_owned();
        let rules = prometheus.rules();
        assert!(rules.iter().all(|rule| rule["health"] != "err"), "{rules:?}");
        let unusual = rules.iter().filter(|rule| rule["state"] != "inactive");
        unusual.map(|rule| (text(rule, "name"), text(rule, "state"))).collect()
    };
    eventually("all rules are judged", || prometheus.rules().iter().all(|rule| rule["health"] == "ok"));
    assert_eq!(states(&prometheus), []);
    assert!(server.server.terminate().success());
    let gone = [("NbdblkServerGone".to_owned(), "pending".to_owned())];
    eventually("the alert of a server that is gone", || states(&prometheus) == gone);
    assert!(prometheus.daemon.is_alive());
}

#[test]
fn the_dashboard_and_the_alerts_name_metrics_that_there_are() {
    let dir = Dir::new();
    let server = Server::start(&dir);
    let prometheus = Prometheus::start(&dir, &server);
    server.load();
    let (_, page) = server.get("/metrics", "text/plain");
    let there = samples(&page);
    let dashboard = fs::read(root().join("dist/grafana/nbdblk.json")).expect("the dashboard is there");
    let dashboard: Value = serde_json::from_slice(&dashboard).expect("the dashboard is JSON");
    let (mut panels, mut variables) = (Vec::new(), Vec::new());
    expressions(&dashboard, &mut panels, &mut variables);
    let rules = prometheus.rules();
    let alerts: Vec<String> = rules.iter().filter_map(|rule| Some(rule["query"].as_str()?.to_owned())).collect();
    assert!(panels.len() > 20 && variables.len() == 2 && alerts.len() >= 8, "{panels:?} {variables:?} {alerts:?}");
    for text in panels.iter().chain(&variables).chain(&alerts) {
        let unknown: Vec<_> = names(text).into_iter().filter(|name| !there.contains(name)).collect();
        assert!(unknown.is_empty(), "{text}: no such metrics: {unknown:?}");
        assert!(!names(text).is_empty() || text.starts_with("up{"), "{text} names no metric");
    }
    // Rates need two scrapes.
    eventually("two scrapes", || prometheus.value("sum(count_over_time(nbdblk_uptime_seconds[1m]))") >= Some(2.0));
    for text in &panels {
        let text = text.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$export", ".*");
        let found = prometheus.query(&text);
        assert!(!found.is_empty() || text.ends_with(" > 0"), "{text} finds nothing");
    }
    for text in &alerts {
        prometheus.query(text);
    }
}

/// The DOM of the page after its script has run for some seconds, and the messages of the browser.
fn browse(dir: &Dir, server: &Server) -> Output {
    tool("chromium")
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args(["--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom"])
        .args([format!("--user-data-dir={}", dir.text("profile")), format!("http://{}/", server.metrics)])
        .env("HOME", dir.path())
        .within(dir.path())
        .ok()
}

#[test]
fn a_browser_shows_the_page() {
    let dir = Dir::new();
    let server = Server::start(&dir);
    let mut client = Raw::enter(server.server.address(), Mode::Structured, "disk");
    client.write(0, &[7; 8192]);
    let is_over = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                client.read(0, 4096);
            }
        });
        let output = std::panic::catch_unwind(|| browse(&dir, &server));
        is_over.store(true, Ordering::Relaxed);
        output.expect("the browser works")
    });
    // The drawn part, without the script.
    let page = output.out.split("<script").next().expect("a text has a first part");
    for text in [
        "<span id=\"health\" class=\"good\">healthy</span>",
        "1 client now, 1 since the start; ",
        "<b>disk</b><span class=\"good\">working</span><span>io_uring disk.img, 16 MiB</span><span>1 client</span>",
        "<b>scratch</b><span class=\"good\">working</span>",
        "<dt>Failed so far</dt><dd>0</dd>",
        "<td>disk</td><td>process ",
        "<td class=\"n\">8 KiB</td>",
        "<rect ",
    ] {
        assert!(page.contains(text), "{text} in {page}");
    }
    let lines: Vec<&str> = page.split("<polyline points=\"").skip(1).collect();
    assert!(lines.len() == 4 && lines.iter().all(|line| line.split('"').next().is_some_and(|it| it.contains(','))));
    // Messages of the page and of the policy are lines of the console.
    assert!(!output.err.contains("CONSOLE") && !output.err.contains("Content Security Policy"), "{}", output.err);
}
