//! A workload: what it is called, what fio is asked for it, and what came of it.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::servers::Running;
use super::transport::Transport;
use crate::shell;

/// `PATTERN-BLOCK-DEPTH[xCONNECTIONS][@TRANSPORT]`, such as `randread-4k-64` or `write-256k-16x2@tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// As fio calls it: `randread`, `write`, …
    pattern: String,
    block: String,
    /// Of each connection.
    depth: u32,
    pub(crate) connections: u32,
    pub(crate) transport: Transport,
}

impl FromStr for Work {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let (rest, transport) = match word.split_once('@') {
            None | Some((_, "unix")) => (word.split('@').next().unwrap_or(word), Transport::Unix),
            Some((rest, "tcp")) => (rest, Transport::Tcp),
            Some((rest, "tls")) => (rest, Transport::Tls),
            Some((_, other)) => bail!("{word}: no transport {other}; there are unix, tcp and tls"),
        };
        let (rest, connections) = rest.split_once('x').unwrap_or((rest, "1"));
        let parts: Vec<&str> = rest.split('-').collect();
        let [pattern @ ("read" | "write" | "randread" | "randwrite"), block, depth] = parts[..] else {
            bail!("{word}: a workload is PATTERN-BLOCK-DEPTH[xCONNECTIONS][@TRANSPORT], such as randread-4k-64x2@tcp");
        };
        let number = |text: &str| text.parse().ok().filter(|n| (1..=1024).contains(n));
        Ok(Self {
            pattern: pattern.into(),
            block: block.into(),
            depth: number(depth).with_context(|| format!("{word}: the depth is a number up to 1024"))?,
            connections: number(connections).with_context(|| format!("{word}: connections are up to 1024"))?,
            transport,
        })
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.pattern, self.block, self.depth)?;
        if self.connections > 1 {
            write!(f, "x{}", self.connections)?;
        }
        match self.transport {
            Transport::Unix => Ok(()),
            Transport::Tcp => f.write_str("@tcp"),
            Transport::Tls => f.write_str("@tls"),
        }
    }
}

/// What a workload did on a server: of one run, or the medians of several.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) iops: f64,
    pub(crate) mib_s: f64,
    /// Latency as the client saw it, microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Processor time of the server for each I/O, microseconds.
    pub(crate) cpu_us: f64,
    /// That of the process behind it, if there is one.
    pub(crate) device_us: f64,
}

impl Figures {
    /// Of each figure the median.
    pub(crate) fn median(runs: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| {
            let mut all: Vec<f64> = runs.iter().map(figure).collect();
            all.sort_unstable_by(f64::total_cmp);
            match all.len() {
                0 => f64::NAN,
                n => (all[n / 2] + all[(n - 1) / 2]) / 2.0,
            }
        };
        Self {
            iops: of(|run| run.iops),
            mib_s: of(|run| run.mib_s),
            p50_us: of(|run| run.p50_us),
            p99_us: of(|run| run.p99_us),
            cpu_us: of(|run| run.cpu_us),
            device_us: of(|run| run.device_us),
        }
    }
}

impl Work {
    /// Lets fio work on the server for some seconds.
    pub(crate) fn run(&self, running: &Running, seconds: u32) -> Result<Figures> {
        let (cpu, device) = (running.cpu()?, running.backend_cpu()?);
        // A server that never answers one client must not delay the figures of the others.
        let mut fio = shell::command("timeout");
        fio.args([&(seconds + 30).to_string(), "fio"]);
        fio.args(["--name=bench", "--ioengine=nbd", "--thread", "--group_reporting", "--time_based"]);
        fio.args(["--size=1g", "--norandommap", "--output-format=json"]);
        fio.arg(format!("--uri={}", running.address.uri()));
        fio.args([format!("--rw={}", self.pattern), format!("--bs={}", self.block)]);
        fio.args([format!("--iodepth={}", self.depth), format!("--numjobs={}", self.connections)]);
        fio.arg(format!("--runtime={seconds}"));
        let report = fio_report(&mut fio)?;
        let (cpu, device) = (running.cpu()? - cpu, running.backend_cpu()? - device);
        figures(&report).map(|(figures, count)| Figures {
            cpu_us: cpu.as_secs_f64() * 1e6 / count,
            device_us: device.as_secs_f64() * 1e6 / count,
            ..figures
        })
    }
}

/// Runs fio and answers what it says of its jobs, which are one group.
pub(crate) fn fio_report(fio: &mut std::process::Command) -> Result<Value> {
    let output = fio.output().context("fio is not installed: run `cargo xtask setup`")?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "fio ended with {}: {}", output.status, errors.trim());
    // Before the report there may be notes.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(json).with_context(|| format!("fio's report: {text}"))?;
    ensure!(report["jobs"][0]["error"] == 0, "fio saw an error: {}", errors.trim());
    Ok(report["jobs"][0].clone())
}

/// What a report says, without processor times, and of how many operations.
pub(crate) fn figures(report: &Value) -> Result<(Figures, f64)> {
    let side = if report["read"]["total_ios"] == 0 { &report["write"] } else { &report["read"] };
    let number = |value: &Value| value.as_f64().context("fio's report lacks a number");
    let count = number(&side["total_ios"])?;
    ensure!(count > 0.0, "fio did no operation");
    let latency = |part: &str| side["clat_ns"]["percentile"][part].as_f64().unwrap_or(0.0) / 1e3;
    let figures = Figures {
        iops: number(&side["iops"])?,
        mib_s: number(&side["bw_bytes"])? / f64::from(1 << 20),
        p50_us: latency("50.000000"),
        p99_us: latency("99.000000"),
        ..Figures::default()
    };
    Ok((figures, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_read_as_they_are_written() {
        for word in ["randread-4k-64", "write-256k-16x2", "randwrite-4k-1@tcp", "read-1m-4x4@tls"] {
            assert_eq!(word.parse::<Work>().expect(word).to_string(), word);
        }
        for word in ["", "randread-4k", "trim-4k-1", "read-4k-0", "read-4k-1x0", "read-4k-1@pipe", "read-4k-1-1"] {
            assert!(word.parse::<Work>().is_err(), "{word}");
        }
    }

    #[test]
    fn a_median_is_in_the_middle() {
        let runs = [3.0, 1.0, 2.0, 9.0].map(|iops| Figures { iops, ..Figures::default() });
        assert_eq!(Figures::median(&runs[..3]).iops, 2.0);
        assert_eq!(Figures::median(&runs).iops, 2.5);
    }
}
