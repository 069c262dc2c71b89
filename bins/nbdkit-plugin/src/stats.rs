//! The statistics that the plugin prints when nbdkit ends.

use blkdev::{Counts, Operation};

/// The counters as text, one line for each operation in use. `latencies`: they were measured.
pub(crate) fn lines(counts: &Counts, latencies: bool) -> Vec<String> {
    let used = Operation::ALL.into_iter().filter(|kind| counts.of(*kind).begun > 0);
    let mut lines: Vec<String> = used.map(|kind| line(counts, kind, latencies)).collect();
    let Counts { split, merged, flushed, zeroed, stalls, .. } = counts;
    if split + merged + flushed + zeroed + stalls > 0 {
        lines.push(format!(
            "statistics: {split} requests split, {merged} read-modify-writes, {flushed} emulated FUA, {zeroed} emulated zeroes, \
             {stalls} stalls"
        ));
    }
    lines
}

fn line(counts: &Counts, kind: Operation, latencies: bool) -> String {
    let of = counts.of(kind);
    let mut line = format!("statistics: {kind}: {} requests, {} bytes, {} errors", of.ended(), of.bytes, of.failed());
    if latencies {
        for (name, q) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            let time = of.latency.quantile(q).unwrap_or_default();
            line.push_str(&format!(", {name} {time:.1?}"));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blkdev::{Device, Io, Plan, memory::Memory};

    use super::*;

    #[test]
    fn only_what_was_used_has_a_line() {
        let device: Arc<dyn Device> = Arc::new(Memory::new(1 << 20));
        let mut channel = Plan::new(1 << 20).open(&device, 1).unwrap().remove(0);
        assert_eq!(lines(&channel.counters().copy(), true), Vec::<String>::new());
        let buf = channel.alloc(0, 4096).unwrap();
        channel.submit(1, Io::Read { at: 0, buf });
        channel.submit(2, Io::Discard { at: 1 << 20, len: 1, fua: false });
        while channel.in_flight() > 0 {
            channel.reap(&mut Vec::new());
        }
        let text = lines(&channel.counters().copy(), false);
        let expected = [
            "statistics: read: 1 requests, 4096 bytes, 0 errors",
            "statistics: discard: 1 requests, 0 bytes, 1 errors",
        ];
        assert_eq!(text, expected);
        assert!(lines(&channel.counters().copy(), true)[0].contains(", p50 "));
    }
}
