//! The tables of `nbdblk status`.

use std::{fmt::Write, path::Path, time::Duration};

use blkdev::Latency;

use super::report::{Client, DeviceState, Export, OperationReport, Queue, Report};

/// Width of the bar of an export.
const BAR: usize = 20;

/// The activity of an export in an interval.
#[derive(Debug, Default)]
struct Rates {
    /// Per second.
    reads: f64,
    writes: f64,
    bytes_read: f64,
    bytes_written: f64,
    errors: u64,
    in_flight: u64,
    /// Of all operations.
    latency: Latency,
}

impl Rates {
    fn of(now: &Export, before: Option<&Export>, seconds: f64) -> Self {
        let mut rates = Self::default();
        for (name, operation) in &now.operations {
            let then = before.and_then(|before| before.operations.get(name));
            let passed =
                |of: fn(&OperationReport) -> u64| of(operation).saturating_sub(then.map_or(0, of)) as f64 / seconds;
            let (requests, bytes) = (passed(|operation| operation.requests), passed(|operation| operation.bytes));
            match name.as_str() {
                "read" => (rates.reads, rates.bytes_read) = (requests, bytes),
                _ => {
                    rates.writes += requests;
                    rates.bytes_written += if name == "write" { bytes } else { 0.0 };
                }
            }
            rates.errors += operation.errors.values().sum::<u64>();
            rates.in_flight += operation.in_flight;
            let earlier = then.map(|then| then.latency.histogram()).unwrap_or_default();
            rates.latency += &operation.latency.histogram().since(&earlier);
        }
        rates.errors += now.refused;
        rates
    }
}

/// The table of exports. Rates and percentiles cover the time since `before`. `bars`: draws a bar for each export.
pub(crate) fn exports(control: &Path, now: &Report, before: &Report, bars: bool) -> String {
    let seconds = (now.uptime_seconds - before.uptime_seconds).max(0.001);
    let earlier = |export: &Export| before.exports.iter().find(|then| then.name == export.name);
    let all: Vec<_> = now.exports.iter().map(|export| (export, Rates::of(export, earlier(export), seconds))).collect();
    let most = all.iter().map(|(_, rates)| rates.bytes_read + rates.bytes_written).fold(1.0, f64::max);
    let mut rows = vec![
        [
            "EXPORT",
            "STATE",
            "CLIENTS",
            "READ/s",
            "OTHER/s",
            "READ B/s",
            "WRITTEN B/s",
            "FLIGHT",
            "P50",
            "P99",
            "ERRORS",
            "",
        ]
        .map(str::to_owned),
    ];
    for (export, rates) in &all {
        let bar = ((rates.bytes_read + rates.bytes_written) / most * BAR as f64).round() as usize;
        rows.push([
            name(&export.name),
            state(export),
            export.clients.to_string(),
            number(rates.reads),
            number(rates.writes),
            bytes(rates.bytes_read),
            bytes(rates.bytes_written),
            rates.in_flight.to_string(),
            time(rates.latency.quantile(0.5)),
            time(rates.latency.quantile(0.99)),
            rates.errors.to_string(),
            if bars { "#".repeat(bar) } else { String::new() },
        ]);
    }
    format!("{}\n{}", head(control, now, before, seconds), table(&rows, &[2, 3, 4, 5, 6, 7, 8, 9, 10]))
}

/// The line above the table.
fn head(control: &Path, now: &Report, before: &Report, seconds: f64) -> String {
    let busy = |report: &Report| report.workers.iter().map(|worker| worker.busy_seconds).sum::<f64>();
    let alive = now.workers.iter().filter(|worker| worker.alive).count();
    let (used, total) = now
        .exports
        .iter()
        .fold((0, 0), |(used, total), export| (used + export.memory.used, total + export.memory.total));
    format!(
        "{} at {}, process {}, up {}; {} clients, {} so far; {alive} of {} workers, busy {:.0} %; memory {} of {}",
        now.program,
        control.display(),
        now.pid,
        span(now.uptime_seconds),
        now.clients.len(),
        now.clients_served,
        now.workers.len(),
        (busy(now) - busy(before)) / seconds / (now.workers.len().max(1) as f64) * 100.0,
        bytes(used as f64),
        bytes(total as f64),
    )
}

/// The table of clients.
pub(crate) fn clients(report: &Report) -> String {
    let mut rows = vec![
        [
            "ID",
            "EXPORT",
            "FROM",
            "SECURITY",
            "REPLIES",
            "CONNECTED",
            "REQUESTS",
            "FAILED",
            "READ",
            "WRITTEN",
            "FLIGHT",
            "OLDEST",
        ]
        .map(str::to_owned),
    ];
    rows.extend(report.clients.iter().map(|client| {
        let Client { id, peer, export, security, protocol, .. } = client;
        [
            id.to_string(),
            name(export),
            peer.clone(),
            security.clone(),
            protocol.clone(),
            span(client.connected_seconds),
            client.requests.to_string(),
            client.failed.to_string(),
            bytes(client.bytes_read as f64),
            bytes(client.bytes_written as f64),
            client.in_flight.to_string(),
            client.oldest_seconds.map_or("-".into(), span),
        ]
    }));
    table(&rows, &[0, 5, 6, 7, 8, 9, 10, 11])
}

/// The table of queues.
pub(crate) fn queues(report: &Report) -> String {
    let mut rows =
        vec![["EXPORT", "WORKER", "FLIGHT", "OLDEST", "MEMORY", "USED", "WAITING", "STATE"].map(str::to_owned)];
    for export in &report.exports {
        rows.extend(export.queues.iter().map(|queue| {
            let Queue { worker, in_flight, oldest_seconds, memory, .. } = queue;
            let stalled = if queue.stalled { "stalled; " } else { "" };
            [
                name(&export.name),
                worker.to_string(),
                in_flight.to_string(),
                oldest_seconds.map_or("-".into(), span),
                bytes(memory.total as f64),
                bytes(memory.used as f64),
                memory.waiting.to_string(),
                format!("{stalled}{}", queue.state),
            ]
        }));
    }
    table(&rows, &[1, 2, 3, 4, 5, 6])
}

/// The name of an export; the empty name in quotes.
fn name(name: &str) -> String {
    if name.is_empty() { "\"\"".into() } else { name.escape_debug().to_string() }
}

fn state(export: &Export) -> String {
    let state = match &export.removal {
        Some(_) if export.state == DeviceState::Working => "removed".into(),
        _ => export.state.name().to_owned(),
    };
    match export.oldest_seconds {
        Some(age) if age >= 1.0 => format!("{state}, oldest {}", span(age)),
        _ => state,
    }
}

/// Columns as wide as their widest cell; those in `right` are numbers.
fn table<const N: usize>(rows: &[[String; N]], right: &[usize]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|n| rows.iter().map(|row| row[n].chars().count()).max().unwrap_or_default());
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (n, cell) in row.iter().enumerate() {
            let width = widths[n];
            let gap = if n == 0 { "" } else { "  " };
            let written = if right.contains(&n) {
                write!(line, "{gap}{cell:>width$}")
            } else {
                write!(line, "{gap}{cell:<width$}")
            };
            written.expect("a string takes everything");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A number with a unit, in about three digits.
fn scaled(value: f64, step: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, 0);
    while value >= step * 0.9995 && unit + 1 < units.len() {
        (value, unit) = (value / step, unit + 1);
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$}{}", units[unit])
}

fn number(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G"])
}

fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &["", "K", "M", "G", "T", "P"])
}

fn time(time: Option<Duration>) -> String {
    time.map_or("-".into(), |time| scaled(time.as_secs_f64() * 1e6, 1000.0, &["us", "ms", "s"]))
}

/// A long time, in seconds, minutes, hours or days.
fn span(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1}s"),
        s if s < 120.0 => format!("{s:.0}s"),
        s if s < 7200.0 => format!("{:.0}min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0}h", s / 3600.0),
        s => format!("{:.0}d", s / 86400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        assert_eq!([0.0, 999.0, 1000.0, 12_345.0, 999_960.0].map(number), ["0", "999", "1.0k", "12.3k", "1.0M"]);
        assert_eq!([1023.0, 1024.0, 1.5 * 1048576.0, 200.0 * 1024.0].map(bytes), ["1023", "1.0K", "1.5M", "200K"]);
        assert_eq!(time(Some(Duration::from_micros(85))), "85us");
        assert_eq!(time(Some(Duration::from_millis(1500))), "1.5s");
        assert_eq!([0.4, 61.0, 7199.0, 90_000.0].map(span), ["0.4s", "61s", "120min", "25h"]);
    }

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let rows = [["NAME", "N"], ["a", "12"], ["\u{fc}ber", "3"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows, &[1]), "NAME   N\na     12\n\u{fc}ber   3\n");
    }
}
