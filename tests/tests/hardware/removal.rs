//! A device is removed while clients use it.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nbdblk_tests::raw::{Mode, Raw, cmd, errno};
use nbdblk_tests::{Daemon, Dir, Nbdblk, Nbdkit, eventually, tool};
use nix::fcntl::OFlag;
use serde_json::{Value, json};

use crate::target::{add_vdpa, await_disk, bind, check, expand, vhost_vdpa};

#[test]
fn io_uring() {
    check(NVME.address, || NVME.removed("nvme", |disk| format!("io_uring={disk},direct=true")));
}

#[test]
fn nvme() {
    check(NVME.address, || NVME.removed("vfio-pci", |address| format!("nvme={address},reconnect=0")));
}

#[test]
fn nvme_that_comes_back() {
    check(NVME.address, || NVME.replaced(|address| format!("nvme={address},reconnect=600s")));
}

#[test]
fn nvme_that_comes_back_below_an_idle_client_of_the_plugin() {
    check(NVME.address, || {
        NVME.replaced_below_an_idle_client(|address| format!("nvme={address},reconnect=600s"));
    });
}

#[test]
fn nvme_io_uring() {
    check(NVME.address, || NVME.removed("nvme", |disk| format!("nvme-io_uring={}", disk.replace("/nvme", "/ng"))));
}

#[test]
fn virtio_pci() {
    check(VIRTIO.address, || VIRTIO.removed("vfio-pci", |address| format!("virtio-pci={address},reconnect=0")));
}

#[test]
fn virtio_pci_that_comes_back() {
    check(VIRTIO.address, || VIRTIO.replaced(|address| format!("virtio-pci={address},reconnect=600s")));
}

#[test]
fn virtio_pci_that_comes_back_below_an_idle_client_of_the_plugin() {
    check(VIRTIO.address, || {
        VIRTIO.replaced_below_an_idle_client(|address| format!("virtio-pci={address},reconnect=600s"));
    });
}

/// A device that can be removed and inserted again.
struct Bay {
    /// Its PCI address.
    address: &'static str,
    /// Its id in QEMU.
    id: &'static str,
    /// The QEMU device type for a new one.
    next: &'static str,
}

const NVME: Bay = Bay { address: "$NBDBLK_NVME_MDTS", id: "nvme-mdts", next: "nvme,bus=socket,max_ioqpairs=1,mdts=2" };

const VIRTIO: Bay = Bay {
    address: "$NBDBLK_VBLK_SOCKET",
    id: "vblk-socket",
    next: "virtio-blk-pci,bus=socket2,disable-legacy=on,iommu_platform=on,num-queues=4,packed=on",
};

impl Bay {
    /// Removes the device under load, and inserts a new one. `spec` returns the argument of nbdblk: from the PCI address if the
    /// driver is vfio-pci, otherwise from the kernel's disk.
    fn removed(&self, driver: &str, spec: impl FnOnce(&str) -> String) {
        let address = expand(self.address);
        bind(driver, &address).unwrap_or_else(|error| panic!("giving {address} to {driver}: {error}"));
        let spec = match driver {
            "vfio-pci" => spec(&address),
            _ => spec(&await_disk(&address, Some(1)).display().to_string()),
        };
        let dir = Dir::new();
        let mut server = Nbdblk::unix(&dir, &[&spec, "--handshake-timeout=3s"]);
        let script = "
data = bytes(65536)
print('writing', flush=True)
try:
    while True:
        for at in range(0, 1 << 24, len(data)):
            h.pwrite(data, at)
except nbd.Error as error:
    print('failed with', error.errno)
";
        let mut client = tool("nbdsh").args(["-u", &server.uri(), "-c", script]).spawn(dir.at("client"));
        client.await_text("writing");
        let _slots = slots();
        monitor(&format!("device_del {}", self.id));
        let (status, log) = client.await_end();
        assert!(status.success() && log.contains("failed with EIO"), "{status}: {log}");

        // A new client gets an error too, in the handshake or later, and SIGTERM ends the server.
        let late = tool("nbdsh").args(["-u", &server.uri(), "-c", "h.pread(4096, 0)"]).run();
        assert!(!late.status.success(), "{late:?}");
        assert!(server.is_alive(), "{}", server.log());
        assert!(server.terminate().success());

        self.insert(&address, &dir);
    }

    /// Replaces the device under load by one that looks the same. The client only sees a pause.
    fn replaced(&self, spec: impl FnOnce(&str) -> String) {
        let address = expand(self.address);
        bind("vfio-pci", &address).unwrap_or_else(|error| panic!("giving {address} to vfio-pci: {error}"));
        let dir = Dir::new();
        let server = Nbdblk::unix(&dir, &[&spec(&address)]);
        let client = writer(&server, &dir);
        let _slots = slots();
        monitor(&format!("device_del {}", self.id));
        server.await_log("reconnecting");
        self.insert(&address, &dir);
        went_on(server, client, &dir);
    }

    /// Replaces the device while a client of the plugin is idle. No request makes the plugin close the old one.
    fn replaced_below_an_idle_client(&self, spec: impl FnOnce(&str) -> String) {
        let address = expand(self.address);
        bind("vfio-pci", &address).unwrap_or_else(|error| panic!("giving {address} to vfio-pci: {error}"));
        let dir = Dir::new();
        let server = Nbdkit::start_with(&dir, &["-v"], &spec(&address).split(',').collect::<Vec<_>>());
        let script = format!(
            "import os, time\nh.pread(512, 0)\nprint('idle', flush=True)\nwhile not os.path.exists('{}'):\n    \
             time.sleep(0.1)\nh.pread(512, 0)\nprint('went on')",
            dir.text("stop")
        );
        let mut client = tool("nbdsh").args(["-u", &server.uri(), "-c", &script]).spawn(dir.at("client"));
        client.await_text("idle");
        let _slots = slots();
        monitor(&format!("device_del {}", self.id));
        eventually("that the plugin reconnects", || server.log().contains("reconnecting"));
        self.insert(&address, &dir);
        eventually("that the device is back", || server.log().contains("back after"));
        std::fs::write(dir.at("stop"), "").unwrap();
        let (status, log) = client.await_end();
        assert!(status.success() && log.contains("went on"), "{status}: {log}");
        assert!(server.terminate().success());
    }

    /// Inserts a new device when the old one is gone.
    fn insert(&self, address: &str, dir: &Dir) {
        // The kernel first releases the device and then ejects it; only then does QEMU release it.
        let device = Path::new("/sys/bus/pci/devices").join(address);
        eventually("that the device has gone", || !device.exists() && !is_occupied(address));
        // QEMU releases a drive after its device, but not at once: so each has another name.
        let drive = format!("new-{}", std::process::id()) + &dir.path().display().to_string().replace('/', "-");
        let id = self.id;
        monitor(&format!("drive_add 0 if=none,id={drive},driver=null-co,read-zeroes=on,size=128M,snapshot=on"));
        monitor(&format!("device_add {},id={id},serial={id},drive={drive}", self.next));
        eventually("a new device with a driver", || device.join("driver").exists());
        bind("vfio-pci", address).expect("vfio-pci takes the new device");
    }
}

/// A client that writes until the file `stop` is there.
fn writer(server: &Nbdblk, dir: &Dir) -> Daemon {
    let script = format!(
        "import os\nn = 0\nprint('writing', flush=True)\nwhile not os.path.exists('{}'):\n    h.pwrite(bytes(65536), n % 256 * \
         65536)\n    n += 1\nprint('went on', flush=True)",
        dir.text("stop")
    );
    let mut client = tool("nbdsh").args(["-u", &server.uri(), "-c", &script]).spawn(dir.at("client"));
    client.await_text("writing");
    client
}

/// The device is back, and the client has seen no error.
fn went_on(server: Nbdblk, client: Daemon, dir: &Dir) {
    server.await_log("back after");
    std::fs::write(dir.at("stop"), "").unwrap();
    let (status, log) = client.await_end();
    assert!(status.success() && log.contains("went on"), "{status}: {log}");
    assert!(server.terminate().success());
}

/// One slot at a time. While a device is being removed, each change of any slot makes QEMU repeat the eject request. After the
/// removal, a repeated request would eject the new device.
fn slots() -> MutexGuard<'static, ()> {
    static SLOTS: Mutex<()> = Mutex::new(());
    SLOTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `vdpa dev del` waits until the server has closed the device.
#[test]
fn vdpa_pci_that_comes_back() {
    check("$NBDBLK_VBLK_VDPA", || {
        let dir = Dir::new();
        let server = Nbdblk::unix(&dir, &[&expand("vdpa=$NBDBLK_VDPA_PCI,reconnect=600s")]);
        let client = writer(&server, &dir);
        tool("vdpa").args(["dev", "del", "pci"]).ok();
        server.await_log("the vDPA device was removed");
        add_vdpa(&expand("$NBDBLK_VBLK_VDPA")).expect("vp-vdpa has the device still");
        went_on(server, client, &dir);
    });
}

/// The process behind a VDUSE device is killed.
#[test]
fn vdpa() {
    check("a device of its own", || {
        let dir = Dir::new();
        let image = dir.sparse("image", 32 << 20);
        let node = format!("driver=file,filename={},node-name=n", image.display());
        let export = "vduse-blk,id=e,node-name=n,writable=on,name=gone,num-queues=1,queue-size=128";
        let qsd = tool("qemu-storage-daemon").args(["--blockdev", &node, "--export", export]).spawn(dir.at("qsd.log"));
        let add = || tool("vdpa").args(["dev", "add", "name", "gone", "mgmtdev", "vduse"]).run().status.success();
        eventually("a vDPA device", add);
        let node = vhost_vdpa("gone");
        let mut server = Nbdblk::unix(&dir, &[&format!("vdpa={},reconnect=0", node.display())]);
        let mut client = Raw::enter(server.address(), Mode::Simple, "");
        client.write(0, &[0; 65536]);
        drop(qsd); // SIGKILL
        let mut write = || client.call(0, cmd::WRITE, 0, 65536, &[0; 65536]).error;
        eventually("an error", || write() != 0);
        assert_eq!(write(), errno::EIO);
        server.await_log("the process behind it (VDUSE) has ended");
        let late = tool("nbdsh").args(["-u", &server.uri(), "-c", "h.pread(4096, 0)"]).run();
        assert!(!late.status.success(), "{late:?}");
        assert!(server.is_alive(), "{}", server.log());
        assert!(server.terminate().success());
        tool("vdpa").args(["dev", "del", "gone"]).ok();
    });
}

/// Whether the slot of a PCI address is occupied.
fn is_occupied(address: &str) -> bool {
    let (place, _function) = address.rsplit_once('.').expect("an address ends with a function");
    let slots = std::fs::read_dir("/sys/bus/pci/slots").expect("sysfs is mounted").flatten().map(|slot| slot.path());
    slots.filter(|slot| read(slot.join("address")).trim() == place).any(|slot| read(slot.join("adapter")).trim() != "0")
}

fn read(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Runs a command of QEMU's monitor.
///
/// # Panics
/// If QEMU refuses it, or does not answer.
pub(crate) fn monitor(command: &str) {
    // The port can be opened only once, so one command at a time.
    static COMMANDS: Mutex<u32> = Mutex::new(0);
    let mut count = COMMANDS.lock().unwrap_or_else(PoisonError::into_inner);
    *count += 1;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let mut port = None;
    // A forked child of another test holds the port of the last command until it executes its program.
    eventually("the port to the monitor", || {
        port = options.open(expand("$NBDBLK_MONITOR")).ok();
        port.is_some()
    });
    let mut port = port.expect("it was awaited");
    // The first command is for a monitor that was not used yet; any other refuses it.
    let arguments = json!({ "command-line": command });
    let line = json!({ "execute": "human-monitor-command", "arguments": arguments, "id": *count });
    write!(port, "{}\n{line}\n", json!({ "execute": "qmp_capabilities" })).expect("QEMU listens");
    let (mut text, mut answer) = (Vec::new(), None);
    eventually(&format!("an answer to {command}"), || {
        let mut bytes = [0; 4096];
        let len = port.read(&mut bytes).unwrap_or(0);
        text.extend_from_slice(&bytes[..len]);
        let mut lines = text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        answer = lines.find(|line| line["id"] == *count);
        answer.is_some()
    });
    let answer = answer.expect("it was awaited");
    assert!(matches!(answer["return"].as_str(), Some("" | "OK\r\n")), "{command}: {answer}");
}
