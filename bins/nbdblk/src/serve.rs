//! `nbdblk serve`: makes devices, exports and sockets from the arguments, and serves until an event ends it.
//!
//! The main thread only waits for events. Work that may wait for a file system or a reader has its own thread.

use std::{
    collections::VecDeque,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Weak, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use blkdev::thread::{Role, spawn};
use nbd_server_core::{Limits, Server};
use nix::{
    libc::RLIM_INFINITY,
    sys::resource::{Resource, getrlimit, setrlimit},
};

use crate::{
    asker::Asker,
    child::Child,
    cli,
    control::{Control, Phase, within},
    control_place,
    events::{Event, Outcome},
    files,
    listen::Sockets,
    logger, metrics,
    observer::Observer,
    parent,
    plan::Plan,
    ready::{self, Ready},
    reload,
    replace::{self, Facts, Prepared},
    resume::{self, Service},
    sandbox, shortage, single,
    stored::{self, Store},
    tls::Security,
    upgrades::Upgrades,
    uri::Address,
};

/// Time for invisible work at the end: removing files, notifying the service manager.
const TIDYING: Duration = Duration::from_secs(2);

/// Time for lines that wait to be written before the program is replaced.
const FLUSHING: Duration = Duration::from_millis(100);

/// Time for a server to stop: a device may have requests to complete, and may never do it.
const STOPPING: Duration = Duration::from_secs(45);

/// Most clients of the control socket that may wait for the next reload.
const ASKERS_MAX: usize = 64;

pub(crate) fn run(args: cli::Serve) -> anyhow::Result<ExitCode> {
    logger::detach();
    let (plan, args) = match args.config.clone() {
        Some(path) => {
            let (plan, args, detail) = Plan::from_file(&path)?;
            detail.apply();
            (plan, args)
        }
        None => (Plan::from_words(&args)?, args),
    };
    let exports = plan.specs.len();
    serve(plan, &args).map_err(|error| shortage::advise(error, &args, exports))
}

/// The limits from the options.
fn limits(args: &cli::Serve) -> Limits {
    let mut limits = Limits::default();
    limits.workers = args.threads.unwrap_or(limits.workers);
    limits.memory = args.memory.unwrap_or(limits.memory);
    limits.connections = match args.connections {
        // No further client can connect.
        _ if args.single => 1,
        Some(connections) => connections.get(),
        None => limits.connections,
    };
    limits.block_size_required = args.block_size_required;
    limits.handshake_timeout = args.handshake_timeout.unwrap_or(limits.handshake_timeout);
    limits.slow = args.slow.map_or(limits.slow, |time| (!time.is_zero()).then_some(time));
    limits.poll = args.poll.map_or(limits.poll, |us| Duration::from_micros(us.into()));
    limits
}

/// Serves the exports of the plan until an event ends it.
fn serve(mut plan: Plan, args: &cli::Serve) -> anyhow::Result<ExitCode> {
    let before = replace::inherited()?;
    let (store, passed) = if before.is_none() { stored::passed()? } else { Default::default() };
    let passed = Sockets::passed(args, passed).map_err(|error| plan.blame("listen", error))?;
    let has_sockets = passed.is_some() || before.is_some();
    Sockets::check(args, has_sockets).map_err(|error| plan.blame("unix", error))?;
    sandbox::prepare(args, &plan.specs)?;
    let control = Control::start(args.config.is_some(), before.as_ref().map_or(Phase::Opening, resume::phase))?;
    let security = Security::load(&args.tls).map_err(|error| plan.blame("tls", error))?;
    if args.exit_with_parent {
        parent::watch()?;
    }
    if args.run.is_none() {
        raise_descriptors();
    }
    let metrics = bind_metrics(&plan, args, before.is_some())?;
    let (tls, limits) = (security.tls.clone(), limits(args));
    let Service { server, addresses, files, socket, child, kept } = match before {
        Some(before) => resume::resume(&mut plan, tls, limits, &control, before)?,
        None => begin(&mut plan, args, (passed, store), &security, limits, &control)?,
    };
    report_failure(&server, control.sender())?;

    let server = Arc::new(server);
    let reloads = Reloads::new(plan, args.config.clone(), &server, control.sender());
    let upgrades = Upgrades::new(&server, control.sender(), socket)?;
    let observer = Observer::new(&server);
    let metrics = metrics.serve(&observer)?;
    let (addresses, security) = (&addresses, &security);
    let mut run = Run {
        observer,
        args,
        control: &control,
        addresses,
        security,
        reloads,
        upgrades,
        child,
        announced: None,
        kept: &kept,
        queue: VecDeque::new(),
    };
    let ended = run.until_the_end();
    let Run { reloads, upgrades, announced, queue, .. } = run;
    // A paused server would not stop.
    drop(queue);
    control.enter(Phase::Stopping);
    wind_up(ended, server, (reloads, upgrades), kept, (files, announced, metrics))
}

/// Binds the sockets of `--metrics`.
fn bind_metrics(plan: &Plan, args: &cli::Serve, is_upgrade: bool) -> anyhow::Result<metrics::Sockets> {
    match metrics::Sockets::bind(&args.metrics).map_err(|error| plan.blame("metrics", error)) {
        // After an upgrade, continuing the clients matters more.
        Err(error) if is_upgrade => {
            log::error!("no metrics: {}", crate::whole(&error));
            Ok(metrics::Sockets::default())
        }
        metrics => metrics,
    }
}

/// Removes the files, answers waiting clients of the control socket, and stops the server.
fn wind_up(
    ended: anyhow::Result<u8>,
    server: Arc<Server>,
    (reloads, upgrades): (Reloads, Upgrades),
    kept: Vec<String>,
    files: impl Sized,
) -> anyhow::Result<ExitCode> {
    // First, so that the files are gone when a second signal comes.
    within(TIDYING, move || {
        files::remove_all();
        ready::notify("STOPPING=1", TIDYING);
        kept.iter().for_each(|name| ready::forget(name));
    });
    drop(files);
    reloads.stop();
    upgrades.stop();
    if within(STOPPING, move || stop(server)).is_none() {
        let text = format!("the server has not stopped within {} s", STOPPING.as_secs());
        ended?;
        return Err(anyhow!("{text}: a device does not answer; the process ends without waiting for it"));
    }
    Ok(ended?.into())
}

/// Opens the devices, and starts a new server.
fn begin(
    plan: &mut Plan,
    args: &cli::Serve,
    (passed, store): (Option<Sockets>, Store),
    security: &Security,
    limits: Limits,
    control: &Control,
) -> anyhow::Result<Service> {
    let unlimited = LimitGuard::file_size();
    plan.open(None)?;
    drop(unlimited);
    let mut ready = Ready::prepare(args)?;
    let Sockets { listeners, addresses, mut files, store, .. } = match passed {
        Some(passed) => passed,
        None if args.single => Sockets { listeners: vec![single::client(control)?], ..Sockets::default() },
        None => Sockets::bind(args, store)?,
    };
    (ready.kept, ready.forgotten) = store.into_parts();
    let kept = ready.kept.iter().map(|(_, name)| name.clone()).collect();
    let path = args.control.clone().or_else(control_place::of_service);
    let socket = path.map(|path| reload::listen(&path, control.sender())).transpose()?;
    let socket = socket.map(|(socket, file)| {
        files.push(file);
        socket
    });
    let unlimited = LimitGuard::file_size();
    let tls = security.tls.clone();
    let server = Server::start(plan.exports(), listeners, tls, limits).context("starting the server")?;
    drop(unlimited);
    control.enter(Phase::Serving);

    let words = security.words();
    let uris: Vec<String> =
        plan.specs.iter().flat_map(|e| addresses.iter().map(|a| a.uri(&e.name, words.as_deref()))).collect();
    let go = announce(ready, uris, args, control.sender())?;
    sandbox::seal()?;
    let _ = go.send(());
    Ok(Service { server, addresses, files, socket, child: None, kept })
}

/// Starts a thread that reports that the server is ready, and its addresses. The thread waits for a message on the returned channel.
/// It starts before the user changes, because only the first user may be able to write to the directory of the pid file.
fn announce(
    mut ready: Ready,
    uris: Vec<String>,
    args: &cli::Serve,
    events: mpsc::Sender<Event>,
) -> anyhow::Result<mpsc::Sender<()>> {
    let (go, signal) = mpsc::channel();
    let (print, say) = (args.print_uri, !args.print_uri && args.run.is_none() && !args.single);
    let announce = move || {
        if signal.recv().is_err() {
            return;
        }
        let announced = ready.announce().and_then(|()| {
            if print {
                crate::print(&uris.iter().map(|uri| format!("{uri}\n")).collect::<String>())?;
            } else if say {
                crate::report(&format!("serving at {}", uris.join(" and ")));
            }
            Ok(())
        });
        let _ = events.send(Event::Announced(announced.map(|()| ready)));
    };
    thread::Builder::new().name("announce".into()).spawn(announce).context("starting a thread")?;
    Ok(go)
}

/// Sends an event when the server fails. A thread waits for it.
fn report_failure(server: &Server, events: mpsc::Sender<Event>) -> anyhow::Result<()> {
    let end = server.end();
    let failed = move || {
        if let Some(why) = end.wait() {
            let _ = events.send(Event::Failed(why));
        }
    };
    sandbox::spawn_service("end", failed).context("starting a thread")
}

/// A running server, as the main thread sees it.
struct Run<'a> {
    observer: Observer,
    args: &'a cli::Serve,
    control: &'a Control,
    addresses: &'a [Address],
    security: &'a Security,
    reloads: Reloads,
    /// The command of `--run`, once it has been started.
    child: Option<Child>,
    /// The files of the announcement, once it is complete.
    announced: Option<Ready>,
    upgrades: Upgrades,
    /// Names of sockets that the service manager keeps.
    kept: &'a [String],
    /// Events that came during an upgrade that failed.
    queue: VecDeque<Event>,
}

impl Run<'_> {
    /// Handles events until one ends the server. Returns the exit code.
    fn until_the_end(&mut self) -> anyhow::Result<u8> {
        loop {
            match self.queue.pop_front().unwrap_or_else(|| self.control.wait()) {
                Event::Stop(signal) => match &self.child {
                    Some(child) => child.terminate(),
                    // The command has not been started.
                    None if self.args.run.is_some() => return Ok(128 + signal as u8),
                    None => return Ok(0),
                },
                Event::Ended(status) => return Ok(status),
                // The operator has to start it again.
                Event::Failed(why) => return Err(anyhow!("the server ends: {why}")),
                Event::Announced(announced) => {
                    self.announced = Some(announced?);
                    self.start_command()?;
                }
                Event::Reload(asker) if self.upgrades.is_running() => self.upgrades.postpone(asker),
                Event::Reload(asker) => self.reloads.ask(asker),
                Event::Reloaded(outcome) => self.reloads.finish(outcome),
                Event::Upgrade(asker, program) => self.upgrade(asker, program),
                Event::Status(asker) => self.observer.answer(asker),
                Event::Disconnect(asker, target) => asker.tell(&self.observer.disconnect(&target)),
                Event::Prepared(prepared) => {
                    let error = match prepared {
                        Ok(prepared) => self.execute(*prepared),
                        Err(error) => error,
                    };
                    if self.upgrades.fail(&error) {
                        self.reloads.ask(None);
                    }
                }
            }
        }
    }

    /// Starts the command of `--run`, unless the server is stopping.
    fn start_command(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        if let Some(command) = self.args.run.as_ref().filter(|_| self.control.enter(Phase::Running)) {
            let export = self.reloads.default_name();
            self.child = Some(Child::start(command, self.addresses, export, self.security, self.control)?);
        }
        Ok(())
    }
}

impl Run<'_> {
    /// Begins to replace the program.
    fn upgrade(&mut self, asker: Option<Asker>, program: Option<PathBuf>) {
        let obstacle = if self.args.single {
            Some("the client of --single cannot be passed on")
        } else if self.announced.is_none() {
            Some("the server is not ready yet")
        } else if self.reloads.running.is_some() {
            Some("a reload has not ended: try again")
        } else {
            None
        };
        let mut facts = Facts::default();
        facts.state.addresses = self.addresses.iter().map(Into::into).collect();
        facts.state.kept = self.kept.to_vec();
        facts.state.child = self.child.as_ref().map(Child::pid);
        facts.volatile = self.reloads.plan.volatile().map(str::to_owned);
        self.upgrades.ask(asker, program, obstacle, facts);
    }

    /// Replaces the program. Returns only the reason why that failed.
    fn execute(&mut self, prepared: Prepared) -> String {
        let Some(_held) = self.control.hold_signals() else { return "the server is stopping".into() };
        while let Some(event) = self.control.pending() {
            match event {
                Event::Reload(Some(asker)) => self.upgrades.postpone(Some(asker)),
                Event::Upgrade(Some(asker), _) | Event::Status(asker) | Event::Disconnect(asker, _) => {
                    self.upgrades.refuse(asker);
                }
                event => self.queue.push_back(event),
            }
        }
        if self.queue.iter().any(|event| matches!(event, Event::Stop(_) | Event::Ended(_) | Event::Failed(_))) {
            return "the server is stopping".into();
        }
        logger::flush(FLUSHING);
        crate::whole(&prepared.execute())
    }
}

/// Stops the server, as soon as a reload that changes its exports has ended.
fn stop(mut server: Arc<Server>) {
    loop {
        match Arc::try_unwrap(server) {
            Ok(server) => return server.stop(),
            Err(shared) => server = shared,
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// The plan that is served, and the reloads that replace it. A thread reads the file and opens the devices, because a file system
/// may hang.
struct Reloads {
    plan: Arc<Plan>,
    path: Option<PathBuf>,
    server: Weak<Server>,
    events: mpsc::Sender<Event>,
    /// When the present reload began, and the clients that wait for it.
    running: Option<(Instant, Vec<Asker>)>,
    /// The file may have changed since then: reload once more, for these clients.
    again: Option<Vec<Asker>>,
}

impl Reloads {
    fn new(plan: Plan, path: Option<PathBuf>, server: &Arc<Server>, events: mpsc::Sender<Event>) -> Self {
        Self { plan: Arc::new(plan), path, server: Arc::downgrade(server), events, running: None, again: None }
    }

    fn default_name(&self) -> &str {
        &self.plan.specs[0].name
    }

    fn ask(&mut self, asker: Option<Asker>) {
        if self.path.is_none() {
            if let Some(asker) = asker {
                asker.tell(&Err("the server has no file to read again: it was started without --config".into()));
            }
            return;
        }
        match &self.running {
            None => self.start(asker.into_iter().collect()),
            Some((since, _)) => {
                let again = self.again.get_or_insert_default();
                if again.len() < ASKERS_MAX {
                    again.extend(asker);
                } else if let Some(asker) = asker {
                    let seconds = since.elapsed().as_secs();
                    asker.tell(&Err(format!("another reload has not ended for {seconds} s, and too many wait for it")));
                }
            }
        }
    }

    fn start(&mut self, askers: Vec<Asker>) {
        let path = self.path.clone().expect("reloads need a file");
        let (plan, server, events) = (Arc::clone(&self.plan), self.server.clone(), self.events.clone());
        let read = move || {
            ready::reloading();
            let reload = || plan.reload(&path, &server).map_err(|error| crate::whole(&error));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reload));
            ready::again();
            // Drop the last references to old devices here, and not on the thread that waits for events.
            drop(plan);
            let _ = events.send(Event::Reloaded(outcome.unwrap_or_else(|_| Err("a panic: see the log".into()))));
        };
        self.running = Some((Instant::now(), askers));
        if let Err(error) = thread::Builder::new().name("reload".into()).spawn(read) {
            self.finish(Err(format!("starting a thread: {error}")));
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        let answer = outcome.map(|(plan, changes)| {
            let old = std::mem::replace(&mut self.plan, Arc::new(plan));
            // Closing a file may take any time.
            let _ = spawn(Role::Helper, "closing", move || drop(old));
            changes
        });
        match &answer {
            Ok(changes) => crate::report(&format!("reloaded: {changes}")),
            Err(error) => log::error!("not reloaded, and nothing has changed: {error}"),
        }
        for asker in self.running.take().into_iter().flat_map(|(_, askers)| askers) {
            asker.tell(&answer);
        }
        if let Some(askers) = self.again.take() {
            self.start(askers);
        }
    }

    fn stop(self) {
        for asker in self.running.into_iter().flat_map(|(_, askers)| askers).chain(self.again.into_iter().flatten()) {
            asker.tell(&Err("the server is stopping".into()));
        }
    }
}

/// Raises this process's soft limit of descriptors to the hard limit. The soft limit exists for programs that use select(2), and
/// the command of `--run` may be one.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, max)| setrlimit(Resource::RLIMIT_NOFILE, max, max));
    if let Err(error) = raised {
        log::warn!("raising the limit of file descriptors: {error}");
    }
}

/// A limit that is lifted until this is dropped.
struct LimitGuard(Option<(u64, u64)>);

impl LimitGuard {
    /// The limit for file sizes (LimitFSIZE=) is meant for disks. But to the kernel, memory that is shared with a device is also
    /// a file. If the limit cannot be lifted, too much memory is an error.
    fn file_size() -> Self {
        let of = Resource::RLIMIT_FSIZE;
        let before = getrlimit(of).ok().filter(|(soft, _)| *soft != RLIM_INFINITY);
        Self(before.filter(|(_, hard)| {
            setrlimit(of, RLIM_INFINITY, RLIM_INFINITY).or_else(|_| setrlimit(of, *hard, *hard)).is_ok()
        }))
    }
}

impl Drop for LimitGuard {
    fn drop(&mut self) {
        if let Some((soft, hard)) = self.0 {
            // Lowering a limit is always allowed.
            let _ = setrlimit(Resource::RLIMIT_FSIZE, soft, hard);
        }
    }
}
