//! The licenses of the libraries that are parts of a program.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell;

/// How files with licenses are called.
const NAMES: [&str; 4] = ["LICENSE", "LICENCE", "COPYING", "NOTICE"];

/// The libraries of a program with their licenses; each text is there once.
pub(crate) fn of(package: &str, features: &[&str]) -> Result<String> {
    let manifests = manifests()?;
    let mut list = String::from("This program contains these libraries:\n\n");
    // Text, and the libraries that have it.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, version, license) in libraries(package, features)? {
        writeln!(list, "  {name} {version}: {license}")?;
        let dir =
            manifests.get(&(name.clone(), version)).with_context(|| format!("cargo has no directory of {name}"))?;
        for text in license_files(dir)? {
            texts.entry(text).or_default().push(name.clone());
        }
    }
    for (text, mut names) in texts {
        names.dedup();
        write!(list, "\n{}\n{}:\n\n{}\n", "=".repeat(78), names.join(", "), text.trim_end())?;
    }
    Ok(list)
}

/// Name, version and license of each library of other projects.
fn libraries(package: &str, features: &[&str]) -> Result<Vec<(String, String, String)>> {
    let mut tree = shell::cargo();
    tree.args(["tree", "-p", package, "-e", "normal,no-proc-macro", "--prefix=none", "--no-dedupe"]);
    let text = shell::output(tree.args(["--format={p}|{l}"]).args(features))?;
    let mut found = Vec::new();
    // Packages of the workspace have their path in parentheses.
    for line in text.lines().filter(|line| !line.contains('(')) {
        let (package, license) = line.split_once('|').context("cargo tree prints what it was asked for")?;
        let (name, version) = package.trim().split_once(" v").context("cargo tree prints a version")?;
        found.push((name.to_owned(), version.to_owned(), license.to_owned()));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// The directory of each package, by name and version.
fn manifests() -> Result<BTreeMap<(String, String), PathBuf>> {
    let text = shell::output(shell::cargo().args(["metadata", "--format-version=1", "--all-features"]))?;
    let all: Value = serde_json::from_str(&text)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = all["packages"].as_array().context("cargo metadata lists packages")?;
    let entry = |package: &Value| {
        let dir = PathBuf::from(text(&package["manifest_path"])).parent().map(Path::to_owned).unwrap_or_default();
        ((text(&package["name"]), text(&package["version"])), dir)
    };
    Ok(packages.iter().map(entry).collect())
}

fn license_files(dir: &Path) -> Result<Vec<String>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let is_license = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_uppercase();
        path.is_file() && NAMES.iter().any(|start| name.starts_with(start))
    };
    paths.iter().filter(is_license).map(|path| Ok(fs::read_to_string(path)?)).collect()
}
