//! [`Peer`]: a process or a device that shares memory with this process.

use std::{
    num::NonZeroU32,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use crate::wake;

/// What may access registered memory even when the device is closed: a process, as long as it lives and maps the memory, or a
/// device.
#[derive(Debug)]
pub struct Peer(Kind);

#[derive(Debug)]
enum Kind {
    Process { pidfd: OwnedFd, id: Option<NonZeroU32> },
    UnknownProcess,
    Device,
}

impl Peer {
    /// The process behind a pidfd (pidfd_open(2), SO_PEERPIDFD), and its id, if this process can see it.
    pub fn new(pidfd: OwnedFd, id: u32) -> Self {
        Self(Kind::Process { pidfd, id: NonZeroU32::new(id) })
    }

    /// A process that is not known, so it may live forever.
    pub fn unknown() -> Self {
        Self(Kind::UnknownProcess)
    }

    /// A device without an IOMMU, which may access pages as long as the host runs.
    pub fn device() -> Self {
        Self(Kind::Device)
    }

    pub(crate) fn is_process(&self) -> bool {
        !matches!(self.0, Kind::Device)
    }

    /// Whether it may still access memory.
    pub fn may_live(&self) -> bool {
        match &self.0 {
            // A pidfd is readable when its process has ended.
            Kind::Process { pidfd, .. } => !wake::wait([pidfd.as_fd()], Some(Duration::ZERO))[0],
            Kind::UnknownProcess | Kind::Device => true,
        }
    }

    /// One of `known` that is the same process, or else `self`. So a process that is met again takes no further descriptor.
    pub(crate) fn or_known<'a>(self: Arc<Self>, known: impl IntoIterator<Item = &'a Arc<Self>>) -> Arc<Self> {
        let id = |peer: &Self| if let Kind::Process { id, .. } = peer.0 { id } else { None };
        let Some(own) = id(&self) else { return self };
        // While a process lives, no other one has its id.
        let same = known.into_iter().find(|peer| id(peer) == Some(own) && peer.may_live());
        same.map_or(self, Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wake::Wake;

    #[test]
    fn a_process_that_is_met_again_is_the_one_that_is_known() {
        let end = Wake::new().unwrap();
        let meet = |id| Arc::new(Peer::new(end.as_fd().try_clone_to_owned().unwrap(), id));
        let known = [Arc::new(Peer::unknown()), meet(6), meet(7)];
        let is_known = |peer: &Arc<Peer>| known.iter().any(|known| Arc::ptr_eq(known, peer));
        assert!(is_known(&meet(7).or_known(&known)));
        assert!(!is_known(&meet(8).or_known(&known)));
        // A process of another PID namespace has no id here.
        assert!(!is_known(&meet(0).or_known(&[meet(0)])));
        assert!(!is_known(&Arc::new(Peer::unknown()).or_known(&known)));
        end.ring();
        assert!(!is_known(&meet(7).or_known(&known)), "it has ended, and another process has its id");
    }
}
