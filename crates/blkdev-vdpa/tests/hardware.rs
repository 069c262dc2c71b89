//! Tests on real vhost-vdpa devices, which are overwritten: `NBDBLK_VDPA=/dev/vhost-vdpa-0 cargo test --test hardware`.
//! `NBDBLK_VDPA_PCI` names a device behind an IOMMU. Without a variable its tests print SKIPPED.

use std::{env, fs::OpenOptions, path::Path, sync::Arc};

use blkdev::{Device, Io, Mapping, Plan, Registration, conformance};
use blkdev_vdpa::{Format, Options, Source, Vdpa};

/// Serialises the tests: a device has one user at a time.
static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn each(test: &str, check: impl Fn(&Path)) {
    let _one = ONE.lock();
    for name in ["NBDBLK_VDPA", "NBDBLK_VDPA_PCI"] {
        match env::var_os(name) {
            Some(path) => check(path.as_ref()),
            None => eprintln!("SKIPPED: {test}: {name} does not name a vhost-vdpa device"),
        }
    }
}

fn conforms(options: Options) {
    let device: Arc<dyn Device> = Arc::new(Vdpa::open(options).unwrap());
    eprintln!("{:?}, {} bytes", device.info(), device.capacity());
    conformance::check(&device);
}

#[test]
fn conforms_with_all_queues_and_again_with_one() {
    each("conformance", |path| {
        conforms(Options::new(Source::Path(path.into())));
        let fd = OpenOptions::new().read(true).write(true).open(path).unwrap();
        conforms(with(Options::new(Source::Fd(fd.into())), |o| {
            (o.virtio.queues, o.virtio.queue_size, o.virtio.ring) = (Some(1), 64, Some(Format::Split));
        }));
    });
}

#[test]
fn can_be_given_up_and_opened_again() {
    each("giving up", |path| {
        for _ in 0..2 {
            let device: Arc<dyn Device> = Arc::new(Vdpa::open(Options::new(Source::Path(path.into()))).unwrap());
            conformance::check_give_up(&device);
        }
    });
}

#[test]
fn has_one_user() {
    each("a second user", |path| {
        let _first = Vdpa::open(Options::new(Source::Path(path.into()))).unwrap();
        let text = Vdpa::open(Options::new(Source::Path(path.into()))).unwrap_err().to_string();
        assert!(text.contains("fuser -v"), "{text}");
    });
}

/// A device that is back after a restart unregisters the memory of old requests like this.
#[test]
fn memory_is_unregistered_under_load() {
    each("unregistering memory", |path| {
        let device: Arc<dyn Device> = Arc::new(Vdpa::open(Options::new(Source::Path(path.into()))).unwrap());
        let memory = |_| Registration::new(&device, &Mapping::new(1 << 16).unwrap()).unwrap();
        let mut unneeded: Vec<_> = (0..32).map(memory).collect();
        let mut channel = Plan::new(4 << 20).open(&device, 1).unwrap().remove(0);
        let (mut begun, mut done) = (0, Vec::new());
        while begun < 6400 || channel.in_flight() > 0 {
            while begun < 6400 && channel.in_flight() < 64 {
                let at = begun % 256 * 65536;
                let Some(buf) = channel.alloc(at, 65536) else { break };
                channel.submit(begun, Io::Read { at, buf });
                begun += 1;
                if begun % 200 == 0 {
                    drop(unneeded.pop().expect("there is one for each time"));
                }
            }
            channel.tick(std::time::Instant::now());
            channel.kick();
            channel.reap(&mut done);
            done.drain(..).for_each(|done| done.result.unwrap());
        }
    });
}
