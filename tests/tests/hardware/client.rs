//! The Linux kernel as the client: a file system on /dev/nbdN.

use std::sync::atomic::{AtomicU32, Ordering};

use nbdblk_tests::{Address, Dir, Nbdblk, tool};

use crate::target::Target;

/// Makes a file system, copies a tree, compares it after a second mount, and checks the file system.
const FILE_SYSTEM: &str = "
set -ex
mkdir mnt
mkfs.ext4 -q -F $0
mount $0 mnt
head -c 4M /dev/urandom > random
cp -a /etc random mnt
umount mnt
mount $0 mnt
diff -r --no-dereference /etc mnt/etc
cmp random mnt/random
rm mnt/random
fstrim mnt
umount mnt
e2fsck -f -n $0
";

pub(crate) fn kernel_over_unix(target: &Target) {
    kernel(target, Nbdblk::unix);
}

pub(crate) fn kernel_over_tcp(target: &Target) {
    kernel(target, Nbdblk::tcp);
}

fn kernel(target: &Target, listen: fn(&Dir, &[&str]) -> Nbdblk) {
    let dir = Dir::new();
    let server = listen(&dir, &[&format!("disk:{}", target.spec())]);
    let idle = sockets(&server);
    let (host, port) = match server.address() {
        Address::Unix(path) => ("-unix".to_owned(), path.display().to_string()),
        Address::Tcp(address) => (address.ip().to_string(), address.port().to_string()),
    };
    let disk = NbdDisk::new(&[&host, &port, "-N", "disk", "-C", "2"]);
    assert_eq!(sockets(&server), idle + 2, "the kernel has two connections");
    tool("sh").args(["-c", FILE_SYSTEM, &disk.0]).within(dir.path()).ok();
    drop(disk);
    assert!(server.terminate().success());
}

/// Sockets that the server has open.
fn sockets(server: &Nbdblk) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let targets = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// The kernel's log from a moment on.
#[derive(Debug)]
pub(crate) struct KernelLog(String);

impl KernelLog {
    /// Marks the moment in the kernel's log.
    pub(crate) fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("nbdblk test {}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        std::fs::write("/dev/kmsg", &mark).expect("root may write to the kernel's log");
        Self(mark)
    }

    /// Panics if the kernel has complained about the disk. Tests of other disks write to the same log.
    pub(crate) fn assert_clean(&self, disk: &NbdDisk) {
        let log = tool("dmesg").args([] as [&str; 0]).ok().out;
        let (_, since) = log.split_once(&self.0).expect("the kernel keeps more lines than a test makes");
        let name = disk.path().trim_start_matches("/dev/");
        let complaints = ["rror", "ailed", "timed out", "stuck", "abort", "emounting", "shutting down"];
        let bad = |line: &&str| line.contains(name) && complaints.iter().any(|word| line.contains(word));
        let bad: Vec<_> = since.lines().filter(bad).collect();
        assert!(bad.is_empty(), "the kernel says:\n{}", bad.join("\n"));
    }
}

/// A disk, `/dev/nbdN`, with a server; detached when dropped.
#[derive(Debug)]
pub(crate) struct NbdDisk(String);

impl NbdDisk {
    pub(crate) fn new(args: &[&str]) -> Self {
        // Tests of other devices use disks, too.
        let mut said = String::new();
        for disk in (0..8).map(|n| format!("/dev/nbd{n}")) {
            let output = tool("nbd-client").args(args).args([&disk]).run();
            if output.status.success() {
                return Self(disk);
            }
            said += &output.err;
        }
        panic!("nbd-client {args:?}: {said}");
    }

    /// The path of the disk.
    pub(crate) fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        // A mount left by a failed test would hold the device.
        let _ = tool("umount").args(["-q", "-l", &self.0]).run();
        let _ = tool("nbd-client").args(["-d", &self.0]).run();
    }
}
