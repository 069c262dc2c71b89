//! nbdblk's description of a device, compared with the kernel's.

use std::fs;
use std::path::Path;

use nbdblk_tests::{Dir, nbdblk, nbdinfo, tool};
use serde_json::{Value, json};

use crate::target::{Other, Target, check};

/// Size, blocks and capabilities; clients get the same.
pub(crate) fn is_true(target: &Target) {
    let info = target.info();
    assert_eq!(info["block_size"], target.block, "{info:#}");
    for act in ["flush", "zero", "discard"] {
        assert_eq!(info["caps"][act], true, "every device here can {act}: {info:#}");
    }
    assert_eq!(info["caps"]["read_only"], false);
    let size = target.behind(|storage| match target.other {
        Other::File(_) => fs::metadata(storage).expect("the file is there").len(),
        _ => {
            let queue = Path::new("/sys/block").join(storage.file_name().expect("a disk has a name")).join("queue");
            let says = |name: &str| fs::read_to_string(queue.join(name)).expect("sysfs has it").trim().to_owned();
            assert_eq!(says("logical_block_size"), target.block.to_string());
            // A virtio disk does not report whether it is rotational.
            let rotates = |said: &str| !matches!(target.other, Other::VirtioPci(_)) && said == "1";
            assert_eq!(json!(rotates(&says("rotational"))), info["caps"]["rotational"]);
            assert_eq!(json!(says("write_cache") == "write back"), info["properties"]["flush-needed"]);
            assert_ne!(says("discard_max_bytes"), "0");
            let serial = queue.join("../device/serial");
            let serial = fs::read_to_string(serial).or_else(|_| fs::read_to_string(queue.join("../serial")));
            assert_eq!(serial.expect("a disk of the machine has a serial number").trim(), info["serial"]);
            let topology = tool("lsblk").args(["-dnb", "-o", "LOG-SEC,SIZE"]).args([storage]).ok().out;
            let topology: Vec<u64> = topology.split_whitespace().map(|word| word.parse().expect(word)).collect();
            assert_eq!(json!(topology), json!([target.block, info["size"]]));
            if storage.to_string_lossy().starts_with("/dev/nvme") {
                let said = tool("nvme").args(["id-ns", "-o", "json"]).args([storage]).ok().out;
                let said: Value = serde_json::from_str(&said).expect("nvme prints JSON");
                let format = &said["lbafs"][said["flbas"].as_u64().expect("a number") as usize & 0xf];
                let shift = format["ds"].as_u64().expect("a number");
                let size = said["nsze"].as_u64().expect("a number") << shift;
                assert_eq!((1 << shift, json!(size)), (target.block, info["size"].clone()), "{said:#}");
            }
            let size = tool("blockdev").args(["--getsize64".as_ref(), storage]).ok().out;
            size.trim().parse().expect("a size is a number")
        }
    });
    assert_eq!(info["size"], size);

    let dir = Dir::new();
    let server = target.serve(&dir);
    let export = &nbdinfo(&server.uri())["exports"][0];
    assert_eq!(export["export-size"], size);
    assert_eq!(export["block_size_minimum"], target.block);
    for flag in ["can_flush", "can_fua", "can_zero", "can_trim", "can_multi_conn"] {
        assert_eq!(export[flag], true, "{flag}: {export:#}");
    }
    assert!(server.terminate().success());
}

/// Memory that a vDPA device reaches through the IOMMU is locked, and the error names the limit for it.
#[test]
fn locked_memory_is_limited() {
    check("$NBDBLK_VBLK_VDPA", || {
        let nbdblk = nbdblk();
        let refused = |kib: u32, word: &str, part: &str| {
            let command = format!("ulimit -l {kib}; exec \"$0\" {word} vdpa=$NBDBLK_VDPA_PCI");
            let output = tool("sh").args(["-c", &command]).args([nbdblk.path()]).run();
            assert!(!output.status.success() && output.err.contains(part), "{command}: {}", output.err);
        };
        refused(1024, "info", "RLIMIT_MEMLOCK is 1 MiB, this device alone needs 2 MiB");
        refused(8192, "serve --run=true", "RLIMIT_MEMLOCK is 8 MiB, this device alone needs ");
    });
}
