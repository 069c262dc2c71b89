//! Debian's changelog, from CHANGELOG.md.

use anyhow::{Context, Result};

use super::{control::MAINTAINER, release::Release};

/// Longest line, as lintian has it.
const WIDTH: usize = 78;

/// The newest version of the changelog, in Debian's format.
pub(crate) fn debian(changelog: &str, release: &Release) -> Result<String> {
    let (_, newest) = changelog.split_once("\n## [").context("CHANGELOG.md has no version")?;
    let newest = newest.split("\n## [").next().unwrap_or_default();
    let items: String = items(newest).iter().map(|item| wrapped(item)).collect();
    let (version, date) = (release.debian_version(), release.date("+%a, %d %b %Y %T +0000")?);
    Ok(format!("nbdblk ({version}) unstable; urgency=medium\n\n{items}\n -- {MAINTAINER}  {date}\n"))
}

/// The items of all lists, each on one line. The marks of Markdown for code and links are removed.
fn items(section: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut is_open = false;
    for line in section.lines() {
        if let Some(text) = line.strip_prefix("- ") {
            found.push(text.to_owned());
            is_open = true;
        } else if let (Some(text), Some(last), true) = (line.strip_prefix("  "), found.last_mut(), is_open) {
            last.push(' ');
            last.push_str(text.trim().trim_start_matches("- "));
        } else {
            is_open = false;
        }
    }
    found.iter().map(|item| item.replace('`', "")).collect()
}

/// An item of Debian's list.
fn wrapped(item: &str) -> String {
    let mut lines = vec!["  *".to_owned()];
    for word in item.split_whitespace() {
        let last = lines.last_mut().expect("there is a line");
        if last.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(format!("    {word}"));
        } else {
            last.push(' ');
            last.push_str(word);
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_becomes_a_list() {
        let text = "# Changelog\n\n## [0.2.0]\n\n### Added\n\n- `a`\n  b.\n- c\n\n## [0.1.0]\n\n- old\n";
        let release = Release { version: "0.2.0", revision: 3, epoch: 0 };
        let expected = format!(
            "nbdblk (0.2.0-3) unstable; urgency=medium\n\n  * a b.\n  * c\n\n -- {MAINTAINER}  \
             Thu, 01 Jan 1970 00:00:00 +0000\n"
        );
        assert_eq!(debian(text, &release).expect("date runs"), expected);
    }
}
