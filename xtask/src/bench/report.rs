//! What was measured, as tables and pictures: for the terminal, and for docs/performance.md.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::memory::IDLE;
use super::servers::{Program, SERVERS};
use super::svg::{self, Bar, Group, Kind, number};
use super::{CONNECTIONS, Results, Row};

/// What a row is measured against: the servers with the same device under the same workload.
struct Rivals {
    /// The least processor time of one, and the most operations of one.
    cpu: Option<f64>,
    iops: Option<f64>,
    floor: Option<f64>,
}

impl Rivals {
    fn of(row: &Row, all: &[Row]) -> Self {
        let rows = || all.iter().filter(|other| other.work == row.work);
        let rivals = || rows().filter(|other| other.device == row.device && kind(&other.server) == Kind::Rival);
        // A device without a floor of its own is held against that of nothing.
        let floor = if row.device == "file" { "floor-file" } else { "floor-null" };
        Self {
            cpu: rivals().map(|row| row.figures.cpu_us).min_by(f64::total_cmp),
            iops: rivals().map(|row| row.figures.iops).max_by(f64::total_cmp),
            floor: rows().find(|row| row.server == floor).map(|row| row.figures.cpu_us),
        }
    }
}

fn kind(server: &str) -> Kind {
    match SERVERS.iter().find(|known| known.name == server).map(|server| server.program) {
        Some(program) if program.is_ours() => Kind::Ours,
        Some(Program::Floor) => Kind::Floor,
        _ => Kind::Rival,
    }
}

/// The different texts that `of` finds, in the order of their first appearance.
fn distinct<'a, T>(rows: &'a [T], of: impl Fn(&'a T) -> &'a str) -> Vec<&'a str> {
    let mut all = Vec::new();
    for text in rows.iter().map(of) {
        if !all.contains(&text) {
            all.push(text);
        }
    }
    all
}

fn ratio(value: f64, base: Option<f64>) -> String {
    base.filter(|&base| base > 0.0).map_or_else(|| "-".into(), |base| format!("{:.2}", value / base))
}

/// A table of text, the first column to the left, the others to the right.
struct Table(Vec<Vec<String>>);

impl Table {
    fn new(heads: &[&str]) -> Self {
        Self(vec![heads.iter().map(|&head| head.into()).collect()])
    }

    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.0.push(cells.into());
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| self.0.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        (0..self.0[0].len()).map(width).collect()
    }

    fn text(&self) -> String {
        let (widths, mut out) = (self.widths(), String::new());
        for row in &self.0 {
            for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let _ = if i == 0 { write!(out, "{cell:width$}") } else { write!(out, "  {cell:>width$}") };
            }
            out.push('\n');
        }
        out
    }

    fn markdown(&self) -> String {
        let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
        let rule: Vec<_> = (0..self.0[0].len()).map(|i| String::from(if i == 0 { "---" } else { "---:" })).collect();
        line(&self.0[0]) + &line(&rule) + &self.0[1..].iter().map(line).collect::<String>()
    }
}

/// The servers under one workload.
fn servers(rows: &[Row], work: &str) -> Table {
    let heads = ["IOPS", "MiB/s", "p50 µs", "p99 µs", "CPU µs", "/ rival", "/ floor", "IOPS / rival", "device µs"];
    let mut table = Table::new(&[&[work][..], &heads].concat());
    for row in rows.iter().filter(|row| row.work == work) {
        let (f, rivals) = (&row.figures, Rivals::of(row, rows));
        table.row([
            row.server.clone(),
            number(f.iops),
            number(f.mib_s),
            number(f.p50_us),
            number(f.p99_us),
            number(f.cpu_us),
            ratio(f.cpu_us, rivals.cpu),
            ratio(f.cpu_us, rivals.floor),
            ratio(f.iops, rivals.iops),
            if f.device_us > 0.0 { number(f.device_us) } else { "-".into() },
        ]);
    }
    table
}

/// Ours against the best of the others, a line each.
fn summary(rows: &[Row]) -> Table {
    let mut table = Table::new(&["workload", "server", "CPU / best rival", "CPU / floor", "IOPS / best rival"]);
    for row in rows.iter().filter(|row| kind(&row.server) == Kind::Ours) {
        let (f, rivals) = (&row.figures, Rivals::of(row, rows));
        table.row([
            row.work.clone(),
            row.server.clone(),
            ratio(f.cpu_us, rivals.cpu),
            ratio(f.cpu_us, rivals.floor),
            ratio(f.iops, rivals.iops),
        ]);
    }
    table
}

fn raw(results: &Results) -> Table {
    let mut table = Table::new(&["device, pattern", "driver", "IOPS", "CPU µs", "CPU / blkio", "IOPS / blkio"]);
    for raw in &results.raw {
        let same = |other: &&super::raw::Raw| other.device == raw.device && other.pattern == raw.pattern;
        let blkio = results.raw.iter().filter(same).find(|other| other.driver == "blkio");
        table.row([
            format!("{}, {}", raw.device, raw.pattern),
            raw.driver.clone(),
            number(raw.iops),
            number(raw.cpu_us),
            ratio(raw.cpu_us, blkio.map(|blkio| blkio.cpu_us)),
            ratio(raw.iops, blkio.map(|blkio| blkio.iops)),
        ]);
    }
    table
}

fn memory(results: &Results) -> Table {
    let woken = format!("woken in {} s", IDLE.as_secs());
    let heads = ["server", "idle, MiB", "each connection, KiB", "64 × 1 MiB in flight, MiB", &woken];
    let mut table = Table::new(&heads);
    let mib = |kib: u64| number(kib as f64 / 1024.0);
    for row in &results.memory {
        let each = row.connection_kib.map_or_else(|| "one client only".into(), number);
        table.row([row.server.clone(), mib(row.idle_kib), each, mib(row.busy_kib), row.wakeups.to_string()]);
    }
    table
}

/// Servers against numbers of connections, processor time for each I/O.
fn connections(results: &Results, title: &str, works: &str) -> Table {
    let heads: Vec<&str> = works.split(',').map(connections_of).collect();
    let title = format!("{title}; connections:");
    let mut table = Table::new(&[&[&*title][..], &heads].concat());
    for server in distinct(&results.connections, |row| &row.server) {
        let cell = |work: &str| {
            let row = results.connections.iter().find(|row| row.server == server && row.work == work);
            row.map_or_else(|| "-".into(), |row| number(row.figures.cpu_us))
        };
        table.0.push(std::iter::once(server.to_owned()).chain(works.split(',').map(cell)).collect());
    }
    table
}

fn connections_of(work: &str) -> &str {
    work.rsplit_once('x').map_or("1", |(_, count)| count)
}

fn micro(results: &Results) -> Table {
    let mut table = Table::new(&["part", "instructions"]);
    for count in &results.micro {
        table.row([count.part.clone(), number(count.instructions)]);
    }
    table
}

/// Everything, for the terminal.
pub(crate) fn text(results: &Results) -> String {
    let tables = distinct(&results.rows, |row| &row.work).into_iter().map(|work| servers(&results.rows, work));
    let others = [raw(results), memory(results), micro(results)];
    let connections = CONNECTIONS.into_iter().map(|(_, title, works)| connections(results, title, works));
    let tables = tables.chain(others).chain(connections).filter(|table| table.0.len() > 1);
    tables.map(|table| table.text() + "\n").collect()
}

/// One picture for each workload, one for the drivers, one for the numbers of connections: file name, text.
fn pictures(results: &Results) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for work in distinct(&results.rows, |row| &row.work) {
        // Small requests are counted, big ones are weighed.
        let big = !work.contains("-4k-");
        let rows: Vec<&Row> = results.rows.iter().filter(|row| row.work == work).collect();
        let group = |device: &str| -> Group {
            let rows = rows.iter().filter(|row| row.device == device);
            let bar = |row: &&Row| Bar {
                label: row.server.clone(),
                kind: kind(&row.server),
                values: [row.figures.cpu_us, if big { row.figures.mib_s } else { row.figures.iops }],
            };
            (device.into(), rows.map(bar).collect())
        };
        let groups: Vec<Group> = distinct(&results.rows, |row| &row.device).into_iter().map(group).collect();
        let heads = ["server CPU, µs for each I/O (less is better)", if big { "MiB/s" } else { "I/O per second" }];
        all.push((format!("{}.svg", work.replace('@', "-")), svg::bars(work, heads, &groups)));
    }
    let heads = ["CPU, µs for each I/O (less is better)", "I/O per second"];
    if !results.raw.is_empty() {
        let mut groups: Vec<Group> = Vec::new();
        for raw in &results.raw {
            let name = format!("{}, {}", raw.device, raw.pattern);
            if groups.last().is_none_or(|(last, _)| *last != name) {
                groups.push((name, Vec::new()));
            }
            let kind = if raw.driver == "nbdblk" { Kind::Ours } else { Kind::Rival };
            let bar = Bar { label: raw.driver.clone(), kind, values: [raw.cpu_us, raw.iops] };
            groups.last_mut().expect("there is one now").1.push(bar);
        }
        all.push(("raw.svg".into(), svg::bars("drivers without NBD: random 4 KiB, 64 in flight", heads, &groups)));
    }
    for (name, title, works) in CONNECTIONS.into_iter().filter(|_| !results.connections.is_empty()) {
        let group = |server: &str| -> Group {
            let row = |work| results.connections.iter().find(|row| row.server == server && row.work == work);
            let bar = |row: &Row| Bar {
                label: connections_of(&row.work).into(),
                kind: kind(server),
                values: [row.figures.cpu_us, row.figures.iops],
            };
            (server.into(), works.split(',').filter_map(row).map(bar).collect())
        };
        let groups: Vec<Group> = distinct(&results.connections, |row| &row.server).into_iter().map(group).collect();
        let title = format!("random 4 KiB reads over 1 to 256 connections, {title}");
        all.push((format!("{name}.svg"), svg::bars(&title, heads, &groups)));
    }
    all
}

/// Draws everything into a directory.
pub(crate) fn draw(results: &Results, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    for (name, text) in pictures(results) {
        fs::write(dir.join(&name), text).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

/// What stands between the marks in docs/performance.md, by its name.
fn section(name: &str, results: &Results) -> Option<String> {
    let picture = |name: &str| format!("![{name}](performance/{name}.svg)\n");
    let rows = &results.rows;
    Some(match name {
        "machine" => results.machine.iter().map(|line| format!("- {line}\n")).collect(),
        "summary" => summary(rows).markdown(),
        "servers" => {
            let works = distinct(rows, |row| &row.work).into_iter();
            let one = |work: &str| {
                let (picture, table) = (picture(&work.replace('@', "-")), servers(rows, work).markdown());
                format!("{picture}\n<details><summary>{work}: all figures</summary>\n\n{table}\n</details>\n")
            };
            works.map(one).collect::<Vec<_>>().join("\n")
        }
        // A picture that is not there must not be shown.
        "raw" if results.raw.is_empty() => String::new(),
        "connections" if results.connections.is_empty() => String::new(),
        "raw" => picture("raw") + "\n" + &raw(results).markdown(),
        "memory" => memory(results).markdown(),
        "connections" => {
            let one = |(name, title, works)| picture(name) + "\n" + &connections(results, title, works).markdown();
            CONNECTIONS.into_iter().map(one).collect::<Vec<_>>().join("\n")
        }
        "micro" => micro(results).markdown(),
        "socket" => socket(rows).markdown(),
        _ => return None,
    })
}

/// Bytes that cross the memory bus for each 4 KiB: written by the device, read and written by the kernel's copy into the
/// socket, read by the network card.
const TRAFFIC: f64 = 4.0 * 4096.0;
/// A socket of a large server: cores, bytes of memory traffic and of network in a second.
const CORES: f64 = 64.0;
const MEMORY: f64 = 300e9;
const NETWORK: f64 = 25e9;

/// What a socket of a large server would carry: the least of what its cores, its memory and its network would.
fn socket(rows: &[Row]) -> Table {
    let heads = [
        "server",
        "CPU µs",
        "one core, million IOPS",
        "64 cores",
        "300 GB/s of memory",
        "2 × 100 Gbit/s",
        "bottleneck",
    ];
    let mut table = Table::new(&heads);
    for row in rows.iter().filter(|row| row.work == "randread-4k-64" && kind(&row.server) == Kind::Ours) {
        let core = 1.0 / row.figures.cpu_us;
        let limits = [("cores", core * CORES), ("memory", MEMORY / TRAFFIC / 1e6), ("network", NETWORK / 4112.0 / 1e6)];
        let least = limits.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |limit| limit.0);
        let [cores, memory, network] = limits.map(|limit| number(limit.1));
        table.row([row.server.clone(), number(row.figures.cpu_us), number(core), cores, memory, network, least.into()]);
    }
    table
}

const BEGIN: &str = "<!-- figures: ";
const END: &str = "<!-- end of figures -->";

/// `text` with the figures between its marks replaced.
///
/// # Errors
/// A mark without an end, or with a name that there is not.
pub(crate) fn fill_in(text: &str, results: &Results) -> Result<String> {
    let mut pieces = text.split(BEGIN);
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (name, rest) = piece.split_once(" -->").context("a mark of figures does not end")?;
        let (_, rest) = rest.split_once(END).with_context(|| format!("the figures {name} do not end"))?;
        let figures = section(name, results).with_context(|| format!("there are no figures {name}"))?;
        let _ = write!(out, "{BEGIN}{name} -->\n\n{figures}\n{END}{rest}");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Figures;

    fn row(server: &str, device: &str, cpu_us: f64, iops: f64) -> Row {
        let figures = Figures { cpu_us, iops, ..Figures::default() };
        let (work, server, device) = ("randread-4k-64".into(), server.into(), device.into());
        Row { work, server, device, rounds: 1, figures }
    }

    /// Two rivals, each the better at one thing.
    fn results() -> Results {
        let rows = vec![
            row("floor-null", "null", 1.0, 9.0),
            row("nbdblk-vu", "vu", 2.0, 8.0),
            row("nbdkit-blkio-vu", "vu", 8.0, 2.0),
            row("qemu-nbd-blkio-vu", "vu", 10.0, 4.0),
        ];
        Results { rows, ..Results::default() }
    }

    #[test]
    fn ratios_are_to_the_best_rival_with_the_same_device() {
        assert_eq!(summary(&results().rows).0[1][2..], ["0.25", "2.00", "2.00"]);
    }

    #[test]
    fn figures_are_filled_in_again_and_again() {
        let text = format!("before\n{BEGIN}summary -->\n{END}\nbetween\n{BEGIN}micro -->\nold\n{END}\nafter\n");
        let once = fill_in(&text, &results()).expect("the marks are good");
        assert_eq!(fill_in(&once, &results()).expect("they still are"), once);
        assert!(once.contains("| nbdblk-vu | 0.25 |") && !once.contains("old"), "{once}");
        assert!(once.starts_with("before\n") && once.contains("\nbetween\n") && once.ends_with("\nafter\n"), "{once}");
        assert!(fill_in(&format!("{BEGIN}nonsense -->{END}"), &results()).is_err());
        assert!(fill_in(&format!("{BEGIN}micro -->"), &results()).is_err());
    }
}
