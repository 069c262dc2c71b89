//! Errors before a device is open.

use std::{fs::File, os::fd::OwnedFd};

use blkdev_vdpa::{Options, Source, Vdpa};

fn refuse(source: Source, part: &str) {
    let text = Vdpa::open(Options::new(source)).unwrap_err().to_string();
    assert!(text.starts_with("vdpa ") && text.contains(part), "{text}");
}

#[test]
fn what_is_no_device_is_refused() {
    refuse(Source::Path("/nonexistent/vhost-vdpa-0".into()), "vdpa dev show");
    refuse(Source::Path("/dev/null".into()), "not a vhost-vdpa device");
    refuse(Source::Fd(OwnedFd::from(File::open("/dev/null").unwrap())), "not a vhost-vdpa device");
}
