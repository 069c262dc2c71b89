//! `nbdblk serve`: specs to devices, devices to exports, exports and sockets to a server, until something ends it.

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use blkdev::Device;
use nbd_server_core::{Export, Limits, Removal, Server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    captive::Captive,
    cli,
    config::{File, Setting, Source},
    control::{Control, Event, Phase},
    exports::{self, Wanted},
    listen::Sockets,
    parent,
    ready::Ready,
    reload, single,
    tls::Security,
};

pub(crate) fn run(args: cli::Serve) -> anyhow::Result<ExitCode> {
    let (mut plan, args) = match args.config.clone() {
        Some(path) => Plan::from_file(&path)?,
        None => (Plan::from_words(&args)?, args),
    };
    let args = &args;
    let passed = Sockets::passed(args)?;
    let security = Security::load(&args.tls).map_err(|error| plan.blame("tls", error))?;
    let control = Control::start(args.config.is_some())?;
    if args.exit_with_parent {
        parent::watch()?;
    }
    if args.run.is_none() {
        raise_descriptors();
    }
    plan.open(None)?;
    control.enter(Phase::Serving);
    let mut ready = Ready::prepare(args)?;
    let Sockets { listeners, addresses, files } = match passed {
        Some(passed) => passed,
        None if args.single => Sockets { listeners: vec![single::client(&control)?], ..Sockets::default() },
        None => Sockets::bind(args)?,
    };

    let defaults = Limits::default();
    let limits = Limits {
        workers: args.threads.map_or(defaults.workers, |threads| threads.get()),
        memory: args.memory.unwrap_or(defaults.memory),
        connections: args.connections.map_or(defaults.connections, |connections| connections.get()),
        block_size_required: args.block_size_required,
        handshake_timeout: args.handshake_timeout.unwrap_or(defaults.handshake_timeout),
        poll: args.poll.map_or(defaults.poll, |us| Duration::from_micros(us.into())),
        ..defaults
    };
    let server =
        Server::start(plan.exports(), listeners, security.tls.clone(), limits).context("starting the server")?;
    let socket = args.control.as_ref().map(|path| reload::listen(path, control.sender())).transpose()?;
    ready.announce()?;

    let words = security.words();
    let uris =
        || plan.wanted.iter().flat_map(|e| addresses.iter().map(|address| address.uri(&e.name, words.as_deref())));
    if args.print_uri {
        crate::print(&uris().map(|uri| uri + "\n").collect::<String>())?;
    } else if args.run.is_none() && !args.single {
        crate::complain(&format!("serving at {}", uris().collect::<Vec<_>>().join(" and ")));
    }
    let captive = match &args.run {
        None => None,
        Some(command) => {
            control.enter(Phase::Running);
            Some(Captive::start(command, &addresses, &plan.wanted[0].name, &security, &control)?)
        }
    };

    let status = loop {
        match (control.wait(), &captive) {
            (Event::Stop, Some(captive)) => captive.terminate(),
            (Event::Stop, None) => break 0,
            (Event::Ended(status), _) => break status,
            (Event::Reload(asker), _) => {
                let path = args.config.as_ref().expect("without a file nobody asks for that");
                let answer = plan.reload(path, &server).map_err(|error| format!("{error:#}"));
                match &answer {
                    Ok(changes) => crate::complain(&format!("reloaded: {changes}")),
                    Err(error) => log::error!("not reloaded, and nothing has changed: {error}"),
                }
                // Whoever asked may have gone.
                let _ = asker.map(|asker| asker.send(answer));
            }
        }
    };
    control.enter(Phase::Stopping);
    // First, so that nothing is left of them when a second signal comes.
    drop((files, socket, ready));
    server.stop();
    Ok(status.into())
}

/// Lets this process have as many descriptors as it may: the limit that it is given is made for programs that use select(2),
/// as the command of `--run` may be.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, max)| setrlimit(Resource::RLIMIT_NOFILE, max, max));
    if let Err(error) = raised {
        log::warn!("raising the limit of file descriptors: {error}");
    }
}

/// What is to be served, as the command line or a file has it.
struct Plan {
    wanted: Vec<Wanted>,
    /// One for each of them, once they are open.
    devices: Vec<Arc<dyn Device>>,
    file: Option<(Source, Vec<Setting>)>,
}

impl Plan {
    fn from_words(args: &cli::Serve) -> anyhow::Result<Self> {
        ensure!(args.control.is_none(), "--control needs --config: there is no file to read again");
        let wanted = exports::under(exports::from_words(&args.specs)?, args)?;
        Ok(Self { wanted, devices: Vec::new(), file: None })
    }

    /// A file, and the arguments with what it adds to them.
    fn from_file(path: &Path) -> anyhow::Result<(Self, cli::Serve)> {
        let file = File::read(path)?;
        let args = file.merge(&std::env::args_os().collect::<Vec<_>>())?;
        let File { source, settings, exports } = file;
        let mut plan = Self { wanted: Vec::new(), devices: Vec::new(), file: Some((source, settings)) };
        plan.wanted = exports::under(exports, &args).map_err(|error| plan.blame("allow", error))?;
        Ok((plan, args))
    }

    /// An error with the place of the first setting of that kind, if it stands in the file.
    fn blame(&self, kind: &str, error: anyhow::Error) -> anyhow::Error {
        let Some((source, settings)) = &self.file else { return error };
        match settings.iter().find(|setting| setting.key.starts_with(kind)) {
            Some(setting) => source.wrong(setting.at, format!("{error:#}")),
            None => error,
        }
    }

    /// Opens all devices, but those that another plan has open already.
    fn open(&mut self, other: Option<&Self>) -> anyhow::Result<()> {
        for wanted in &self.wanted {
            let open = other.and_then(|other| Some(&other.devices[other.find(|old| old.has_device_of(wanted))?]));
            let device = match open {
                Some(device) => Arc::clone(device),
                None => wanted.open().map_err(|error| match &self.file {
                    Some((source, _)) => source.wrong(wanted.at, format!("{error:#}")),
                    None => error,
                })?,
            };
            self.devices.push(device);
        }
        Ok(())
    }

    fn exports(&self) -> Vec<Export> {
        self.wanted.iter().zip(&self.devices).map(|(wanted, device)| wanted.export(Arc::clone(device))).collect()
    }

    fn find(&self, test: impl Fn(&Wanted) -> bool) -> Option<usize> {
        self.wanted.iter().position(test)
    }

    fn named(&self, name: &str) -> Option<usize> {
        self.find(|wanted| wanted.name == name)
    }

    /// Serves what the file says now: all of it, or, when anything is wrong, none. Answers what has changed.
    fn reload(&mut self, path: &Path, server: &Server) -> anyhow::Result<String> {
        let (mut next, args) = Self::from_file(path)?;
        let security = Security::load(&args.tls).map_err(|error| next.blame("tls", error))?;
        next.open(Some(self))?;
        // For an export that changes the newer word counts.
        let removal = |name: &str| {
            let words = next.named(name).map(|n| &next.wanted[n]).or(self.named(name).map(|n| &self.wanted[n]));
            words.map_or(Removal::default(), |wanted| wanted.on_remove)
        };
        server.replace(next.exports(), security.tls, removal).with_context(|| path.display().to_string())?;
        let changes = next.changes_since(self);
        *self = next;
        Ok(changes)
    }

    fn changes_since(&self, old: &Self) -> String {
        let (mut added, mut reopened, mut updated) = (Vec::new(), Vec::new(), Vec::new());
        let (mut set, mut later) = (Vec::new(), Vec::new());
        for (wanted, device) in self.wanted.iter().zip(&self.devices) {
            let name = format!("{:?}", wanted.name);
            match old.named(&wanted.name) {
                None => added.push(name),
                Some(n) if !Arc::ptr_eq(device, &old.devices[n]) => reopened.push(name),
                Some(n) if !wanted.has_words_of(&old.wanted[n]) => updated.push(name),
                Some(_) => {}
            }
        }
        let gone = old.wanted.iter().filter(|wanted| self.named(&wanted.name).is_none());
        let removed: Vec<_> = gone.map(|wanted| format!("{:?} ({})", wanted.name, wanted.on_remove)).collect();
        let settings = |plan: &Self, key: &str| {
            let all = plan.file.iter().flat_map(|(_, settings)| settings);
            all.filter(|setting| setting.key == key).flat_map(|setting| setting.words.clone()).collect::<Vec<_>>()
        };
        for (_, list) in [&self.file, &old.file].into_iter().flatten() {
            let keys = list.iter().map(|setting| &setting.key);
            for key in keys.filter(|key| settings(self, key) != settings(old, key)) {
                let at_once = AT_ONCE.contains(&key.as_str()) || key.starts_with("tls");
                let keys = if at_once { &mut set } else { &mut later };
                if !keys.contains(key) {
                    keys.push(key.clone());
                }
            }
        }
        let kinds = [
            ("added", added),
            ("removed", removed),
            ("reopened", reopened),
            ("updated", updated),
            ("set", set),
            ("not before the next start", later),
        ];
        let said = kinds.into_iter().filter(|(_, names)| !names.is_empty());
        let said: Vec<_> = said.map(|(kind, names)| format!("{kind}: {}", names.join(", "))).collect();
        if said.is_empty() { "nothing has changed".into() } else { said.join("; ") }
    }
}

/// Settings that take effect with the exports, beside those of TLS.
const AT_ONCE: &[&str] = &["allow", "read-only"];
