//! Tests on real controllers. `NBDBLK_NVME` is the PCI address of a controller bound to `vfio-pci`; `NBDBLK_NG` and
//! `NBDBLK_NG4K` are namespaces of the kernel's driver, `/dev/ngXnY`. ALL NAMESPACES ARE OVERWRITTEN. Without the variables the
//! tests print SKIPPED.

use std::{
    env, fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use blkdev::{Arena, Device, Error, Mapping, Op, Queue, Request, conformance};
use blkdev_nvme::{Nvme, Options, Passthrough, PassthroughOptions, Target, VfioOptions};
use blkdev_vfio::{PciDevice, Vfio};

/// Serialises the tests: a controller has one user at a time.
static ONE: Mutex<()> = Mutex::new(());

/// The options with a change.
fn with<T>(mut options: T, change: impl FnOnce(&mut T)) -> T {
    change(&mut options);
    options
}

fn controller() -> Option<(String, MutexGuard<'static, ()>)> {
    match env::var("NBDBLK_NVME") {
        Ok(address) => Some((address, ONE.lock().unwrap_or_else(PoisonError::into_inner))),
        Err(_) => {
            eprintln!(
                "SKIPPED: NBDBLK_NVME does not name an NVMe controller bound to vfio-pci, so nothing was tested on hardware"
            );
            None
        }
    }
}

fn open(address: &str, nsid: Option<u32>, options: &Options) -> Arc<dyn Device> {
    let target = Target { controller: address.to_owned(), nsid };
    let device = Nvme::open_vfio(&target, &how(), options);
    Arc::new(device.unwrap_or_else(|e| panic!("{e}")))
}

/// Set `NBDBLK_NO_IOMMU` on a machine without an IOMMU.
fn how() -> VfioOptions {
    with(VfioOptions::default(), |o| o.no_iommu = env::var_os("NBDBLK_NO_IOMMU").is_some())
}

/// The active namespaces, parsed from the error for a missing one.
fn namespaces(address: &str) -> Vec<u32> {
    let target = Target { controller: address.to_owned(), nsid: Some(0xffff_fffe) };
    let refusal = Nvme::open_vfio(&target, &how(), &Options::default()).unwrap_err().to_string();
    let (_, list) = refusal.split_once("active are: ").unwrap_or_else(|| panic!("{refusal}"));
    list.split(", ").map(|nsid| nsid.parse().unwrap()).collect()
}

#[test]
fn every_namespace_conforms() {
    let Some((address, _one)) = controller() else { return };
    for nsid in namespaces(&address) {
        let target = Target { controller: address.clone(), nsid: Some(nsid) };
        let device = match Nvme::open_vfio(&target, &how(), &Options::default()) {
            Ok(device) => Arc::new(device) as Arc<dyn Device>,
            Err(e) => {
                assert!(e.to_string().contains("bytes of metadata with each block, which is not supported"), "{e}");
                continue;
            }
        };
        let info = device.info();
        let started = Instant::now();
        conformance::check(&device);
        println!("{}: {} bytes, {info:?}: conforms, in {:?}", info.target, device.capacity(), started.elapsed());
    }
}

#[test]
fn small_queues_conform() {
    let Some((address, _one)) = controller() else { return };
    let options = with(Options::default(), |o| (o.queues, o.queue_size) = (Some(1), 4));
    conformance::check(&open(&address, None, &options));
}

#[test]
fn read_only_conforms() {
    let Some((address, _one)) = controller() else { return };
    conformance::check_read_only(&open(&address, None, &with(Options::default(), |o| o.read_only = true)));
}

#[test]
fn a_small_mdts_conforms() {
    let Ok(address) = env::var("NBDBLK_NVME_MDTS") else {
        return eprintln!("SKIPPED: NBDBLK_NVME_MDTS does not name a controller with a small MDTS");
    };
    let device = open(&address, None, &Options::default());
    assert!(device.info().transfer_max < 128 << 10, "{:?}", device.info());
    conformance::check(&device);
}

#[test]
fn it_can_be_given_up_and_opened_again() {
    let Some((address, _one)) = controller() else { return };
    for _ in 0..3 {
        conformance::check_give_up(&open(&address, None, &Options::default()));
    }
    works(&*open(&address, None, &Options::default()));
}

/// Checks that a read completes.
fn works(device: &dyn Device) {
    let (mut queue, mut arena) = queue(device);
    let buf = arena.alloc(4096).unwrap();
    queue.push(Request { tag: 1, op: Op::Read { at: 0, buf } }).unwrap();
    queue.kick();
    let (started, mut done) = (Instant::now(), Vec::new());
    while done.is_empty() {
        queue.reap(&mut done);
        assert!(started.elapsed() < Duration::from_secs(10), "the read completes");
    }
    assert_eq!(done[0].result, Ok(()));
}

fn queue(device: &dyn Device) -> (Box<dyn Queue>, Arena) {
    let memory = Mapping::new(1 << 20).unwrap();
    device.register(&memory).unwrap();
    let arena = memory.arenas(1).remove(0);
    (device.open_queue(8).unwrap(), arena)
}

#[test]
fn a_device_that_is_taken_away_under_load_is_let_go() {
    let Some((address, _one)) = controller() else { return };
    let device = open(&address, None, &Options::default());
    let (mut queue, mut arena) = queue(&*device);
    let driver = fs::canonicalize(format!("/sys/bus/pci/devices/{address}/driver")).unwrap();
    let (unbind, name) = (driver.join("unbind"), address.clone());
    let mut unbinding = None;
    let (mut done, mut count, mut told) = (Vec::new(), 0, None);
    while told.is_none() {
        if let Some(buf) = arena.alloc(4096)
            && let Err(request) = queue.push(Request { tag: count, op: Op::Read { at: count % 1000 * 4096, buf } })
        {
            drop(request);
        }
        queue.kick();
        queue.reap(&mut done);
        count += done.len() as u64;
        if count > 1000 && unbinding.is_none() {
            let (unbind, name) = (unbind.clone(), name.clone());
            // The unbind waits until the device is closed.
            unbinding = Some((Instant::now(), thread::spawn(move || fs::write(unbind, name))));
        }
        for done in done.drain(..) {
            if let Err(error) = done.result {
                assert_eq!(error, Error::Gone);
                told = unbinding.as_ref().map(|(started, _)| started.elapsed());
            }
        }
        if let Some((started, _)) = &unbinding {
            assert!(started.elapsed() < Duration::from_secs(20), "the removal is detected");
        }
    }
    let (started, thread) = unbinding.unwrap();
    drop(queue);
    drop(device);
    thread.join().unwrap().unwrap();
    println!("{address}: removed under load: requests failed after {told:?}, gone after {:?}", started.elapsed());
    fs::write(driver.join("bind"), &address).unwrap();
    works(&*open(&address, None, &Options::default()));
}

/// Disables the controller under load, by its register and by a function reset.
#[test]
fn a_controller_that_stops_is_reset_and_nothing_is_lost() {
    let Some((address, _one)) = controller() else { return };
    let pci = Arc::new(Vfio::open(&address, &how()).unwrap());
    let device = Nvme::open(Arc::clone(&pci) as _, &Options::default()).unwrap();
    let (mut queue, mut arena) = queue(&device);
    let disable = || pci.bar(0).unwrap().write32(0x14, 0);
    let acts: [&dyn Fn(); 2] = [&disable, &|| pci.reset().unwrap()];
    for (round, act) in acts.into_iter().enumerate() {
        for write in [true, false] {
            let (mut sent, mut done) = (0, Vec::new());
            let started = Instant::now();
            while done.len() < 256 {
                if sent < 256
                    && let Some(mut buf) = arena.alloc(4096)
                {
                    let at = sent * 4096;
                    buf.copy_from(0, &[round as u8 ^ sent as u8; 4096]);
                    let op = if write { Op::Write { at, buf, fua: false } } else { Op::Read { at, buf } };
                    if queue.push(Request { tag: sent, op }).is_ok() {
                        sent += 1;
                    }
                    if write && sent == 100 {
                        queue.kick();
                        act();
                    }
                }
                queue.kick();
                queue.reap(&mut done);
                assert!(started.elapsed() < Duration::from_secs(60), "round {round}: {} requests end", done.len());
            }
            for done in done {
                assert_eq!(done.result, Ok(()), "round {round}: {done:?}");
                if let Op::Read { buf, .. } = &done.op {
                    assert_eq!(buf.to_vec(), [round as u8 ^ done.tag as u8; 4096], "round {round}");
                }
            }
        }
    }
}

fn namespaces_of_the_kernel() -> Vec<String> {
    let list: Vec<_> = ["NBDBLK_NG", "NBDBLK_NG4K"].iter().filter_map(|name| env::var(name).ok()).collect();
    if list.is_empty() {
        eprintln!("SKIPPED: NBDBLK_NG does not name a /dev/ngXnY, so passthrough was not tested");
    }
    list
}

#[test]
fn passthrough_conforms() {
    for path in namespaces_of_the_kernel() {
        let device: Arc<dyn Device> = Arc::new(Passthrough::open(PassthroughOptions::new(&path)).unwrap());
        let started = Instant::now();
        conformance::check(&device);
        println!("{path}: {} bytes, {:?}: conforms, in {:?}", device.capacity(), device.info(), started.elapsed());
        let read_only = with(PassthroughOptions::new(&path), |o| o.read_only = true);
        conformance::check_read_only(&(Arc::new(Passthrough::open(read_only).unwrap()) as _));
        conformance::check_give_up(&device);
    }
}

#[test]
fn passthrough_conforms_polled() {
    let queues = fs::read_to_string("/sys/module/nvme/parameters/poll_queues").unwrap_or_default();
    if ["", "0"].contains(&queues.trim()) {
        eprintln!("SKIPPED: the kernel's driver has no poll queues (nvme.poll_queues=1)");
        return;
    }
    for path in namespaces_of_the_kernel() {
        let polled = with(PassthroughOptions::new(&path), |o| o.polled = true);
        conformance::check(&(Arc::new(Passthrough::open(polled).unwrap()) as _));
        println!("{path}: conforms with polled queues");
    }
}

#[test]
fn passthrough_says_what_is_no_namespace() {
    let refuse = |path: &str, part: &str| {
        let e = Passthrough::open(PassthroughOptions::new(path)).unwrap_err().to_string();
        assert!(e.starts_with(path) && e.contains(part), "{e}");
    };
    refuse("/dev/null", "not an NVMe namespace");
    refuse("/dev/no-such-device", "No such file");
}

#[test]
fn what_cannot_be_opened_is_explained() {
    let Some((address, _one)) = controller() else { return };
    let refuse = |options: Options, part: &str| {
        let target = Target { controller: address.clone(), nsid: None };
        let e = Nvme::open_vfio(&target, &how(), &options).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    refuse(with(Options::default(), |o| o.queues = Some(1000)), "1000 queues requested, but the device has");
    refuse(with(Options::default(), |o| o.queue_size = 1), "queue size 1");
    let _first = open(&address, None, &Options::default());
    refuse(Options::default(), "another process uses the device");
}
