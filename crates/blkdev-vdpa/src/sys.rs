//! The kernel interface of vhost-vdpa (linux/vhost.h, linux/vhost_types.h). Each ioctl is a safe method of [`Vhost`]. And
//! pidfd_open(2), which `nix` does not have.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use blkdev::Context;
use nix::{errno::Errno, libc};

/// Backend features: IOTLB messages of version 2, and batches of messages.
pub(crate) const BACKEND_F_IOTLB_MSG_V2: u64 = 1 << 1;
pub(crate) const BACKEND_F_IOTLB_BATCH: u64 = 1 << 2;

const IOTLB_MSG: u32 = 1;
const IOTLB_MSG_V2: u32 = 2;
const IOTLB_RW: u8 = 3;

/// Type of an IOTLB message.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Iotlb {
    Update = 2,
    Invalidate = 3,
    BatchBegin = 5,
    BatchEnd = 6,
}

#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// The header of `struct vhost_vdpa_config`, whose size is part of the ioctl numbers, followed by room for any virtio-blk
/// configuration.
#[repr(C)]
struct ConfigHead {
    off: u32,
    len: u32,
}

#[repr(C)]
struct Config {
    head: ConfigHead,
    bytes: [u8; CONFIG_MAX],
}

/// Longest part of the configuration space in one call, in bytes.
pub(crate) const CONFIG_MAX: usize = 256;

#[repr(C)]
#[derive(Default)]
struct IovaRange {
    first: u64,
    last: u64,
}

const VIRTIO: u8 = 0xaf;

nix::ioctl_read!(get_features, VIRTIO, 0x00, u64);
nix::ioctl_write_ptr!(set_features, VIRTIO, 0x00, u64);
nix::ioctl_none!(set_owner, VIRTIO, 0x01);
nix::ioctl_write_ptr!(set_vring_num, VIRTIO, 0x10, VringState);
nix::ioctl_write_ptr!(set_vring_addr, VIRTIO, 0x11, VringAddr);
nix::ioctl_write_ptr!(set_vring_base, VIRTIO, 0x12, VringState);
nix::ioctl_write_ptr!(set_vring_kick, VIRTIO, 0x20, VringFile);
nix::ioctl_write_ptr!(set_vring_call, VIRTIO, 0x21, VringFile);
nix::ioctl_write_ptr!(set_backend_features, VIRTIO, 0x25, u64);
nix::ioctl_read!(get_backend_features, VIRTIO, 0x26, u64);
nix::ioctl_read!(get_device_id, VIRTIO, 0x70, u32);
nix::ioctl_read!(get_status, VIRTIO, 0x71, u8);
nix::ioctl_write_ptr!(set_status, VIRTIO, 0x72, u8);
nix::ioctl_read!(get_config, VIRTIO, 0x73, ConfigHead);
nix::ioctl_write_ptr!(set_config, VIRTIO, 0x74, ConfigHead);
nix::ioctl_write_ptr!(set_vring_enable, VIRTIO, 0x75, VringState);
nix::ioctl_read!(get_vring_num, VIRTIO, 0x76, u16);
nix::ioctl_write_ptr!(set_config_call, VIRTIO, 0x77, i32);
nix::ioctl_read!(get_iova_range, VIRTIO, 0x78, IovaRange);
nix::ioctl_read!(get_config_size, VIRTIO, 0x79, u32);
nix::ioctl_read!(get_vqs_count, VIRTIO, 0x80, u32);
nix::ioctl_readwrite!(get_vring_size, VIRTIO, 0x82, VringState);

/// An open vhost-vdpa device. Errors name the ioctl that failed.
#[derive(Debug)]
pub(crate) struct Vhost(OwnedFd);

/// Defines methods for ioctls that read or write one plain value.
macro_rules! methods {
    (read { $($read:ident, $value:ty;)* } write { $($write:ident, $given:ty;)* }) => {
        $(pub(crate) fn $read(&self) -> io::Result<$value> {
            let mut value = <$value>::default();
            // SAFETY: the kernel writes one value of this type; the ioctl's number has its size.
            named(stringify!($read), unsafe { $read(self.0.as_raw_fd(), &mut value) })?;
            Ok(value)
        })*
        $(pub(crate) fn $write(&self, value: $given) -> io::Result<()> {
            // SAFETY: the kernel reads one value of this type; the ioctl's number has its size.
            named(stringify!($write), unsafe { $write(self.0.as_raw_fd(), &value) })
        })*
    };
}

impl Vhost {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    methods! {
        read {
        get_features, u64;
        get_backend_features, u64;
        get_device_id, u32;
        get_status, u8;
        get_vring_num, u16;
        get_config_size, u32;
        get_vqs_count, u32;
        }
        write {
        set_features, u64;
        set_backend_features, u64;
        set_status, u8;
        }
    }

    pub(crate) fn set_owner(&self) -> io::Result<()> {
        // SAFETY: takes no argument.
        named("set_owner", unsafe { set_owner(self.0.as_raw_fd()) })
    }

    /// First and last I/O address that the device can access.
    pub(crate) fn get_iova_range(&self) -> io::Result<(u64, u64)> {
        let mut range = IovaRange::default();
        // SAFETY: the kernel writes one value of this type.
        named("get_iova_range", unsafe { get_iova_range(self.0.as_raw_fd(), &mut range) })?;
        Ok((range.first, range.last))
    }

    /// Largest ring of a queue, in descriptors. Kernels before 6.12 do not support this.
    pub(crate) fn get_vring_size(&self, index: u16) -> io::Result<u32> {
        let mut state = VringState { index: index.into(), num: 0 };
        // SAFETY: the kernel reads and writes one value of this type.
        named("get_vring_size", unsafe { get_vring_size(self.0.as_raw_fd(), &mut state) })?;
        Ok(state.num)
    }

    pub(crate) fn set_vring_num(&self, index: u16, num: u16) -> io::Result<()> {
        let state = VringState { index: index.into(), num: num.into() };
        // SAFETY: the kernel reads one value of this type.
        named("set_vring_num", unsafe { set_vring_num(self.0.as_raw_fd(), &state) })
    }

    pub(crate) fn set_vring_base(&self, index: u16, base: u32) -> io::Result<()> {
        let state = VringState { index: index.into(), num: base };
        // SAFETY: as above.
        named("set_vring_base", unsafe { set_vring_base(self.0.as_raw_fd(), &state) })
    }

    pub(crate) fn enable_vring(&self, index: u16) -> io::Result<()> {
        let state = VringState { index: index.into(), num: 1 };
        // SAFETY: as above.
        named("set_vring_enable", unsafe { set_vring_enable(self.0.as_raw_fd(), &state) })
    }

    /// Sets the three areas of a queue, by I/O address.
    pub(crate) fn set_vring_addr(&self, index: u16, [descriptors, driver, device]: [u64; 3]) -> io::Result<()> {
        let address = VringAddr { index: index.into(), flags: 0, descriptors, used: device, available: driver, log: 0 };
        // SAFETY: as above. Only the device uses the addresses, within the memory mapped for it.
        named("set_vring_addr", unsafe { set_vring_addr(self.0.as_raw_fd(), &address) })
    }

    pub(crate) fn set_vring_kick(&self, index: u16, fd: BorrowedFd<'_>) -> io::Result<()> {
        let file = VringFile { index: index.into(), fd: fd.as_raw_fd() };
        // SAFETY: as above; the kernel takes its own reference to the eventfd.
        named("set_vring_kick", unsafe { set_vring_kick(self.0.as_raw_fd(), &file) })
    }

    pub(crate) fn set_vring_call(&self, index: u16, fd: BorrowedFd<'_>) -> io::Result<()> {
        let file = VringFile { index: index.into(), fd: fd.as_raw_fd() };
        // SAFETY: as above.
        named("set_vring_call", unsafe { set_vring_call(self.0.as_raw_fd(), &file) })
    }

    pub(crate) fn set_config_call(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: as above.
        named("set_config_call", unsafe { set_config_call(self.0.as_raw_fd(), &fd.as_raw_fd()) })
    }

    /// Fills `bytes`, at most [`CONFIG_MAX`], from the start of the configuration space.
    pub(crate) fn get_config(&self, bytes: &mut [u8]) -> io::Result<()> {
        let head = ConfigHead { off: 0, len: bytes.len() as u32 };
        let mut config = Config { head, bytes: [0; CONFIG_MAX] };
        let room = &mut config.bytes[..bytes.len()];
        assert!(room.len() == bytes.len(), "the configuration fits in the buffer");
        // SAFETY: the kernel writes as many bytes after the header as its length field says; the same struct has room for them.
        let done = unsafe { get_config(self.0.as_raw_fd(), (&raw mut config).cast()) };
        named("get_config", done)?;
        bytes.copy_from_slice(&config.bytes[..bytes.len()]);
        Ok(())
    }

    /// Writes `bytes`, at most [`CONFIG_MAX`], to the configuration space at byte offset `at`.
    pub(crate) fn set_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let head = ConfigHead { off: at as u32, len: bytes.len() as u32 };
        let mut config = Config { head, bytes: [0; CONFIG_MAX] };
        config.bytes[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: the kernel reads as many bytes after the header as its length field says; they are in the same struct.
        named("set_config", unsafe { set_config(self.0.as_raw_fd(), (&raw const config).cast()) })
    }

    /// Writes an IOTLB message for `len` bytes at `address`, which is both the process's address and the I/O address.
    pub(crate) fn iotlb(&self, v2: bool, what: Iotlb, address: u64, len: u64) -> io::Result<()> {
        // struct vhost_msg_v2: type, address space, then struct vhost_iotlb_msg, padded to 64 bytes. Version 1 has padding in
        // place of the address space.
        let mut message = [0; 72];
        let version = if v2 { IOTLB_MSG_V2 } else { IOTLB_MSG };
        message[..4].copy_from_slice(&version.to_ne_bytes());
        message[8..16].copy_from_slice(&address.to_ne_bytes());
        message[16..24].copy_from_slice(&len.to_ne_bytes());
        message[24..32].copy_from_slice(&address.to_ne_bytes());
        message[32] = IOTLB_RW;
        message[33] = what as u8;
        let written = nix::unistd::write(&self.0, &message)?;
        if written < message.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took only a part of an IOTLB message"));
        }
        Ok(())
    }
}

impl AsFd for Vhost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A descriptor for a process, readable when the process has ended. Linux 5.3.
pub(crate) fn pidfd_open(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) })?;
    // SAFETY: the kernel has just opened this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Adds the ioctl's name to the errno.
fn named(name: &str, result: nix::Result<i32>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(errno) => {
            let error = io::Error::from(errno);
            Err(Context::wrap(format!("{}: {error}", name.to_uppercase()), error))
        }
    }
}
