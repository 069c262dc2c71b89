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
