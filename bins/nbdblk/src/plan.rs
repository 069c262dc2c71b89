//! [`Plan`]: the exports to serve, and the differences from the ones being served.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use blkdev::{Device, State};
use nbd_server_core::{Export, Removal, Server};

use crate::{
    cli,
    config::{self, File, Setting, Source},
    exports::{self, ExportSpec},
    logger::Detail,
    sandbox, shortage,
    tls::Security,
};

/// The exports to serve, from the command line or a file.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) specs: Vec<ExportSpec>,
    /// One device for each export, once they are open.
    devices: Vec<Arc<dyn Device>>,
    /// Their sizes when the plan was made, in bytes.
    sizes: Vec<u64>,
    file: Option<(Source, Vec<Setting>)>,
}

impl Plan {
    pub(crate) fn from_words(args: &cli::Serve) -> anyhow::Result<Self> {
        let specs = exports::under(exports::from_words(&args.specs)?, args)?;
        Ok(Self { specs, devices: Vec::new(), sizes: Vec::new(), file: None })
    }

    /// Reads a file, and combines it with the arguments.
    pub(crate) fn from_file(path: &Path) -> anyhow::Result<(Self, cli::Serve, Detail)> {
        Self::from_file_with(path, &std::env::args_os().collect::<Vec<_>>())
    }

    /// As [`from_file`](Self::from_file), for the arguments of another process.
    pub(crate) fn from_file_with(path: &Path, words: &[OsString]) -> anyhow::Result<(Self, cli::Serve, Detail)> {
        let file = File::read(path)?;
        let (args, detail) = file.merge(words)?;
        let File { source, settings, exports } = file;
        let file = Some((source, settings));
        let mut plan = Self { specs: Vec::new(), devices: Vec::new(), sizes: Vec::new(), file };
        plan.specs = exports::under(exports, &args).map_err(|error| plan.blame("allow", error))?;
        Ok((plan, args, detail))
    }

    /// Adds its place to an error that a setting of the file causes: the one that the error names, the one of this kind whose value
    /// the error names, such as a directory, or the first of this kind.
    pub(crate) fn blame(&self, kind: &str, error: anyhow::Error) -> anyhow::Error {
        let Some((source, settings)) = &self.file else { return error };
        let text = crate::whole(&error);
        let of_kind = || settings.iter().filter(|setting| setting.key.starts_with(kind));
        // A path, because another value may be an ordinary word.
        let has_path = |setting: &&Setting| {
            let values = setting.words.iter().filter_map(|word| Some(word.split_once('=')?.1));
            values.filter(|value| value.contains('/')).any(|value| text.contains(value))
        };
        match config::blamed(settings, &text).or_else(|| of_kind().find(has_path)).or_else(|| of_kind().next()) {
            Some(setting) => source.wrong(setting.at, config::in_words_of_files(&text)),
            None => error,
        }
    }

    /// Opens all devices, except those that the other plan has open, that work, and whose name still means the same device. A
    /// first plan waits for devices that are not there yet.
    pub(crate) fn open(&mut self, other: Option<&Self>) -> anyhow::Result<()> {
        for spec in &self.specs {
            let open = other.and_then(|other| Some(&other.devices[other.find(|old| old.has_device_of(spec))?]));
            let device = match open.filter(|device| device.state() != State::Dead && !device.is_replaced()) {
                Some(device) => {
                    device.refresh();
                    Arc::clone(device)
                }
                None => {
                    spec.open_within(if other.is_none() { spec.wait } else { Duration::ZERO }).map_err(|error| {
                        match &self.file {
                            Some((source, _)) => source.wrong(spec.at, crate::whole(&error)),
                            None => error,
                        }
                    })?
                }
            };
            self.sizes.push(device.capacity());
            self.devices.push(device);
        }
        Ok(())
    }

    /// Opens the devices that the replaced program had open. A device may need a moment to notice that, or may have gone: then its
    /// export is left out, unless it is the only one.
    pub(crate) fn open_again(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let specs: Arc<[ExportSpec]> = std::mem::take(&mut self.specs).into();
        let opened = open_all(&specs, started)?;
        let mut results: Vec<_> = specs.iter().map(|_| None).collect();
        for _ in 0..specs.len() {
            let rest = REOPENING_MAX.saturating_sub(started.elapsed());
            let Ok((n, result)) = opened.recv_timeout(rest) else { break };
            results[n] = Some(result);
        }
        for (spec, result) in specs.iter().zip(results) {
            match result.unwrap_or_else(|| Err(anyhow!("export \"{}\": its device does not open", spec.name))) {
                Ok(device) => {
                    self.specs.push(spec.clone());
                    self.sizes.push(device.capacity());
                    self.devices.push(device);
                }
                Err(error) => log::error!("its clients are disconnected: {}", crate::whole(&error)),
            }
        }
        ensure!(!self.specs.is_empty(), "no device can be opened again");
        Ok(())
    }

    /// An export whose content would be lost with this process.
    pub(crate) fn volatile(&self) -> Option<&str> {
        let is_volatile = |device: &Arc<dyn Device>| device.info().driver == "memory";
        let position = self.devices.iter().position(is_volatile);
        position.map(|position| self.specs[position].name.as_str())
    }

    pub(crate) fn exports(&self) -> Vec<Export> {
        self.specs.iter().zip(&self.devices).map(|(spec, device)| spec.export(Arc::clone(device))).collect()
    }

    fn find(&self, test: impl Fn(&ExportSpec) -> bool) -> Option<usize> {
        self.specs.iter().position(test)
    }

    fn named(&self, name: &str) -> Option<usize> {
        self.find(|spec| spec.name == name)
    }

    /// Serves the present content of the file: all of it, or, after any error, nothing of it. Returns the plan that is served
    /// then, and the changes.
    pub(crate) fn reload(&self, path: &Path, server: &Weak<Server>) -> anyhow::Result<(Self, String)> {
        let (mut next, args, detail) = Self::from_file(path)?;
        sandbox::enter_reload(&next.specs)?;
        let security = Security::load(&args.tls).map_err(|error| next.blame("tls", error))?;
        let open = next.open(Some(self));
        open.map_err(|error| shortage::advise(error, &args, next.specs.len()))?;
        // For an export that changes, the newer setting counts.
        let removal = |name: &str| {
            let words = next.named(name).map(|n| &next.specs[n]).or(self.named(name).map(|n| &self.specs[n]));
            words.map_or(Removal::default(), |spec| spec.on_remove)
        };
        let server = server.upgrade().context("the server is stopping")?;
        let replaced = server.replace(next.exports(), security.tls, removal).context("starting the exports");
        let replaced = replaced.map_err(|error| shortage::advise(error, &args, next.specs.len()));
        replaced.with_context(|| path.display().to_string())?;
        detail.apply();
        let changes = next.changes_since(self);
        Ok((next, changes))
    }

    fn changes_since(&self, old: &Self) -> String {
        let (mut added, mut reopened, mut updated) = (Vec::new(), Vec::new(), Vec::new());
        let (mut set, mut later, mut resized) = (Vec::new(), Vec::new(), Vec::new());
        for ((spec, device), size) in self.specs.iter().zip(&self.devices).zip(&self.sizes) {
            let name = format!("{:?}", spec.name);
            match old.named(&spec.name) {
                None => added.push(name),
                Some(n) if !Arc::ptr_eq(device, &old.devices[n]) => {
                    let was_dead = old.devices[n].state() == State::Dead;
                    reopened.push(if was_dead { format!("{name} (it was dead)") } else { name });
                }
                Some(n) if *size != old.sizes[n] => {
                    resized.push(format!("{name} (from {} to {size} bytes)", old.sizes[n]));
                }
                Some(n) if !spec.has_words_of(&old.specs[n]) => updated.push(name),
                Some(_) => {}
            }
        }
        let gone = old.specs.iter().filter(|spec| self.named(&spec.name).is_none());
        let removed: Vec<_> = gone.map(|spec| format!("{:?} ({})", spec.name, spec.on_remove)).collect();
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
            ("resized", resized),
            ("updated", updated),
            ("set", set),
            ("not before the next start", later),
        ];
        let said = kinds.into_iter().filter(|(_, names)| !names.is_empty());
        let said: Vec<_> = said.map(|(kind, names)| format!("{kind}: {}", names.join(", "))).collect();
        if said.is_empty() { "nothing has changed".into() } else { said.join("; ") }
    }
}

/// A device that was opened, or not, and the position of its export.
type Opened = (usize, anyhow::Result<Arc<dyn Device>>);

/// Opens devices in threads, so that a slow one adds nothing to the pause of the others.
fn open_all(specs: &Arc<[ExportSpec]>, started: Instant) -> anyhow::Result<mpsc::Receiver<Opened>> {
    let (sender, opened) = mpsc::channel();
    // The same file one by one: the second opening has to find the locks of the first.
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (n, spec) in specs.iter().enumerate() {
        let key = spec.settings.get("path").unwrap_or_else(|_| n.to_string());
        groups.entry(key).or_default().push(n);
    }
    let groups: Arc<Mutex<Vec<Vec<usize>>>> = Arc::new(Mutex::new(groups.into_values().collect()));
    for _ in 0..specs.len().min(OPENERS) {
        let (specs, sender, groups) = (Arc::clone(specs), sender.clone(), Arc::clone(&groups));
        let next = move || groups.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let work = move || {
            for n in std::iter::from_fn(next).flatten() {
                let mut open = specs[n].open_within(Duration::ZERO);
                while open.is_err() && started.elapsed() < REOPENING {
                    thread::sleep(Duration::from_millis(10));
                    open = specs[n].open_within(Duration::ZERO);
                }
                // If it comes too late, the device is closed again.
                let _ = sender.send((n, open));
            }
        };
        thread::Builder::new().name("opening".into()).spawn(work).context("starting a thread")?;
    }
    Ok(opened)
}

/// Threads that open devices after an upgrade.
const OPENERS: usize = 16;

/// How long opening a device is tried again after an upgrade.
const REOPENING: Duration = Duration::from_secs(2);

/// Longest pause of clients because a device does not open. Its own clients are disconnected then.
const REOPENING_MAX: Duration = Duration::from_secs(10);

/// Settings that take effect with the exports, in addition to those of TLS.
const AT_ONCE: &[&str] = &["allow", "log-format", "read-only", "verbose"];

#[cfg(test)]
mod tests {
    use std::io;

    use blkdev::{Info, Mapping, Queue, memory::Memory};

    use super::*;

    /// A device whose name means another device now.
    struct Replaced(Memory);

    impl Device for Replaced {
        fn info(&self) -> &Info {
            self.0.info()
        }

        fn capacity(&self) -> u64 {
            self.0.capacity()
        }

        fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
            self.0.register(mapping)
        }

        fn is_replaced(&self) -> bool {
            true
        }

        fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
            self.0.open_queue(depth)
        }
    }

    #[test]
    fn a_device_whose_name_means_another_one_is_reopened() {
        let plan = || Plan {
            specs: exports::from_words(&["a:memory=1M".into(), "b:memory=1M".into()]).expect("good words"),
            devices: Vec::new(),
            sizes: Vec::new(),
            file: None,
        };
        let mut old = plan();
        old.open(None).expect("memory can be opened");
        old.devices[1] = Arc::new(Replaced(Memory::new(1 << 20)));
        let mut next = plan();
        next.open(Some(&old)).expect("memory can be opened");
        assert!(Arc::ptr_eq(&next.devices[0], &old.devices[0]));
        assert!(!Arc::ptr_eq(&next.devices[1], &old.devices[1]));
        assert_eq!(next.changes_since(&old), "reopened: \"b\"");
    }
}
