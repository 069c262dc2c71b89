//! nbdblk from the user's view: the real binary, real clients, real devices.

mod access;
mod cli;
mod clients;
mod conformance;
mod copy;
mod fairness;
mod files;
mod handshake;
mod hostile;
mod listen;
mod original;
mod process;
mod reload;
mod requests;
mod restarts;
mod sandbox;
mod status;
mod tls;
mod upgrade;
mod vhost_user;

use std::path::PathBuf;

use nbdblk_tests::{Dir, Export, Nbdblk, Qsd, write_runs};

/// ID of a user and of a group without privileges, which every Debian has.
const NOBODY: u32 = 65534;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A device behind the server, so that one test can use several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    IoUring,
    VhostUser,
}

/// A server with a new image, and everything that must live as long. Dropped from the top: the server first.
struct Stand {
    server: Nbdblk,
    qsd: Option<Qsd>,
    image: PathBuf,
    dir: Dir,
}

impl Behind {
    const BOTH: [Self; 2] = [Self::IoUring, Self::VhostUser];

    /// Serves an image of `size` bytes, empty except for the runs `(at, len)` of random bytes.
    fn stand(self, size: u64, runs: &[(u64, u64)]) -> Stand {
        let dir = Dir::new();
        let image = dir.at("disk.raw");
        write_runs(&image, size, runs.iter().copied());
        let (qsd, spec) = self.device(&dir, &image);
        let server = Nbdblk::unix(&dir, &[&spec]);
        Stand { server, qsd, image, dir }
    }

    /// The connection from the image to the server: the device's process, if it needs one, and the argument.
    fn device(self, dir: &Dir, image: &std::path::Path) -> (Option<Qsd>, String) {
        match self {
            Self::IoUring => (None, format!("io_uring={}", image.display())),
            Self::VhostUser => {
                let qsd = Qsd::start(dir, image, Export::default());
                let spec = qsd.spec();
                (Some(qsd), spec)
            }
        }
    }
}
