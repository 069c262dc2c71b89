//! A device under test, and the other way to its storage.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use nbdblk_tests::{Dir, Nbdblk, eventually, nbdblk, tool};
use serde_json::Value;

/// A row of the table. `$NAME` in a text is a variable of the machine (`xtask/vm/README.md`).
#[derive(Debug)]
pub(crate) struct Target {
    /// The argument of nbdblk.
    pub(crate) spec: &'static str,
    /// The smallest block size for clients, in bytes.
    pub(crate) block: u64,
    /// The way to the same bytes without nbdblk.
    pub(crate) other: Other,
}

/// The other way to a device's storage.
#[derive(Debug)]
pub(crate) enum Other {
    /// A block device of the kernel.
    Disk(&'static str),
    /// A file that contains the device's data.
    File(&'static str),
    /// An NVMe controller of vfio-pci: a namespace by its NSID, lent to the kernel's driver.
    Nvme(&'static str, u32),
    /// A virtio-blk device of vfio-pci or vp-vdpa, lent to the kernel's driver.
    VirtioPci(&'static str),
}

impl Target {
    /// Runs the check, if this is the machine; other tests of the device wait.
    pub(crate) fn check(&self, test: impl FnOnce(&Self)) {
        check(self.storage(), || test(self));
    }

    /// The variable that names the storage.
    fn storage(&self) -> &'static str {
        match self.other {
            Other::Disk(name) | Other::File(name) | Other::Nvme(name, _) | Other::VirtioPci(name) => name,
        }
    }

    /// The argument of nbdblk.
    pub(crate) fn spec(&self) -> String {
        expand(self.spec)
    }

    /// Serves the device on a unix socket.
    pub(crate) fn serve(&self, dir: &Dir) -> Nbdblk {
        Nbdblk::unix(dir, &[&self.spec()])
    }

    /// The output of `nbdblk info`.
    pub(crate) fn info(&self) -> Value {
        serde_json::from_str(&nbdblk().args(["info", "--json", &self.spec()]).ok().out).expect("info prints JSON")
    }

    /// Calls `look` with the path of the storage. Nothing else may have the device open.
    pub(crate) fn behind<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        let disk = |lent: Option<Lent>, path: PathBuf| {
            // Drops the kernel's cache of the content.
            tool("blockdev").args(["--flushbufs".as_ref(), path.as_path()]).ok();
            (lent, path)
        };
        let given_back = |address: &str, driver, nsid| {
            let address = expand(address);
            disk(Some(Lent::to(driver, &address)), await_disk(&address, nsid))
        };
        let (_lent, path) = match self.other {
            Other::File(path) => (None, expand(path).into()),
            Other::Disk(path) => disk(None, expand(path).into()),
            Other::Nvme(address, nsid) => given_back(address, "nvme", Some(nsid)),
            Other::VirtioPci(address) => given_back(address, "virtio-pci", None),
        };
        look(&path)
    }

    /// Panics unless the storage has the first `len` bytes of `file` at `at`.
    pub(crate) fn assert_holds(&self, file: &Path, at: u64, len: u64) {
        self.behind(|storage| {
            tool("cmp").args([format!("--ignore-initial=0:{at}"), format!("--bytes={len}")]).args([file, storage]).ok()
        });
    }
}

/// Runs the test, if this is the machine; other tests with the same `storage` wait.
pub(crate) fn check(storage: &'static str, test: impl FnOnce()) {
    if std::env::var_os("NBDBLK_VM").is_some() {
        // After a failed test, the next one may use the device.
        let _one = lock_of(storage).lock().unwrap_or_else(PoisonError::into_inner);
        test();
    } else {
        static SAID: Once = Once::new();
        // Not with eprintln: a passing test does not show its output.
        let say = || std::io::stderr().write_all(b"\nSKIPPED: hardware tests run by `cargo xtask vm test` only\n");
        SAID.call_once(|| drop(say()));
    }
}

fn lock_of(storage: &'static str) -> &'static Mutex<()> {
    static LOCKS: Mutex<BTreeMap<&str, &Mutex<()>>> = Mutex::new(BTreeMap::new());
    let mut locks = LOCKS.lock().expect("no thread panics with all locks");
    locks.entry(storage).or_insert_with(|| Box::leak(Box::default()))
}

/// Replaces the machine's variables.
pub(crate) fn expand(text: &str) -> String {
    let mut parts = text.split('$');
    let mut whole = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end =
            part.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')).unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        whole += &std::env::var(name).unwrap_or_else(|_| panic!("the machine has no variable {name}"));
        whole += rest;
    }
    whole
}

/// The kernel's disk on a PCI device.
pub(crate) fn await_disk(address: &str, nsid: Option<u32>) -> PathBuf {
    let part = format!("/{address}/");
    let is_it = |disk: &Path| {
        let below = std::fs::canonicalize(disk).is_ok_and(|path| path.to_string_lossy().contains(&part));
        let number = || std::fs::read_to_string(disk.join("nsid")).ok()?.trim().parse().ok();
        below && (nsid.is_none() || nsid == number())
    };
    let mut found = None;
    eventually(&format!("a disk on {address}"), || {
        let disks = std::fs::read_dir("/sys/block").expect("sysfs is mounted");
        found = disks.flatten().map(|entry| entry.path()).find(|disk| is_it(disk));
        found.is_some()
    });
    let disk = Path::new("/dev").join(found.as_deref().and_then(Path::file_name).expect("it was found"));
    eventually("the node of the disk", || disk.exists());
    disk
}

/// A PCI device that is lent to a driver of the kernel. Dropping this returns it to its previous driver.
#[derive(Debug)]
struct Lent {
    address: String,
    owner: String,
}

impl Lent {
    fn to(driver: &str, address: &str) -> Self {
        let owner = driver_of(address);
        bind(driver, address).unwrap_or_else(|error| panic!("giving {address} to {driver}: {error}"));
        Self { address: address.into(), owner }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Self { address, owner } = self;
        let result = bind(owner, address).and_then(|()| match owner.as_str() {
            "vp-vdpa" => add_vdpa(address),
            _ => Ok(()),
        });
        // A second panic would hide the first.
        assert!(result.is_ok() || std::thread::panicking(), "giving {address} back to {owner}: {result:?}");
    }
}

/// The name of a PCI device's driver.
fn driver_of(address: &str) -> String {
    let link = Path::new("/sys/bus/pci/devices").join(address).join("driver");
    let driver = std::fs::read_link(&link).unwrap_or_else(|error| panic!("{}: {error}", link.display()));
    driver.file_name().expect("a driver has a name").to_string_lossy().into_owned()
}

/// Creates the vDPA device of a PCI device of vp-vdpa, as `xtask/vm/init.sh` does.
pub(crate) fn add_vdpa(address: &str) -> std::io::Result<()> {
    let output = tool("vdpa").args(["dev", "add", "name", "pci", "mgmtdev", &format!("pci/{address}")]).run();
    if !output.status.success() {
        return Err(std::io::Error::other(output.err));
    }
    // Its number may have changed.
    let link = expand("$NBDBLK_VDPA_PCI");
    std::fs::remove_file(&link)?;
    std::os::unix::fs::symlink(vhost_vdpa("pci"), link)
}

/// The node, `/dev/vhost-vdpa-N`, of a vDPA device.
pub(crate) fn vhost_vdpa(name: &str) -> PathBuf {
    let entries = std::fs::read_dir(Path::new("/sys/bus/vdpa/devices").join(name)).expect("the device is there");
    let mut names = entries.flatten().map(|entry| entry.file_name());
    let node = names.find(|name| name.to_string_lossy().starts_with("vhost-vdpa-"));
    Path::new("/dev").join(node.expect("vhost-vdpa has the device"))
}

/// Binds a PCI device to a driver of the kernel.
pub(crate) fn bind(driver: &str, address: &str) -> std::io::Result<()> {
    let device = Path::new("/sys/bus/pci/devices").join(address);
    std::fs::write(device.join("driver/unbind"), address)?;
    std::fs::write(device.join("driver_override"), driver)?;
    std::fs::write("/sys/bus/pci/drivers_probe", address)
}
