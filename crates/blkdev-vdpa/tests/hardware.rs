//! On a real vhost-vdpa device, which is overwritten: `NBDBLK_VDPA=/dev/vhost-vdpa-0 cargo test --test hardware`.
//! Without the variable nothing is tested, and that is said aloud.

use std::{env, fs::OpenOptions, path::PathBuf, sync::Arc};

use blkdev::{Device, conformance};
use blkdev_vdpa::{Format, Options, Source, Vdpa};

/// One after the other: a device has one user.
static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn device(test: &str) -> Option<PathBuf> {
    let path = env::var_os("NBDBLK_VDPA").map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: {test}: NBDBLK_VDPA names no vhost-vdpa device");
    }
    path
}

fn conforms(options: Options) {
    let device: Arc<dyn Device> = Arc::new(Vdpa::open(options).unwrap());
    eprintln!("{:?}, {} bytes", device.info(), device.capacity());
    conformance::check(&device);
}

#[test]
fn conforms_with_all_queues_and_again_with_one() {
    let Some(path) = device("conformance") else { return };
    let _one = ONE.lock();
    conforms(Options::new(Source::Path(path.clone())));
    let fd = OpenOptions::new().read(true).write(true).open(path).unwrap();
    conforms(Options {
        num_queues: Some(1),
        queue_size: 64,
        ring: Some(Format::Split),
        ..Options::new(Source::Fd(fd.into()))
    });
}

#[test]
fn can_be_given_up_and_opened_again() {
    let Some(path) = device("giving up") else { return };
    let _one = ONE.lock();
    for _ in 0..2 {
        let device: Arc<dyn Device> = Arc::new(Vdpa::open(Options::new(Source::Path(path.clone()))).unwrap());
        conformance::check_give_up(&device);
    }
}

#[test]
fn has_one_user() {
    let Some(path) = device("a second user") else { return };
    let _one = ONE.lock();
    let _first = Vdpa::open(Options::new(Source::Path(path.clone()))).unwrap();
    let text = Vdpa::open(Options::new(Source::Path(path))).unwrap_err().to_string();
    assert!(text.contains("fuser -v"), "{text}");
}
