//! The invariants of ARCHITECTURE.md and of the style, held as tests: most of them are of absence.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::sync::OnceLock;

use nbdblk_tests::{files, root, tool};
use serde_json::Value;

/// Which of our packages each of our packages may be built on; some are still to come.
const MAY_USE: &[(&str, &[&str])] = &[
    // The codec knows nobody, and blkdev knows neither NBD nor a driver.
    ("nbd-proto", &[]),
    ("blkdev", &[]),
    ("blkdev-ring", &["blkdev"]),
    // A driver knows no other driver.
    ("blkdev-io-uring", &["blkdev", "blkdev-ring"]),
    ("blkdev-virtio", &["blkdev"]),
    ("blkdev-vhost-user", &["blkdev", "blkdev-virtio"]),
    ("blkdev-vdpa", &["blkdev", "blkdev-virtio"]),
    ("blkdev-vfio", &["blkdev"]),
    ("blkdev-virtio-pci", &["blkdev", "blkdev-vfio", "blkdev-virtio"]),
    ("blkdev-nvme", &["blkdev", "blkdev-ring", "blkdev-vfio"]),
    ("blkdev-libblkio", &["blkdev"]),
    // The one place that knows them all.
    (
        "blkdev-drivers",
        &[
            "blkdev",
            "blkdev-io-uring",
            "blkdev-libblkio",
            "blkdev-nvme",
            "blkdev-vdpa",
            "blkdev-vhost-user",
            "blkdev-virtio",
            "blkdev-virtio-pci",
        ],
    ),
    // The client knows neither the server nor devices.
    ("nbd-client", &["nbd-proto"]),
    // The server knows no driver.
    ("nbd-server-core", &["blkdev", "nbd-proto"]),
    ("nbdblk", &["blkdev", "blkdev-drivers", "nbd-server-core"]),
    ("nbdkit-nbdblk-plugin", &["blkdev", "blkdev-drivers"]),
    ("nbdblk-manual", &["blkdev-drivers", "nbdblk"]),
    ("nbdblk-tests", &[]),
    ("xtask", &["nbd-client"]),
];

/// Packages that may allocate an error, parse arguments and print: programs, not libraries.
const PROGRAMS: &[&str] = &["nbdblk", "nbdblk-manual", "nbdkit-nbdblk-plugin", "nbdblk-tests", "xtask"];

/// What only programs may use.
const FOR_PROGRAMS: &[&str] = &["anyhow", "clap"];

/// Runtimes: anything can drive a `Queue`, so no package brings one. Examples and tests may use them.
const RUNTIMES: &[&str] = &["async-std", "futures", "mio", "monoio", "smol", "tokio", "tokio-uring"];

/// The files where `unsafe` may stand, and for what.
const UNSAFE: &[(&str, &str)] = &[
    ("bins/nbdkit-plugin/src/abi.rs", "nbdkit's table of callbacks"),
    ("bins/nbdkit-plugin/src/callbacks.rs", "nbdkit's buffers"),
    ("bins/nbdkit-plugin/src/host.rs", "nbdkit's functions"),
    ("bins/nbdblk/src/sys.rs", "pidfd_open"),
    ("crates/blkdev-drivers/src/fd.rs", "a file descriptor named by its number"),
    ("crates/blkdev-io-uring/src/sys.rs", "ioctls"),
    ("crates/blkdev-libblkio/src/queue.rs", "blkio's raw pointers"),
    ("crates/blkdev-nvme/src/model.rs", "a controller that reads the queues, for tests"),
    ("crates/blkdev-nvme/src/sys.rs", "ioctls"),
    ("crates/blkdev-ring/src/ring.rs", "SQEs that point at memory"),
    ("crates/blkdev-vdpa/src/sys.rs", "ioctls"),
    ("crates/blkdev-vfio/src/bar.rs", "registers of a device"),
    ("crates/blkdev-vfio/src/sys.rs", "ioctls"),
    ("crates/blkdev-vhost-user/src/control.rs", "memory regions told to the back end"),
    ("crates/blkdev-vhost-user/tests/common/mod.rs", "a back end that maps what it is told of"),
    ("crates/blkdev-virtio/src/model.rs", "a device that reads the rings, for tests"),
    ("crates/blkdev-virtio/src/notifier.rs", "preadv2, which reads an eventfd without blocking"),
    ("crates/blkdev/src/arena.rs", "pieces of a mapping"),
    ("crates/blkdev/src/fuzz/dma.rs", "a device that reads and writes registered memory, for tests"),
    ("crates/blkdev/src/mem.rs", "the mapping"),
    ("crates/blkdev/src/socket.rs", "recvmsg and sendmsg with device memory, accept4"),
    ("crates/blkdev/src/window.rs", "queue memory shared with the device"),
];

/// What `cargo metadata` says of the workspace with all features, on Linux.
fn metadata() -> &'static Value {
    static METADATA: OnceLock<Value> = OnceLock::new();
    METADATA.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["metadata", "--format-version=1", "--all-features", "--locked"]);
        command.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).current_dir(root());
        let output = command.output().expect("cargo runs the tests, so it is there");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
    })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// The packages of the workspace.
fn ours() -> impl Iterator<Item = &'static Value> {
    let members = list(metadata(), "workspace_members");
    list(metadata(), "packages").iter().filter(|package| members.contains(&package["id"]))
}

/// The packages that are really built, of the workspace and beyond.
fn built() -> impl Iterator<Item = &'static Value> {
    let nodes: BTreeSet<&str> = list(&metadata()["resolve"], "nodes").iter().map(|node| text(node, "id")).collect();
    list(metadata(), "packages").iter().filter(move |package| nodes.contains(text(package, "id")))
}

/// What a package is built on: not what only its tests use.
fn used_by(package: &Value) -> impl Iterator<Item = &str> {
    list(package, "dependencies").iter().filter(|dep| dep["kind"] != "dev").map(|dep| text(dep, "name"))
}

#[test]
fn each_package_uses_only_what_it_may_know() {
    let names: BTreeSet<&str> = ours().map(|package| text(package, "name")).collect();
    for package in ours() {
        let name = text(package, "name");
        let row = MAY_USE.iter().find(|row| row.0 == name);
        let (_, allowed) = row.unwrap_or_else(|| panic!("{name} is new: say in MAY_USE what it may know"));
        for used in used_by(package).filter(|used| names.contains(used)) {
            assert!(allowed.contains(&used), "{name} must not know {used}: see ARCHITECTURE.md");
        }
    }
    assert!(ours().any(|package| text(package, "name") == "nbd-proto" && used_by(package).next().is_none()));
}

#[test]
fn libraries_use_nothing_made_for_programs() {
    for package in ours().filter(|package| !PROGRAMS.contains(&text(package, "name"))) {
        for used in used_by(package) {
            assert!(!FOR_PROGRAMS.contains(&used), "{} uses {used}: that is for programs", text(package, "name"));
        }
    }
}

#[test]
fn nothing_brings_a_runtime() {
    // What the packages of the workspace are built on, directly or not.
    let mut used: BTreeSet<&str> = ours().map(|package| text(package, "id")).collect();
    let mut next: Vec<&str> = used.iter().copied().collect();
    while let Some(id) = next.pop() {
        let node = list(&metadata()["resolve"], "nodes").iter().find(|node| text(node, "id") == id);
        for dep in list(node.unwrap_or_else(|| panic!("cargo resolves {id}")), "deps") {
            let builds = list(dep, "dep_kinds").iter().any(|kind| kind["kind"] != "dev");
            if builds && used.insert(text(dep, "pkg")) {
                next.push(text(dep, "pkg"));
            }
        }
    }
    for package in built().filter(|package| used.contains(text(package, "id"))) {
        assert!(!RUNTIMES.contains(&text(package, "name")), "{} is in the tree", text(package, "name"));
    }
}

#[test]
fn every_library_has_an_example_and_every_package_the_lints() {
    for package in ours() {
        let (name, manifest) = (text(package, "name"), text(package, "manifest_path"));
        let has =
            |kind: &str| list(package, "targets").iter().any(|target| list(target, "kind").contains(&kind.into()));
        let is_library = manifest.contains("/crates/");
        assert!(!is_library || has("example"), "{name} has no example");
        let manifest = fs::read_to_string(manifest).expect("cargo names files that are there");
        assert!(manifest.contains("[lints]\nworkspace = true"), "{name} does not take the lints of the workspace");
    }
}

/// Cargo builds the examples of all packages into one directory, where one would replace another of the same name.
#[test]
fn no_two_examples_have_the_same_name() {
    let mut owners: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in ours() {
        for target in list(package, "targets").iter().filter(|target| list(target, "kind").contains(&"example".into()))
        {
            owners.entry(text(target, "name")).or_default().push(text(package, "name"));
        }
    }
    assert!(!owners.is_empty(), "the libraries have examples");
    owners.retain(|_, owners| owners.len() > 1);
    assert!(owners.is_empty(), "packages have examples of the same name: {owners:?}");
}

/// The strings of the list `key = [...]` in deny.toml.
fn denied(key: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("deny.toml")).expect("deny.toml is in the root");
    let (_, rest) = text.split_once(&format!("\n{key} = [\n")).unwrap_or_else(|| panic!("no {key} in deny.toml"));
    let (list, _) = rest.split_once("\n]").expect("the list ends");
    // The first string of a line is the value; one after it is a reason.
    list.lines().map(|line| line.split('"').nth(1).expect("each line has a string").to_owned()).collect()
}

#[test]
fn the_licences_of_all_dependencies_are_known() {
    let allowed = denied("allow");
    for package in built() {
        let name = text(package, "name");
        let licence = package["license"].as_str().unwrap_or_else(|| panic!("{name} has no licence"));
        assert!(is_allowed(licence, &allowed), "{name} has the licence {licence}: see deny.toml");
    }
}

/// Whether an SPDX expression can be met with the allowed licences. AND binds tighter than OR.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ").replace(" WITH ", "\0");
    let words: Vec<String> = spaced.split_whitespace().map(|word| word.replace('\0', " WITH ")).collect();
    let mut words = words.iter().map(String::as_str).peekable();
    either(&mut words, allowed)
}

fn either<'a>(words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> bool {
    let mut met = both(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        met |= both(words, allowed);
    }
    met
}

fn both<'a>(words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> bool {
    let mut met = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one<'a>(words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>, allowed: &[String]) -> bool {
    match words.next() {
        Some("(") => {
            let met = either(words, allowed);
            assert_eq!(words.next(), Some(")"), "a licence with an open bracket");
            met
        }
        Some(licence) => allowed.iter().any(|allowed| allowed == licence),
        None => panic!("a licence that ends early"),
    }
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT", "Apache-2.0 WITH LLVM-exception"].map(String::from);
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-2.0", false),
        ("GPL-2.0 OR MIT", true),
        ("GPL-2.0/MIT", true),
        ("GPL-2.0 AND MIT", false),
        ("(GPL-2.0 OR MIT) AND MIT", true),
        ("MIT AND (GPL-2.0 OR Zlib)", false),
        ("MIT OR GPL-2.0 AND Zlib", true),
        ("Apache-2.0 WITH LLVM-exception OR Zlib", true),
        ("Apache-2.0", false),
    ] {
        assert_eq!(is_allowed(expression, &allowed), expected, "{expression}");
    }
}

/// A user with the declared compiler must be able to build the dependencies as well.
#[test]
fn no_dependency_needs_a_newer_compiler_than_we_declare() {
    let version = |package: &Value| {
        let text = package["rust_version"].as_str().unwrap_or("1.0").to_owned();
        let mut numbers = text.split('.').map(|n| n.parse::<u32>().expect("a version consists of numbers"));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    };
    let declared = ours().map(version).min().expect("there are packages");
    for package in built() {
        let (name, needed) = (text(package, "name"), version(package));
        assert!(needed <= declared, "{name} needs Rust {needed:?}, and we declare {declared:?}");
    }
}

#[test]
fn no_package_is_there_in_two_versions_without_a_reason() {
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in built() {
        let (name, version) = (text(package, "name"), text(package, "version"));
        versions.entry(name).or_default().insert(format!("{name}@{version}"));
    }
    let skipped: BTreeSet<String> = denied("skip").into_iter().collect();
    for (name, versions) in &versions {
        let counted = versions.difference(&skipped).count();
        assert!(counted <= 1, "{name} is there as {versions:?}: agree on one, or give a reason in deny.toml");
    }
    for skipped in &skipped {
        let needed = versions.values().any(|versions| versions.len() > 1 && versions.contains(skipped));
        assert!(needed, "{skipped} is not doubled any more: take it out of deny.toml");
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for (name, text) in files(&[".rs"]) {
        assert!(text.starts_with("//! "), "{name} does not begin with //!");
    }
}

#[test]
fn nothing_is_left_unfinished() {
    // In two halves, because this file is looked through as well.
    let words =
        [("to", "do!("), ("db", "g!("), ("FIX", "ME"), ("#[ign", "ore"), ("unimpl", "emented!("), ("TO", "DO:")];
    for (name, text) in files(&[".rs", ".toml", ".md"]) {
        for word in words.map(|(a, b)| [a, b].concat()) {
            assert!(!text.contains(&word), "{name} contains {word}");
        }
    }
}

/// Words that documents and comments avoid, and what to write instead.
const SPELLING: &[(&str, &str)] = &[
    ("anew", "again"),
    ("by itself", "on its own, individually"),
    ("everybody", "the party: client, worker, device, caller"),
    ("for ever", "forever"),
    ("given up", "abandoned, declared dead"),
    ("let go of", "released, dropped"),
    ("nobody", "the party: no client, no worker, no caller"),
    ("of late", "recently"),
    ("somebody", "the party: a client, a device, a caller"),
    ("the words of the command line", "arguments"),
    ("told of", "registered"),
    ("under way", "in flight"),
    ("whoever", "the party: a client, a worker, the caller"),
    ("withdrawn", "cancelled"),
];

/// Words that codespell takes for others: terms, and misspelled words of tests.
const NO_MISTAKES: &str = "bu,conectix,crate,crates,exprot,keypair,nd,ore,ot,pahts,siez,te";

#[test]
fn words_are_spelled_correctly() {
    let files = files(&[".rs", ".md", ".toml", ".sh", ".yml", ".html"]).into_iter().map(|(name, _)| name);
    let said = tool("codespell").within(root()).args(["-L", NO_MISTAKES]).args(files).run();
    assert!(said.status.success(), "misspelled words:\n{}{}", said.out, said.err);
}

/// The words of a text in lower case, without punctuation, with one space on each side.
fn spaced(text: &str) -> String {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.fold(" ".to_owned(), |all, word| all + &word.to_lowercase() + " ")
}

/// Documents and the comments of product code are in plain English. Code is not checked.
#[test]
fn documents_and_comments_are_in_plain_english() {
    let is_ours = |name: &str| ["crates/", "bins/", "xtask/"].iter().any(|dir| name.starts_with(dir));
    let comments = |text: &str| {
        let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("//"));
        lines.collect::<Vec<_>>().join(" ")
    };
    let sources = files(&[".rs"]).into_iter().filter(|(name, _)| is_ours(name) && name.contains("/src/"));
    let texts = sources.map(|(name, text)| (name, comments(&text))).chain(files(&[".md"]));
    let mut found = Vec::new();
    for (name, text) in texts {
        let text = spaced(&text);
        for (word, better) in SPELLING.iter().filter(|(word, _)| text.contains(&format!(" {word} "))) {
            found.push(format!("{name}: not \"{word}\", but {better}"));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn no_file_names_a_place_on_somebodys_machine() {
    let places = [("/wo", "rk/"), ("/ro", "ot/"), ("/ho", "me/")];
    for (name, text) in files(&[".rs", ".toml", ".md", ".lock", ".yml", ".html", ".json", "run"]) {
        for place in places.map(|(a, b)| [a, b].concat()) {
            assert!(!text.contains(&place), "{name} contains {place}");
        }
    }
}

/// docs/security.md names the tests that show each promise.
#[test]
fn every_test_that_the_security_page_names_exists() {
    let page = fs::read_to_string(root().join("docs/security.md")).expect("the page is there");
    let sources: String = files(&[".rs"]).into_iter().map(|(_, text)| text).collect();
    let names: BTreeSet<&str> =
        page.split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() > 1).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names.iter().chain(&["orderly_devices"]) {
        // Also as an argument of a macro that makes tests.
        let is_there =
            [format!("fn {name}("), format!("{name} ="), format!("{name},")].iter().any(|text| sources.contains(text));
        assert!(is_there, "docs/security.md names the test {name}, which does not exist");
    }
}

/// A test is named by its file, without the ending, and its function.
#[test]
fn every_test_that_the_page_on_restarts_names_exists() {
    let page = fs::read_to_string(root().join("docs/restarts.md")).expect("the page is there");
    let named: Vec<_> = page.split('`').filter_map(|name| name.split_once("::")).collect();
    assert!(named.len() > 20, "the page names its tests");
    for (file, name) in named {
        let places = [root().join("tests/tests").join(file), root().join(file)];
        let texts = places.iter().map(|place| fs::read_to_string(place.with_extension("rs")));
        let has = |text: String| text.contains(&format!("fn {name}("));
        assert!(texts.flatten().any(has), "docs/restarts.md names {file}::{name}, which does not exist");
    }
}

#[test]
fn unsafe_stands_where_it_is_known_to() {
    let allowed = [("allow(uns", "afe_code"), ("expect(uns", "afe_code")].map(|(a, b)| [a, b].concat());
    let allows = |text: &str| allowed.iter().any(|words| text.contains(words));
    let found: BTreeSet<String> =
        files(&[".rs"]).into_iter().filter(|(_, text)| allows(text)).map(|(name, _)| name).collect();
    let known: BTreeSet<String> = UNSAFE.iter().map(|(name, _)| (*name).to_owned()).collect();
    let new: Vec<_> = found.difference(&known).collect();
    assert!(new.is_empty(), "{new:?} allow unsafe code: can it be done without? If not, say in UNSAFE what for");
    let gone: Vec<_> = known.difference(&found).collect();
    assert!(gone.is_empty(), "{gone:?} need no unsafe code any more: take them out of UNSAFE");
    for package in ["nbd-client", "nbd-proto", "nbd-server-core"] {
        let text = fs::read_to_string(root().join("crates").join(package).join("src/lib.rs")).expect("a library");
        assert!(text.contains(&["#![forbid(uns", "afe_code)]"].concat()), "{package} does not forbid unsafe code");
    }
}

/// Files that start threads without a role, and why.
const THREADS: &[(&str, &str)] = &[
    ("bins/nbdblk/src/child.rs", "waits for the command of --run"),
    ("bins/nbdblk/src/control.rs", "removes files at the end"),
    ("bins/nbdblk/src/logger.rs", "starts before the sandbox, and confines itself then"),
    ("bins/nbdblk/src/plan.rs", "opens devices after an upgrade"),
    ("bins/nbdblk/src/resume.rs", "reports to the service manager"),
    ("bins/nbdblk/src/sandbox/mod.rs", "confines the thread"),
    ("bins/nbdblk/src/serve.rs", "announces, and reloads"),
    ("bins/nbdblk/src/upgrades.rs", "executes the next program"),
    ("crates/blkdev/src/thread.rs", "starts threads with a role"),
    ("crates/blkdev-nvme/src/model.rs", "for tests"),
    ("crates/blkdev-virtio/src/model.rs", "for tests"),
];

/// A thread without a role would not be confined.
#[test]
fn every_thread_of_the_server_has_a_role() {
    let starts = |text: &str| {
        let product = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        product.contains("Builder::new().name(") || product.contains("thread::spawn(")
    };
    let is_product =
        |name: &str| name.contains("/src/") && (name.starts_with("crates/") || name.starts_with("bins/nbdblk/"));
    let all = files(&[".rs"]).into_iter().filter(|(name, text)| is_product(name) && starts(text));
    let found: BTreeSet<String> = all.map(|(name, _)| name).collect();
    let known: BTreeSet<String> = THREADS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(found, known, "use blkdev::thread::spawn, or say in THREADS why not");
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    for (name, text) in files(&[".md"]) {
        let dir = root().join(&name).parent().expect("a file lies in a directory").to_owned();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            let outside = path.is_empty() || path.contains("://") || path.contains(' ');
            assert!(outside || dir.join(path).exists(), "{name}: no {target}");
        }
    }
}
