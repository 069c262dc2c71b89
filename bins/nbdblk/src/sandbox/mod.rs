//! The sandbox: restrictions of the threads, so that an attacker who controls one of them can do little.
//!
//! The kernel has these restrictions for each thread, so each thread applies its own at its start ([`confine`]). A thread cannot
//! remove them. Threads that serve clients, devices and the control socket can use only files and sockets that are open. The main
//! thread, and its threads for reloads and upgrades, can do more: they open devices, and execute the next program, which opens
//! devices in turn.

mod filter;
mod identity;
mod reach;

use std::{
    fmt, io, process,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

use anyhow::{Context, anyhow};
use blkdev::thread::{Role, confine_with, spawn};
use nix::sys::prctl;

use crate::{
    cli::{self, SandboxMode as Mode},
    exports::ExportSpec,
    logger,
};
use filter::Filters;
use identity::{Identity, Keeps};
use reach::{OpenFiles, Reach};

/// The restrictions of the threads of this process.
#[derive(Debug)]
struct Policy {
    mode: Mode,
    identity: Option<Identity>,
    /// There is a command of `--run`, which would inherit the restrictions of the main thread.
    has_command: bool,
    /// `None`: the kernel has no seccomp.
    filters: Option<Filters>,
    /// `None`: the kernel has no landlock.
    open_files: Option<OpenFiles>,
    /// Files for opening devices again.
    reach: Mutex<Reach>,
}

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Prepares the sandbox. Threads that start from now on confine themselves; only the thread for the log has started before.
///
/// # Errors
/// The user cannot be changed, or the sandbox is required and the kernel cannot do all of it.
pub(crate) fn prepare(args: &cli::Serve, specs: &[ExportSpec]) -> anyhow::Result<()> {
    let mode = args.sandbox.unwrap_or_default();
    let identity = Identity::new(args.user, args.group)?;
    if identity.is_some() {
        identity::raise_locked_memory();
    }
    let mut policy = Policy {
        mode,
        identity,
        has_command: args.run.is_some(),
        filters: None,
        open_files: None,
        reach: Mutex::new(Reach::of(specs)),
    };
    if mode != Mode::Off {
        policy.open_files = policy.accept("landlock", OpenFiles::new())?;
        // On a thread that ends then, because the filters stay.
        let tried = thread::spawn(|| Filters::new().and_then(|filters| filters.probe().map(|()| filters))).join();
        policy.filters = policy.accept("seccomp", tried.unwrap_or_else(|_| Err(anyhow!("a panic"))))?;
    }
    if mode != Mode::Off || policy.identity.is_some() {
        let _ = POLICY.set(policy);
        confine_with(confine);
    }
    Ok(())
}

/// Confines the main thread, once the devices are open and the sockets are bound.
///
/// # Errors
/// The user cannot be changed, or the sandbox is required and something failed.
pub(crate) fn seal() -> anyhow::Result<()> {
    let Some(policy) = POLICY.get() else { return Ok(()) };
    logger::confine();
    policy.assume()?;
    match policy.confine_main() {
        Err(error) if policy.mode == Mode::Require => Err(error.context("--sandbox require")),
        sealed => {
            Policy::check("main", false, sealed);
            Ok(())
        }
    }
}

/// Starts a thread of this program that serves or reports.
pub(crate) fn spawn_service(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn(Role::Service, name, work).map(drop)
}

/// Starts a thread that may do as much as the main thread once that is [sealed](seal), such as removing files.
pub(crate) fn spawn_trusted(name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let work = move || {
        if let Some(policy) = POLICY.get() {
            Policy::check(name, true, policy.assume());
            Policy::check(name, policy.mode == Mode::Require, policy.confine_main());
        }
        work();
    };
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

/// Confines the calling thread for a reload to these exports: it cannot create, remove or execute files. Threads that it starts can
/// open their devices again.
///
/// # Errors
/// No descriptor or memory is left.
pub(crate) fn enter_reload(specs: &[ExportSpec]) -> anyhow::Result<()> {
    let Some(policy) = POLICY.get() else { return Ok(()) };
    let reach = Reach::of(specs);
    let is_unlimited = policy.open_files.is_none() || reach.is_unlimited();
    *policy.reach.lock().unwrap_or_else(PoisonError::into_inner) = reach;
    if is_unlimited { Ok(()) } else { reach::confine_to_existing().context("the sandbox of a reload") }
}

/// Confines the calling thread according to its role.
fn confine(role: Role) {
    let Some(policy) = POLICY.get() else { return };
    Policy::check(role, true, policy.assume());
    Policy::check(role, policy.mode == Mode::Require, policy.confine(role));
}

impl Policy {
    /// A part of the sandbox, if it works. If it does not, this is logged, or an error if the sandbox is required.
    fn accept<T>(&self, part: &str, tried: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match tried {
            Ok(part) => Ok(Some(part)),
            Err(error) if self.mode == Mode::Require => {
                Err(error.context(format!("--sandbox require: {part} does not work here")))
            }
            Err(error) => {
                log::warn!("the sandbox works without {part}: {}", crate::whole(&error));
                Ok(None)
            }
        }
    }

    /// Changes the user of the calling thread.
    fn assume(&self) -> anyhow::Result<()> {
        self.identity.iter().try_for_each(Identity::assume)
    }

    fn confine(&self, role: Role) -> anyhow::Result<()> {
        if self.mode == Mode::Off {
            return Ok(());
        }
        let reach = (role == Role::Opener).then(|| self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone());
        identity::keep(reach.as_ref().map_or(Keeps::Nothing, |reach| Keeps::ToOpen(reach.is_unlimited())))?;
        prctl::set_no_new_privs()?;
        match (&self.open_files, reach) {
            (Some(open_files), None) => open_files.confine()?,
            (Some(_), Some(reach)) if !reach.is_unlimited() => reach.confine()?,
            _ => {}
        }
        self.filters.iter().try_for_each(|filters| filters.apply(role))
    }

    /// Confines the main thread, or a thread that may do as much.
    fn confine_main(&self) -> anyhow::Result<()> {
        if self.mode == Mode::Off || self.has_command {
            return Ok(());
        }
        identity::keep(Keeps::ToOpen(true))?;
        prctl::set_no_new_privs()?;
        self.filters.iter().try_for_each(Filters::apply_to_main)
    }

    /// Logs a failure to confine a thread. `is_fatal`: ends the process. Failures are rare: [`prepare`] has tried each part, so that
    /// only a shortage of memory or descriptors is left.
    fn check(thread: impl fmt::Debug, is_fatal: bool, confined: anyhow::Result<()>) {
        let Err(error) = confined else { return };
        let text = format!("the sandbox of thread {thread:?}: {}", crate::whole(&error));
        if is_fatal {
            crate::complain(&text);
            logger::flush(logger::PATIENCE);
            process::exit(1);
        }
        log::warn!("{text}");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Read,
        net::{Ipv4Addr, TcpListener, TcpStream},
        os::unix::net::{UnixListener, UnixStream},
        process::Command,
    };

    use nix::{
        errno::Errno,
        libc,
        sys::{
            ptrace,
            signal::{Signal, kill},
            socket::{AddressFamily, SockFlag, SockType, socket},
        },
        unistd::{Pid, execv, getppid},
    };

    use super::*;
    use crate::sys::map_page;

    /// Runs `work` on a thread with a role of the server.
    fn run<T: Send + 'static>(role: Role, reach: Reach, work: impl FnOnce() -> T + Send + 'static) -> T {
        let policy = Policy {
            mode: Mode::Require,
            identity: None,
            has_command: false,
            filters: Some(Filters::new().unwrap()),
            open_files: Some(OpenFiles::new().unwrap()),
            reach: Mutex::new(reach),
        };
        let confined = move || {
            policy.confine(role).unwrap();
            work()
        };
        thread::spawn(confined).join().unwrap()
    }

    const CONFINED: [Role; 3] = [Role::Worker, Role::Watcher, Role::Service];

    fn denied<T>(result: io::Result<T>) -> bool {
        result.err().is_some_and(|error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)))
    }

    #[test]
    fn a_confined_thread_cannot_open_files() {
        for role in CONFINED {
            assert!(run(role, Reach::default(), || denied(File::open("/etc/passwd"))), "{role:?}");
            assert!(run(role, Reach::default(), || denied(fs::remove_file("/etc/passwd.not"))), "{role:?}");
        }
    }

    #[test]
    fn a_confined_thread_cannot_connect() {
        let dir = std::env::temp_dir().join(format!("nbdblk-sandbox-{}", process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("s");
        let (_unix, tcp) = (UnixListener::bind(&path).unwrap(), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let port = tcp.local_addr().unwrap().port();
        for role in CONFINED {
            let path = path.clone();
            assert!(run(role, Reach::default(), move || denied(UnixStream::connect(path))), "{role:?}");
        }
        for role in [Role::Worker, Role::Watcher, Role::Service, Role::Opener] {
            let connect = move || denied(TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
            assert!(run(role, Reach::default(), connect), "{role:?}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_confined_thread_cannot_make_sockets_of_any_family() {
        let families = [AddressFamily::Unix, AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Netlink];
        for (role, family) in CONFINED.into_iter().flat_map(|role| families.map(|family| (role, family))) {
            let make = move || socket(family, SockType::Datagram, SockFlag::empty(), None).err();
            assert_eq!(run(role, Reach::default(), make), Some(Errno::EPERM), "{role:?} {family:?}");
        }
    }

    #[test]
    fn a_confined_thread_cannot_execute_programs() {
        for role in [Role::Worker, Role::Watcher, Role::Service, Role::Opener] {
            let execute = || (execv(c"/bin/true", &[c"true"]).err(), denied(Command::new("/bin/true").status()));
            assert_eq!(run(role, Reach::default(), execute), (Some(Errno::EPERM), true), "{role:?}");
        }
    }

    #[test]
    fn a_confined_thread_cannot_trace_or_signal_other_processes() {
        for role in [Role::Worker, Role::Watcher, Role::Service, Role::Opener] {
            let trace = || (ptrace::attach(getppid()).err(), kill(getppid(), None::<Signal>).err());
            assert_eq!(run(role, Reach::default(), trace), (Some(Errno::EPERM), Some(Errno::EPERM)), "{role:?}");
        }
        let signal = || kill(Pid::this(), None::<Signal>).err();
        assert_eq!(run(Role::Worker, Reach::default(), signal), Some(Errno::EPERM), "not even this process");
    }

    #[test]
    fn a_confined_thread_cannot_execute_memory_that_it_has_written() {
        for role in [Role::Worker, Role::Watcher, Role::Service, Role::Opener] {
            assert_eq!(run(role, Reach::default(), || map_page(false)), Ok(()), "{role:?}");
            assert_eq!(run(role, Reach::default(), || map_page(true)), Err(Errno::EPERM), "{role:?}");
        }
    }

    #[test]
    fn a_confined_thread_has_no_capabilities_and_gets_no_new_privileges() {
        for role in CONFINED {
            let look = || {
                let none = rustix::thread::capabilities(None).unwrap();
                (none.effective | none.permitted | none.inheritable, prctl::get_no_new_privs().unwrap())
            };
            assert_eq!(run(role, Reach::default(), look), (rustix::thread::CapabilitySet::empty(), true), "{role:?}");
        }
    }

    #[test]
    fn a_thread_that_opens_devices_reaches_their_directories_only() {
        let dir = std::env::temp_dir().join(format!("nbdblk-reach-{}", process::id()));
        fs::create_dir(&dir).unwrap();
        let image = dir.join("image");
        let spec = format!("io_uring={}", image.display());
        let specs = crate::exports::from_words(&[spec.into()]).unwrap();
        // Made later, as a socket is that comes back.
        fs::write(&image, "content").unwrap();
        let open = move || {
            let mut text = String::new();
            File::options().read(true).write(true).open(&image).unwrap().read_to_string(&mut text).unwrap();
            (text, denied(File::open("/etc/passwd")), denied(fs::write(image.with_extension("new"), "")))
        };
        assert_eq!(run(Role::Opener, Reach::of(&specs), open), ("content".into(), true, true));
        fs::remove_dir_all(&dir).unwrap();
    }

    /// Addresses of memory, for a device without an IOMMU.
    #[test]
    fn a_thread_that_opens_a_device_of_vfio_reaches_its_own_page_map() {
        let specs = crate::exports::from_words(&["nvme=0000:01:00.0".into()]).unwrap();
        let open = || (File::open("/proc/self/pagemap").is_ok(), denied(File::open("/proc/1/environ")));
        assert_eq!(run(Role::Opener, Reach::of(&specs), open), (true, true));
    }

    #[test]
    fn a_thread_for_a_reload_creates_removes_and_executes_no_files() {
        let path = std::env::temp_dir().join(format!("nbdblk-reload-{}", process::id()));
        fs::write(&path, "x").unwrap();
        let found = thread::spawn({
            let path = path.clone();
            move || {
                reach::confine_to_existing().unwrap();
                let removed = denied(fs::remove_file(&path));
                (
                    fs::read(&path).unwrap(),
                    removed,
                    denied(fs::write(path.with_extension("new"), "")),
                    execv(c"/bin/true", &[c"true"]).err(),
                )
            }
        });
        assert_eq!(found.join().unwrap(), (b"x".to_vec(), true, true, Some(Errno::EACCES)));
        fs::remove_file(&path).unwrap();
    }
}
