//! The pages as files for man.

use std::{fs, path::Path};

use anyhow::Result;

use crate::{
    generate, markdown,
    page::{self, Page},
    roff,
};

/// Writes all pages for man.
pub(crate) fn write_all(dir: &Path, date: &str) -> Result<()> {
    for page in page::all()? {
        let to = dir.join(format!("man{}", page.section));
        fs::create_dir_all(&to)?;
        fs::write(to.join(format!("{}.{}", page.name, page.section)), roff(&page, date)?)?;
    }
    Ok(())
}

/// The page in the language of man(7).
fn roff(page: &Page, date: &str) -> Result<String> {
    let text = generate::with_sections(page)?;
    let title = page.name.to_uppercase().replace('-', "\\-");
    let version = env!("CARGO_PKG_VERSION");
    let head = format!(".TH {title} {} {date} \"nbdblk {version}\" \"nbdblk manual\"\n", page.section);
    let hint = ".\\\" Made by nbdblk-manual from docs/man. Do not edit.\n";
    Ok(format!("{hint}{head}{}", roff::render(&markdown::parse(&text))))
}
