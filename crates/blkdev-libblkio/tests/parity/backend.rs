//! Scratch files, and qemu-storage-daemon to export them over vhost-user.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// A directory that is removed when dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("blkdev-libblkio-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }

    /// Creates a sparse file.
    pub(crate) fn file(&self, name: &str, size: u64) -> String {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A file exported over vhost-user. The daemon ends when this is dropped.
pub(crate) struct Export {
    daemon: Child,
    socket: String,
}

impl Export {
    pub(crate) fn start(scratch: &Scratch, file: &str, num_queues: u32, writable: bool) -> Self {
        let socket = format!("{file}.sock");
        assert!(socket.len() < 108 && socket.starts_with(scratch.0.to_str().unwrap()), "{socket}");
        let state = if writable { "on" } else { "off" };
        let read_only = if writable { "off" } else { "on" };
        let daemon = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,filename={file},node-name=n,discard=unmap,read-only={read_only}"))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable={state},num-queues={num_queues}"
            ))
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-storage-daemon: {error}"));
        let export = Self { daemon, socket };
        // The daemon serves one front end at a time, so a connection that is closed at once does no harm.
        let started = Instant::now();
        while let Err(error) = UnixStream::connect(&export.socket) {
            assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused), "{error}");
            assert!(started.elapsed() < Duration::from_secs(10), "qemu-storage-daemon does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        export
    }

    pub(crate) fn socket(&self) -> &str {
        &self.socket
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
