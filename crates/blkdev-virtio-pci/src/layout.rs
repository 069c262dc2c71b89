//! Locates a virtio PCI device's structures through its capability list (virtio 1.2, 4.1.4).

use std::io;

use blkdev_vfio::PciDevice;

/// Register offsets in PCI configuration space (PCI 3.0, 6.1 and 6.7).
const VENDOR: u16 = 0;
const STATUS: u16 = 6;
const CAPABILITIES: u16 = 0x34;

/// Status bit: the device has a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Id of a vendor-specific capability.
const CAPABILITY_VENDOR: u8 = 9;

/// Vendor and device ids (4.1.2): a block device, and a transitional one (which also supports the interface before virtio 1.0).
const RED_HAT: u16 = 0x1af4;
const BLOCK: u16 = 0x1042;
const BLOCK_TRANSITIONAL: u16 = 0x1001;

/// Structure types (4.1.4).
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// Location of a structure: a region (BAR), and the bytes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) bar: u8,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

/// The structures that the driver uses. With MSI-X the ISR status register is not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) common: Place,
    pub(crate) notify: Place,
    /// Distance between the doorbells of two queues, in bytes.
    pub(crate) multiplier: usize,
    pub(crate) device: Place,
}

impl Layout {
    pub(crate) fn read(pci: &dyn PciDevice) -> io::Result<Self> {
        let unsupported = |why: String| io::Error::new(io::ErrorKind::Unsupported, why);
        let (vendor, device) = (read16(pci, VENDOR)?, read16(pci, VENDOR + 2)?);
        if vendor != RED_HAT || ![BLOCK, BLOCK_TRANSITIONAL].contains(&device) {
            let why = format!("PCI device {vendor:04x}:{device:04x} is not a virtio block device");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let (mut common, mut notify, mut multiplier, mut device) = (None, None, 0, None);
        let mut next = 0;
        if read16(pci, STATUS)? & STATUS_CAPABILITIES != 0 {
            next = read8(pci, CAPABILITIES)? & 0xfc;
        }
        // There is room for 48 capabilities. A longer list is a loop.
        for _ in 0..48 {
            if next == 0 {
                break;
            }
            let at = u16::from(next);
            next = read8(pci, at + 1)? & 0xfc;
            if read8(pci, at)? != CAPABILITY_VENDOR {
                continue;
            }
            let bar = read8(pci, at + 4)?;
            let place = Place { bar, at: read32(pci, at + 8)? as usize, len: read32(pci, at + 12)? as usize };
            // If a structure occurs more than once, the device prefers the first (4.1.4.1). Capabilities in unknown regions are
            // ignored.
            match read8(pci, at + 3)? {
                _ if bar > 5 => {}
                COMMON => common = common.or(Some(place)),
                DEVICE => device = device.or(Some(place)),
                NOTIFY if notify.is_none() => {
                    notify = Some(place);
                    multiplier = read32(pci, at + 16)? as usize;
                }
                _ => {}
            }
        }
        let there = |place: Option<Place>, what: &str, least: usize, alignment: usize| {
            let place = place.filter(|place| place.len >= least);
            let place = place.ok_or_else(|| {
                unsupported(format!("the device does not support virtio 1.0: no capability for {what}"))
            })?;
            if !place.at.is_multiple_of(alignment) {
                return Err(unsupported(format!(
                    "the capability for {what} is at {:#x}, which is not aligned",
                    place.at
                )));
            }
            Ok(place)
        };
        Ok(Self {
            common: there(common, "the common configuration", 56, 4)?,
            notify: there(notify, "notifications", 2, 2)?,
            multiplier,
            device: there(device, "the device's configuration", 8, 1)?,
        })
    }
}

fn read8(pci: &dyn PciDevice, at: u16) -> io::Result<u8> {
    let mut bytes = [0; 1];
    pci.read_config(at, &mut bytes)?;
    Ok(bytes[0])
}

fn read16(pci: &dyn PciDevice, at: u16) -> io::Result<u16> {
    let mut bytes = [0; 2];
    pci.read_config(at, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

fn read32(pci: &dyn PciDevice, at: u16) -> io::Result<u32> {
    let mut bytes = [0; 4];
    pci.read_config(at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}
