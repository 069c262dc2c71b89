//! Storage of another machine: a namespace that the kernel has attached over NVMe/TCP. The other machine is this kernel's own target,
//! over the loopback device.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nbdblk_tests::checker::{BLOCK, Durability};
use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Dir, Nbdblk, eventually, tool, under_load};

use crate::target::check;

const SIZE: u64 = 32 << 20;

/// A target with one subsystem, and the controller that is connected to it.
struct Fabric {
    name: String,
    port: u16,
    subsystem: PathBuf,
    link: PathBuf,
}

impl Fabric {
    fn new(dir: &Dir, port: u16) -> Self {
        tool("modprobe").args(["-a", "nvmet", "nvmet_tcp", "nvme_tcp"]).ok();
        let root = Path::new("/sys/kernel/config/nvmet");
        if !root.exists() {
            tool("mount").args(["-t", "configfs", "none", "/sys/kernel/config"]).ok();
        }
        dir.sparse("remote.img", SIZE);
        let name = format!("nqn.2026-11.example:disk{port}");
        let subsystem = root.join("subsystems").join(&name);
        let place = root.join(format!("ports/{port}"));
        let link = place.join("subsystems").join(&name);
        let set = |dir: &Path, values: &[(&str, &str)]| {
            for (key, value) in values {
                fs::write(dir.join(key), value).unwrap_or_else(|e| panic!("{key} of {}: {e}", dir.display()));
            }
        };
        fs::create_dir(&subsystem).expect("a subsystem");
        set(&subsystem, &[("attr_allow_any_host", "1")]);
        fs::create_dir(subsystem.join("namespaces/1")).expect("a namespace");
        set(&subsystem.join("namespaces/1"), &[("device_path", &dir.text("remote.img")), ("enable", "1")]);
        fs::create_dir(&place).expect("a port");
        let number = port.to_string();
        set(
            &place,
            &[("addr_trtype", "tcp"), ("addr_adrfam", "ipv4"), ("addr_traddr", "127.0.0.1"), ("addr_trsvcid", &number)],
        );
        let fabric = Self { name, port, subsystem, link };
        fabric.restore();
        fabric.connect();
        fabric
    }

    /// The host's side. It tries forever to connect again, each second.
    fn connect(&self) {
        let place = ["-t", "tcp", "-a", "127.0.0.1", "-s", &self.port.to_string(), "-n", &self.name];
        let again = ["--reconnect-delay=1", "--ctrl-loss-tmo=-1", "--nr-io-queues=2"];
        tool("nvme").args(["connect"]).args(place).args(again).ok();
    }

    /// Takes the path away: the target ends the connections, and refuses new ones.
    fn lose(&self) {
        fs::remove_file(&self.link).expect("the subsystem is at the port");
    }

    fn restore(&self) {
        symlink(&self.subsystem, &self.link).expect("the port takes the subsystem");
    }

    fn disconnect(&self) {
        tool("nvme").args(["disconnect", "-n", &self.name]).ok();
    }

    /// The name of the namespace, such as `nvme3n1`, once the kernel has it.
    fn namespace(&self) -> String {
        let mut found = None;
        eventually("a namespace", || {
            let subsystems = fs::read_dir("/sys/class/nvme-subsystem").expect("the kernel has NVMe").flatten();
            let ours =
                |dir: &PathBuf| fs::read_to_string(dir.join("subsysnqn")).is_ok_and(|nqn| nqn.trim() == self.name);
            let dir = subsystems.map(|entry| entry.path()).find(ours);
            let names = dir.into_iter().flat_map(|dir| fs::read_dir(dir).expect("it exists").flatten());
            let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
            // Not a controller, and not a path.
            found = names.find(|name| name.starts_with("nvme") && name[4..].contains('n') && !name[4..].contains('c'));
            found.as_ref().is_some_and(|name| Path::new("/dev").join(name).exists())
        });
        found.expect("it was found")
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        // If the test has failed, the machine ends anyway.
        let _ = fs::remove_file(&self.link);
        let _ = fs::remove_dir(self.subsystem.join("namespaces/1"));
        let _ = fs::remove_dir(&self.subsystem);
    }
}

#[test]
fn a_lost_path_is_a_pause_for_the_block_device() {
    check("NVMe over TCP", || {
        let dir = Dir::in_memory();
        let fabric = Fabric::new(&dir, 4420);
        let server = Nbdblk::unix(&dir, &[&format!("io_uring=/dev/{},direct=true", fabric.namespace())]);
        under_load(server.address(), &[Durability::Often; 2], SIZE as usize / BLOCK / 2, || {
            for _ in 0..2 {
                thread::sleep(Duration::from_secs(1));
                fabric.lose();
                thread::sleep(Duration::from_secs(3));
                fabric.restore();
                thread::sleep(Duration::from_secs(4));
            }
        });
        assert!(server.terminate().success());
        fabric.disconnect();
    });
}

/// The kernel does not hold requests of the passthrough.
#[test]
fn a_lost_path_is_an_error_for_the_passthrough_until_it_is_back() {
    check("NVMe over TCP", || {
        let dir = Dir::in_memory();
        let fabric = Fabric::new(&dir, 4421);
        let path = fabric.namespace().replacen("nvme", "/dev/ng", 1);
        let server = Nbdblk::unix(&dir, &[&format!("nvme-io_uring={path}")]);
        let mut client = Raw::enter(server.address(), Mode::Structured, "");
        client.write(0, &[7; 4096]);
        fabric.lose();
        eventually("a request fails", || client.call(0, cmd::WRITE, 4096, 4096, &[8; 4096]).error != 0);
        fabric.restore();
        eventually("a request succeeds", || client.call(0, cmd::WRITE, 8192, 4096, &[9; 4096]).error == 0);
        assert_eq!(client.read(0, 4096), [7; 4096]);
        assert_eq!(client.read(8192, 4096), [9; 4096]);
        assert!(server.terminate().success());
        fabric.disconnect();
    });
}
