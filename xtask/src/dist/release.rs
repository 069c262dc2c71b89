//! What identifies a release: its version, and the time that its files get.

use anyhow::{Context, Result};

use crate::shell;

/// A release of the packages.
#[derive(Clone, Debug)]
pub(crate) struct Release {
    /// The version of the programs.
    pub(crate) version: &'static str,
    /// How often this version has been packed.
    pub(crate) revision: u32,
    /// Seconds since 1970: the same source gives the same packages.
    pub(crate) epoch: u64,
}

impl Release {
    /// The release of this source: its time is `SOURCE_DATE_EPOCH`, or that of the last commit.
    pub(crate) fn current() -> Result<Self> {
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(epoch) => epoch.parse().context("SOURCE_DATE_EPOCH is not a number")?,
            Err(_) => last_commit()?,
        };
        Ok(Self { version: env!("CARGO_PKG_VERSION"), revision: 1, epoch })
    }

    /// The version of the Debian packages.
    pub(crate) fn debian_version(&self) -> String {
        format!("{}-{}", self.version, self.revision)
    }

    /// The time in a format of date(1).
    pub(crate) fn date(&self, format: &str) -> Result<String> {
        let mut date = shell::command("date");
        date.env("LC_ALL", "C").args(["-u", "-d", &format!("@{}", self.epoch), format]);
        shell::output(&mut date).map(|text| text.trim().to_owned())
    }
}

fn last_commit() -> Result<u64> {
    let mut log = shell::command("git");
    log.current_dir(shell::root()).args(["log", "-1", "--format=%ct"]);
    let text = shell::output(&mut log).context("no commit: set SOURCE_DATE_EPOCH")?;
    text.trim().parse().context("git log prints no time: set SOURCE_DATE_EPOCH")
}
