//! What was measured, as a table for the terminal, with ratios to the rivals and to the floor.

use std::fmt::Write;

use super::servers::{Program, SERVERS};
use super::{Results, Row};

/// What a row is measured against: in its workload, on the same device.
struct Rivals<'a> {
    rows: Vec<&'a Row>,
    floor: Option<&'a Row>,
}

impl<'a> Rivals<'a> {
    fn of(row: &Row, all: &'a [Row]) -> Self {
        let peers = || all.iter().filter(|other| other.work == row.work && other.device == row.device);
        Self {
            rows: peers().filter(|other| program(other).is_some_and(Program::is_rival)).collect(),
            floor: all.iter().find(|other| {
                // The least that a server of this device could do; nothing at all for the devices without a floor of their own.
                let name = if row.device == "file" { "floor-file" } else { "floor-null" };
                other.work == row.work && other.server == name
            }),
        }
    }

    /// The least processor time of a rival.
    fn cpu(&self) -> Option<f64> {
        self.rows.iter().map(|row| row.figures.cpu_us).min_by(f64::total_cmp)
    }

    /// The most operations of a rival.
    fn iops(&self) -> Option<f64> {
        self.rows.iter().map(|row| row.figures.iops).max_by(f64::total_cmp)
    }
}

fn program(row: &Row) -> Option<Program> {
    SERVERS.iter().find(|server| server.name == row.server).map(|server| server.program)
}

/// The names of the workloads, in order.
fn works(rows: &[Row]) -> Vec<&str> {
    let mut works: Vec<&str> = rows.iter().map(|row| row.work.as_str()).collect();
    works.dedup();
    works
}

fn ratio(value: f64, base: Option<f64>) -> String {
    base.map_or_else(|| "-".into(), |base| format!("{:.2}", value / base))
}

/// Everything, for people. Ratios are to the best rival with the same device.
pub(crate) fn table(results: &Results) -> String {
    let mut out = String::new();
    for work in works(&results.rows) {
        let _ = writeln!(
            out,
            "\n{work:22} {:>9} {:>8} {:>8} {:>8} {:>8}   {:>7} {:>7} {:>8} {:>7}",
            "IOPS", "MiB/s", "p50 us", "p99 us", "CPU us", "/rival", "/floor", "IOPS/riv", "dev us"
        );
        let mut device = "";
        for row in results.rows.iter().filter(|row| row.work == work) {
            if device != row.device && !device.is_empty() {
                out.push('\n');
            }
            device = &row.device;
            let (f, rivals) = (&row.figures, Rivals::of(row, &results.rows));
            let _ = writeln!(
                out,
                "  {:20} {:9.0} {:8.0} {:8.0} {:8.0} {:8.2}   {:>7} {:>7} {:>8} {:7.2}",
                row.server,
                f.iops,
                f.mib_s,
                f.p50_us,
                f.p99_us,
                f.cpu_us,
                ratio(f.cpu_us, rivals.cpu()),
                ratio(f.cpu_us, rivals.floor.map(|floor| floor.figures.cpu_us)),
                ratio(f.iops, rivals.iops()),
                f.device_us,
            );
        }
    }
    out
}
