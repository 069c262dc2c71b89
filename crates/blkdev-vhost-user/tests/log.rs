//! Each failure is logged once, and nothing else is.

mod common;

use std::{sync::Mutex, time::Duration};

use blkdev::{Device, Op, Request};
use blkdev_vhost_user::{Options, VhostUser};
use blkdev_virtio::model::{Fault, Model, Spec};
use common::{Backend, Quirks, collect};
use log::{Level, LevelFilter, Log, Metadata, Record};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Keep;

impl Log for Keep {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        LINES.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Returns the log lines of `act` about its back end.
fn lines(spec: Spec, act: impl FnOnce(&Backend, VhostUser)) -> Vec<String> {
    let backend = Backend::new(Model::new(spec), Quirks::default());
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    act(&backend, device);
    let name = format!("vhost-user {}: ", backend.socket.display());
    let mut lines = std::mem::take(&mut *LINES.lock().unwrap());
    for line in &mut lines {
        *line = line.strip_prefix(&name).expect("each line starts with the back end's name").to_owned();
    }
    lines
}

// A single test, because the logger is global.
#[test]
fn once_and_only_when_something_went_wrong() {
    log::set_logger(&Keep).unwrap();
    log::set_max_level(LevelFilter::Trace);

    let flush = |tag| Request { tag, op: Op::Flush };
    let quiet = lines(Spec::new(1 << 20), |_, device| {
        let mut queue = device.open_queue(4).unwrap();
        queue.push(flush(1)).unwrap();
        drop((queue, device));
    });
    assert_eq!(quiet, [""; 0]);

    let gone = lines(Spec::new(1 << 20), |backend, device| {
        let mut queues = [device.open_queue(4).unwrap(), device.open_queue(4).unwrap()];
        backend.hang_up();
        for queue in &mut queues {
            while queue.arm() {
                std::thread::yield_now();
                let _ = queue.push(flush(1));
                queue.kick();
            }
            collect(&mut **queue, 1, Duration::from_secs(20));
        }
    });
    assert_eq!(gone, ["the back end closed the connection; the device is declared dead"]);

    let nonsense = lines(Spec::new(1 << 20).fault(Fault::WrongId, 2), |_, device| {
        let mut queue = device.open_queue(4).unwrap();
        queue.push(flush(1)).unwrap();
        queue.kick();
        collect(&mut *queue, 1, Duration::from_secs(20));
    });
    assert_eq!(nonsense, ["queue 0: used id 11 belongs to no request; the device is declared dead"]);

    let unclear = lines(Spec::new(1 << 20).fault(Fault::NoLengths, 0), |_, device| drop(device));
    assert_eq!(unclear, ["the device does not report read lengths: each read buffer is cleared first"]);
}
