//! The memory of a server: idle, with many clients that do nothing, and under load; and whether an idle server sleeps.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use nbd_client::{Client, Options};
use serde::{Deserialize, Serialize};

use super::servers::{Address, Running, Server, Stage};
use super::transport::Transport;
use super::work::Work;

/// A server at rest and at work. Memory is resident, in KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Memory {
    pub(crate) server: String,
    pub(crate) device: String,
    /// One export, no client.
    pub(crate) idle_kib: u64,
    /// More for each connection that does nothing. `None`: it does not take so many.
    pub(crate) connection_kib: Option<f64>,
    /// The most, with 64 reads of 1 MiB in flight on one connection.
    pub(crate) busy_kib: u64,
    /// How often its threads were woken in [`IDLE`] with one client that does nothing.
    pub(crate) wakeups: u64,
}

/// Connections to divide by.
const CONNECTIONS: u32 = 200;
/// How long the servers are watched at rest.
pub(crate) const IDLE: Duration = Duration::from_secs(10);

/// Measures each server: at rest all at a time, at work one by one.
pub(crate) fn run(stage: &Stage, servers: &[&'static Server], seconds: u32) -> Result<Vec<Memory>> {
    let running: Vec<Running> = servers
        .iter()
        .filter_map(|server| match stage.start(server, Transport::Unix) {
            Ok(running) => Some(running),
            Err(error) => {
                eprintln!("{}: skipped: {error:#}", server.name);
                None
            }
        })
        .collect();
    let load: Work = "read-1m-64".parse()?;
    eprintln!("watching {} servers at rest for {} s", running.len(), IDLE.as_secs());
    sleep(Duration::from_millis(500));
    let mut idle = Vec::new();
    for running in &running {
        let pid = running.process.id();
        let kib = status(pid, "VmRSS")?;
        let client = connect(&running.address)?;
        sleep(Duration::from_millis(100));
        idle.push((kib, switches(pid)?, client));
    }
    sleep(IDLE);
    let woken: Vec<u64> = running.iter().map(|running| switches(running.process.id())).collect::<Result<_>>()?;
    let mut all = Vec::new();
    for ((running, (idle_kib, before, client)), after) in running.iter().zip(idle).zip(woken) {
        let (server, pid) = (running.server, running.process.id());
        let one = status(pid, "VmRSS")?;
        let more = (0..CONNECTIONS).map(|_| connect(&running.address)).collect::<Result<Vec<_>>>();
        sleep(Duration::from_millis(200));
        let grown = status(pid, "VmRSS")? as f64 - one as f64;
        let connection_kib = more.is_ok().then_some(grown / f64::from(CONNECTIONS));
        drop((client, more));
        sleep(Duration::from_millis(200));
        // From here on, the most.
        fs::write(format!("/proc/{pid}/clear_refs"), "5").context("resetting the peak of memory")?;
        load.run(running, seconds)?;
        let memory = Memory {
            server: server.name.into(),
            device: server.device.into(),
            idle_kib,
            connection_kib,
            busy_kib: status(pid, "VmHWM")?,
            wakeups: after - before,
        };
        eprintln!("{memory:?}");
        all.push(memory);
    }
    Ok(all)
}

/// A number of /proc/PID/status.
fn status(pid: u32, key: &str) -> Result<u64> {
    number(&fs::read_to_string(format!("/proc/{pid}/status")).context("a server ended while it was measured")?, key)
}

fn number(status: &str, key: &str) -> Result<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.split_whitespace().next());
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no {key} in a status of /proc"))
}

/// How often the threads of a process got a processor. A sleeping thread gets none.
fn switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("a server ended while it was measured")? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
        sum += number(&text, "voluntary_ctxt_switches")? + number(&text, "nonvoluntary_ctxt_switches")?;
    }
    Ok(sum)
}

/// A client that has shaken hands and does nothing.
fn connect(address: &Address) -> Result<Client> {
    let uri = address.uri().parse()?;
    Ok(Client::connect(&uri, &Options::default())?)
}
