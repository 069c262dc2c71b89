//! The files of the project, for tests that read them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::root;

/// Directories without sources: build output, fuzzing input.
const SKIPPED: [&str; 4] = ["target", ".git", "corpus", "artifacts"];

/// Returns every file of the project with one of these endings: its path from the root, and its text.
pub fn files(endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    collect(root(), &mut found);
    let relative = |path: &Path| path.strip_prefix(root()).expect("found below the root").display().to_string();
    let wanted =
        found.iter().map(|path| (relative(path), path)).filter(|(name, _)| endings.iter().any(|e| name.ends_with(e)));
    wanted.map(|(name, path)| (name, fs::read_to_string(path).expect("sources are text"))).collect()
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("the tree can be read").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let skipped = SKIPPED.iter().any(|skipped| name == *skipped);
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && !skipped => collect(&path, found),
            Ok(kind) if kind.is_file() => found.push(path),
            _ => {}
        }
    }
}
