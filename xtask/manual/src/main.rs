//! Makes the manual pages and shell completions of nbdblk.
//!
//! The sources of the pages are the Markdown files in `docs/man`. Sections between `<!-- generated: NAME -->` and
//! `<!-- end -->` come from the tables of the program; `nbdblk-manual update` writes them again.

mod completions;
mod drivers;
mod files;
mod generate;
mod markdown;
mod options;
mod page;
mod roff;
mod settings;
mod text;

use std::path::Path;

use anyhow::{Result, bail};

const HELP: &str = "\
usage: nbdblk-manual update               write the generated sections of the pages in docs/man again
       nbdblk-manual check                fail if a generated section is not current
       nbdblk-manual pages DIR DATE       write the pages for man to DIR: man1/nbdblk.1 and so on, dated YYYY-MM-DD
       nbdblk-manual completions DIR      write the completions to DIR: nbdblk.bash, _nbdblk and nbdblk.fish";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["update"] => generate::update(),
        ["check"] => generate::check(),
        ["pages", dir, date] => files::write_all(Path::new(dir), date),
        ["completions", dir] => completions::write(Path::new(dir)),
        _ => bail!("{HELP}"),
    }
}
