//! The ioctls of a namespace's character device.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd};

use blkdev_ring::passthru;

use crate::spec::{Command, IDENTIFY_LEN, Status};

/// `_IO('N', 0x40)`.
const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;

/// `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const NVME_IOCTL_ADMIN_CMD: u32 = 0xc048_4e41;

/// Returns the namespace identifier of a namespace's device.
pub(crate) fn nsid(file: &File) -> io::Result<u32> {
    // SAFETY: the kernel reads no argument.
    let nsid = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ID) };
    if nsid > 0 { Ok(nsid as u32) } else { Err(io::Error::last_os_error()) }
}

/// Sends Identify. `Ok(Err)`: the controller refuses.
pub(crate) fn identify(file: &File, cns: u8, nsid: u32) -> io::Result<Result<[u8; IDENTIFY_LEN], Status>> {
    let mut answer = [0; IDENTIFY_LEN];
    let address = answer.as_mut_ptr() as u64;
    let mut command = passthru(&Command::identify(cns, nsid).0, address, IDENTIFY_LEN as u32, 0);
    // SAFETY: the structure has the size that the ioctl's number states, and the kernel writes `data_len` bytes, a field of the
    // structure, to `answer`.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ADMIN_CMD as libc::Ioctl, command.as_mut_ptr()) };
    match status {
        0 => Ok(Ok(answer)),
        1.. => Ok(Err(Status(status as u16))),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_that_of_the_kernel_s_header() {
        let command = Command::transfer(2, 7, 0x1_0000_0002, 8, false);
        let bytes = passthru(&command.0, 0x1234_5678_9abc_def0, 4096, 30_000);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((bytes[0], word(4), word(36), word(64), word(68)), (2, 7, 4096, 30_000, 0));
        assert_eq!(u64::from_ne_bytes(bytes[24..32].try_into().unwrap()), 0x1234_5678_9abc_def0);
        assert_eq!([word(40), word(44), word(48), word(52), word(60)], [2, 1, 7, 0, 0]);
    }
}
