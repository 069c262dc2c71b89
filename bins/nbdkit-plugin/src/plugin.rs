//! The state of the plugin: parameters first, then checked parameters, then an open device that all connections share.

use std::{
    ffi::{CStr, CString, OsStr},
    io,
    num::NonZero,
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    thread,
};

use blkdev::{Device, Error, Extent, Info, Io};
use blkdev_drivers::{Settings, properties};

use crate::{
    abi,
    affinity::Affinity,
    config::{Choice, Fault, Words, is_named, restrict, unreadable},
    host, options,
    pool::{Place, Pool},
    stats,
};

/// Global, because nbdkit's callbacks have no argument for state.
static STATE: Mutex<State> = Mutex::new(State::Start);

enum State {
    Start,
    Words(Words),
    Chosen(Choice),
    /// The device is open, and nbdkit may still fork.
    Ready(Choice, Arc<Plugin>),
    Serving(Arc<Plugin>),
    /// The device could not be opened; clients get the error.
    Failed(Fault),
}

/// The device, and its properties that each connection needs.
#[derive(Debug)]
pub(crate) struct Plugin {
    pool: Pool,
    settings: Settings,
    choice: Choice,
    device: Arc<dyn Device>,
    description: CString,
    /// The process that opened it.
    process: u32,
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes one `key=value` of the command line.
pub(crate) fn config(key: &str, value: &OsStr) -> Result<(), Fault> {
    let mut state = state();
    if !matches!(*state, State::Words(_)) {
        *state = State::Words(Words::default());
    }
    let State::Words(words) = &mut *state else { unreachable!("it was just set") };
    words.add(key, value)
}

/// Checks the parameters at the end of the command line.
pub(crate) fn config_complete() -> Result<(), Fault> {
    let mut state = state();
    let choice = match &*state {
        State::Words(words) => words.check()?,
        _ => Words::default().check()?,
    };
    *state = State::Chosen(choice);
    Ok(())
}

/// Opens the device before nbdkit may fork, so that errors are reported at start. The device stays open for the serving process,
/// which is this one unless nbdkit [forks](before_fork).
///
/// With `--run`, nbdkit always forks, and a back end behind a socket may serve one front end only. Only the serving process opens
/// such a device.
pub(crate) fn get_ready() -> Result<(), Fault> {
    let choice = choice()?;
    if options::runs_command() && choice.is_behind_socket() {
        host::debug("the serving process opens the device");
        return Ok(());
    }
    let plugin = Plugin::open(&choice)?;
    plugin.tell()?;
    let info = plugin.pool.info();
    host::debug(&format!(
        "{} {}: {} bytes, up to {} queues",
        info.driver,
        info.target,
        plugin.pool.capacity(),
        info.queues_max
    ));
    *state() = State::Ready(choice, Arc::new(plugin));
    Ok(())
}

/// Closes the device before nbdkit forks. Neither threads nor rings survive a fork, and a device for one client must be free for
/// the serving process.
pub(crate) fn before_fork() {
    let mut state = match STATE.try_lock() {
        Ok(state) => state,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        // A callback holds the lock: nbdkit serves already, and forks for another purpose.
        Err(TryLockError::WouldBlock) => return,
    };
    if let State::Ready(choice, _) = &*state {
        let choice = choice.clone();
        *state = State::Chosen(choice);
    }
}

/// Opens the device in the serving process, unless it is already open.
pub(crate) fn after_fork() -> Result<(), Fault> {
    let ready = std::mem::replace(&mut *state(), State::Start);
    let choice = match ready {
        State::Ready(_, plugin) if plugin.process == process::id() => {
            *state() = State::Serving(plugin);
            return Ok(());
        }
        State::Ready(choice, plugin) => {
            // Another process opened it and forked without notice: its threads and rings do not exist here, so it must not be
            // dropped.
            std::mem::forget(plugin);
            choice
        }
        State::Chosen(choice) => choice,
        _ => return Err(out_of_order()),
    };
    match Plugin::open(&choice) {
        Ok(plugin) => *state() = State::Serving(Arc::new(plugin)),
        // The command of --run is already running. Its clients would wait for a process that has ended.
        Err(fault) if options::runs_command() => {
            host::error(&fault.text);
            *state() = State::Failed(fault);
        }
        Err(fault) => return Err(fault),
    }
    Ok(())
}

/// For a connection, or for a single question.
pub(crate) fn open() -> Result<Connection, Fault> {
    let plugin = match &*state() {
        State::Serving(plugin) => Arc::clone(plugin),
        State::Failed(fault) => return Err(fault.clone()),
        _ => return Err(Fault { errno: libc::ESHUTDOWN, text: "the device is not open".into() }),
    };
    // Better than an export whose requests all fail.
    let place = plugin.pool.pick().ok_or_else(|| plugin.is_dead())?;
    plugin.tell()?;
    let home = plugin.choice.pin.then(Affinity::new);
    Ok(Connection { plugin, place, home })
}

/// Closes the device after the last connection, within the time-out of a request.
pub(crate) fn cleanup() {
    let serving = std::mem::replace(&mut *state(), State::Start);
    if let State::Serving(plugin) = &serving {
        stats::lines(&plugin.pool.counts(), abi::wants_latencies()).iter().for_each(|line| host::debug(line));
    }
    drop(serving);
}

fn choice() -> Result<Choice, Fault> {
    match &*state() {
        State::Chosen(choice) => Ok(choice.clone()),
        _ => Err(out_of_order()),
    }
}

fn out_of_order() -> Fault {
    Fault::invalid("nbdkit called out of order")
}

impl Plugin {
    fn open(choice: &Choice) -> Result<Self, Fault> {
        let (device, settings) = device(&choice.settings)?;
        let info = device.info();
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        // If num-queues is set, use all queues. Otherwise, at most one for each core.
        let most = if settings.get("num-queues").is_ok() { usize::from(u16::MAX) } else { cores };
        let queues = usize::from(info.queues_max).min(most);
        let description = host::c_string(&format!("{} {}", info.driver, info.target));
        let pool = Pool::open(Arc::clone(&device), queues, choice.memory).map_err(|error| fault(&error))?;
        Ok(Self { pool, settings, choice: choice.clone(), device, description, process: process::id() })
    }

    fn is_dead(&self) -> Fault {
        let Info { driver, target, .. } = self.pool.info();
        let text = format!(
            "{driver} {target}: the device is dead: it went away, did not answer, or its driver failed; when it is back, \
             restart nbdkit"
        );
        Fault { errno: libc::ENODEV, text }
    }

    /// Prints the properties of `get=`, in the format of the stock plugin.
    fn tell(&self) -> Result<(), Fault> {
        if self.choice.gets.is_empty() {
            return Ok(());
        }
        let values = properties(&*self.device, &self.settings);
        for get in &self.choice.gets {
            let found = values.iter().find(|(name, _)| is_named(name, get));
            let (_, value) = found.ok_or_else(|| unreadable(get, &self.settings))?;
            host::debug(&format!("get {get} = {value}"));
        }
        Ok(())
    }
}

/// One client of the device.
#[derive(Debug)]
pub(crate) struct Connection {
    plugin: Arc<Plugin>,
    place: Place,
    /// `None`: its threads run where they like.
    home: Option<Affinity>,
}

impl Connection {
    pub(crate) fn info(&self) -> &Info {
        self.plugin.pool.info()
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.plugin.pool.capacity()
    }

    pub(crate) fn description(&self) -> &CStr {
        &self.plugin.description
    }

    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let _request = self.home.as_ref().map(Affinity::enter);
        self.plugin.pool.read(self.place, at, bytes)
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8], fua: bool) -> Result<(), Error> {
        let _request = self.home.as_ref().map(Affinity::enter);
        self.plugin.pool.write(self.place, at, bytes, fua)
    }

    /// Runs a request without payload.
    pub(crate) fn run(&self, io: Io) -> Result<(), Error> {
        let _request = self.home.as_ref().map(Affinity::enter);
        self.plugin.pool.run(self.place, io)
    }

    pub(crate) fn status(&self, at: u64, len: u64) -> Result<Vec<Extent>, Error> {
        let _request = self.home.as_ref().map(Affinity::enter);
        self.plugin.pool.status(self.place, at, len)
    }

    #[cfg(feature = "panic-test")]
    pub(crate) fn panic_at(&self) -> Option<u64> {
        self.plugin.choice.panic_at
    }
}

/// Opens the device, read-only if it cannot be opened for writing.
fn device(settings: &Settings) -> Result<(Arc<dyn Device>, Settings), Fault> {
    let first = match settings.open() {
        Ok(device) => return Ok((device, settings.clone())),
        Err(error) => error,
    };
    let denied = matches!(
        first.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::ExecutableFileBusy
    );
    // An inherited descriptor that is open read-only is refused as an invalid setting.
    let handed_over = first.kind() == io::ErrorKind::InvalidInput && settings.get("fd").is_ok_and(|fd| fd != "-1");
    let mut settings = settings.clone();
    if (denied || handed_over)
        && restrict(&mut settings)
        && let Ok(device) = settings.open()
    {
        host::debug(&format!("serving read-only: {first}"));
        return Ok((device, settings));
    }
    Err(fault(&first))
}

fn fault(error: &io::Error) -> Fault {
    Fault { errno: blkdev::Context::os_error(error).unwrap_or(libc::EIO), text: error.to_string() }
}
