//! The kinds of errors: a program can match on the reason why a device cannot be opened.
#![cfg(all(
    feature = "io-uring",
    feature = "nvme",
    feature = "nvme-io_uring",
    feature = "vdpa",
    feature = "vhost-user",
    feature = "virtio-pci"
))]

use std::{
    env, fs,
    io::{ErrorKind, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    process, thread,
};

use blkdev::Context;
use blkdev_drivers::Spec;

/// A directory that is removed when dropped.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = env::temp_dir().join(format!("blkdev-kinds-{name}-{}", process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn check(spec: &str, kind: ErrorKind) {
    let parsed: Spec = spec.parse().unwrap();
    let error = parsed.settings.open().expect_err(spec);
    assert_eq!(error.kind(), kind, "{spec}: {error}");
    // A report of the whole chain repeats nothing.
    let source = std::error::Error::source(&error);
    assert!(source.is_none_or(|source| !error.to_string().contains(&source.to_string())), "{spec}: {error}");
}

#[test]
fn what_is_absent_is_not_found() {
    let dir = Dir::new("absent");
    let absent = dir.path("absent");
    for driver in ["io_uring", "vhost-user", "nvme-io_uring", "vdpa"] {
        check(&format!("{driver}={absent}"), ErrorKind::NotFound);
    }
    check("vdpa=/dev/vhost-vdpa-none", ErrorKind::NotFound);
    check("nvme=ffff:ff:1f.7", ErrorKind::NotFound);
    check("virtio-pci=ffff:ff:1f.7", ErrorKind::NotFound);
    check("virtio-pci=/sys/bus/pci/devices/absent", ErrorKind::NotFound);
}

#[test]
fn what_is_of_another_kind_is_invalid_input() {
    let dir = Dir::new("other");
    fs::create_dir_all(dir.path("dir")).unwrap();
    fs::write(dir.path("file"), [0; 4096]).unwrap();
    let _listener = UnixListener::bind(dir.path("socket")).unwrap();
    for driver in ["io_uring", "vhost-user", "nvme-io_uring", "vdpa"] {
        for name in ["dir", "file", "socket"] {
            if !matches!((driver, name), ("io_uring", "file") | ("vhost-user", "socket")) {
                check(&format!("{driver}={}", dir.path(name)), ErrorKind::InvalidInput);
            }
        }
        check(&format!("{driver}=/dev/null"), ErrorKind::InvalidInput);
    }
    check(&format!("vhost-user={}", dir.path(&"x".repeat(108))), ErrorKind::InvalidInput);
    check(&format!("nvme={}", dir.path("dir")), ErrorKind::InvalidInput);
    check(&format!("virtio-pci={}", dir.path("dir")), ErrorKind::InvalidInput);
    check("nvme=nvme0", ErrorKind::InvalidInput);
    check("io_uring,fd=1000000", ErrorKind::InvalidInput);
    check("io_uring", ErrorKind::InvalidInput);
}

#[test]
fn more_queues_than_there_are_is_invalid_input() {
    let dir = Dir::new("queues");
    for driver in ["null", "memory"] {
        check(&format!("{driver}=1M,num-queues=65535"), ErrorKind::InvalidInput);
    }
    fs::write(dir.path("file"), [0; 4096]).unwrap();
    check(&format!("io_uring={},num-queues=65535", dir.path("file")), ErrorKind::InvalidInput);
}

#[test]
fn what_this_user_may_not_open_is_permission_denied() {
    let dir = Dir::new("denied");
    fs::write(dir.path("file"), [0; 4096]).unwrap();
    fs::set_permissions(dir.path("file"), fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(dir.path("file")).is_err() {
        check(&format!("io_uring={}", dir.path("file")), ErrorKind::PermissionDenied);
        check(&format!("vdpa={}", dir.path("file")), ErrorKind::PermissionDenied);
    }
    // Root may open everything.
}

/// Connects to a process that sends `words`, and then hangs up or waits.
fn meet(name: &str, words: &'static [u8], waits: bool, kind: ErrorKind) {
    let dir = Dir::new(name);
    let listener = UnixListener::bind(dir.path("socket")).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(words).unwrap();
        if waits {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    check(&format!("vhost-user={},connect-timeout=300ms", dir.path("socket")), kind);
    server.join().unwrap();
}

#[test]
fn what_a_process_behind_a_socket_does_has_a_kind() {
    meet("garbage", b"HTTP/1.1 400 Bad Request\r\n\r\n", true, ErrorKind::InvalidData);
    meet("nbd", b"NBDMAGICIHAVEOPT\0\x03", true, ErrorKind::InvalidData);
    meet("closed", b"", false, ErrorKind::ConnectionReset);
    meet("silent", b"", true, ErrorKind::TimedOut);
    let dir = Dir::new("stale");
    drop(UnixListener::bind(dir.path("socket")).unwrap());
    check(&format!("vhost-user={}", dir.path("socket")), ErrorKind::ConnectionRefused);
}

#[test]
fn the_errno_of_the_system_is_kept() {
    let errno = |spec: &str| Context::os_error(&spec.parse::<Spec>().unwrap().settings.open().unwrap_err());
    for spec in ["vdpa=/dev/vhost-vdpa-none", "io_uring=/nonexistent/file", "virtio-pci=ffff:ff:1f.7"] {
        // ENOENT.
        assert_eq!(errno(spec), Some(2), "{spec}");
    }
}
