//! The faults: how each begins, and how it ends.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nbd_client::{Client, Error, Options};

use super::clock::now;
use super::crew;
use super::judge::{Errors, Scope};
use super::place;
use super::plan::{Fault, Planned};
use super::process::Process;
use super::report::{BadClients, Behaviour};
use super::stage::{Export, Kind, MIB};
use super::world::World;

/// The export that reloads add and remove.
const EXTRA: &str = "extra";

/// A fault that goes on, and what ends it.
#[derive(Debug)]
pub(crate) enum Active {
    Client { n: usize, id: u32, window: u64 },
    Dead { n: usize, window: u64 },
    Stopped { n: usize, id: u32, window: u64 },
    Unread { flag: Arc<AtomicBool>, _clients: Process },
    BadClients { _clients: Process },
    Extra { removal: &'static str, _clients: Process },
    Short { image: PathBuf, size: u64, window: u64 },
    Full { filler: PathBuf, window: u64 },
}

/// Begins a fault. `None`: it is over already, or has no target now.
pub(crate) fn begin(world: &mut World, planned: &Planned) -> Result<Option<Active>> {
    let seed = planned.pick;
    world.faults += 1;
    match planned.fault {
        Fault::KillClient => kill_client(world, seed).map(|()| None),
        Fault::PauseClient => Ok(pause_client(world, seed)),
        Fault::KillBackEnd => Ok(kill_back_end(world, seed)),
        Fault::PauseBackEnd => Ok(stop_back_end(world, seed, Errors::None)),
        Fault::HangBackEnd => Ok(stop_back_end(world, seed, Errors::Any)),
        Fault::FullPipe => {
            let flag = Arc::clone(&world.server.is_unread);
            flag.store(true, Ordering::Relaxed);
            // Their connections are lines of the log.
            Ok(Some(Active::Unread { flag, _clients: bad_clients(world, Behaviour::Vanish, 4, seed)? }))
        }
        Fault::SlowReaders => clients(world, Behaviour::ReadSlowly, 6, seed),
        Fault::SlowWriters => clients(world, Behaviour::WriteSlowly, 6, seed),
        Fault::Pressure => clients(world, Behaviour::UseMemory, 6, seed),
        Fault::Vanishing => clients(world, Behaviour::Vanish, 6, seed),
        Fault::Reload => add_export(world, seed),
        Fault::BadReload => reload_badly(world, seed).map(|()| None),
        Fault::Truncate => truncate(world),
        Fault::NoSpace => fill(world),
        Fault::Stop => world.restart(true).map(|()| None),
        Fault::Crash => world.restart(false).map(|()| None),
    }
}

/// Ends a fault.
pub(crate) fn end(world: &mut World, active: Active) -> Result<()> {
    match active {
        Active::Client { n, id, window } => {
            world.crew.resume(n, id);
            world.judge.close(window, now());
        }
        Active::Dead { n, window } => {
            // A new server may have needed it earlier.
            if !world.back_ends[n].is_alive() {
                world.back_ends[n].restart()?;
            }
            let reloaded = world.server.reload(&world.stage)?;
            let changes = reloaded.map_err(|error| anyhow!("a reload after a crash of a back end: {error}"))?;
            world.note(&format!("reloaded: {changes}"));
            world.judge.close(window, now());
        }
        Active::Stopped { n, id, window } => {
            if world.back_ends[n].id() == Some(id) {
                world.back_ends[n].resume();
            }
            world.judge.close(window, now());
        }
        Active::Unread { flag, .. } => flag.store(false, Ordering::Relaxed),
        Active::BadClients { .. } => {}
        Active::Extra { removal, .. } => remove_export(world, removal)?,
        Active::Short { image, size, window } => {
            File::options().write(true).open(image)?.set_len(size)?;
            world.judge.close(window, now());
        }
        Active::Full { filler, window } => {
            fs::remove_file(filler)?;
            world.judge.close(window, now());
        }
    }
    Ok(())
}

fn kill_client(world: &mut World, seed: u64) -> Result<()> {
    let n = seed as usize % world.crew.members.len();
    world.crew.kill(n, &mut world.judge, &world.noise)?;
    world.crew.replace(n)
}

fn pause_client(world: &mut World, seed: u64) -> Option<Active> {
    let n = seed as usize % world.crew.members.len();
    let window = world.judge.open(Scope::Region(world.crew.members[n].job.region), Errors::Any, now());
    match world.crew.pause(n) {
        Some(id) => Some(Active::Client { n, id, window }),
        None => {
            world.judge.close(window, now());
            None
        }
    }
}

fn kill_back_end(world: &mut World, seed: u64) -> Option<Active> {
    let n = seed as usize % world.back_ends.len();
    if !world.back_ends[n].is_alive() {
        return None;
    }
    let window = world.judge.open(Scope::Export(world.back_ends[n].export.name), Errors::Any, now());
    world.back_ends[n].kill();
    Some(Active::Dead { n, window })
}

fn stop_back_end(world: &mut World, seed: u64, errors: Errors) -> Option<Active> {
    let n = seed as usize % world.back_ends.len();
    let id = world.back_ends[n].id()?;
    let window = world.judge.open(Scope::Export(world.back_ends[n].export.name), errors, now());
    world.back_ends[n].pause();
    Some(Active::Stopped { n, id, window })
}

/// Exports where clients may do anything.
fn wild(seed: u64, world: &World) -> &'static Export {
    let exports: Vec<_> = world.stage.exports().filter(|export| export.wild.is_some()).collect();
    exports[(seed >> 32) as usize % exports.len()]
}

fn clients(world: &World, kind: Behaviour, count: usize, seed: u64) -> Result<Option<Active>> {
    Ok(Some(Active::BadClients { _clients: bad_clients(world, kind, count, seed)? }))
}

fn bad_clients(world: &World, kind: Behaviour, count: usize, seed: u64) -> Result<Process> {
    let export = wild(seed, world);
    let place = export.wild.context("these exports have room for any client")?;
    start_bad_clients(world, export.name, kind, count, place, seed)
}

fn start_bad_clients(
    world: &World,
    export: &str,
    kind: Behaviour,
    count: usize,
    place: (u64, u64),
    seed: u64,
) -> Result<Process> {
    let (dir, export) = (world.stage.path().into(), export.into());
    let work = BadClients { dir, export, kind, count, at: place.0, size: place.1, seed };
    crew::start("torture-bad-clients", &serde_json::to_string(&work)?)
}

fn add_export(world: &mut World, seed: u64) -> Result<Option<Active>> {
    if !world.more.is_empty() {
        return Ok(None);
    }
    let removal = ["hide", "soft", "hard"][seed as usize % 3];
    world.more = format!("[[export]]\nname = \"{EXTRA}\"\ndevice = \"memory=4M\"\non-remove = \"{removal}\"\n");
    world.stage.configure(&world.more)?;
    let changes = world.server.reload(&world.stage)?.map_err(|error| anyhow!("a reload failed: {error}"))?;
    ensure!(changes.contains("added: \"extra\""), "a reload with a new export: {changes}");
    let kind = if seed & 0x10 == 0 { Behaviour::UseMemory } else { Behaviour::Vanish };
    let _clients = start_bad_clients(world, EXTRA, kind, 2, (0, 4 * MIB), seed)?;
    Ok(Some(Active::Extra { removal, _clients }))
}

/// While its clients are still at work.
fn remove_export(world: &mut World, removal: &str) -> Result<()> {
    world.more.clear();
    world.stage.configure("")?;
    let changes = world.server.reload(&world.stage)?.map_err(|error| anyhow!("a reload failed: {error}"))?;
    let expected = format!("removed: \"{EXTRA}\" ({removal})");
    ensure!(changes.contains(&expected), "a reload without an export that was there: {changes}");
    let uri = place::uri(world.stage.path(), EXTRA, false).parse()?;
    match Client::connect(&uri, &Options::default()) {
        Err(Error::Refused { .. }) => Ok(()),
        Err(error) => bail!("a new client of a removed export must be refused: {error}"),
        Ok(_) => bail!("a removed export is still there for new clients"),
    }
}

fn reload_badly(world: &mut World, seed: u64) -> Result<()> {
    let errors = [
        "[[export]]\nname = 7\n",
        "[[export]]\nname = \"gone\"\ndevice = \"io_uring=gone.image\"\n",
        "[[export]]\nname = \"file\"\ndevice = \"memory=1M\"\n",
        "[[export]\n",
    ];
    world.stage.configure(&format!("{}{}", world.more, errors[seed as usize % errors.len()]))?;
    let reloaded = world.server.reload(&world.stage)?;
    world.stage.configure(&world.more)?;
    match reloaded {
        Err(error) => world.note(&format!("not reloaded: {error}")),
        Ok(changes) => bail!("a reload with an error in the file succeeded: {changes}"),
    }
    Ok(())
}

fn truncate(world: &mut World) -> Result<Option<Active>> {
    let is_it = |export: &&Export| export.kind == Kind::Truncated;
    let export = world.stage.exports().find(is_it).context("one export loses its second half")?;
    let member = world.crew.members.iter().find(|member| member.job.lossy).context("it has a client")?;
    let window = world.judge.open(Scope::Region(member.job.region), Errors::Any, now());
    let image = world.stage.image(export);
    File::options().write(true).open(&image)?.set_len(export.size / 2)?;
    Ok(Some(Active::Short { image, size: export.size, window }))
}

fn fill(world: &mut World) -> Result<Option<Active>> {
    let filler = world.stage.at("mount").join("filler");
    if !world.stage.is_mounted || filler.exists() {
        return Ok(None);
    }
    let window = world.judge.open(Scope::Export("cramped"), Errors::NoSpace, now());
    let mut file = File::create(&filler)?;
    while file.write_all(&[1; 4096]).is_ok() {}
    Ok(Some(Active::Full { filler, window }))
}
