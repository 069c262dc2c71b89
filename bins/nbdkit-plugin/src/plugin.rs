//! What the plugin is at any time: words, then a choice, then an open device that all connections share.

use std::{
    ffi::{CStr, CString},
    io,
    num::NonZero,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use blkdev::{Device, Error, Extent, Info, Io};
use blkdev_drivers::{Settings, properties};

use crate::{
    config::{Choice, Fault, Words, is_named, restrict, unreadable},
    home::Home,
    host,
    pool::Pool,
};

/// nbdkit's way: callbacks without an argument that could carry state.
static STATE: Mutex<State> = Mutex::new(State::Start);

enum State {
    Start,
    Words(Words),
    Chosen(Choice),
    Serving(Arc<Plugin>),
}

/// The device, and what each connection wants to know of it.
#[derive(Debug)]
pub(crate) struct Plugin {
    pool: Pool,
    settings: Settings,
    choice: Choice,
    device: Arc<dyn Device>,
    description: CString,
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One `key=value` of the command line.
pub(crate) fn config(key: &str, value: &str) -> Result<(), Fault> {
    let mut state = state();
    if !matches!(*state, State::Words(_)) {
        *state = State::Words(Words::default());
    }
    let State::Words(words) = &mut *state else { unreachable!("it was just set") };
    words.add(key, value)
}

/// The command line has ended.
pub(crate) fn config_complete() -> Result<(), Fault> {
    let mut state = state();
    let choice = match &*state {
        State::Words(words) => words.check()?,
        _ => Words::default().check()?,
    };
    *state = State::Chosen(choice);
    Ok(())
}

/// Before the fork: whatever will be wrong shows here. Nothing stays open, since neither threads nor rings live through a
/// fork, and a device that takes one client must be free for the process that serves.
pub(crate) fn get_ready() -> Result<(), Fault> {
    let choice = choice()?;
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
    Ok(())
}

/// In the process that serves.
pub(crate) fn after_fork() -> Result<(), Fault> {
    let plugin = Plugin::open(&choice()?)?;
    *state() = State::Serving(Arc::new(plugin));
    Ok(())
}

/// For a connection, or to be asked once.
pub(crate) fn open() -> Result<Connection, Fault> {
    let State::Serving(plugin) = &*state() else {
        return Err(Fault { errno: libc::ESHUTDOWN, text: "the device is not open".into() });
    };
    let plugin = Arc::clone(plugin);
    plugin.tell()?;
    let lane = plugin.pool.pick();
    Ok(Connection { plugin, lane, home: Home::new() })
}

/// The last connection has gone: the device is closed, within the time that a request may take.
pub(crate) fn cleanup() {
    let serving = std::mem::replace(&mut *state(), State::Start);
    drop(serving);
}

fn choice() -> Result<Choice, Fault> {
    match &*state() {
        State::Chosen(choice) => Ok(choice.clone()),
        _ => Err(Fault::invalid("nbdkit called out of order")),
    }
}

impl Plugin {
    fn open(choice: &Choice) -> Result<Self, Fault> {
        let (device, settings) = device(&choice.settings)?;
        let info = device.info();
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        // Queues that were asked for are all used; of those that there happen to be, one for each core.
        let most = if settings.get("num-queues").is_ok() { usize::from(u16::MAX) } else { cores };
        let queues = usize::from(info.queues_max).min(most);
        let description = host::c_string(&format!("{} {}", info.driver, info.target));
        let pool = Pool::open(Arc::clone(&device), queues, choice.memory).map_err(|error| fault(&error))?;
        Ok(Self { pool, settings, choice: choice.clone(), device, description })
    }

    /// What `get=` asks for, in the stock plugin's words.
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
    lane: usize,
    home: Home,
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
        let _request = self.home.enter();
        self.plugin.pool.read(self.lane, at, bytes)
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8], fua: bool) -> Result<(), Error> {
        let _request = self.home.enter();
        self.plugin.pool.write(self.lane, at, bytes, fua)
    }

    /// A request without payload.
    pub(crate) fn run(&self, io: Io) -> Result<(), Error> {
        let _request = self.home.enter();
        self.plugin.pool.run(self.lane, io)
    }

    pub(crate) fn status(&self, at: u64, len: u64) -> Result<Vec<Extent>, Error> {
        let _request = self.home.enter();
        self.plugin.pool.status(self.lane, at, len)
    }

    #[cfg(feature = "panic-test")]
    pub(crate) fn panic_at(&self) -> Option<u64> {
        self.plugin.choice.panic_at
    }
}

/// Opens the device; one that cannot be written is opened for reading.
fn device(settings: &Settings) -> Result<(Arc<dyn Device>, Settings), Fault> {
    let first = match settings.open() {
        Ok(device) => return Ok((device, settings.clone())),
        Err(error) => error,
    };
    let denied = matches!(
        first.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::ExecutableFileBusy
    );
    // A descriptor that was handed over open for reading only is refused as an invalid setting.
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
    Fault { errno: error.raw_os_error().unwrap_or(libc::EIO), text: error.to_string() }
}
