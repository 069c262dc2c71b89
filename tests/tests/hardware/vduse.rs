//! The process behind a VDUSE device ends and comes back, while clients verify what they write.
//!
//! The kernel keeps a VDUSE device without its process, and the next process with that name continues with it.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nbdblk_tests::checker::{BLOCK, Durability};
use nbdblk_tests::raw::{Mode, Raw, cmd, errno};
use nbdblk_tests::{Daemon, Dir, Nbdblk, Rng, eventually, restarts, tool, under_load};
use nix::sys::signal::Signal;

use crate::target::{check, vhost_vdpa};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// A VDUSE device of its own, made by a qemu-storage-daemon.
struct Vduse<'a> {
    dir: &'a Dir,
    name: &'static str,
    format: &'static str,
    image: PathBuf,
    daemon: Option<Daemon>,
}

impl<'a> Vduse<'a> {
    fn new(dir: &'a Dir, name: &'static str, format: &'static str) -> Self {
        let image = dir.at("image");
        tool("qemu-img").args(["create", "-q", "-f", format]).args([&image]).args([SIZE.to_string()]).ok();
        let mut vduse = Self { dir, name, format, image, daemon: None };
        vduse.start();
        vduse.add();
        vduse
    }

    fn start(&mut self) {
        let node = format!(
            "driver={},node-name=n,file.driver=file,file.locking=off,file.filename={}",
            self.format,
            self.image.display()
        );
        let export = format!("vduse-blk,id=e,node-name=n,writable=on,name={},num-queues=2,queue-size=128", self.name);
        let pid_file = self.dir.at("qsd.pid");
        let _ = std::fs::remove_file(&pid_file);
        let daemon = tool("qemu-storage-daemon").args(["--blockdev", &node, "--export", &export, "--pidfile"]);
        self.daemon = Some(daemon.args([&pid_file]).spawn(self.dir.at("qsd.log")));
    }

    /// Makes a vDPA device of it. Fails as long as its queues are not all set up.
    fn add(&self) {
        let add = || tool("vdpa").args(["dev", "add", "name", self.name, "mgmtdev", "vduse"]).run().status.success();
        eventually("a vDPA device", add);
    }

    fn remove(&self) {
        tool("vdpa").args(["dev", "del", self.name]).ok();
    }

    fn kill(&mut self) {
        let daemon = self.daemon.take().expect("it runs");
        daemon.signal(Signal::SIGKILL);
        daemon.await_end();
    }

    /// Waits until the device is back. Starts the daemon again whenever QEMU aborts.
    fn await_log(&mut self, server: &Nbdblk, text: &str, count: usize) {
        eventually(&format!("{text:?} in the log"), || {
            if !self.daemon.as_mut().is_some_and(Daemon::is_alive) {
                eprintln!("started again: {}", self.daemon.take().map_or_else(String::new, |daemon| daemon.log()));
                self.start();
            }
            server.log().matches(text).count() >= count
        });
    }

    /// A link to it: its number may be that of another device later.
    fn link(&self) -> PathBuf {
        let link = self.dir.at("vdpa");
        let _ = std::fs::remove_file(&link);
        symlink(vhost_vdpa(self.name), &link).expect("a link can be made in the directory");
        link
    }

    fn spec(&self) -> String {
        format!("vdpa={}", vhost_vdpa(self.name).display())
    }
}

/// Runs `disturb` while two clients verify what they write.
fn disturbed(server: &Nbdblk, durability: Durability, disturb: impl FnOnce()) {
    under_load(server.address(), &[durability; 2], SIZE as usize / BLOCK / 2, disturb);
}

fn kill_under_load(name: &'static str, format: &'static str, durability: Durability) {
    check("a VDUSE device that is killed", || {
        let dir = Dir::in_memory();
        let mut vduse = Vduse::new(&dir, name, format);
        let server = Nbdblk::unix(&dir, &[&vduse.spec()]);
        let mut rng = Rng(5);
        disturbed(&server, durability, || {
            for n in 1..=restarts(4) as usize {
                thread::sleep(Duration::from_millis(300 + rng.below(400)));
                vduse.kill();
                thread::sleep(Duration::from_millis(rng.below(2) * rng.below(500)));
                vduse.start();
                vduse.await_log(&server, "back after", n);
            }
        });
        assert!(server.terminate().success());
        vduse.remove();
        drop(vduse.daemon.take());
        let check = tool("qemu-img").args(["check", "-f", format]).args([&vduse.image]).run();
        assert!(format == "raw" || [Some(0), Some(3)].contains(&check.status.code()), "{check:?}");
    });
}

#[test]
fn no_write_is_lost_when_its_process_is_killed() {
    kill_under_load("killed-raw", "raw", Durability::Often);
}

/// No client flushes, and the process forgets changes that were not flushed.
#[test]
fn no_write_to_qcow2_is_lost_when_its_process_is_killed() {
    kill_under_load("killed-qcow2", "qcow2", Durability::None);
}

/// The device is deleted and made again, while the process keeps running.
#[test]
fn a_device_that_is_removed_and_added_again_with_its_process() {
    check("a VDUSE device that is removed", || {
        let dir = Dir::in_memory();
        let mut vduse = Vduse::new(&dir, "moved", "raw");
        let server = Nbdblk::unix(&dir, &[&format!("vdpa={}", vduse.link().display())]);
        disturbed(&server, Durability::Often, || {
            thread::sleep(Duration::from_millis(500));
            vduse.remove();
            server.await_log("the vDPA device was removed");
            vduse.add();
            vduse.link();
            vduse.await_log(&server, "back after", 1);
        });
        assert!(server.terminate().success());
        vduse.remove();
        assert_eq!(vduse.daemon.as_ref().map(Daemon::log), Some(String::new()), "it is the same process");
    });
}

/// The device is deleted, and made again, larger.
#[test]
fn a_device_that_is_removed_and_added_again() {
    check("a VDUSE device that is removed", || {
        let dir = Dir::in_memory();
        let mut vduse = Vduse::new(&dir, "removed", "raw");
        let server = Nbdblk::unix(&dir, &[&format!("vdpa={},reconnect=600s", vduse.link().display())]);
        disturbed(&server, Durability::Often, || {
            thread::sleep(Duration::from_secs(1));
            vduse.kill();
            server.await_log("reconnecting");
            // Waits until the server has closed the device. The kernel waits for the process meanwhile, for half a minute.
            vduse.remove();
            tool("qemu-img").args(["resize", "-q", "-f", "raw"]).args([&vduse.image]).args(["48M"]).ok();
            // The kernel has given up on the device. The next process is refused, and destroys it.
            vduse.start();
            let (status, said) = vduse.daemon.take().expect("it was started").await_end();
            assert!(!status.success() && said.contains("Operation not permitted"), "{status}: {said}");
            vduse.start();
            vduse.add();
            vduse.link();
            vduse.await_log(&server, "back after", 1);
        });
        assert_eq!(Raw::enter(server.address(), Mode::Structured, "").size, 48 * MIB, "new clients see the new size");
        assert!(server.terminate().success());
        vduse.remove();
    });
}

/// Requests wait for the process as long as the device may be away, and then fail. They succeed when it is back.
#[test]
fn requests_fail_when_its_process_stays_away() {
    check("a VDUSE device that stays away", || {
        let dir = Dir::in_memory();
        let mut vduse = Vduse::new(&dir, "away", "raw");
        let server = Nbdblk::unix(&dir, &[&format!("{},reconnect=1s", vduse.spec())]);
        let mut raw = Raw::enter(server.address(), Mode::Simple, "");
        raw.write(0, &[7; 512]);
        vduse.kill();
        assert_eq!(raw.call(0, cmd::WRITE, 0, 512, &[1; 512]).error, errno::EIO);
        assert_eq!(raw.call(0, cmd::READ, 0, 512, b"").error, errno::EIO);
        server.await_log("requests fail until it is");
        vduse.start();
        vduse.await_log(&server, "back after", 1);
        assert_eq!(raw.read(0, 512), [7; 512], "a write that failed while the device was away was not carried out");
        assert!(server.terminate().success());
        vduse.remove();
    });
}

/// A process that hangs for longer than the time-out gets no reset as long as it has requests: QEMU would abort.
#[test]
fn clients_go_on_after_a_hang() {
    check("a VDUSE device that hangs", || {
        let dir = Dir::in_memory();
        let vduse = Vduse::new(&dir, "hangs", "raw");
        let server = Nbdblk::unix(&dir, &[&format!("{},request-timeout=1s", vduse.spec())]);
        let daemon = vduse.daemon.as_ref().expect("it runs");
        disturbed(&server, Durability::Often, || {
            thread::sleep(Duration::from_millis(500));
            daemon.signal(Signal::SIGSTOP);
            server.await_log("reconnecting");
            thread::sleep(Duration::from_secs(2));
            daemon.signal(Signal::SIGCONT);
            server.await_log("back after");
        });
        assert!(server.terminate().success());
        vduse.remove();
        assert_eq!(daemon.log(), "", "it is the same process");
    });
}
