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
    env,
    error::Error,
    fs,
    io::{self, ErrorKind, Read, Write},
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

/// The error of an open that fails.
fn refuse(spec: &str) -> io::Error {
    spec.parse::<Spec>().unwrap().settings.open().expect_err(spec)
}

fn check(spec: &str, kind: ErrorKind) {
    let error = refuse(spec);
    assert_eq!(error.kind(), kind, "{spec}: {error}");
    // A report of the whole chain repeats nothing.
    assert_eq!(Context::report(&error), error.to_string(), "{spec}");
}

/// The last error of the chain that begins with `error`.
fn root(error: &io::Error) -> &io::Error {
    let mut last: &(dyn Error + 'static) = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.downcast_ref().expect("the system's error is an io::Error")
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

/// A program that follows `source` finds the error of the system call that failed.
#[test]
fn the_source_leads_to_the_error_of_the_system() {
    let dir = Dir::new("sources");
    fs::write(dir.path("file"), [0; 4096]).unwrap();
    drop(UnixListener::bind(dir.path("stale")).unwrap());
    let check = |spec: &str, errno: i32| {
        let error = refuse(spec);
        assert!(error.source().is_some(), "{spec}: {error}");
        assert_eq!(root(&error).raw_os_error(), Some(errno), "{spec}: {error}");
        assert_eq!(Context::os_error(&error), Some(errno), "{spec}: {error}");
    };
    let (enoent, enotty, econnrefused) = (2, 25, 111);
    for driver in ["io_uring", "vhost-user", "nvme-io_uring", "vdpa", "nvme", "virtio-pci"] {
        let absent = if matches!(driver, "nvme" | "virtio-pci") { "ffff:ff:1f.7".into() } else { dir.path("absent") };
        check(&format!("{driver}={absent}"), enoent);
    }
    #[cfg(feature = "libblkio")]
    check(&format!("libblkio=io_uring,path={}", dir.path("absent")), enoent);
    check(&format!("vhost-user={}", dir.path("stale")), econnrefused);
    check("vdpa=/dev/null", enotty);
    check("nvme-io_uring=/dev/null", enotty);
}
