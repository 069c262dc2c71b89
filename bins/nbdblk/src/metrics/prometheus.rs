//! The metrics, in the OpenMetrics text format and in the classic one of Prometheus. Names and units follow the conventions of
//! Prometheus; docs/status.md lists them.

use std::{collections::HashSet, fmt, time::Duration};

use blkdev::{Counts, Error, Latency, Operation};
use nbd_server_core::{ExportView, Observation};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeCounterValue, NoLabelSet, text},
    metrics::{MetricType, exemplar::Exemplar},
    registry::{Registry, Unit},
};

use crate::status::report::{DeviceState, error, operation};

/// All metrics in the OpenMetrics text format.
pub(super) fn encode(seen: Observation, uptime: Duration) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("nbdblk");
    registry.register_collector(Box::new(Metrics { seen, uptime }));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

/// The same in the classic format. There, the family of a counter has the name of its samples, and there is neither a unit nor an
/// end mark.
pub(super) fn classic(open: &str) -> String {
    let types = open.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let counters: HashSet<&str> = types.filter_map(|line| line.strip_suffix(" counter")).collect();
    let mut page = String::with_capacity(open.len());
    for line in open.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("UNIT"), ..) | (Some("#"), Some("EOF"), None, None) => continue,
            (Some("#"), Some(what), Some(family), Some(rest)) if counters.contains(family) => {
                page.extend(["# ", what, " ", family, "_total ", rest]);
            }
            _ => page.push_str(line),
        }
        page.push('\n');
    }
    page
}

/// Labels of a sample.
type Labels = Vec<(&'static str, String)>;

#[derive(Debug)]
struct Metrics {
    seen: Observation,
    uptime: Duration,
}

/// The name, help and unit of a metric.
struct Name {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
}

const fn plain(name: &'static str, help: &'static str) -> Name {
    Name { name, help, unit: None }
}

const fn bytes(name: &'static str, help: &'static str) -> Name {
    Name { name, help, unit: Some(Unit::Bytes) }
}

const fn seconds(name: &'static str, help: &'static str) -> Name {
    Name { name, help, unit: Some(Unit::Seconds) }
}

/// An encoder, with one method for each type of metric.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn counters<V: EncodeCounterValue>(
        &mut self,
        name: &Name,
        samples: impl IntoIterator<Item = (Labels, V)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name.name, name.help, name.unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in samples {
            encoder.encode_family(&labels)?.encode_counter(&value, None::<&Exemplar<NoLabelSet, f64>>)?;
        }
        Ok(())
    }

    fn gauges(&mut self, name: &Name, samples: impl IntoIterator<Item = (Labels, f64)>) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name.name, name.help, name.unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in samples {
            encoder.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histograms<'a>(&mut self, name: &Name, samples: impl IntoIterator<Item = (Labels, &'a Latency)>) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name.name, name.help, name.unit.as_ref(), MetricType::Histogram)?;
        for (labels, latency) in samples {
            let (sum, count, buckets) = (latency.sum().as_secs_f64(), latency.count(), halves(latency));
            encoder.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

/// The buckets of a histogram, four merged into one: Prometheus keeps a time series for each.
fn halves(latency: &Latency) -> Vec<(f64, u64)> {
    let (mut halves, mut count) = (Vec::new(), 0);
    for (place, (end, more)) in latency.buckets().enumerate() {
        count += more;
        match end {
            Some(end) if place % 4 == 0 => halves.push((end.as_secs_f64(), std::mem::take(&mut count))),
            Some(_) => {}
            None => halves.push((f64::MAX, count)),
        }
    }
    halves
}

impl Metrics {
    /// A value of each export.
    fn exports<T>(&self, value: impl Fn(&ExportView) -> T) -> impl Iterator<Item = (Labels, T)> {
        // A removed export may have the name of a present one.
        let present = self.seen.exports.iter().filter(|export| export.removal.is_none());
        present.map(move |export| (vec![("export", export.name.clone())], value(export)))
    }

    /// A value of each operation of each export.
    fn operations<'a, T>(
        &'a self,
        value: impl Fn(&'a Counts, Operation) -> T + Copy,
    ) -> impl Iterator<Item = (Labels, T)> {
        let present = self.seen.exports.iter().filter(|export| export.removal.is_none());
        present.flat_map(move |export| {
            Operation::ALL.into_iter().map(move |kind| {
                let labels = vec![("export", export.name.clone()), ("operation", operation(kind).into())];
                (labels, value(&export.counts, kind))
            })
        })
    }

    fn requests(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let name = plain("requests", "Requests that have ended, with success or not");
        encoder.counters(&name, self.operations(|counts, kind| counts.of(kind).ended()))?;
        let name = bytes("request", "Bytes of the requests that have succeeded");
        encoder.counters(&name, self.operations(|counts, kind| counts.of(kind).bytes))?;
        let name = plain("request_errors", "Requests that have failed at the device, by kind");
        let errors = self.operations(|counts, kind| counts.of(kind).errors);
        encoder.counters(
            &name,
            errors.flat_map(|(labels, errors)| {
                let kinds = Error::ALL.into_iter().zip(errors);
                kinds.map(move |(kind, count)| {
                    let mut labels = labels.clone();
                    labels.push(("kind", error(kind).into()));
                    (labels, count)
                })
            }),
        )?;
        let name = plain("requests_in_flight", "Requests that have begun and not ended");
        encoder.gauges(&name, self.operations(|counts, kind| counts.of(kind).in_flight() as f64))?;
        let name = seconds(
            "request_duration",
            "Time from the turn that passes a request to the device to the turn of its reply",
        );
        let used = self.operations(|counts, kind| &counts.of(kind).latency);
        encoder.histograms(&name, used.filter(|(_, latency)| latency.count() > 0))?;
        let name = seconds("oldest_request", "Age of the oldest request that has not ended; 0: there is none");
        encoder.gauges(&name, self.exports(|export| export.oldest.unwrap_or_default().as_secs_f64()))
    }

    fn emulation(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let name = plain("requests_refused", "Requests that were refused before they reached the device");
        encoder.counters(&name, self.exports(|export| export.refused))?;
        let name = plain("requests_split", "Requests that the device got in several pieces");
        encoder.counters(&name, self.exports(|export| export.counts.split))?;
        let name = plain("read_modify_writes", "Requests that were merged into blocks which they cover only in part");
        encoder.counters(&name, self.exports(|export| export.counts.merged))?;
        let name = plain("emulated_fua", "Requests with FUA that were followed by a flush");
        encoder.counters(&name, self.exports(|export| export.counts.flushed))?;
        let name = plain("emulated_zeroes", "Requests for zeroes that were writes of zeroes");
        encoder.counters(&name, self.exports(|export| export.counts.zeroed))
    }

    fn devices(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let states = [DeviceState::Working, DeviceState::Stalled, DeviceState::Reconnecting, DeviceState::Dead];
        let present = self.exports(|export| DeviceState::of(export.device.as_ref()));
        let samples = present.flat_map(|(labels, now)| {
            states.map(|state| {
                let mut labels = labels.clone();
                labels.push(("state", state.name().into()));
                (labels, f64::from(u8::from(state == now)))
            })
        });
        encoder.gauges(
            &plain("device_state", "1 for the present state of the device of an export, 0 for the others"),
            samples,
        )?;
        let name = bytes("device_size", "Size of the device");
        encoder.gauges(&name, self.exports(|export| export.device.as_ref().map_or(0, |d| d.capacity) as f64))?;
        let name = plain("device_queues", "Open queues of the device");
        encoder.gauges(&name, self.exports(|export| export.device.as_ref().map_or(0, |d| d.queues) as f64))?;
        let name = plain("device_reconnects", "How often the device was opened again after it had died");
        encoder.counters(&name, self.exports(|export| export.device.as_ref().map_or(0, |d| d.reconnects)))?;
        let name = plain("queue_stalls", "How often a queue has completed nothing within the time-out");
        encoder.counters(&name, self.exports(|export| export.counts.stalls))
    }

    fn memory(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let name = bytes("memory", "Payload memory of an export");
        encoder.gauges(&name, self.exports(|export| export.memory.total as f64))?;
        let name = bytes("memory_used", "Payload memory that requests and unsent replies hold");
        encoder.gauges(&name, self.exports(|export| export.memory.used as f64))?;
        let name = plain("memory_waiting_clients", "Clients with a request that waits for payload memory");
        encoder.gauges(&name, self.exports(|export| export.memory.waiting as f64))?;
        let name = plain("memory_waits", "How often a client had to wait for payload memory");
        encoder.counters(&name, self.exports(|export| export.memory.waits))
    }

    fn clients(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let name = plain("clients", "Clients that are served");
        encoder.gauges(&name, self.exports(|export| export.clients as f64))?;
        let name = plain("clients_served", "Clients that were served so far");
        encoder.counters(&name, [(Vec::new(), self.seen.clients_served)])
    }

    fn workers(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let workers = || {
            let numbered = self.seen.workers.iter().enumerate();
            numbered.map(|(number, worker)| (vec![("worker", number.to_string())], worker))
        };
        let name = plain("worker_up", "1: the worker thread lives; 0: it has ended");
        encoder.gauges(&name, workers().map(|(labels, worker)| (labels, f64::from(u8::from(worker.is_alive)))))?;
        let name = seconds("worker_busy", "Processor time of the worker thread");
        encoder.counters(&name, workers().map(|(labels, worker)| (labels, worker.busy.as_secs_f64())))?;
        let name = bytes("worker_memory", "Payload memory of the worker thread");
        encoder.gauges(&name, workers().map(|(labels, worker)| (labels, worker.memory.total as f64)))?;
        let name =
            bytes("worker_memory_used", "Payload memory of the worker thread that requests and unsent replies hold");
        encoder.gauges(&name, workers().map(|(labels, worker)| (labels, worker.memory.used as f64)))?;
        let name = plain("worker_turns", "Turns of the worker thread");
        encoder.counters(&name, workers().map(|(labels, worker)| (labels, worker.turns)))?;
        let name = plain("worker_polls", "Busy-polls of the worker thread");
        encoder.counters(&name, workers().map(|(labels, worker)| (labels, worker.polls)))?;
        let name = plain("worker_sleeps", "Sleeps of the worker thread");
        encoder.counters(&name, workers().map(|(labels, worker)| (labels, worker.sleeps)))
    }

    fn server(&self, encoder: &mut Encoder<'_>) -> fmt::Result {
        let labels = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        encoder.gauges(&plain("build_info", "1; the label has the version"), [(labels, 1.0)])?;
        let name = seconds("uptime", "Time since the server started");
        encoder.gauges(&name, [(Vec::new(), self.uptime.as_secs_f64())])
    }
}

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut Encoder(encoder);
        self.server(encoder)?;
        self.requests(encoder)?;
        self.emulation(encoder)?;
        self.devices(encoder)?;
        self.memory(encoder)?;
        self.clients(encoder)?;
        self.workers(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classic_format_names_counters_as_their_samples() {
        let open = "# HELP a_bytes What it is\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\na_bytes_total{b=\"# HELP a_bytes\"} 1\n\
                    # HELP c Another\n# TYPE c gauge\nc 2.0\n# EOF\n";
        let expected = "# HELP a_bytes_total What it is\n# TYPE a_bytes_total counter\na_bytes_total{b=\"# HELP a_bytes\"} 1\n\
                        # HELP c Another\n# TYPE c gauge\nc 2.0\n";
        assert_eq!(classic(open), expected);
    }
}
