//! The sources of the pages.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// A page of the manual.
#[derive(Debug)]
pub(crate) struct Page {
    /// Such as `nbdblk-serve`.
    pub(crate) name: String,
    /// Such as `1`.
    pub(crate) section: String,
    pub(crate) source: PathBuf,
    pub(crate) text: String,
}

/// All pages, by name.
pub(crate) fn all() -> Result<Vec<Page>> {
    let dir = sources();
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let source = entry?.path();
        let name = source.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some((name, section)) = name.strip_suffix(".md").and_then(|name| name.rsplit_once('.')) else { continue };
        let (name, section) = (name.to_owned(), section.to_owned());
        let text = fs::read_to_string(&source)?;
        found.push(Page { name, section, source, text });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    if found.is_empty() {
        bail!("{} has no pages", dir.display());
    }
    Ok(found)
}

/// The directory of the sources.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/man")
}
