//! Sections about the settings of a configuration file.

use anyhow::{Result, ensure};
use nbdblk::manual::{EXPORT_SETTINGS, file_settings, value_kind};

use crate::{options, text};

/// The section with the settings that are options, too.
pub(crate) const SECTION: &str = "settings";

/// The settings with their kinds and the first lines of their descriptions.
pub(crate) fn list() -> String {
    let entry = |option: &clap::Arg| {
        let name = option.get_long().unwrap_or_default();
        let help = option.get_help().map(ToString::to_string).unwrap_or_default();
        let kind = text::ended(&text::capitalised(&value_kind(option)));
        let help = text::paragraph(&help, &options::values(option)).replace(". May be repeated.", ".");
        text::entry(&format!("**{name}**"), &[format!("{help} {kind}")])
    };
    file_settings().iter().map(entry).collect::<Vec<_>>().join("\n")
}

/// Fails if the pages lack a setting of an export.
pub(crate) fn check_exports(pages: &str) -> Result<()> {
    for name in EXPORT_SETTINGS {
        let entry = format!("- **{name}** =");
        ensure!(pages.contains(&entry), "docs/man/nbdblk.toml.5.md does not describe the setting {name} of an export");
    }
    Ok(())
}
