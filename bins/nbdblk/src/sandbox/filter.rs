//! [`Filters`]: the system calls of each kind of thread (seccomp(2)). Other calls fail with EPERM.

use std::{collections::BTreeMap, env::consts::ARCH, process};

use anyhow::{Context, ensure};
use blkdev::thread::Role;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// System calls of all threads: they use open files and sockets, memory and threads.
const COMMON: &[i64] = &[
    // Files and sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_memfd_create,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mlock,
    libc::SYS_munlock,
    // Time.
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // Threads and the process.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Threads that a thread starts confine themselves, too.
    libc::SYS_clone3,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_seccomp,
];

/// Older forms of some of them.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_dup2];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// More system calls of threads that watch a device.
const WATCH: &[i64] = &[libc::SYS_pidfd_open];

/// More system calls of threads that open devices. Landlock limits the files.
const OPEN: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_connect,
    libc::SYS_pidfd_open,
    libc::SYS_prlimit64,
    libc::SYS_uname,
];
#[cfg(target_arch = "x86_64")]
const OLD_OPEN: &[i64] = &[libc::SYS_open, libc::SYS_readlink, libc::SYS_access];
#[cfg(not(target_arch = "x86_64"))]
const OLD_OPEN: &[i64] = &[];

/// System calls that no thread needs, not even the main thread: for debuggers, for the set-up of a system, and some that were often
/// part of attacks on the kernel.
const FORBIDDEN: &[i64] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_mknodat,
];

/// Types of ioctl requests (their second byte) that the drivers use: file systems, block devices, NVMe, VFIO, vhost.
const IOCTL_TYPES: [u8; 5] = [b'f', 0x12, b'N', b';', 0xaf];

/// Single ioctl requests for sockets and pipes. Their type has others that are dangerous, such as TIOCSTI.
const IOCTLS: [u64; 2] = [libc::FIONREAD, libc::FIONBIO];

/// Operations of prctl(2).
const PRCTLS: [i32; 6] = [
    libc::PR_SET_NAME,
    libc::PR_SET_TIMERSLACK,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_CAPBSET_DROP,
    libc::PR_SET_VMA,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters of all kinds of threads, compiled.
#[derive(Debug)]
pub(super) struct Filters {
    /// Makes clone3(2) fail with ENOSYS, so that the C library calls clone(2), whose flags a filter can read.
    clone3: BpfProgram,
    worker: BpfProgram,
    watcher: BpfProgram,
    opener: BpfProgram,
    main: BpfProgram,
}

impl Filters {
    pub(super) fn new() -> anyhow::Result<Self> {
        let denied = || SeccompAction::Errno(libc::EPERM as u32);
        let allow = |rules| compile(rules, denied(), SeccompAction::Allow);
        let mut watcher = common()?;
        watcher.extend(always(WATCH));
        let mut opener = common()?;
        opener.extend([OPEN, OLD_OPEN].into_iter().flat_map(always));
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            opener.insert(call, vec![rule(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?]);
        }
        Ok(Self {
            clone3: compile(
                always(&[libc::SYS_clone3]).collect(),
                SeccompAction::Allow,
                SeccompAction::Errno(libc::ENOSYS as u32),
            )?,
            worker: allow(common()?)?,
            watcher: allow(watcher)?,
            opener: allow(opener)?,
            main: compile(always(FORBIDDEN).collect(), SeccompAction::Allow, denied())?,
        })
    }

    /// Restricts the calling thread. Filters add up: a thread that starts another one passes its own on.
    pub(super) fn apply(&self, role: Role) -> anyhow::Result<()> {
        let filter = match role {
            Role::Watcher => &self.watcher,
            Role::Opener => &self.opener,
            _ => &self.worker,
        };
        apply_filter(&self.clone3)?;
        apply_filter(filter)?;
        Ok(())
    }

    /// Restricts the main thread, and those that it starts.
    pub(super) fn apply_to_main(&self) -> anyhow::Result<()> {
        Ok(apply_filter(&self.main)?)
    }

    /// Restricts the calling thread, and checks that this has an effect.
    pub(super) fn probe(&self) -> anyhow::Result<()> {
        self.apply(Role::Worker).context("seccomp")?;
        let opened = std::fs::File::open("/dev/null").err().and_then(|error| error.raw_os_error());
        ensure!(opened == Some(libc::EPERM), "the kernel accepts filters, but does not use them");
        Ok(())
    }
}

/// The rules for [`COMMON`], and for calls with certain arguments only.
fn common() -> anyhow::Result<Rules> {
    let mut rules: Rules = [COMMON, OLD].into_iter().flat_map(always).collect();
    let masked = |mask| SeccompCmpOp::MaskedEq(mask);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, masked(libc::PROT_EXEC as u64), 0)?]);
    }
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule(0, masked(thread), thread)?]);
    // To this process only, for abort(3).
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, process::id().into())?]);
    let types = IOCTL_TYPES.iter().map(|kind| rule(1, masked(0xff00), u64::from(*kind) << 8));
    let single = IOCTLS.iter().map(|&request| rule(1, SeccompCmpOp::Eq, request));
    rules.insert(libc::SYS_ioctl, types.chain(single).collect::<anyhow::Result<_>>()?);
    let prctls = PRCTLS.iter().map(|&operation| rule(0, SeccompCmpOp::Eq, operation as u64));
    rules.insert(libc::SYS_prctl, prctls.collect::<anyhow::Result<_>>()?);
    Ok(rules)
}

/// Rules for calls with any arguments.
fn always(calls: &[i64]) -> impl Iterator<Item = (i64, Vec<SeccompRule>)> {
    calls.iter().map(|&call| (call, Vec::new()))
}

/// A rule about the lower half of an argument.
fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> anyhow::Result<BpfProgram> {
    let arch = ARCH.try_into().with_context(|| format!("there are no filters for {ARCH}"))?;
    Ok(SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?)
}
