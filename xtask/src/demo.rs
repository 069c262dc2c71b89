//! The tour: a disk image behind vhost-user, served by nbdblk, read from Python, by two clients at once.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::setup;
use crate::shell::{self, Daemon, TempDir, find};

/// Reads ext4's superblock, which is at 1024, and prints its magic number and label (s_magic, s_volume_name).
const LABEL_SCRIPT: &str = r#"sb = h.pread(1024, 1024)
print("ext4 magic: 0x%x" % int.from_bytes(sb[56:58], "little"))
print("label:", sb[120:136].rstrip(b"\0").decode())"#;

/// Runs the tour; every command is shown before it runs, so that a user can repeat it.
pub(crate) fn run() -> Result<()> {
    if let Err(error) = setup::run(setup::Extent::Basic) {
        // The tour can do without its vhost-user device, and without nothing else.
        ensure!(setup::missing_programs(setup::Extent::Basic) == ["qemu-storage-daemon"], error);
        println!("setup: {error:#}");
    }
    say("Building nbdblk");
    show("cargo build --release -p nbdblk");
    let nbdblk = shell::build_nbdblk()?;
    let dir = TempDir::new("demo")?;
    let dir = dir.path();
    println!("  (everything below runs in {}, which is removed at the end)", dir.display());

    say("Making a qcow2 disk image with an ext4 file system and a file in it; nothing is mounted, no root is needed");
    std::fs::create_dir(dir.join("files"))?;
    std::fs::write(dir.join("files/hello.txt"), "Hello from a file inside an ext4 inside a qcow2.\n")?;
    run_shown(dir, "mkfs.ext4", &["-q", "-L", "nbdblk-demo", "-d", "files", "disk.raw", "64M"])?;
    write_boot_block(&dir.join("disk.raw"))?;
    run_shown(dir, "qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"])?;

    let backend = export(dir)?;
    let device = if backend.is_some() { "vhost-user=vhost.sock" } else { "io_uring=disk.raw" };

    say(&format!("Serving {device} as a Network Block Device; without --unix it would listen on nbd://localhost"));
    let mut serve = Command::new(&nbdblk);
    serve.args(["serve", device, "--unix", "nbd.sock"]).current_dir(dir).stdin(Stdio::null());
    show(&format!("{} &", shell::show(&serve)));
    let server = Daemon::start(&mut serve, &dir.join("nbd.sock"))?;
    let uri = "nbd+unix:///?socket=nbd.sock";

    say("Asking the server what it serves");
    run_shown(dir, "nbdinfo", &[uri])?;

    say("Reading the first 512 bytes from Python");
    run_shown(dir, "nbdsh", &["-u", uri, "-c", r#"print("%r" % h.pread(512, 0))"#])?;

    two_clients(dir, uri)?;

    say("Copying the whole disk out and taking the file from it");
    run_shown(dir, "nbdcopy", &[uri, "copy.raw"])?;
    run_shown(dir, "debugfs", &["-R", "cat /hello.txt", "copy.raw"])?;
    let same = std::fs::read(dir.join("disk.raw"))? == std::fs::read(dir.join("copy.raw"))?;
    ensure!(same, "the copy differs from the original");
    println!("  the copy is equal to the original, byte for byte");

    say("Ending the server (SIGTERM)");
    server.stop()?;
    drop(backend);
    println!("  it ended with status 0\n");
    println!("Next: `{} serve --help`, `nbdblk drivers`, and the README.", nbdblk.display());
    Ok(())
}

/// Fills the first 512 bytes, which ext4 leaves alone, with something worth printing.
fn write_boot_block(image: &Path) -> Result<()> {
    let text = "The first sector of a disk, read over NBD from a vhost-user device. ";
    let block: Vec<u8> = text.bytes().cycle().take(512).collect();
    std::fs::OpenOptions::new().write(true).open(image)?.write_all_at(&block, 0)?;
    Ok(())
}

/// Starts qemu-storage-daemon's vhost-user-blk export of disk.qcow2, where there is such a program.
fn export(dir: &Path) -> Result<Option<Daemon>> {
    if find("qemu-storage-daemon").is_none() {
        say("qemu-storage-daemon could not be had on this machine: the tour goes on with a plain file over io_uring");
        return Ok(None);
    }
    say("Exporting the image as a vhost-user-blk device on vhost.sock, as a storage daemon does for virtual machines");
    let mut qsd = shell::command("qemu-storage-daemon");
    qsd.args(["--blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"])
        .args(["--export", "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=vhost.sock,writable=on"])
        .args(["--pidfile", "qsd.pid"])
        .current_dir(dir)
        .stdin(Stdio::null());
    show(&format!("{} &", shell::show(&qsd)));
    // The pid file is written when the export listens.
    Ok(Some(Daemon::start(&mut qsd, &dir.join("qsd.pid"))?))
}

/// One client connects and stays; another comes, reads and goes; the first still reads.
fn two_clients(dir: &Path, uri: &str) -> Result<()> {
    say("Two clients at the same time: the first stays connected while the second reads");
    let stay = r#"import sys; sys.stdout.flush(); input()
print("the first client still reads:", h.pread(512, 0)[:17].decode())"#;
    let first = format!("{LABEL_SCRIPT}\n{stay}");
    let mut command = shell::command("nbdsh");
    command.args(["-u", uri, "-c", LABEL_SCRIPT]);
    show(&format!("{} # the first, which stays", shell::show(&command)));
    let mut child = shell::command("nbdsh")
        .args(["-u", uri, "-c", &first])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting nbdsh")?;
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    for line in lines.by_ref().take(2) {
        println!("  {}", line?);
    }
    run_shown(dir, "nbdsh", &["-u", uri, "-c", LABEL_SCRIPT])?;
    writeln!(child.stdin.take().expect("stdin is piped"))?;
    for line in lines {
        println!("  {}", line?);
    }
    ensure!(child.wait()?.success(), "the first client failed");
    Ok(())
}

fn say(text: &str) {
    println!("\n# {text}");
}

fn show(command: &str) {
    println!("$ {command}");
}

/// Shows a command and runs it with its output indented.
fn run_shown(dir: &Path, program: &str, args: &[&str]) -> Result<()> {
    let mut command = shell::command(program);
    command.args(args).current_dir(dir).stdin(Stdio::null());
    show(&shell::show(&command));
    let output = command.output().with_context(|| format!("starting {program}"))?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        println!("  {line}");
    }
    ensure!(
        output.status.success(),
        "{program} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
