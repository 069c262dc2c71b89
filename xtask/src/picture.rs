//! The picture of the crates in ARCHITECTURE.md, made from what cargo knows, so that it cannot go stale.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::shell;

const FILE: &str = "docs/crates.svg";

/// Each crate with those that it uses.
type Uses = BTreeMap<String, Vec<String>>;

/// Draws the picture.
pub(crate) fn draw() -> Result<()> {
    fs::write(FILE, svg(&uses()?)).context(FILE)
}

/// Fails if the picture shows anything else than what there is.
pub(crate) fn check() -> Result<()> {
    let found = fs::read_to_string(FILE).context(FILE)?;
    ensure!(found == svg(&uses()?), "{FILE} does not show the crates that there are: type `cargo xtask picture`");
    Ok(())
}

fn uses() -> Result<Uses> {
    let mut command = shell::cargo();
    command.args(["metadata", "--format-version=1", "--no-deps", "--locked"]);
    let output = command.output().context("starting cargo")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let product = |package: &Value| {
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        manifest.contains("/crates/") || manifest.contains("/bins/")
    };
    let packages: Vec<Value> = list(&metadata["packages"]).into_iter().filter(product).collect();
    let ours: Vec<String> = packages.iter().map(name).collect();
    let used = |package: &Value| {
        let dependencies = list(&package["dependencies"]);
        let real = dependencies.iter().filter(|dependency| dependency["kind"].is_null()).map(name);
        real.filter(|name| ours.contains(name)).collect()
    };
    Ok(packages.iter().map(|package| (name(package), used(package))).collect())
}

/// The row of a crate, from the top: below all that use it.
fn row(name: &str, uses: &Uses) -> usize {
    users(name, uses).map(|user| row(user, uses) + 1).max().unwrap_or(0)
}

fn users<'a>(name: &'a str, uses: &'a Uses) -> impl Iterator<Item = &'a str> {
    uses.iter().filter(move |(_, used)| used.iter().any(|used| used == name)).map(|(user, _)| user.as_str())
}

/// Whether a crate uses another one, directly or by a third.
fn reaches(from: &str, to: &str, uses: &Uses) -> bool {
    uses[from].iter().any(|used| used == to || reaches(used, to, uses))
}

const WIDTH: f64 = 1000.0;
const BOX: (f64, f64) = (130.0, 26.0);
const STEP: f64 = 84.0;

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#1f2328;text-anchor:middle}.b{fill:#fff}\
path{stroke:#afb8c1;fill:none}.c{fill:#ddf4ff;stroke:#1f6feb}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.b{fill:#0d1117}path{stroke:#6e7681}.c{fill:#12283f;stroke:#58a6ff}}";

fn svg(uses: &Uses) -> String {
    let mut rows: Vec<Vec<&str>> = Vec::new();
    for name in uses.keys() {
        let row = row(name, uses);
        rows.resize_with(rows.len().max(row + 1), Vec::new);
        rows[row].push(name);
    }
    let height = rows.len() as f64 * STEP;
    let mut places: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for (n, row) in rows.iter_mut().enumerate() {
        // Below those that use it, as far as there is room.
        let centre = |name: &str| {
            let above: Vec<f64> = users(name, uses).filter_map(|user| Some(places.get(user)?.0)).collect();
            above.iter().sum::<f64>() / above.len().max(1) as f64
        };
        row.sort_by(|a, b| centre(a).total_cmp(&centre(b)));
        let share = WIDTH / row.len() as f64;
        for (m, name) in row.iter().enumerate() {
            places.insert(name, ((m as f64 + 0.5) * share, (n as f64 + 0.5) * STEP));
        }
    }
    let (mut lines, mut boxes) = (String::new(), String::new());
    for (name, used) in uses {
        let (x, y) = places[name.as_str()];
        // What a crate uses by way of another one needs no line of its own.
        for other in used.iter().filter(|other| !used.iter().any(|third| reaches(third, other, uses))) {
            let (to_x, to_y) = places[other.as_str()];
            let mut path = format!("M{x:.0} {:.0}", y + BOX.1 / 2.0);
            for (n, row) in rows.iter().enumerate() {
                let between = (n as f64 + 0.5) * STEP;
                if between > y && between < to_y {
                    // Past the boxes of this row.
                    let share = WIDTH / row.len() as f64;
                    let gap = ((x + (to_x - x) * (between - y) / (to_y - y)) / share).round() * share;
                    let _ = write!(path, "L{gap:.0} {:.0}V{:.0}", between - BOX.1 / 2.0, between + BOX.1 / 2.0);
                }
            }
            let _ = writeln!(lines, "<path d='{path}L{to_x:.0} {:.0}'/>", to_y - BOX.1 / 2.0);
        }
        let (left, top) = (x - BOX.0 / 2.0, y - BOX.1 / 2.0);
        let _ = writeln!(
            boxes,
            "<rect class='c' x='{left:.0}' y='{top:.0}' width='{}' height='{}' rx='4'/><text x='{x:.0}' y='{:.0}'>{name}</text>",
            BOX.0,
            BOX.1,
            y + 4.0
        );
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>\n\
         <style>{STYLE}</style>\n<rect class='b' width='100%' height='100%'/>\n{lines}{boxes}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_stands_above_all_that_it_uses_and_each_way_is_drawn_once() {
        let crates = [("top", vec!["middle", "bottom"]), ("middle", vec!["bottom"]), ("bottom", vec![])];
        let owned =
            |(name, used): &(&str, Vec<&str>)| (name.to_string(), used.iter().map(ToString::to_string).collect());
        let uses: Uses = crates.iter().map(owned).collect();
        assert_eq!(["bottom", "middle", "top"].map(|name| row(name, &uses)), [2, 1, 0]);
        let picture = svg(&uses);
        assert_eq!((picture.matches("<path").count(), picture.matches("<rect class='c'").count()), (2, 3));
    }
}
