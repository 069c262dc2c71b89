//! The Linux kernel as the client: a file system on /dev/nbd0.

use nbdblk_tests::{Address, Dir, Nbdblk, tool};

use crate::target::Target;

/// Makes a file system, copies a tree, compares it after a second mount, and has it checked.
const FILE_SYSTEM: &str = "
set -ex
mkdir mnt
mkfs.ext4 -q -F /dev/nbd0
mount /dev/nbd0 mnt
head -c 16M /dev/urandom > random
cp -a /etc random mnt
umount mnt
mount /dev/nbd0 mnt
diff -r --no-dereference /etc mnt/etc
cmp random mnt/random
rm mnt/random
fstrim mnt
umount mnt
e2fsck -f -n /dev/nbd0
blockdev --getsize64 /dev/nbd0
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
    let attached = Attached::new(&[&host, &port, "/dev/nbd0", "-N", "disk", "-C", "2"]);
    assert_eq!(sockets(&server), idle + 2, "the kernel has two connections");
    tool("sh").args(["-c", FILE_SYSTEM]).within(dir.path()).ok();
    drop(attached);
    assert!(server.terminate().success());
}

/// Sockets that the server has open.
fn sockets(server: &Nbdblk) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the server runs");
    let targets = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// /dev/nbd0 with a server; let go when dropped.
#[derive(Debug)]
struct Attached;

impl Attached {
    fn new(args: &[&str]) -> Self {
        tool("nbd-client").args(args).ok();
        Self
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // What a failed test left mounted would hold the device.
        let _ = tool("umount").args(["-q", "-l", "/dev/nbd0"]).run();
        let _ = tool("nbd-client").args(["-d", "/dev/nbd0"]).run();
    }
}
