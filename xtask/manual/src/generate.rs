//! The generated sections of the pages.

use std::fs;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    drivers, options,
    page::{self, Page},
    settings,
};

const START: &str = "<!-- generated: ";
const END: &str = "<!-- end -->";

/// Writes the generated sections of all pages again.
pub(crate) fn update() -> Result<()> {
    for page in page::all()? {
        let text = with_sections(&page)?;
        if text != page.text {
            fs::write(&page.source, text)?;
            println!("updated {}", page.source.display());
        }
    }
    Ok(())
}

/// Fails if a generated section is not what the tables say, or if a table has an entry that no page describes.
pub(crate) fn check() -> Result<()> {
    let pages = page::all()?;
    for page in &pages {
        let is_current = with_sections(page)? == page.text;
        ensure!(is_current, "{} is not current: run `cargo xtask manual`", page.source.display());
    }
    let text: String = pages.iter().map(|page| page.text.as_str()).collect();
    let needed = drivers::sections().into_iter().chain(options::sections()).chain([settings::SECTION.to_owned()]);
    for section in needed {
        ensure!(text.contains(&format!("{START}{section} -->")), "no page in docs/man has the section \"{section}\"");
    }
    settings::check_exports(&text)
}

/// The text of a page with current sections.
pub(crate) fn with_sections(page: &Page) -> Result<String> {
    let mut out = String::new();
    let mut rest = page.text.as_str();
    while let Some((before, after)) = rest.split_once(START) {
        let (name, after) = after.split_once(" -->").context("a mark that does not end")?;
        let (_, after) = after.split_once(END).with_context(|| format!("the section {name} does not end"))?;
        let section = section(name).with_context(|| format!("in {}", page.source.display()))?;
        out += &format!("{before}{START}{name} -->\n\n{}\n\n{END}", section.trim());
        rest = after;
    }
    Ok(out + rest)
}

fn section(name: &str) -> Result<String> {
    match name.split_once(" of ") {
        Some(("options", command)) => options::of(command),
        Some(("properties", driver)) => drivers::properties(driver),
        Some(("values", "open devices")) => Ok(drivers::common_values()),
        _ if name == settings::SECTION => Ok(settings::list()),
        _ if name == drivers::LIST => Ok(drivers::list()),
        _ => bail!("there is no section \"{name}\""),
    }
}
