//! No files of a package depend on each other in a circle, and imports name the file that defines what they import: so each
//! file can be read with only those that it names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use nbdblk_tests::root;

/// Circles that are there for a reason: the package's sources, and files of the circle.
const ARGUED: &[(&str, &[&str], &str)] = &[(
    "crates/blkdev-drivers/src",
    &["common", "driver", "settings"],
    "a driver is opened with settings, which are the settings of a driver",
)];

/// A file's place among the modules of its package: `tls::records`; empty for `lib.rs` and `main.rs`.
type Module = Vec<String>;

/// The files below a package's `src`.
fn modules(dir: &Path, place: &Module, found: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(dir).expect("the sources are there").flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|name| name.to_str()).expect("names are UTF-8").to_owned();
        let mut module = place.clone();
        if path.is_dir() {
            module.push(name);
            modules(&path, &module, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            if !["lib", "main", "mod"].contains(&name.as_str()) {
                module.push(name);
            }
            found.insert(module, code(&fs::read_to_string(&path).expect("sources are UTF-8")));
        }
    }
}

/// A file without its comments and its unit tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The paths in a file: those of its imports, one by one, and those that are spelled out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for part in code.split("use ").skip(1) {
        let tree = part.split(';').next().unwrap_or_default();
        if tree.len() < 4000 {
            expand(&tree.split_whitespace().collect::<Vec<_>>().join(" "), &mut found);
        }
    }
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let path: String =
                code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
            found.push(path);
        }
    }
    let split = |path: &String| path.split("::").map(|part| part.trim().to_owned()).collect::<Vec<_>>();
    found.iter().map(split).filter(|path| path.iter().all(|part| !part.is_empty())).collect()
}

/// `a::{b, c::{d, e}}` is `a::b`, `a::c::d` and `a::c::e`.
fn expand(tree: &str, found: &mut Vec<String>) {
    let Some((start, rest)) = tree.split_once('{') else {
        found.push(tree.split(" as ").next().unwrap_or_default().trim().to_owned());
        return;
    };
    let (mut depth, mut part) = (0, String::new());
    for c in rest.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => expand(&format!("{}{}", start.trim(), std::mem::take(&mut part).trim()), found),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                part.push(c);
            }
        }
    }
    if !part.trim().is_empty() {
        expand(&format!("{}{}", start.trim(), part.trim()), found);
    }
}

/// Which file a path leads to, seen from `module`, and what of the path is left then.
fn target(path: &[String], module: &Module, files: &BTreeMap<Module, String>) -> Option<(Module, Vec<String>)> {
    let (mut base, mut rest) = match path.first()?.as_str() {
        "crate" => (Module::new(), &path[1..]),
        "self" => (module.clone(), &path[1..]),
        "super" => (module.clone(), path),
        name => {
            let mut child = module.clone();
            child.push(name.to_owned());
            files.contains_key(&child).then_some((module.clone(), path))?
        }
    };
    while rest.first().is_some_and(|part| part == "super") {
        base.pop();
        rest = &rest[1..];
    }
    while let Some(part) = rest.first() {
        let mut child = base.clone();
        child.push(part.clone());
        if !files.contains_key(&child) {
            break;
        }
        (base, rest) = (child, &rest[1..]);
    }
    Some((base, rest.to_vec()))
}

/// Each file, and the files that it names.
fn graph(files: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    let named = |(module, code): (&Module, &String)| {
        let targets = paths(code).into_iter().filter_map(|path| target(&path, module, files));
        let others = targets.map(|(file, _)| file).filter(|file| file != module && !file.is_empty());
        (module.clone(), others.collect())
    };
    files.iter().filter(|(module, _)| !module.is_empty()).map(named).collect()
}

fn reaches(from: &Module, to: &Module, graph: &BTreeMap<Module, BTreeSet<Module>>) -> bool {
    let (mut seen, mut ahead) = (BTreeSet::new(), vec![from]);
    while let Some(here) = ahead.pop() {
        for next in graph.get(here).into_iter().flatten() {
            if next == to {
                return true;
            }
            if seen.insert(next) {
                ahead.push(next);
            }
        }
    }
    false
}

/// The `src` of every package, and its files.
fn packages() -> Vec<(String, BTreeMap<Module, String>)> {
    let mut found = Vec::new();
    let below = |dir: &str| {
        let entries = fs::read_dir(root().join(dir)).expect("the directory is there").flatten();
        let sources = entries.map(|entry| format!("{dir}/{}/src", entry.file_name().to_string_lossy()));
        sources.collect::<Vec<_>>()
    };
    for source in
        [below("crates"), below("bins"), vec!["xtask/src".into(), "xtask/manual/src".into(), "tests/src".into()]]
            .concat()
    {
        let mut files = BTreeMap::new();
        modules(&root().join(&source), &Module::new(), &mut files);
        found.push((source, files));
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

#[test]
fn no_files_depend_on_each_other() {
    let mut used = BTreeSet::new();
    for (source, files) in packages() {
        let graph = graph(&files);
        for module in graph.keys().filter(|module| reaches(module, module, &graph)) {
            let name = module.join("::");
            let argued = ARGUED.iter().position(|(of, names, _)| *of == source && names.contains(&name.as_str()));
            let names: Vec<_> = graph[module].iter().filter(|next| reaches(next, module, &graph)).collect();
            let argued = argued.unwrap_or_else(|| panic!("{source}: {name} is in a circle by {names:?}"));
            used.insert(argued);
        }
    }
    assert_eq!(used.len(), ARGUED.len(), "a circle is gone: take it out of the list");
}

#[test]
fn imports_name_the_file_that_defines_what_they_import() {
    for (source, files) in packages().into_iter().filter(|(source, _)| source.starts_with("crates/")) {
        for (module, code) in files.iter().filter(|(module, _)| !module.is_empty()) {
            for path in paths(code).iter().filter(|path| path[0] == "crate") {
                let Some((file, rest)) = target(path, module, &files) else { continue };
                let root_defines = |name: &str| {
                    let text = &files[&Module::new()];
                    ["const ", "macro_rules! ", "fn "].iter().any(|kind| text.contains(&format!("{kind}{name}")))
                };
                let through_lib = file.is_empty() && rest.first().is_some_and(|name| !root_defines(name));
                assert!(!through_lib, "{source}: {} imports {} through lib.rs", module.join("::"), path.join("::"));
            }
        }
    }
}

#[test]
fn import_trees_are_understood() {
    let mut found = Vec::new();
    expand("crate::{a::{B, c::D as E}, f, g::H}", &mut found);
    assert_eq!(found, ["crate::a::B", "crate::a::c::D", "crate::f", "crate::g::H"]);
    let files = |names: &[&str]| -> BTreeMap<Module, String> {
        let module = |name: &str| name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        names.iter().map(|name| (module(name), String::new())).collect()
    };
    let files = files(&["", "a", "a::c", "f"]);
    let at = |path: &str, module: &str| {
        let path: Vec<String> = path.split("::").map(str::to_owned).collect();
        let module: Module = module.split("::").map(str::to_owned).collect();
        target(&path, &module, &files).map(|(file, _)| file.join("::"))
    };
    assert_eq!(at("crate::a::c::D", "f").as_deref(), Some("a::c"));
    assert_eq!(at("super::f", "a").as_deref(), Some("f"));
    assert_eq!(at("c::D", "a").as_deref(), Some("a::c"));
    assert_eq!(at("std::io", "a"), None);
}
