//! The manual pages are current and without mistakes, and the completions work in their shells.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A directory that is removed when the test has ended.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nbdblk-manual-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a new directory");
        Self(path)
    }

    fn text(&self) -> &str {
        self.0.to_str().expect("the path is UTF-8")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn manual(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nbdblk-manual")).args(args).output().expect("nbdblk-manual runs")
}

/// The output of a tool, which succeeds.
fn tool(name: &str, args: &[&str]) -> String {
    let output = Command::new(name).args(args).env("LC_ALL", "C.UTF-8").env("MANWIDTH", "80").output();
    let output = output.unwrap_or_else(|error| panic!("{name} is not installed: run `cargo xtask setup`: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?}: {out}{err}");
    format!("{out}{err}")
}

fn pages(dir: &Dir) -> Vec<PathBuf> {
    let made = manual(&["pages", dir.text(), "2026-01-02"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let list = |path: &Path| std::fs::read_dir(path).expect("it is there").map(|entry| entry.expect("an entry").path());
    let found: Vec<PathBuf> = list(&dir.0).flat_map(|section| list(&section).collect::<Vec<_>>()).collect();
    assert!(found.len() >= 6, "{found:?}");
    found
}

/// Options and properties are those of the program.
#[test]
fn the_pages_are_current() {
    let checked = manual(&["check"]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn mandoc_finds_no_mistake() {
    let dir = Dir::new("lint");
    for page in pages(&dir) {
        let path = page.to_str().expect("UTF-8");
        assert_eq!(tool("mandoc", &["-T", "lint", "-W", "style", path]), "", "{path}");
    }
}

#[test]
fn man_shows_the_pages_without_warnings() {
    let dir = Dir::new("man");
    for page in pages(&dir) {
        let path = page.to_str().expect("UTF-8");
        let command = format!("man --warnings=w -l '{path}' 2>&1 >/dev/null");
        assert_eq!(tool("sh", &["-c", &command]), "", "{path}");
        let text = tool("man", &["-l", path]);
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "SEE ALSO"] {
            assert!(text.contains(section), "{path} has no section {section}");
        }
    }
}

/// Each shell completes `nbdblk s` to a command, and `nbdblk serve --rea` to an option. bash completes `nbdblk check ` to a file.
#[test]
fn completions_work_in_each_shell() {
    let dir = Dir::new("completions");
    let made = manual(&["completions", dir.text()]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let at = |name: &str| dir.0.join(name).to_str().expect("UTF-8").to_owned();

    let bash = "source \"$1\"; COMP_WORDS=(nbdblk serve --rea); COMP_CWORD=2; _nbdblk nbdblk --rea serve; echo ${COMPREPLY[*]}";
    let found = tool("bash", &["--norc", "-ec", bash, "bash", &at("nbdblk.bash")]);
    assert!(found.contains("--read-only") && found.contains("--ready-fd"), "bash: {found}");

    // With the options of the real call, bash offers file names if the function offers nothing.
    let bash = "source \"$1\"; COMP_WORDS=(nbdblk check ''); COMP_CWORD=2; _nbdblk nbdblk '' check; echo ${#COMPREPLY[*]}; complete -p";
    let found = tool("bash", &["--norc", "-ec", bash, "bash", &at("nbdblk.bash")]);
    assert!(found.starts_with("0\n") && found.contains("-o default"), "bash: {found}");

    let fish = "source $argv[1]; complete -C 'nbdblk serve --rea'; complete -C 'nbdblk s'";
    let found = tool("fish", &["--no-config", "-c", fish, &at("nbdblk.fish")]);
    for word in ["--read-only", "serve", "status"] {
        assert!(found.contains(word), "fish: {found}");
    }
    assert!(!found.contains("judge"), "fish: {found}");

    // The function runs only in a terminal; zsh compiles it as a whole.
    let zsh = "autoload -Uz compinit; compinit -u -D; fpath=(\"$1\" $fpath); autoload -Uz _nbdblk; autoload +X _nbdblk; \
               compdef _nbdblk nbdblk; print $_comps[nbdblk]; functions _nbdblk | grep -c -- --read-only";
    let found = tool("zsh", &["-f", "-c", zsh, "zsh", dir.text()]);
    assert!(found.starts_with("_nbdblk\n"), "zsh: {found}");
}
