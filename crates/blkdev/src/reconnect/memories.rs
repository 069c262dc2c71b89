//! [`Memories`]: the memory of the queues. A device that comes back may leave a process behind that still accesses it. So the
//! queues get other memory then, and the old one stays as long as a request or a process uses it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::{device::Device, mem::Mapping, peer::Peer};

/// Most memory that processes behind dead devices may hold, as a multiple of what is registered.
const HELD_MAX: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Memories {
    present: Vec<Present>,
    retired: Vec<Retired>,
    held: Vec<Held>,
}

/// Memory that new requests use.
#[derive(Debug)]
struct Present {
    /// What was registered at first. Its user may know no other.
    first: Weak<Mapping>,
    mapping: Arc<Mapping>,
}

/// Memory that only requests of an earlier device use.
#[derive(Debug)]
struct Retired {
    first: Weak<Mapping>,
    mapping: Arc<Mapping>,
    /// Processes behind dead devices that had it.
    peers: Vec<Arc<Peer>>,
}

/// Memory that nothing uses here.
#[derive(Debug)]
struct Held {
    memory: Remains,
    len: usize,
    peers: Vec<Arc<Peer>>,
}

#[derive(Debug)]
enum Remains {
    /// Of processes, which map the file.
    File(OwnedFd),
    /// Of a device that accesses pages.
    Pages(#[expect(dead_code, reason = "it only stays")] Arc<Mapping>),
}

impl Memories {
    pub(super) fn add(&mut self, mapping: &Arc<Mapping>) {
        self.present.push(Present { first: Arc::downgrade(mapping), mapping: Arc::clone(mapping) });
    }

    /// Forgets the memory that was registered as `mapping`, or that took its place. Returns all of it that the device has.
    pub(super) fn remove(&mut self, mapping: &Arc<Mapping>) -> Vec<Arc<Mapping>> {
        let is = |known: &Arc<Mapping>, first: &Weak<Mapping>| {
            Arc::ptr_eq(known, mapping) || std::ptr::eq(first.as_ptr(), Arc::as_ptr(mapping))
        };
        let present =
            self.present.iter().find(|present| is(&present.mapping, &present.first)).map(|found| &found.first);
        let retired =
            self.retired.iter().find(|retired| is(&retired.mapping, &retired.first)).map(|found| &found.first);
        let Some(first) = present.or(retired).cloned() else { return Vec::new() };
        let present = self.present.extract_if(.., |known| known.first.ptr_eq(&first)).map(|known| known.mapping);
        let mut removed: Vec<_> = present.collect();
        for Retired { mapping, peers, .. } in self.retired.extract_if(.., |known| known.first.ptr_eq(&first)) {
            removed.push(Arc::clone(&mapping));
            self.held.extend(Held::new(mapping, peers));
        }
        removed
    }

    /// Memory that new requests use, in bytes.
    pub(super) fn len(&self) -> usize {
        self.present.iter().map(|present| present.mapping.len()).sum()
    }

    /// Registers all memory with a device that was opened again, and the memory for new requests, which it returns: for
    /// [`replace`](Self::replace).
    ///
    /// # Errors
    /// The device refused, or no memory is left.
    pub(super) fn register(&self, device: &dyn Device, is_replaced: bool) -> io::Result<Vec<Arc<Mapping>>> {
        let present = self.present.iter().map(|present| &present.mapping);
        let retired = self.retired.iter().map(|retired| &retired.mapping);
        present.clone().chain(retired).try_for_each(|mapping| device.register(mapping))?;
        let fresh = |mapping: &Arc<Mapping>| {
            let fresh = device.new_memory(mapping.len())?;
            device.register(&fresh)?;
            Ok(fresh)
        };
        present.filter(|_| is_replaced).map(fresh).collect()
    }

    /// New requests use `fresh` memory from now on, because `peer` may access the present one.
    pub(super) fn replace(&mut self, fresh: Vec<Arc<Mapping>>, peer: Option<&Arc<Peer>>) {
        for retired in &mut self.retired {
            retired.peers.extend(peer.cloned());
        }
        for (present, fresh) in self.present.iter_mut().zip(fresh) {
            let mapping = std::mem::replace(&mut present.mapping, Arc::clone(&fresh));
            mapping.retire(fresh);
            self.retired.push(Retired {
                first: present.first.clone(),
                mapping,
                peers: peer.cloned().into_iter().collect(),
            });
        }
    }

    /// Adds memory that only requests which have moved there use.
    pub(super) fn add_spare(&mut self, mapping: &Arc<Mapping>) {
        self.retired.push(Retired { first: Weak::new(), mapping: Arc::clone(mapping), peers: Vec::new() });
    }

    /// Takes out memory that no request uses any more.
    pub(super) fn unused(&mut self) -> Vec<Unused> {
        let unused = self.retired.extract_if(.., |retired| !retired.mapping.is_in_use());
        unused.map(|Retired { mapping, peers, .. }| Unused { mapping, peers }).collect()
    }

    /// Keeps memory that the present device does not have any more, until no process can access it.
    pub(super) fn hold(&mut self, Unused { mapping, peers }: Unused) {
        self.held.extend(Held::new(mapping, peers));
    }

    /// Frees memory that no process can access any more. Returns whether some is left.
    pub(super) fn free(&mut self) -> bool {
        self.held.retain(Held::is_accessible);
        !self.held.is_empty() || !self.retired.is_empty()
    }

    /// Whether some waits for the end of a request or a process.
    #[cfg(test)]
    pub(super) fn waits(&self) -> bool {
        !self.held.is_empty() || !self.retired.is_empty()
    }

    /// Number of mappings for new requests.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.present.len()
    }

    /// Processes that are known.
    pub(super) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.retired.iter().flat_map(|retired| &retired.peers).chain(self.held.iter().flat_map(|held| &held.peers))
    }

    /// Whether processes behind dead devices hold so much that the device must not come back yet.
    pub(super) fn is_exhausted(&self) -> bool {
        let retired: usize = self.retired.iter().map(|retired| retired.mapping.len()).sum();
        let held: usize = self.held.iter().map(|held| held.len).sum();
        retired + held >= HELD_MAX * self.len().max(1)
    }
}

/// Memory that no request uses any more, and that the present device still has.
#[derive(Debug)]
pub(super) struct Unused {
    pub(super) mapping: Arc<Mapping>,
    peers: Vec<Arc<Peer>>,
}

impl Held {
    /// `None`: nothing else can access the memory.
    fn new(mapping: Arc<Mapping>, peers: Vec<Arc<Peer>>) -> Option<Self> {
        let len = mapping.len();
        let file = mapping.as_fd().try_clone_to_owned().ok().filter(|_| peers.iter().all(|peer| peer.is_process()));
        let memory = match file {
            Some(file) => {
                // Ends the access from here.
                drop(mapping);
                Remains::File(file)
            }
            // Or no descriptor is left.
            None => Remains::Pages(mapping),
        };
        Some(Self { memory, len, peers }).filter(Self::is_accessible)
    }

    /// Whether a process may still access it.
    fn is_accessible(&self) -> bool {
        let lives = self.peers.iter().any(|peer| peer.may_live());
        let Remains::File(file) = &self.memory else { return lives };
        // The kernel refuses this seal as long as a process maps the file for writing, as a back end does.
        lives && fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err()
    }
}
