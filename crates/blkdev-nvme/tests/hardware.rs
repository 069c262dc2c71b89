//! Real controllers: `NBDBLK_NVME` is the PCI address of one that is bound to `vfio-pci`; ALL ITS NAMESPACES ARE OVERWRITTEN.
//! Without it the tests say that they were skipped.

use std::{
    env,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use blkdev::{Device, Mapping, Op, Queue, Request, conformance};
use blkdev_nvme::{Nvme, Options, Target};

/// A controller has one user at a time.
static ONE: Mutex<()> = Mutex::new(());

fn controller() -> Option<(String, MutexGuard<'static, ()>)> {
    match env::var("NBDBLK_NVME") {
        Ok(address) => Some((address, ONE.lock().unwrap_or_else(PoisonError::into_inner))),
        Err(_) => {
            eprintln!("SKIPPED: NBDBLK_NVME names no NVMe controller on vfio-pci, so nothing was tested on hardware");
            None
        }
    }
}

fn open(address: &str, nsid: Option<u32>, options: &Options) -> Arc<dyn Device> {
    let target = Target { controller: address.to_owned(), nsid };
    let device = Nvme::open_vfio(&target, &blkdev_vfio::Options::default(), options);
    Arc::new(device.unwrap_or_else(|e| panic!("{e}")))
}

/// Its namespaces, as the refusal of one that is not there lists them.
fn namespaces(address: &str) -> Vec<u32> {
    let target = Target { controller: address.to_owned(), nsid: Some(0xffff_fffe) };
    let refusal =
        Nvme::open_vfio(&target, &blkdev_vfio::Options::default(), &Options::default()).unwrap_err().to_string();
    let (_, list) = refusal.split_once("active are: ").unwrap_or_else(|| panic!("{refusal}"));
    list.split(", ").map(|nsid| nsid.parse().unwrap()).collect()
}

#[test]
fn every_namespace_conforms() {
    let Some((address, _one)) = controller() else { return };
    for nsid in namespaces(&address) {
        let device = open(&address, Some(nsid), &Options::default());
        let info = device.info();
        let started = Instant::now();
        conformance::check(&device);
        println!("{}: {} bytes, {info:?}: conforms, in {:?}", info.target, device.capacity(), started.elapsed());
    }
}

#[test]
fn small_queues_conform() {
    let Some((address, _one)) = controller() else { return };
    let options = Options { queues: Some(1), queue_size: 4, ..Options::default() };
    conformance::check(&open(&address, None, &options));
}

#[test]
fn read_only_conforms() {
    let Some((address, _one)) = controller() else { return };
    conformance::check_read_only(&open(&address, None, &Options { read_only: true, ..Options::default() }));
}

#[test]
fn it_can_be_given_up_and_opened_again() {
    let Some((address, _one)) = controller() else { return };
    for _ in 0..3 {
        conformance::check_give_up(&open(&address, None, &Options::default()));
    }
    let device = open(&address, None, &Options::default());
    let (mut queue, buf) = one_page(&*device);
    queue.push(Request { tag: 1, op: Op::Read { at: 0, buf } }).unwrap();
    queue.kick();
    let (started, mut done) = (Instant::now(), Vec::new());
    while done.is_empty() {
        queue.reap(&mut done);
        assert!(started.elapsed() < Duration::from_secs(10), "a read of a controller that was reset is answered");
    }
    assert_eq!(done[0].result, Ok(()));
}

fn one_page(device: &dyn Device) -> (Box<dyn Queue>, blkdev::Buf) {
    let memory = Mapping::new(4096).unwrap();
    device.register(&memory).unwrap();
    let mut arena = memory.arenas(1).remove(0);
    (device.open_queue(8).unwrap(), arena.alloc(4096).unwrap())
}

#[test]
fn what_cannot_be_opened_is_explained() {
    let Some((address, _one)) = controller() else { return };
    let refuse = |options: Options, part: &str| {
        let target = Target { controller: address.clone(), nsid: None };
        let e = Nvme::open_vfio(&target, &blkdev_vfio::Options::default(), &options).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    refuse(Options { queues: Some(1000), ..Options::default() }, "1000 queues asked for, the device has");
    refuse(Options { queue_size: 1, ..Options::default() }, "queue size 1");
    let _first = open(&address, None, &Options::default());
    refuse(Options::default(), "somebody else uses the device");
}
