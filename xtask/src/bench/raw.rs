//! Drivers without NBD between: ours, the crate blkio's, and fio's own io_uring.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::servers::{Stage, example};
use super::work::{Figures, figures, fio_report};
use crate::shell;

/// One way to a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Raw {
    /// `file` or `vu`, as for servers.
    pub(crate) device: String,
    /// `read` or `write`: random 4 KiB, 64 in flight.
    pub(crate) pattern: String,
    /// `nbdblk`, `blkio` or `fio`.
    pub(crate) driver: String,
    pub(crate) iops: f64,
    pub(crate) cpu_us: f64,
}

const DRIVERS: &[(&str, &str)] =
    &[("file", "nbdblk"), ("file", "blkio"), ("file", "fio"), ("vu", "nbdblk"), ("vu", "blkio")];

/// Measures them all, round by round; the medians.
pub(crate) fn run(stage: &Stage, rounds: usize, seconds: u32) -> Result<Vec<Raw>> {
    let (ours, theirs) = (example("blkdev-drivers", "raw")?, example("blkdev-libblkio", "baseline")?);
    let seconds = seconds.to_string();
    let mut all = Vec::new();
    for pattern in ["read", "write"] {
        let mut runs = vec![Vec::new(); DRIVERS.len()];
        for _ in 0..rounds {
            for (&(device, driver), runs) in DRIVERS.iter().zip(&mut runs) {
                let _vhost = if device == "vu" { Some(stage.vhost("raw")?) } else { None };
                let path = if device == "vu" { stage.vhost_socket("raw") } else { stage.image().to_owned() };
                let path = path.display();
                let figures = match (device, driver) {
                    ("file", "nbdblk") => {
                        measure(Command::new(&ours).arg(format!("io_uring={path}")), pattern, &seconds)
                    }
                    (_, "nbdblk") => measure(Command::new(&ours).arg(format!("vhost-user={path}")), pattern, &seconds),
                    ("file", "blkio") => {
                        measure(Command::new(&theirs).args(["io_uring", &path.to_string()]), pattern, &seconds)
                    }
                    (_, "blkio") => measure(
                        Command::new(&theirs).args(["virtio-blk-vhost-user", &path.to_string()]),
                        pattern,
                        &seconds,
                    ),
                    _ => fio(&path.to_string(), pattern, &seconds),
                }?;
                eprintln!(
                    "{pattern} {device} {driver}: {:.0} IOPS, {:.2} us of processor each",
                    figures.iops, figures.cpu_us
                );
                runs.push(figures);
            }
        }
        all.extend(DRIVERS.iter().zip(runs).map(|(&(device, driver), runs)| {
            let Figures { iops, cpu_us, .. } = Figures::median(&runs);
            Raw { device: device.into(), pattern: pattern.into(), driver: driver.into(), iops, cpu_us }
        }));
    }
    Ok(all)
}

/// Runs one of the examples, which print `IOPS MICROSECONDS`.
fn measure(command: &mut Command, pattern: &str, seconds: &str) -> Result<Figures> {
    let output = command.args([pattern, "4096", "64", seconds]).output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{} ended with {}: {}", shell::show(command), output.status, errors.trim());
    let (iops, cpu) = text.trim().split_once(' ').with_context(|| format!("not two numbers: {text}"))?;
    Ok(Figures { iops: iops.parse()?, cpu_us: cpu.parse()?, ..Figures::default() })
}

fn fio(path: &str, pattern: &str, seconds: &str) -> Result<Figures> {
    let mut fio = shell::command("fio");
    fio.args(["--name=bench", "--ioengine=io_uring", "--iodepth=64", "--bs=4k", "--norandommap", "--time_based"]);
    // As the examples do: a system call for what there is to do, not one for each.
    fio.args(["--iodepth_batch_submit=64", "--iodepth_batch_complete_max=64", "--gtod_reduce=1", "--thread"]);
    // Or it throws the file out of the page cache first.
    fio.arg("--invalidate=0");
    fio.args([format!("--filename={path}"), format!("--rw=rand{pattern}"), format!("--runtime={seconds}")]);
    let report = fio_report(fio.arg("--output-format=json"))?;
    let percent = |key: &str| report[key].as_f64().with_context(|| format!("fio does not tell {key}"));
    let (figures, _) = figures(&report)?;
    // Of the one thread that does all the work, in hundredths of its time.
    Ok(Figures { cpu_us: (percent("usr_cpu")? + percent("sys_cpu")?) * 1e4 / figures.iops, ..figures })
}
