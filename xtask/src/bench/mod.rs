//! `cargo xtask bench`: nbdblk beside other NBD servers, in one run, on this machine.

mod report;
mod servers;
mod work;

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::setup;
use servers::{Running, SERVERS, Server, Stage};
use work::{Figures, Work};

const HELP: &str = "\
usage: cargo xtask bench [OPTIONS]

Measures NBD servers side by side with fio: the processor time that the server spends on an I/O, IOPS, MiB/s, latency.
Compare figures of one run only, and let the machine be idle otherwise.

  --only A,B        servers whose names contain one of these words (--list prints the names)
  --work W,…        workloads PATTERN-BLOCK-DEPTH[xCONNECTIONS][@TRANSPORT], such as randread-4k-64,write-256k-16x2@tcp
  --all             every workload there is: hours
  --rounds N        rounds (3); figures are their medians
  --secs N          seconds for each server and workload (1)
  --json FILE       write the figures there
  --nbdblk PATH     measure this build of nbdblk
  --plugin PATH     and this one of the plugin
  --list            print servers and workloads";

/// What a user gets who asks for nothing.
const DEFAULT: &str = "randread-4k-1,randread-4k-64,randwrite-4k-64,read-256k-16,write-256k-16";

/// Everything that was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Vec<String>,
    pub(crate) rows: Vec<Row>,
}

/// A server under a workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) work: String,
    pub(crate) server: String,
    pub(crate) device: String,
    pub(crate) rounds: usize,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

/// What the user asked for.
struct Options {
    only: Vec<String>,
    work: Vec<Work>,
    rounds: usize,
    seconds: u32,
    json: Option<String>,
    nbdblk: Option<String>,
    plugin: Option<String>,
}

/// Runs the benchmark that the words describe.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let mut options = Options {
        only: Vec::new(),
        work: works(DEFAULT)?,
        rounds: 3,
        seconds: 1,
        json: None,
        nbdblk: None,
        plugin: None,
    };
    let mut words = words.iter().copied();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a value\n\n{HELP}"));
        match word {
            "--only" => options.only = value()?.split(',').map(Into::into).collect(),
            "--work" => options.work = works(value()?)?,
            "--all" => options.work = all(),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--secs" => options.seconds = value()?.parse().context("--secs")?,
            "--json" => options.json = Some(value()?.into()),
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
    setup::run()?;
    let chosen = |server: &&Server| options.only.is_empty() || options.only.iter().any(|o| server.name.contains(o));
    let servers: Vec<&'static Server> = SERVERS.iter().filter(chosen).collect();
    ensure!(!servers.is_empty(), "no server has such a name; --list prints them");
    let stage = Stage::new(&servers, options.nbdblk.as_deref(), options.plugin.as_deref())?;
    let results = Results { machine: machine(&stage), rows: measure(&stage, &servers, &options) };
    print!("{}", report::table(&results));
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&results)?).with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}

fn works(words: &str) -> Result<Vec<Work>> {
    words.split(',').map(str::parse).collect()
}

/// The whole matrix.
fn all() -> Vec<Work> {
    let mut all = Vec::new();
    for transport in ["unix", "tcp"] {
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

/// Runs every workload on every server, round by round. In a round all servers run, and each workload goes from one to the
/// next, so that what changes on the machine meanwhile hits all alike.
fn measure(stage: &Stage, servers: &[&'static Server], options: &Options) -> Vec<Row> {
    let mut runs: BTreeMap<(usize, usize), Vec<Figures>> = BTreeMap::new();
    let total = options.rounds * options.work.len() * servers.len();
    let mut count = 0;
    let mut transports: Vec<_> = options.work.iter().map(|work| work.transport).collect();
    transports.dedup();
    for round in 0..options.rounds {
        for &transport in &transports {
            let running: Vec<Option<Running>> = servers
                .iter()
                .map(|server| match stage.start(server, transport) {
                    Ok(running) => Some(running),
                    Err(error) => {
                        if round == 0 {
                            eprintln!("{}: skipped: {error:#}", server.name);
                        }
                        None
                    }
                })
                .collect();
            for (w, work) in options.work.iter().enumerate().filter(|(_, work)| work.transport == transport) {
                for (s, running) in running.iter().enumerate() {
                    count += 1;
                    let Some(running) = running else { continue };
                    let name = running.server.name;
                    match work.run(running, options.seconds) {
                        Ok(f) => {
                            let (iops, cpu) = (f.iops, f.cpu_us);
                            eprintln!("[{count}/{total}] {work} {name}: {iops:.0} IOPS, {cpu:.2} us of processor each");
                            runs.entry((w, s)).or_default().push(f);
                        }
                        Err(error) => eprintln!("[{count}/{total}] {work} {name}: FAILED: {error:#}"),
                    }
                }
            }
        }
    }
    let row = |((w, s), runs): (&(usize, usize), &Vec<Figures>)| Row {
        work: options.work[*w].to_string(),
        server: servers[*s].name.into(),
        device: servers[*s].device.into(),
        rounds: runs.len(),
        figures: Figures::median(runs),
    };
    runs.iter().map(row).collect()
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
    let mut lines = vec![
        format!("{cpus} × {cpu}{}", if virtual_machine { ", a virtual machine" } else { "" }),
        format!("{:.0} GiB of memory", memory.unwrap_or(0.0) / f64::from(1 << 20)),
        format!("Linux {}", read("/proc/sys/kernel/osrelease").split('-').next().unwrap_or_default().trim()),
    ];
    lines.extend(stage.versions());
    lines
}
