//! Locates the VFIO files of a PCI device by its name.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use blkdev::Context;

/// A PCI device that is bound to `vfio-pci`.
#[derive(Debug)]
pub(crate) struct Location {
    /// `0000:01:00.0`.
    pub(crate) address: String,
    /// Its directory in sysfs.
    sysfs: PathBuf,
}

impl Location {
    /// Finds the device with the PCI address (with or without domain) or sysfs path `name`.
    pub(crate) fn find(name: &str) -> io::Result<Self> {
        Self::find_in(Path::new("/sys/bus/pci/devices"), name)
    }

    fn find_in(devices: &Path, name: &str) -> io::Result<Self> {
        let sysfs = match address(name) {
            Some(address) => devices.join(address),
            None if name.starts_with('/') => PathBuf::from(name),
            None => {
                let text = format!("{name:?} is neither a PCI address such as 0000:01:00.0 nor a path in sysfs");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        };
        let path = fs::canonicalize(&sysfs)
            .map_err(|e| Context::wrap(format!("no PCI device at {}: {e}", sysfs.display()), e))?;
        let address = path.file_name().and_then(|last| address(last.to_str()?)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a PCI device", path.display()))
        })?;
        Ok(Self { address, sysfs: path })
    }

    /// # Errors
    /// The device is bound to another driver or to none; the text shows the commands to bind it.
    pub(crate) fn check_driver(&self) -> io::Result<()> {
        let driver = link(&self.sysfs.join("driver"));
        let address = &self.address;
        let state = match driver.as_deref() {
            // The names of vendor variants of vfio-pci end like this.
            Some(name) if name == "vfio-pci" || name.ends_with("-vfio-pci") || name.ends_with("_vfio_pci") => {
                return Ok(());
            }
            Some(name) => format!("it is bound to the driver {name:?}"),
            None => "it is bound to no driver".to_owned(),
        };
        let unbind = if driver.is_some() {
            format!("echo {address} > /sys/bus/pci/devices/{address}/driver/unbind; ")
        } else {
            String::new()
        };
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{state}, not to vfio-pci; to bind it, as root: modprobe vfio-pci; echo vfio-pci > \
                 /sys/bus/pci/devices/{address}/driver_override; {unbind}echo {address} > /sys/bus/pci/drivers_probe"
            ),
        ))
    }

    /// The device's own file (cdev), if the kernel supports that.
    pub(crate) fn cdev(&self) -> Option<PathBuf> {
        let mut entries = fs::read_dir(self.sysfs.join("vfio-dev")).ok()?;
        let name = entries.next()?.ok()?.file_name();
        Some(Path::new("/dev/vfio/devices").join(name)).filter(|path| path.exists())
    }

    /// Number of its IOMMU group; `None`: it is in no group.
    pub(crate) fn group(&self) -> Option<String> {
        link(&self.sysfs.join("iommu_group"))
    }

    /// The devices of its group that are bound to another driver than `vfio-pci`.
    pub(crate) fn strangers(&self) -> Vec<String> {
        let Ok(devices) = fs::read_dir(self.sysfs.join("iommu_group/devices")) else { return Vec::new() };
        let stranger = |entry: fs::DirEntry| {
            let driver = link(&entry.path().join("driver")).filter(|name| !name.contains("vfio"))?;
            Some(format!("{} ({driver})", entry.file_name().to_string_lossy()))
        };
        devices.filter_map(|entry| stranger(entry.ok()?)).collect()
    }
}

/// The last component of a symbolic link's target.
fn link(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// The full address in lower case, if `name` is one: `[domain:]bus:device.function`, in hexadecimal digits.
fn address(name: &str) -> Option<String> {
    let (front, function) = name.split_once('.')?;
    let parts: Vec<&str> = front.split(':').collect();
    let (domain, bus, device) = match parts[..] {
        [bus, device] => ("0000", bus, device),
        [domain, bus, device] => (domain, bus, device),
        _ => return None,
    };
    let number = |text: &str, digits: usize| {
        let good = !text.is_empty() && text.len() <= digits && text.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    let (domain, bus) = (number(domain, 8)?, number(bus, 2)?);
    let (device, function) = (number(device, 2).filter(|n| *n < 32)?, number(function, 1).filter(|n| *n < 8)?);
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn addresses_are_made_whole() {
        assert_eq!(address("0000:01:00.0").as_deref(), Some("0000:01:00.0"));
        assert_eq!(address("1:1f.7").as_deref(), Some("0000:01:1f.7"));
        assert_eq!(address("10000:E1:00.0").as_deref(), Some("10000:e1:00.0"));
        for wrong in ["", "01:00", "01:20.0", "01:00.8", "0:0:0:0.0", "x:00.0", "/sys/x.0", "+1:00.0"] {
            assert_eq!(address(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_wrong_driver_is_named_with_the_way_to_the_right_one() {
        let root = std::env::temp_dir().join(format!("blkdev-vfio-{}", std::process::id()));
        let device = root.join("devices/0000:01:00.0");
        fs::create_dir_all(root.join("drivers/nvme")).unwrap();
        fs::create_dir_all(root.join("drivers/vfio-pci")).unwrap();
        fs::create_dir_all(&device).unwrap();
        let devices = root.join("devices");
        let find = |name: &str| Location::find_in(&devices, name);

        let unbound = find("01:00.0").unwrap().check_driver().unwrap_err().to_string();
        assert!(unbound.contains("bound to no driver") && !unbound.contains("unbind"), "{unbound}");
        symlink("../../drivers/nvme", device.join("driver")).unwrap();
        let wrong = find(device.to_str().unwrap()).unwrap().check_driver().unwrap_err().to_string();
        assert!(wrong.contains("\"nvme\"") && wrong.contains("drivers_probe"), "{wrong}");
        fs::remove_file(device.join("driver")).unwrap();
        symlink("../../drivers/vfio-pci", device.join("driver")).unwrap();
        find("0:1:0.0").unwrap().check_driver().unwrap();

        assert!(find("02:00.0").unwrap_err().to_string().contains("no PCI device at"));
        assert!(find("nvme0").unwrap_err().to_string().contains("neither"));
        assert!(find(root.to_str().unwrap()).unwrap_err().to_string().contains("is not a PCI device"));
        fs::remove_dir_all(root).unwrap();
    }
}
