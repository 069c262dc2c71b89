//! `nbdblk serve`: specs to devices, devices to exports, exports and sockets to a server, until something ends it.

use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use blkdev_drivers::{Spec, properties};
use nbd_server_core::{Access, Export, Limits, Server};

use crate::{
    captive::Captive,
    cli,
    control::{Control, Event, Phase},
    info::human,
    listen::Sockets,
    parent,
    ready::Ready,
    single,
    tls::Security,
};

/// Longest export name, in bytes (doc/proto.md of NBD, "Values": string limits).
const NAME_MAX: usize = 4096;

pub(crate) fn run(args: &cli::Serve) -> anyhow::Result<ExitCode> {
    let specs = specs(args)?;
    let passed = Sockets::passed(args)?;
    let security = Security::load(&args.tls)?;
    let control = Control::start()?;
    if args.exit_with_parent {
        parent::watch()?;
    }
    let exports = specs.iter().map(|spec| open(spec, args)).collect::<anyhow::Result<Vec<_>>>()?;
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
        handshake_timeout: args.handshake_timeout.unwrap_or(defaults.handshake_timeout),
        ..defaults
    };
    let server = Server::start(exports, listeners, security.tls.clone(), limits).context("starting the server")?;
    ready.announce()?;

    let uris =
        || specs.iter().flat_map(|spec| addresses.iter().map(|address| address.uri(&spec.name, security.words())));
    if args.print_uri {
        crate::print(&uris().map(|uri| uri + "\n").collect::<String>())?;
    } else if args.run.is_none() && !args.single {
        crate::complain(&format!("serving at {}", uris().collect::<Vec<_>>().join(" and ")));
    }
    let captive = match &args.run {
        None => None,
        Some(command) => {
            control.enter(Phase::Running);
            Some(Captive::start(command, &addresses, &specs[0].name, &security, &control)?)
        }
    };

    let status = loop {
        match (control.wait(), &captive) {
            (Event::Stop, Some(captive)) => captive.terminate(),
            (Event::Stop, None) => break 0,
            (Event::Ended(status), _) => break status,
        }
    };
    control.enter(Phase::Stopping);
    // First, so that nothing is left of them when a second signal comes.
    drop((files, ready));
    server.stop();
    Ok(status.into())
}

/// Everything that can be wrong with the words is found before the first device is opened.
fn specs(args: &cli::Serve) -> anyhow::Result<Vec<Spec>> {
    let mut specs: Vec<Spec> = Vec::new();
    for text in &args.specs {
        let spec: Spec = text.parse()?;
        let name = &spec.name;
        ensure!(name.len() <= NAME_MAX, "an export's name can have {NAME_MAX} bytes, this one has {}", name.len());
        if !specs.is_empty() && name.is_empty() {
            bail!("{text} needs a name, NAME:{text}: only the first export can be without");
        }
        ensure!(specs.iter().all(|other| other.name != *name), "there are two exports with the name \"{name}\"");
        specs.push(spec);
    }
    for name in args.allow.iter().filter_map(|(name, _)| name.as_ref()) {
        ensure!(specs.iter().any(|spec| spec.name == *name), "--allow: there is no export with the name \"{name}\"");
    }
    Ok(specs)
}

fn open(spec: &Spec, args: &cli::Serve) -> anyhow::Result<Export> {
    let settings = crate::info::restrict(&spec.settings, args.read_only);
    let device = settings.open()?;
    let (name, info) = (spec.name.clone(), device.info());
    log::info!("export \"{name}\": {} {}, {}", info.driver, info.target, human(device.capacity()));
    for (property, value) in properties(&*device, &settings) {
        log::info!("export \"{name}\": {property} = {value}");
    }
    let description = info.driver.to_owned();
    let read_only = args.read_only || info.caps.read_only;
    let rules = args.allow.iter().filter(|(of, _)| of.as_ref().is_none_or(|of| *of == spec.name));
    let access = Access(rules.map(|(_, rule)| rule.clone()).collect());
    Ok(Export { name, description, device, read_only, access })
}
