//! The sandbox: what threads give up for good, so that code that takes one of them over can do little.
//!
//! Each thread gives up its own rights at its start ([`confine`]), because the kernel keeps them for each thread. Threads that talk
//! to clients, devices and the control socket keep only what they need for files and sockets that are open. The main thread and
//! those that it starts for a reload or an upgrade keep more: they open devices, and execute the next program, which must be able to
//! open devices in turn.

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
    cli::{self, Sandbox as Mode},
    exports::ExportSpec,
    logger,
};
use filter::Filters;
use identity::{Identity, Keeps};
use reach::{Nothing, Reach};

/// What the threads of this process give up.
#[derive(Debug)]
struct Policy {
    mode: Mode,
    identity: Option<Identity>,
    /// A command of `--run` inherits everything from the main thread.
    has_command: bool,
    filters: Option<Filters>,
    nothing: Option<Nothing>,
    /// What can be opened again.
    reach: Mutex<Reach>,
}

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Prepares the sandbox, before the first thread and the first device. From now on, threads confine themselves.
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
        nothing: None,
        reach: Mutex::new(Reach::of(specs)),
    };
    if mode != Mode::Off {
        policy.nothing = policy.accept("landlock", Nothing::new())?;
        // On a thread, which takes the restrictions with it.
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

/// Confines the calling thread to opening devices and reading files, for a reload: it creates and removes no file, and executes none.
///
/// # Errors
/// No descriptor or memory is left.
pub(crate) fn enter_reload(specs: &[ExportSpec]) -> anyhow::Result<()> {
    match POLICY.get() {
        Some(policy) if policy.nothing.is_some() && !Reach::of(specs).needs_everything() => {
            reach::confine_to_existing().context("the sandbox of a reload")
        }
        _ => Ok(()),
    }
}

/// Adds the devices of a new configuration to those that can be opened again.
pub(crate) fn extend(specs: &[ExportSpec]) {
    if let Some(policy) = POLICY.get() {
        policy.reach.lock().unwrap_or_else(PoisonError::into_inner).extend(specs);
    }
}

/// Confines the calling thread according to its role.
fn confine(role: Role) {
    let Some(policy) = POLICY.get() else { return };
    Policy::check(role, true, policy.assume());
    Policy::check(role, policy.mode == Mode::Require, policy.confine(role));
}

impl Policy {
    /// Part of the sandbox, as far as it works.
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
        let is_opener = role == Role::Opener;
        let reach = self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone();
        identity::keep(if is_opener { Keeps::ToOpen(reach.needs_everything()) } else { Keeps::Nothing })?;
        prctl::set_no_new_privs()?;
        match &self.nothing {
            Some(nothing) if !is_opener => nothing.confine()?,
            Some(_) if !reach.needs_everything() => reach.confine()?,
            _ => {}
        }
        self.filters.iter().try_for_each(|filters| filters.apply(role))
    }

    /// Confines a thread that opens devices for new configurations, and executes programs.
    fn confine_main(&self) -> anyhow::Result<()> {
        if self.mode == Mode::Off || self.has_command {
            return Ok(());
        }
        identity::keep(Keeps::ToOpen(true))?;
        prctl::set_no_new_privs()?;
        self.filters.iter().try_for_each(Filters::apply_to_main)
    }

    /// What was tried before works, unless memory or descriptors are short. `is_fatal`: the thread must not go on without.
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

    /// Runs `work` on a thread that is confined as one of the server.
    fn run<T: Send + 'static>(role: Role, reach: Reach, work: impl FnOnce() -> T + Send + 'static) -> T {
        let policy = Policy {
            mode: Mode::Require,
            identity: None,
            has_command: false,
            filters: Some(Filters::new().unwrap()),
            nothing: Some(Nothing::new().unwrap()),
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
