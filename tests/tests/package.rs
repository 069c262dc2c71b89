//! The libraries as a stranger gets them: packaged, unpacked, and used from outside the workspace.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nbdblk_tests::{Dir, root};

/// The libraries, in the order in which they depend on each other, as `cargo package` names them.
fn libraries() -> Vec<String> {
    let crates = fs::read_dir(root().join("crates")).expect("the libraries are there");
    crates.map(|entry| entry.expect("it can be listed").file_name().into_string().expect("names are ASCII")).collect()
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn cargo(dir: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(dir);
    command
}

/// The example of a device of one's own is a program that anybody can write: it is built from the packages, without the
/// workspace, and serves.
#[test]
fn a_project_outside_the_workspace_serves_a_device_of_its_own() {
    let dir = Dir::new();
    let mut package = cargo(root());
    package
        .args(["package", "--no-verify", "--allow-dirty", "--offline", "--target-dir"])
        .arg(dir.path())
        .args(libraries().iter().flat_map(|name| ["-p", name.as_str()]));
    run(&mut package);
    let mut manifest = String::from(
        "[package]\nname = \"mine\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n[dependencies]\nblkdev = \"0.1.0\"\n\
         nbd-server-core = \"0.1.0\"\n\n[patch.crates-io]\n",
    );
    for name in libraries() {
        let unpacked = dir.at(&format!("{name}-0.1.0"));
        let packed = dir.at(&format!("package/{name}-0.1.0.crate"));
        run(Command::new("tar").arg("-xzf").arg(packed).arg("-C").arg(dir.path()));
        for needed in ["README.md", "src/lib.rs"] {
            assert!(unpacked.join(needed).exists(), "the package {name} has no {needed}");
        }
        manifest.push_str(&format!("{name} = {{ path = {unpacked:?} }}\n"));
    }
    let mine = dir.at("mine");
    fs::create_dir_all(mine.join("src")).expect("a new directory");
    fs::write(mine.join("Cargo.toml"), manifest).expect("a new file");
    fs::copy(root().join("Cargo.lock"), mine.join("Cargo.lock")).expect("the versions that are there");
    let example = root().join("crates/nbd-server-core/examples/own_device.rs");
    fs::copy(example, mine.join("src/main.rs")).expect("the example is there");
    run(cargo(&mine).args(["build", "--offline"]).env("CARGO_TARGET_DIR", dir.at("built")));

    let socket = dir.at("nbd.sock");
    let mut server =
        Command::new(dir.at("built/debug/mine")).arg(&socket).stdout(Stdio::piped()).spawn().expect("it runs");
    let mut ready = String::new();
    let stdout = server.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready).expect("it says when it serves");
    let text = Command::new("nbdcopy").arg(ready.trim()).arg("-").output();
    server.kill().expect("it runs");
    server.wait().expect("it ends");
    let text = String::from_utf8(text.expect("nbdcopy runs").stdout).expect("lines of text");
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    assert_eq!((lines.len(), lines[0], lines[16383]), (16384, "block 0", "block 16383"));
}
