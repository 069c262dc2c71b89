//! [`Passthrough`]: NVMe commands to a namespace, through the kernel's driver and past its block layer.

use std::time::Duration;

use blkdev::Buf;
use io_uring::{cqueue, opcode, squeue, types};

use crate::{
    kind::{Kind, Sealed},
    memory::Memory,
};

/// A ring for a namespace's character device, `/dev/ngXnY`. Its entries have twice the size. Linux 5.19.
#[derive(Clone, Copy, Debug)]
pub struct Passthrough;

/// An NVMe I/O command. The completion's result is the status field, or a negative errno.
#[derive(Clone, Copy, Debug)]
pub struct NvmeCommand<'a> {
    /// The submission queue entry. Used of it are the opcode, the namespace, and words 10 to 15.
    pub words: [u32; 16],
    /// What the controller reads or writes.
    pub data: Data<'a>,
    /// How long the kernel's driver waits before it aborts the command, in milliseconds.
    pub timeout_ms: u32,
}

/// The data of an [`NvmeCommand`].
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// None.
    None,
    /// Payload memory. `fixed`: by its registration, if it is registered. Kernels before 6.1 refuse that with EINVAL.
    Buf {
        /// The whole buffer.
        buf: &'a Buf,
        /// See above.
        fixed: bool,
    },
    /// Ranges of a Dataset Management command, as they are in memory.
    Ranges(&'a [[u64; 2]]),
}

impl Sealed for Passthrough {}

impl Kind for Passthrough {
    type Command<'a> = NvmeCommand<'a>;
    type Sqe = squeue::Entry128;
    type Cqe = cqueue::Entry32;

    const NEEDED: &'static [u8] = &[opcode::UringCmd80::CODE];
    const OPTIONAL: &'static [u8] = &[];
    const TOO_OLD: &'static str = "NVMe passthrough by io_uring needs Linux 5.19 or later";
    const DRAIN_MAX: Duration = Duration::from_secs(30);

    #[inline]
    fn entry(command: NvmeCommand<'_>, memory: &mut Memory, user_data: u64) -> squeue::Entry128 {
        let (address, len, index) = match command.data {
            Data::Buf { buf, .. } if buf.is_empty() => (0, 0, None),
            Data::Buf { buf, fixed } => (buf.as_ptr() as u64, buf.len() as u32, memory.keep(buf).filter(|_| fixed)),
            Data::Ranges(ranges) => (ranges.as_ptr() as u64, size_of_val(ranges) as u32, None),
            Data::None => (0, 0, None),
        };
        let mut cmd = [0; 80];
        cmd[..PASSTHRU_LEN].copy_from_slice(&passthru(&command.words, address, len, command.timeout_ms));
        opcode::UringCmd80::new(FILE, NVME_URING_CMD_IO).cmd(cmd).buf_index(index).build().user_data(user_data)
    }
}

/// The ring's file in its table of registered files.
const FILE: types::Fixed = types::Fixed(0);

/// `_IOWR('N', 0x80, struct nvme_uring_cmd)`.
const NVME_URING_CMD_IO: u32 = 0xc048_4e80;

/// Length of [`passthru`].
pub const PASSTHRU_LEN: usize = 72;

/// `struct nvme_uring_cmd`, and `struct nvme_passthru_cmd`, whose last word is the result.
pub fn passthru(words: &[u32; 16], address: u64, len: u32, timeout_ms: u32) -> [u8; PASSTHRU_LEN] {
    let mut bytes = [0; PASSTHRU_LEN];
    bytes[0] = words[0] as u8;
    bytes[4..8].copy_from_slice(&words[1].to_ne_bytes());
    bytes[24..32].copy_from_slice(&address.to_ne_bytes());
    bytes[36..40].copy_from_slice(&len.to_ne_bytes());
    for (n, word) in words[10..].iter().enumerate() {
        bytes[40 + 4 * n..44 + 4 * n].copy_from_slice(&word.to_ne_bytes());
    }
    bytes[64..68].copy_from_slice(&timeout_ms.to_ne_bytes());
    bytes
}
