//! [`Identity`]: the user and groups of a thread, and the capabilities that it [keeps](keep).
//!
//! The kernel has them for each thread. The functions of the C library change them in all threads at once, which fails in threads
//! whose filter forbids it. So each thread changes only its own.

use anyhow::{Context, anyhow, ensure};
use nix::{
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
    unistd::{Gid, Uid, User, getgrouplist, getgroups, getresgid, getresuid},
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// The user and groups of `--user` and `--group`.
#[derive(Debug)]
pub(super) struct Identity {
    /// `None`: only the groups change.
    uid: Option<Uid>,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Identity {
    /// `None`: nothing changes.
    pub(super) fn new(user: Option<u32>, group: Option<u32>) -> anyhow::Result<Option<Self>> {
        if user.is_none() && group.is_none() {
            return Ok(None);
        }
        let uid = user.map(Uid::from_raw);
        let known = uid.map(User::from_uid).transpose()?.flatten();
        let gid = match (group, &known) {
            (Some(gid), _) => Gid::from_raw(gid),
            (None, Some(user)) => user.gid,
            (None, None) => return Err(anyhow!("--user {}: it has no name, so set --group too", user.unwrap_or(0))),
        };
        let groups = match &known {
            Some(user) => getgrouplist(&std::ffi::CString::new(user.name.as_str())?, gid)?,
            None => vec![gid],
        };
        let identity = Self { uid, gid, groups };
        ensure!(
            identity.is_assumed()? || Uid::effective().is_root(),
            "--user and --group need root: this process belongs to user {}",
            Uid::effective()
        );
        Ok(Some(identity))
    }

    fn is_assumed(&self) -> anyhow::Result<bool> {
        let (uids, gids) = (getresuid()?, getresgid()?);
        let is_user = self.uid.is_none_or(|uid| [uids.real, uids.effective, uids.saved] == [uid; 3]);
        let mut groups = [getgroups()?, self.groups.clone()];
        groups.iter_mut().for_each(|groups| {
            groups.push(self.gid);
            groups.sort_unstable_by_key(|group| group.as_raw());
            groups.dedup();
        });
        Ok(is_user && [gids.real, gids.effective, gids.saved] == [self.gid; 3] && groups[0] == groups[1])
    }

    /// Gives this user and these groups to the calling thread.
    pub(super) fn assume(&self) -> anyhow::Result<()> {
        if self.is_assumed()? {
            return Ok(());
        }
        let gid = |gid: &Gid| rustix::process::Gid::from_raw(gid.as_raw());
        set_thread_groups(&self.groups.iter().map(gid).collect::<Vec<_>>()).context("changing the groups")?;
        let own = gid(&self.gid);
        set_thread_res_gid(own, own, own).with_context(|| format!("changing the group to {}", self.gid))?;
        if let Some(uid) = self.uid {
            let own = rustix::process::Uid::from_raw(uid.as_raw());
            set_thread_res_uid(own, own, own).with_context(|| format!("changing the user to {uid}"))?;
        }
        Ok(())
    }
}

/// The capabilities that a thread keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeps {
    /// None.
    Nothing,
    /// Those for opening devices. `true`: also the one for looking into other processes (VDUSE).
    ToOpen(bool),
}

/// Drops all other capabilities of the calling thread, and of programs that it executes.
pub(super) fn keep(keeps: Keeps) -> anyhow::Result<()> {
    let kept = match keeps {
        Keeps::Nothing => CapabilitySet::empty(),
        Keeps::ToOpen(looks) => {
            let looks = if looks { CapabilitySet::SYS_PTRACE } else { CapabilitySet::empty() };
            // Files of other users; administration of NVMe; devices without an IOMMU; pinned memory; ports below 1024 for
            // --metrics after an upgrade.
            CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::SYS_ADMIN
                | CapabilitySet::SYS_RAWIO
                | CapabilitySet::IPC_LOCK
                | CapabilitySet::SYS_RESOURCE
                | CapabilitySet::NET_BIND_SERVICE
                | looks
        }
    };
    let before = capabilities(None).context("reading the capabilities")?;
    if before.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(kept).iter() {
            // Fails for those that the kernel does not have.
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    let sets = CapabilitySets {
        effective: before.effective & kept,
        permitted: before.permitted & kept,
        inheritable: before.inheritable & kept,
    };
    if sets != before {
        set_capabilities(None, sets).context("dropping capabilities")?;
    }
    Ok(())
}

/// Lets another user pin memory for devices, as root can. `--memory` bounds it.
pub(super) fn raise_locked_memory() {
    // Without privileges the limit stays.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}
