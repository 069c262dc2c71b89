//! `cargo xtask bench`: compares nbdblk with other NBD servers, in one run, on this machine.

mod memory;
mod micro;
mod raw;
mod report;
mod servers;
mod svg;
mod transport;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::setup;
use memory::Memory;
use micro::Count;
use raw::Raw;
use servers::{Program, Running, SERVERS, Server, Stage};
use transport::Transport;
use work::{Figures, Work};

const HELP: &str = "\
usage: cargo xtask bench [PART...] [OPTIONS]

Measures NBD servers with fio: the server's CPU time per I/O, IOPS, MiB/s, latency.
Compare only figures of one run, and keep the machine idle otherwise.

parts
  --servers         nbdblk, the nbdkit plugin and their rivals under each workload (the default)
  --raw             drivers without NBD: ours, those of the crate blkio, fio's io_uring engine
  --memory          memory of an idle server, of idle connections, under load; wake-ups of an idle server
  --connections     CPU time per I/O with 1 to 256 connections
  --micro           instructions in codec, virtqueue and Channel, counted by callgrind
options
  --only A,B        measure servers whose names contain one of these words (--list prints the names)
  --work W,...      workloads PATTERN-BLOCK-DEPTH[xCONNECTIONS][@TRANSPORT], such as randread-4k-64,write-256k-16x2@tcp
  --all             measure every workload; takes hours
  --rounds N        number of rounds (3); figures are their medians
  --secs N          seconds for each server and workload (1)
  --json FILE       write the figures to this file
  --svg DIR         draw the pictures in this directory
  --docs            update docs/performance.md with the figures of the named parts, or of all
  --check           count instructions; fail if a part needs over 2 % more than docs/performance.md says
  --draw            the same from the stored figures, without measuring
  --nbdblk PATH     measure this build of nbdblk
  --plugin PATH     measure this build of the plugin
  --list            print servers and workloads";

/// What a user gets who asks for nothing: some minutes.
const DEFAULT: &str = "randread-4k-1,randread-4k-64,randwrite-4k-64,read-256k-16,write-256k-16";

/// What docs/performance.md shows.
const DOCS: &str = "randread-4k-1,randread-4k-64,randwrite-4k-64,randread-4k-64x2,randread-4k-64@tcp,randread-4k-64@tls,read-256k-16,write-256k-16";

/// More and more connections: with as many requests in flight on each, or all together. Name of the picture, title, workloads.
const CONNECTIONS: [(&str, &str, &str); 2] = [
    (
        "connections",
        "64 in flight on each connection",
        "randread-4k-64,randread-4k-64x4,randread-4k-64x16,randread-4k-64x64,randread-4k-64x256",
    ),
    (
        "connections-256",
        "256 in flight over all connections",
        "randread-4k-256,randread-4k-64x4,randread-4k-16x16,randread-4k-4x64,randread-4k-1x256",
    ),
];

/// Where the figures of the documentation are kept, and what is made of them.
const DOCS_JSON: &str = "docs/performance/figures.json";
const DOCS_PAGE: &str = "docs/performance.md";

/// Everything that was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Results {
    machine: Vec<String>,
    rows: Vec<Row>,
    connections: Vec<Row>,
    raw: Vec<Raw>,
    memory: Vec<Memory>,
    micro: Vec<Count>,
    /// Which compiler made the code whose instructions were counted.
    compiler: String,
}

/// A server under a workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    work: String,
    server: String,
    device: String,
    rounds: usize,
    #[serde(flatten)]
    figures: Figures,
}

/// What the user asked for.
struct Options {
    parts: Vec<String>,
    only: Vec<String>,
    work: Option<Vec<Work>>,
    rounds: usize,
    seconds: u32,
    json: Option<String>,
    svg: Option<String>,
    docs: bool,
    nbdblk: Option<String>,
    plugin: Option<String>,
}

/// Runs the benchmark that the words describe.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let mut options = Options {
        parts: Vec::new(),
        only: Vec::new(),
        work: None,
        rounds: 3,
        seconds: 1,
        json: None,
        svg: None,
        docs: false,
        nbdblk: None,
        plugin: None,
    };
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a value\n\n{HELP}"));
        match word {
            "--servers" | "--raw" | "--memory" | "--connections" | "--micro" => options.parts.push(word.into()),
            "--only" => options.only = value()?.split(',').map(Into::into).collect(),
            "--work" => options.work = Some(works(value()?)?),
            "--all" => options.work = Some(all()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--secs" => options.seconds = value()?.parse().context("--secs")?,
            "--json" => options.json = Some(value()?.into()),
            "--svg" => options.svg = Some(value()?.into()),
            "--docs" => options.docs = true,
            "--check" => return check(),
            "--draw" => return write_docs(&read_docs()?),
            "--nbdblk" => options.nbdblk = Some(value()?.into()),
            "--plugin" => options.plugin = Some(value()?.into()),
            "--list" => {
                SERVERS.iter().for_each(|server| println!("{}", server.name));
                all().iter().for_each(|work| println!("{work}"));
                return Ok(());
            }
            "help" | "-h" | "--help" => {
                println!("{HELP}");
                return Ok(());
            }
            _ => bail!("no such option: {word}\n\n{HELP}"),
        }
    }
    setup::run(setup::Extent::Basic)?;
    // What the documentation shows of other parts stays.
    let mut results = if options.docs { read_docs()? } else { Results::default() };
    options.measure(&mut results)?;
    print!("{}", report::text(&results));
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&results)?).with_context(|| format!("writing {path}"))?;
    }
    if let Some(dir) = &options.svg {
        report::draw(&results, dir.as_ref())?;
    }
    Ok(())
}

/// Fails if the data path needs more instructions than it did.
pub(crate) fn check() -> Result<()> {
    let stored = read_docs()?;
    micro::check(&stored.micro, &stored.compiler)
}

fn read_docs() -> Result<Results> {
    match fs::read_to_string(DOCS_JSON) {
        Ok(text) => serde_json::from_str(&text).context(DOCS_JSON),
        Err(_) => Ok(Results::default()),
    }
}

fn write_docs(results: &Results) -> Result<()> {
    let dir = Path::new(DOCS_JSON).parent().expect("it has a directory");
    // Pictures of what is not shown any more go.
    for entry in
        fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().extension().is_some_and(|e| e == "svg"))
    {
        fs::remove_file(entry.path())?;
    }
    report::draw(results, dir)?;
    fs::write(DOCS_JSON, serde_json::to_string_pretty(results)? + "\n").context(DOCS_JSON)?;
    let page = fs::read_to_string(DOCS_PAGE).context(DOCS_PAGE)?;
    fs::write(DOCS_PAGE, report::fill_in(&page, results)?).context(DOCS_PAGE)
}

impl Options {
    fn wants(&self, part: &str) -> bool {
        let none = self.parts.is_empty();
        self.parts.iter().any(|wanted| wanted == part) || none && (self.docs || part == "--servers")
    }

    fn measure(&self, results: &mut Results) -> Result<()> {
        let chosen = |server: &&Server| self.only.is_empty() || self.only.iter().any(|only| server.name.contains(only));
        let servers: Vec<&'static Server> = SERVERS.iter().filter(chosen).collect();
        ensure!(!servers.is_empty(), "no server has such a name; --list prints them");
        if self.wants("--micro") {
            results.micro = micro::run()?;
            results.compiler = micro::compiler()?;
            self.keep(results)?;
        }
        if !["--servers", "--raw", "--memory", "--connections"].iter().any(|part| self.wants(part)) {
            return Ok(());
        }
        let raw = self.wants("--raw");
        let stage = Stage::new(&servers, raw, self.nbdblk.as_deref(), self.plugin.as_deref())?;
        results.machine = machine(&stage);
        if raw {
            results.raw = raw::run(&stage, self.rounds, self.seconds)?;
            self.keep(results)?;
        }
        if self.wants("--servers") {
            let usual = works(if self.docs { DOCS } else { DEFAULT })?;
            results.rows = self.rounds(&stage, &servers, self.work.as_ref().unwrap_or(&usual));
            self.keep(results)?;
        }
        if self.wants("--connections") {
            let servers: Vec<_> = servers.iter().copied().filter(|server| server.device == "null").collect();
            let mut list = Vec::new();
            for (_, _, words) in CONNECTIONS {
                list.extend(works(words)?.into_iter().filter(|work| !list.contains(work)).collect::<Vec<_>>());
            }
            results.connections = self.rounds(&stage, &servers, &list);
            self.keep(results)?;
        }
        if self.wants("--memory") {
            let servers: Vec<_> = servers.iter().copied().filter(|server| server.program != Program::Floor).collect();
            results.memory = memory::run(&stage, &servers, self.seconds)?;
            self.keep(results)?;
        }
        Ok(())
    }

    /// Puts what there is so far into the documentation, if that is wanted: a part takes minutes.
    fn keep(&self, results: &Results) -> Result<()> {
        if self.docs { write_docs(results) } else { Ok(()) }
    }

    /// Runs every workload on every server, round by round. In a round all servers run, and each workload goes from one to
    /// the next, so that what changes on the machine meanwhile hits all alike.
    fn rounds(&self, stage: &Stage, servers: &[&'static Server], works: &[Work]) -> Vec<Row> {
        let mut runs: BTreeMap<(usize, usize), Vec<Figures>> = BTreeMap::new();
        let total = self.rounds * works.len() * servers.len();
        let mut count = 0;
        for round in 0..self.rounds {
            for transport in Transport::ALL {
                let works: Vec<_> = works.iter().enumerate().filter(|(_, work)| work.transport == transport).collect();
                if works.is_empty() {
                    continue;
                }
                let start = |server: &&'static Server| {
                    let skipped = |error| {
                        if round == 0 {
                            eprintln!("{}: skipped: {error:#}", server.name);
                        }
                    };
                    stage.start(server, transport).map_err(skipped).ok()
                };
                let running: Vec<Option<Running>> = servers.iter().map(start).collect();
                for (w, work) in works {
                    for (s, running) in running.iter().enumerate() {
                        count += 1;
                        let Some(running) = running else { continue };
                        let name = running.server.name;
                        match work.run(running, self.seconds) {
                            Ok(f) => {
                                let (iops, cpu) = (f.iops, f.cpu_us);
                                eprintln!(
                                    "[{count}/{total}] {work} {name}: {iops:.0} IOPS, {cpu:.2} us of processor each"
                                );
                                runs.entry((w, s)).or_default().push(f);
                            }
                            Err(error) => eprintln!("[{count}/{total}] {work} {name}: FAILED: {error:#}"),
                        }
                    }
                }
            }
        }
        let row = |((w, s), runs): (&(usize, usize), &Vec<Figures>)| Row {
            work: works[*w].to_string(),
            server: servers[*s].name.into(),
            device: servers[*s].device.into(),
            rounds: runs.len(),
            figures: Figures::median(runs),
        };
        runs.iter().map(row).collect()
    }
}

fn works(words: &str) -> Result<Vec<Work>> {
    words.split(',').map(str::parse).collect()
}

/// The whole matrix.
fn all() -> Vec<Work> {
    let mut all = Vec::new();
    for transport in ["unix", "tcp", "tls"] {
        for connections in [1, 2, 4] {
            let small = ["randread-4k", "randwrite-4k"].map(|work| (work, &[1, 8, 64, 256][..]));
            let big =
                ["read-64k", "write-64k", "read-256k", "write-256k", "read-1m", "write-1m"].map(|w| (w, &[16][..]));
            for (work, depths) in small.into_iter().chain(big) {
                let word = |depth| format!("{work}-{depth}x{connections}@{transport}");
                all.extend(depths.iter().map(|depth| word(depth).parse::<Work>().expect("a workload")));
            }
        }
    }
    all
}

/// What kind of machine this is, and what runs on it, a line each; no names.
fn machine(stage: &Stage) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    let virtual_machine = read("/proc/cpuinfo").contains(" hypervisor");
    vec![
        format!("{cpus} × {cpu}{}", if virtual_machine { ", a virtual machine" } else { "" }),
        format!("{:.0} GiB of memory", memory.unwrap_or(0.0) / f64::from(1 << 20)),
        format!("Linux {}", read("/proc/sys/kernel/osrelease").split('-').next().unwrap_or_default().trim()),
        stage.versions(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell::{self, TempDir};

    /// The whole way, on two servers for a second; nothing is said of how fast they are.
    #[test]
    fn a_server_is_measured_told_of_and_drawn() -> Result<()> {
        std::env::set_current_dir(shell::root())?;
        let dir = TempDir::new("bench-test")?;
        let (json, svg) = (dir.path().join("figures.json"), dir.path().join("pictures"));
        let (json_word, svg_word) = (json.display().to_string(), svg.display().to_string());
        let built = std::env::var("NBDBLK_BIN");
        let mut words = vec!["--only", "floor-null,nbdblk-null", "--work", "randread-4k-8@tcp", "--rounds", "1"];
        words.extend(["--json", &json_word, "--svg", &svg_word]);
        words.extend(built.iter().flat_map(|path| ["--nbdblk", path]));
        run(&words)?;
        let results: Results = serde_json::from_str(&fs::read_to_string(json)?)?;
        for (row, server) in results.rows.iter().zip(["floor-null", "nbdblk-null"]) {
            assert_eq!((row.work.as_str(), row.server.as_str()), ("randread-4k-8@tcp", server));
            let Figures { iops, mib_s, p50_us, p99_us, cpu_us, .. } = row.figures;
            assert!(iops > 0.0 && mib_s > 0.0 && p50_us > 0.0 && p99_us >= p50_us && cpu_us > 0.0, "{row:?}");
        }
        assert_eq!(results.rows.len(), 2);
        let picture = fs::read_to_string(svg.join("randread-4k-8-tcp.svg"))?;
        svg::tests::assert_well_formed(&picture);
        assert!(picture.contains(">nbdblk-null</text>"), "{picture}");
        Ok(())
    }

    #[test]
    fn words_that_are_not_understood_are_refused() {
        for words in
            [&["--ounly", "x"][..], &["--only"], &["--work", "x"], &["--rounds", "x"], &["--only", "no such server"]]
        {
            assert!(run(words).is_err(), "{words:?}");
        }
    }

    /// The page has a place for each kind of figures, and every mark on it is known.
    #[test]
    fn the_page_can_be_filled_in() -> Result<()> {
        let page = fs::read_to_string(shell::root().join(DOCS_PAGE))?;
        let filled = report::fill_in(&page, &Results::default())?;
        for part in ["machine", "summary", "servers", "raw", "memory", "connections", "micro", "socket"] {
            assert!(filled.contains(&format!("<!-- figures: {part} -->")), "no place for {part}");
        }
        Ok(())
    }
}
