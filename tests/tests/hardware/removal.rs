//! The device goes while clients use it.

use std::path::Path;

use nbdblk_tests::{Dir, Nbdblk, eventually, nbdsh, tool};

use crate::target::{await_disk, bind, check, expand};

#[test]
fn io_uring() {
    check(|| removed("nvme", |disk| format!("io_uring={},direct=true", disk.expect("it has a driver").display())));
}

/// Pulls the NVMe controller out that can be, and puts a new one in; `spec` says how nbdblk reaches it, by the kernel's
/// disk when its driver makes one.
fn removed(driver: &str, spec: impl FnOnce(Option<&Path>) -> String) {
    let address = expand("$NBDBLK_NVME_MDTS");
    bind(driver, &address).unwrap_or_else(|error| panic!("giving {address} to {driver}: {error}"));
    let disk = (driver != "vfio-pci").then(|| await_disk(&address, Some(1)));
    let dir = Dir::new();
    let mut server = Nbdblk::unix(&dir, &[&spec(disk.as_deref())]);
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
    monitor("device_del nvme-mdts");
    let (status, log) = client.await_end();
    // ENOSPC comes from the kernel: the disk of a device that has gone has the size 0, and a write lies past its end.
    let told = ["failed with EIO", "failed with ENOSPC"].iter().any(|text| log.contains(text));
    assert!(status.success() && told, "{status}: {log}");

    // Who comes now is told too, and the server can be asked to end.
    let script = "
try:
    h.pread(4096, 0)
except nbd.Error as error:
    print(error.errno)
";
    assert_eq!(nbdsh(&server.uri(), script), "EIO\n");
    assert!(server.is_alive(), "{}", server.log());
    assert!(server.terminate().success());

    let device = Path::new("/sys/bus/pci/devices").join(&address);
    eventually("that the controller has gone", || !device.exists());
    monitor("drive_add 0 if=none,id=new,driver=null-co,read-zeroes=on,size=128M");
    monitor("device_add nvme,id=nvme-mdts,serial=nvme-mdts,bus=socket,max_ioqpairs=1,mdts=2,drive=new");
    eventually("a new controller with a driver", || device.join("driver").exists());
    bind("vfio-pci", &address).expect("vfio-pci takes the new controller");
}

/// Types a command at QEMU's monitor.
fn monitor(command: &str) {
    std::fs::write(expand("$NBDBLK_MONITOR"), format!("{command}\n")).expect("QEMU listens");
}
