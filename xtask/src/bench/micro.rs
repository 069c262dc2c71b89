//! Instructions of the parts of the data path, counted by callgrind: the same on every machine, and at every load.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::servers::example;
use crate::shell::{find, show};

/// A part of the data path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Count {
    pub(crate) part: String,
    /// For each request.
    pub(crate) instructions: f64,
}

/// Package, example, its arguments before the number of batches, the function to count in, the requests in a batch, what
/// it is.
type Part = (&'static str, &'static str, &'static [&'static str], &'static str, f64, &'static str);

const PARTS: &[Part] = &[
    ("nbd-proto", "codec_cost", &[], "count_read", 64.0, "codec: take a READ"),
    ("nbd-proto", "codec_cost", &[], "count_write", 64.0, "codec: take a WRITE whose 4 KiB have come along"),
    ("nbd-proto", "codec_cost", &[], "count_head", 64.0, "codec: the head of a READ's structured reply"),
    ("nbd-proto", "codec_cost", &[], "count_done", 64.0, "codec: a WRITE's reply"),
    (
        "blkdev",
        "channel_cost",
        &[],
        "count_submit",
        64.0,
        "Channel: allocate and submit, down to a device that does nothing",
    ),
    ("blkdev", "channel_cost", &[], "count_reap", 64.0, "Channel: reap"),
    ("blkdev", "channel_cost", &[], "count_drop", 64.0, "Channel: free the memory"),
    ("blkdev-virtio", "cost", &["64", "split"], "count_push", 64.0, "virtqueue, split: push"),
    ("blkdev-virtio", "cost", &["64", "split"], "count_reap", 64.0, "virtqueue, split: reap"),
    ("blkdev-virtio", "cost", &["64", "packed"], "count_push", 64.0, "virtqueue, packed: push"),
    ("blkdev-virtio", "cost", &["64", "packed"], "count_reap", 64.0, "virtqueue, packed: reap"),
];

const BATCHES: f64 = 100.0;

/// Counts them all.
pub(crate) fn run() -> Result<Vec<Count>> {
    ensure!(find("valgrind").is_some(), "valgrind is not installed: as root type `apt-get install valgrind`");
    PARTS.iter().map(count).collect()
}

/// How much more is too much: the counts are exact, but depend on what the compiler inlines.
const TOLERANCE: f64 = 1.02;

/// Counts them all, and compares them with what is stored.
///
/// # Errors
/// A part needs over 2 per cent more.
pub(crate) fn check(stored: &[Count], compiler: &str) -> Result<()> {
    if compiler != self::compiler()? {
        println!("the stored counts are of {compiler}, not of {}: nothing is compared", self::compiler()?);
        return Ok(());
    }
    let worse = worse(stored, &run()?);
    ensure!(
        worse.is_empty(),
        "more instructions per request than stored: {}\nIf that is worth it: cargo xtask bench --micro --docs",
        worse.join("; ")
    );
    Ok(())
}

/// What needs more than it did.
fn worse(stored: &[Count], counted: &[Count]) -> Vec<String> {
    let mut worse = Vec::new();
    for Count { part, instructions } in counted {
        let before = stored.iter().find(|before| before.part == *part).map_or(0.0, |before| before.instructions);
        // Half an instruction per request is what a batch needs, not a request.
        if *instructions > before * TOLERANCE + 0.5 {
            worse.push(format!("{part}: {instructions:.1} instead of {before:.1}"));
        }
    }
    worse
}

/// The compiler's name and version, which the counts depend on.
pub(crate) fn compiler() -> Result<String> {
    let output = Command::new("rustc").arg("--version").output().context("starting rustc")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn count(&(package, name, args, function, batch, part): &Part) -> Result<Count> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(format!("--toggle-collect={name}::{function}"));
    command.arg(example(package, name)?).args(args).arg(BATCHES.to_string());
    let output = command.output().context("starting valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} ended with {}: {text}", show(&command), output.status);
    let collected = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<f64>().ok());
    let collected = collected.filter(|&n| n > 0.0).with_context(|| format!("nothing counted in {function}: {text}"))?;
    let count = Count { part: part.into(), instructions: collected / (BATCHES * batch) };
    eprintln!("{}: {:.1} instructions", count.part, count.instructions);
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_two_per_cent_more_is_worse_and_so_is_what_is_not_stored() {
        let count = |part: &str, instructions| Count { part: part.into(), instructions };
        let stored = [count("a", 100.0), count("b", 100.0)];
        assert_eq!(worse(&stored, &[count("a", 102.4), count("b", 50.0)]), [""; 0]);
        assert_eq!(worse(&stored, &[count("a", 102.6)]), ["a: 102.6 instead of 100.0"]);
        assert_eq!(worse(&stored, &[count("c", 1.0)]), ["c: 1.0 instead of 0.0"]);
    }
}
