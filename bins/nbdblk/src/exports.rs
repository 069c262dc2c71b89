//! From arguments to exports: parses them, and opens devices that are not open yet.

use std::{ffi::OsString, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use blkdev::Device;
use blkdev_drivers::{Settings, Spec, properties};
use nbd_server_core::{Access, Export, Removal, Rule};

use crate::{
    cli,
    info::{human, restrict},
    patience,
};

/// Longest export name, in bytes (doc/proto.md of NBD, "Values": string limits).
pub(crate) const NAME_MAX: usize = 4096;

/// An export as the arguments or the file describe it.
#[derive(Clone, Debug)]
pub(crate) struct ExportSpec {
    pub(crate) name: String,
    /// `None`: the driver's name.
    pub(crate) description: Option<String>,
    pub(crate) settings: Settings,
    pub(crate) read_only: bool,
    pub(crate) rules: Vec<Rule>,
    pub(crate) tls_only: bool,
    pub(crate) block_size_required: bool,
    /// What happens to its clients when it is removed.
    pub(crate) on_remove: Removal,
    /// How long the start waits for its device.
    pub(crate) wait: Duration,
    /// Position of its device in the file.
    pub(crate) at: usize,
}

/// Parses the arguments. Finds all their errors before the first device is opened.
pub(crate) fn from_words(words: &[OsString]) -> anyhow::Result<Vec<ExportSpec>> {
    let mut all: Vec<ExportSpec> = Vec::new();
    for words in words {
        let Spec { name, settings } = Spec::parse(words)?;
        let text = words.display();
        ensure!(
            name.len() <= NAME_MAX,
            "an export's name can have at most {NAME_MAX} bytes, this one has {}",
            name.len()
        );
        if !all.is_empty() && name.is_empty() {
            bail!("{text} needs a name, NAME:{text}: only the first export can have none");
        }
        ensure!(all.iter().all(|other| other.name != name), "there are two exports with the name \"{name}\"");
        let (rules, on_remove) = (Vec::new(), Removal::default());
        let (read_only, tls_only, block_size_required) = (false, false, false);
        let description = None;
        all.push(ExportSpec {
            name,
            description,
            settings,
            read_only,
            rules,
            tls_only,
            block_size_required,
            on_remove,
            wait: Duration::ZERO,
            at: 0,
        });
    }
    Ok(all)
}

/// Applies the options for all exports, or for one by its name.
pub(crate) fn under(mut all: Vec<ExportSpec>, args: &cli::Serve) -> anyhow::Result<Vec<ExportSpec>> {
    for name in args.allow.iter().filter_map(|(name, _)| name.as_ref()) {
        ensure!(all.iter().any(|spec| spec.name == *name), "--allow: there is no export with the name \"{name}\"");
    }
    for name in &args.tls.only {
        ensure!(all.iter().any(|spec| spec.name == *name), "--tls-only: there is no export with the name \"{name}\"");
    }
    for spec in &mut all {
        spec.tls_only |= args.tls.only.contains(&spec.name);
        spec.read_only |= args.read_only;
        if spec.wait.is_zero() {
            spec.wait = args.wait.unwrap_or_default();
        }
        spec.settings = restrict(&spec.settings, spec.read_only);
        let rules = args.allow.iter().filter(|(of, _)| of.as_ref().is_none_or(|of| *of == spec.name));
        spec.rules.extend(rules.map(|(_, rule)| rule.clone()));
    }
    Ok(all)
}

impl ExportSpec {
    /// Whether the device of `other` can be used.
    pub(crate) fn has_device_of(&self, other: &Self) -> bool {
        self.name == other.name && self.settings == other.settings && self.read_only == other.read_only
    }

    /// Whether clients get the same name and description.
    pub(crate) fn has_words_of(&self, other: &Self) -> bool {
        let told = |spec: &Self| (spec.description.clone(), spec.tls_only, spec.block_size_required);
        self.rules == other.rules && told(self) == told(other)
    }

    /// Opens the device. Waits for one that is not there yet, at most for `time`.
    pub(crate) fn open_within(&self, time: Duration) -> anyhow::Result<Arc<dyn Device>> {
        let open = patience::open(&self.settings, &self.name, time);
        let device = match self.name.is_empty() {
            true => open?,
            false => open.with_context(|| format!("export \"{}\"", self.name))?,
        };
        let (name, info) = (&self.name, device.info());
        log::info!("export \"{name}\": {} {}, {}", info.driver, info.target, human(device.capacity()));
        for (property, value) in properties(&*device, &self.settings) {
            log::info!("export \"{name}\": {property} = {value}");
        }
        Ok(device)
    }

    /// The export, once its device is open.
    pub(crate) fn export(&self, device: Arc<dyn Device>) -> Export {
        let info = device.info();
        let description = self.description.clone().unwrap_or_else(|| info.driver.to_owned());
        let read_only = self.read_only || info.caps.read_only;
        let mut export = Export::new(&self.name, device);
        export.description = description;
        export.read_only = read_only;
        export.access = Access(self.rules.clone());
        export.tls_only = self.tls_only;
        export.block_size_required = self.block_size_required;
        export
    }
}
