//! The server and the files and disks that it serves: it closes them, never waits for one of them forever, and respects the locks
//! of other programs.

use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use nbdblk_tests::checker::{Checker, Durability};
use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Cmd, Daemon, Dir, Nbdblk, Output, deadline, eventually, nbdblk, nbdinfo, nbdsh, tool};
use nix::sys::signal::Signal;

use crate::MIB;

/// A mounted file system, unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    /// A file system in memory, on the directory `m`. `None`, with a loud notice, without the right to mount.
    fn tmpfs(dir: &Dir) -> Option<Self> {
        let path = dir.at("m");
        let _ = fs::create_dir(&path);
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64M", "tmpfs"]).arg(&path).output();
        match made {
            Ok(made) if made.status.success() => Some(Self(path)),
            refused => {
                eprintln!("SKIPPED: nothing can be mounted here (it takes root): {refused:?}");
                None
            }
        }
    }

    /// Unmounts it, which must succeed at once.
    #[track_caller]
    fn unmount(self) {
        let told = Command::new("umount").arg(&self.0).output().unwrap();
        assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(&self.0).output();
    }
}

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None`, with a loud notice, without the right to create one.
    fn new(file: &Path) -> Option<Self> {
        match Command::new("losetup").args(["--find", "--show"]).arg(file).output() {
            Ok(made) if made.status.success() => Some(Self(String::from_utf8(made.stdout).unwrap().trim().into())),
            refused => {
                eprintln!("SKIPPED: no loop device to be had here (it takes root and losetup): {refused:?}");
                None
            }
        }
    }

    fn spec(&self, more: &str) -> String {
        format!("io_uring={}{more}", self.0.display())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// An image on a FUSE file system: the file `fuse.img` in `dir`, served by qemu-storage-daemon, which can stop.
struct Fuse {
    daemon: Daemon,
    mount: Mount,
}

impl Fuse {
    /// `None`, with a loud notice, without FUSE.
    fn new(dir: &Dir) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            eprintln!("SKIPPED: there is no /dev/fuse here");
            return None;
        }
        let (image, at) = (dir.sparse("behind.img", 16 * MIB), dir.sparse("fuse.img", 0));
        // The server's locks do not pass through FUSE, and this is not a test of them.
        let node = format!("driver=file,node-name=f,locking=off,filename={}", image.display());
        let export = format!("type=fuse,id=e,node-name=f,writable=on,mountpoint={}", at.display());
        let daemon = tool("qemu-storage-daemon").args(["--blockdev", &node, "--export", &export]);
        let mut daemon = daemon.spawn(dir.at("fuse.log"));
        let start = Instant::now();
        while fs::metadata(&at).map_or(0, |meta| meta.len()) != 16 * MIB {
            if !daemon.is_alive() {
                eprintln!("SKIPPED: no FUSE export can be made here: {}", daemon.log());
                return None;
            }
            assert!(start.elapsed() < deadline(), "the FUSE export appears: {}", daemon.log());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Some(Self { daemon, mount: Mount(at) })
    }

    fn freeze(&self) {
        self.daemon.signal(Signal::SIGSTOP);
    }

    fn spec(&self) -> String {
        format!("io_uring={}", self.mount.0.display())
    }
}

/// Serves with these arguments while `true` runs, which ends at once.
fn serve_briefly(dir: &Dir, args: &[&str]) -> Output {
    nbdblk().args(["serve"]).args(args).args(["--run", "true"]).within(dir.path()).run()
}

/// The server starts, and ends with success.
#[track_caller]
fn accepted(dir: &Dir, args: &[&str]) {
    let Output { status, err, .. } = serve_briefly(dir, args);
    assert!(status.success(), "{args:?}: {err}");
}

/// The server refuses, in one line that contains `words`.
#[track_caller]
fn refused(dir: &Dir, args: &[&str], words: &[&str]) {
    let Output { status, err, .. } = serve_briefly(dir, args);
    assert!(!status.success() && err.lines().count() == 1, "{args:?}: {err}");
    for word in words {
        assert!(err.contains(word), "{word} in {err}");
    }
}

#[test]
fn its_file_system_can_be_unmounted_when_the_server_has_ended() {
    let dir = Dir::new();
    for round in 0..12 {
        let Some(mount) = Mount::tmpfs(&dir) else { return };
        dir.sparse("m/d.img", 16 * MIB);
        let work =
            r#"nbdsh -u "$uri" -c "h.pwrite(b'x' * 100000, 7); h.flush(); h.zero(1 << 20, 0); h.trim(1 << 20, 0)""#;
        let command = if round % 3 == 0 { work } else { "true" };
        nbdblk().args(["serve", "io_uring=m/d.img", "--run", command]).within(dir.path()).ok();
        mount.unmount();
    }
}

#[test]
fn its_file_system_can_be_unmounted_when_the_export_is_gone() {
    let dir = Dir::new();
    let configure = |exports: &str| {
        fs::write(dir.at("nbdblk.toml"), format!("control = \"c\"\n[[export]]\ndevice = \"null=1M\"\n{exports}"))
            .unwrap();
    };
    configure("");
    let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
    let reload = |exports: &str| {
        configure(exports);
        nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).ok();
    };
    for round in 0..12 {
        let Some(mount) = Mount::tmpfs(&dir) else { return };
        let image = dir.sparse("m/d.img", 16 * MIB);
        reload("[[export]]\nname = \"x\"\ndevice = \"io_uring=m/d.img\"\n");
        if round % 3 == 0 {
            nbdsh(&server.uri_of("x"), "h.pwrite(b'x' * 100000, 7); h.flush(); h.zero(1 << 20, 0)");
        }
        reload("");
        let fds = PathBuf::from(format!("/proc/{}/fd", server.pid()));
        let is_open =
            || fs::read_dir(&fds).unwrap().flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|f| f == image));
        eventually("the server has closed the file", || !is_open());
        mount.unmount();
    }
    assert!(server.terminate().success());
}

#[test]
fn a_program_that_was_served_can_be_executed() {
    let dir = Dir::new();
    for _ in 0..20 {
        fs::copy("/bin/true", dir.at("program")).unwrap();
        accepted(&dir, &["io_uring=program"]);
        // It does not fail with "text file busy".
        Cmd::new(dir.at("program")).ok();
        fs::remove_file(dir.at("program")).unwrap();
    }
}

#[test]
fn a_hung_file_system_delays_neither_other_exports_nor_the_end() {
    let dir = Dir::new();
    let Some(fuse) = Fuse::new(&dir) else { return };
    dir.sparse("near.img", 16 * MIB);
    let far = format!("far:{}", fuse.spec());
    let server = Nbdblk::unix(&dir, &[&far, "near:io_uring=near.img", "--threads", "1"]);
    let mut clients: Vec<Raw> = (0..6).map(|_| Raw::enter(server.address(), Mode::Structured, "far")).collect();
    clients[0].write(0, &[7; 100_000]);
    assert_eq!(clients[0].read(0, 100_000), [7; 100_000]);
    let mut near = Raw::enter(server.address(), Mode::Structured, "near");
    fuse.freeze();
    for (client, command) in clients.iter_mut().zip([cmd::READ, cmd::WRITE, cmd::FLUSH, cmd::TRIM, cmd::WRITE_ZEROES]) {
        let payload = if command == cmd::WRITE { vec![1; 4096] } else { Vec::new() };
        let (at, len) = if command == cmd::FLUSH { (0, 0) } else { (8192, 4096) };
        client.request(0, command, at, len, &payload);
    }
    for n in 0..50 {
        near.write(n * 4096, &[n as u8; 4096]);
        assert_eq!(near.read(n * 4096, 4096), [n as u8; 4096]);
    }
    // A new client does not wait for the size either.
    let _ = Raw::enter(server.address(), Mode::Structured, "near");
    let _ = Raw::enter(server.address(), Mode::Structured, "far");
    // `terminate` has a deadline, and the kernel must let the process go.
    assert!(server.terminate().success());
}

#[test]
fn block_status_does_not_wait_for_a_file_system_that_hangs() {
    let dir = Dir::new();
    let Some(fuse) = Fuse::new(&dir) else { return };
    let server = Nbdblk::unix(&dir, &[&fuse.spec(), "--threads", "1"]);
    let mut client = Raw::greeted(server.address());
    client.negotiate_structured();
    client.negotiate_context("");
    client.go("");
    fuse.freeze();
    let reply = client.call(0, cmd::BLOCK_STATUS, 0, 1 << 20, b"");
    assert_eq!(reply.error, 0);
    assert!(server.terminate().success());
}

#[test]
fn an_image_that_qemu_has_open_is_refused() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    let image = dir.text("d.img");
    let open = |mode: &[&str]| {
        let mut qemu = tool("qemu-io").args(mode).args(["-f", "raw", &image]).spawn(dir.at("qemu.log"));
        qemu.type_line("read 0 512");
        qemu.await_text("read 512/512");
        qemu
    };
    let close = |mut qemu: Daemon| {
        qemu.type_line("quit");
        qemu.await_end();
    };
    let words = ["d.img is in use", "may write to it", "force-share=true"];
    let writer = open(&[]);
    refused(&dir, &["io_uring=d.img"], &words);
    refused(&dir, &["io_uring=d.img,read-only=true"], &words);
    accepted(&dir, &["io_uring=d.img,force-share=true"]);
    close(writer);
    let reader = open(&["-r"]);
    accepted(&dir, &["io_uring=d.img"]);
    close(reader);
    // The disk of a guest: qemu-storage-daemon permits only readers.
    let node = format!("driver=file,node-name=f,filename={image}");
    let socket =
        format!("type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={}", dir.text("v.sock"));
    let mut guest =
        tool("qemu-storage-daemon").args(["--blockdev", &node, "--export", &socket]).spawn(dir.at("qsd.log"));
    guest.await_that("its socket", |_| dir.at("v.sock").exists());
    refused(&dir, &["io_uring=d.img"], &["d.img is in use", "force-share=true"]);
    guest.signal(Signal::SIGTERM);
    guest.await_end();
    accepted(&dir, &["io_uring=d.img"]);
}

#[test]
fn qemu_and_other_servers_refuse_an_image_that_is_served() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    let image = dir.text("d.img");
    let qemu =
        |mode: &[&str], command: &str| tool("qemu-io").args(mode).args(["-f", "raw", "-c", command, &image]).run();
    let server = Nbdblk::unix(&dir, &["io_uring=d.img"]);
    let Output { out, err, .. } = qemu(&[], "write 0 512");
    assert!(format!("{out}{err}").contains("lock"), "{out}{err}");
    assert!(qemu(&["-r"], "read 0 512").out.contains("read 512/512"));
    refused(&dir, &["io_uring=d.img"], &["d.img is in use", "force-share=true"]);
    refused(&dir, &["io_uring=d.img,read-only=true"], &["d.img is in use", "force-share=true"]);
    accepted(&dir, &["io_uring=d.img,force-share=true"]);
    assert!(server.terminate().success());
    // Readers share the image, and exclude writers.
    let reader = Nbdblk::unix(&dir, &["io_uring=d.img,read-only=true"]);
    accepted(&dir, &["io_uring=d.img,read-only=true"]);
    refused(&dir, &["io_uring=d.img"], &["d.img is in use"]);
    assert!(reader.terminate().success());
    accepted(&dir, &["io_uring=d.img"]);
    let sharing = Nbdblk::unix(&dir, &["io_uring=d.img,force-share=true"]);
    assert!(qemu(&[], "write 0 512").out.contains("wrote 512/512"));
    assert!(sharing.terminate().success());
}

#[test]
fn a_server_that_was_killed_can_be_started_again_at_once() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    for _ in 0..10 {
        // Dropping it kills it, and the kernel closes the file a little later.
        drop(Nbdblk::unix(&dir, &["io_uring=d.img"]));
    }
    let Some(disk) = Loop::new(&dir.sparse("e.img", MIB)) else { return };
    for _ in 0..10 {
        drop(Nbdblk::unix(&dir, &[&disk.spec("")]));
    }
    // So that it can be detached.
    accepted(&dir, &[&disk.spec("")]);
}

#[test]
fn one_server_may_open_an_image_more_than_once() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    let configure = |properties: &str| {
        let text = format!("control = \"c\"\n[[export]]\nname = \"x\"\ndevice = \"io_uring=d.img{properties}\"\n");
        fs::write(dir.at("nbdblk.toml"), text).unwrap();
    };
    accepted(&dir, &["a:io_uring=d.img", "b:io_uring=d.img"]);
    accepted(&dir, &["a:io_uring=d.img,read-only=true", "b:io_uring=d.img", "c:io_uring=d.img,direct=true"]);
    configure(",read-only=true");
    let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
    let mut old = Raw::enter(server.address(), Mode::Structured, "x");
    for properties in ["", ",direct=true", ",num-entries=64", ",read-only=true", ""] {
        configure(properties);
        let told = nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).ok().out;
        assert_eq!(told.trim(), "reopened: \"x\"", "{properties}");
        assert_eq!(old.read(0, 3), [0; 3]);
        let mut new = Raw::enter(server.address(), Mode::Structured, "x");
        assert_eq!(new.read(0, 3), [0; 3]);
        old = new;
        refused(&dir, &["io_uring=d.img"], &["d.img is in use"]);
    }
    drop(old);
    assert!(server.terminate().success());
    accepted(&dir, &["io_uring=d.img"]);
}

#[test]
fn one_server_exports_an_image_for_reading_twice() {
    let dir = Dir::new();
    fs::write(dir.sparse("d.img", MIB), vec![7; MIB as usize]).unwrap();
    let properties = [
        &["a:io_uring=d.img,read-only=true", "b:io_uring=d.img,read-only=true"][..],
        &["a:io_uring=d.img", "b:io_uring=d.img", "--read-only"],
    ];
    for args in properties {
        let server = Nbdblk::unix(&dir, args);
        let mut clients = ["a", "b"].map(|name| Raw::enter(server.address(), Mode::Structured, name));
        for client in &mut clients {
            assert_eq!(client.read(4096, 512), [7; 512]);
            assert_ne!(client.call(0, cmd::WRITE, 0, 1, b"x").error, 0, "it is read-only");
        }
        // The process holds the lock until both are closed.
        refused(&dir, &["io_uring=d.img"], &["d.img is in use"]);
        drop(clients);
        assert!(server.terminate().success());
        accepted(&dir, &["io_uring=d.img"]);
    }
}

#[test]
fn a_reload_opens_a_file_that_replaced_another() {
    let dir = Dir::new();
    let image = dir.sparse("disk.img", MIB);
    symlink("disk.img", dir.at("link.img")).unwrap();
    let exports = [("x", "disk.img"), ("same", "disk.img,read-only=true"), ("link", "link.img,force-share=true")];
    let exports =
        exports.map(|(name, device)| format!("[[export]]\nname = \"{name}\"\ndevice = \"io_uring={device}\"\n"));
    fs::write(dir.at("nbdblk.toml"), format!("control = \"c\"\n{}", exports.concat())).unwrap();
    let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
    let reload = || nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).run();
    let changes = || {
        let Output { status, out, err } = reload();
        assert!(status.success(), "{err}");
        out.trim().to_owned()
    };
    let enter = |name: &str| Raw::enter(server.address(), Mode::Structured, name);
    let size = |name: &str| nbdinfo(&server.uri_of(name))["exports"][0]["export-size"].as_u64().unwrap();
    let mut old = enter("x");
    old.write(0, b"old");
    assert_eq!(changes(), "nothing has changed");

    // A file that another program writes to is refused, and the server keeps its state.
    let new = dir.sparse("new.img", 2 * MIB);
    fs::File::options().write(true).open(&new).unwrap().write_all_at(b"new", 0).unwrap();
    let writer = Nbdblk::unix(&dir, &["io_uring=new.img"]);
    fs::rename(&new, &image).unwrap();
    let told = reload();
    assert!(!told.status.success() && told.err.contains("disk.img is in use"), "{}", told.err);
    assert_eq!((size("x"), enter("x").read(0, 3)), (MIB, b"old".to_vec()));
    assert!(writer.terminate().success());

    assert_eq!(changes(), r#"reopened: "x", "same", "link""#);
    for name in ["x", "same", "link"] {
        assert_eq!((size(name), enter(name).read(0, 3)), (2 * MIB, b"new".to_vec()), "{name}");
    }
    old.write(3, b" goes on");
    assert_eq!(old.read(0, 11), b"old goes on");
    assert_eq!(enter("x").read(0, 3), b"new");
    assert_eq!(changes(), "nothing has changed");
    // The lock moves too: this is the image in use now.
    refused(&dir, &["io_uring=disk.img"], &["disk.img is in use"]);
    // When its last client leaves, the server closes the file, which has no name any more.
    drop(old);
    let fds = PathBuf::from(format!("/proc/{}/fd", server.pid()));
    let gone =
        |fd: fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|f| f.to_string_lossy().ends_with("disk.img (deleted)"));
    eventually("the server has closed the deleted file", || !fs::read_dir(&fds).unwrap().flatten().any(gone));

    // A link that points elsewhere also names another file.
    dir.sparse("other.img", 3 * MIB);
    symlink("other.img", dir.at("new-link")).unwrap();
    fs::rename(dir.at("new-link"), dir.at("link.img")).unwrap();
    assert_eq!(changes(), r#"reopened: "link""#);
    assert_eq!((size("x"), size("link")), (2 * MIB, 3 * MIB));
    // If the path names no file, the open one stays in use.
    fs::remove_file(&image).unwrap();
    assert_eq!(changes(), "nothing has changed");
    assert_eq!(enter("x").read(0, 3), b"new");
    assert!(server.terminate().success());
}

#[test]
fn another_process_counts_although_this_one_has_the_image_open() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    let configure = |properties: &str| {
        let text = format!("control = \"c\"\n[[export]]\nname = \"x\"\ndevice = \"io_uring=d.img{properties}\"\n");
        fs::write(dir.at("nbdblk.toml"), text).unwrap();
    };
    configure(",read-only=true");
    let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
    let other = Nbdblk::unix(&dir, &["io_uring=d.img,read-only=true"]);
    configure("");
    let reload = || nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).run();
    let told = reload();
    assert!(!told.status.success() && told.err.contains("d.img is in use"), "{}", told.err);
    // A refusal leaves no lock behind.
    accepted(&dir, &["io_uring=d.img,read-only=true"]);
    assert!(other.terminate().success());
    assert!(reload().status.success());
    assert!(server.terminate().success());
}

#[test]
fn a_block_device_that_is_mounted_is_not_written_to() {
    let dir = Dir::new();
    let Some(disk) = Loop::new(&dir.sparse("d.img", 16 * MIB)) else { return };
    tool("mkfs.ext4").args(["-q"]).args([&disk.0]).ok();
    fs::create_dir(dir.at("m")).unwrap();
    let mount = || Command::new("mount").arg(&disk.0).arg(dir.at("m")).output().unwrap();
    assert!(mount().status.success());
    let mounted = Mount(dir.at("m"));
    refused(&dir, &[&disk.spec("")], &["is in use: it is mounted", "read-only=true", "force-share=true"]);
    accepted(&dir, &[&disk.spec(",read-only=true")]);
    accepted(&dir, &[&disk.spec(",force-share=true")]);
    mounted.unmount();
    // And the other way round. For this process, it is the same device as before.
    let (a, b) = (format!("a:{}", disk.spec("")), format!("b:{}", disk.spec(",direct=true")));
    let server = Nbdblk::unix(&dir, &[&a, &b]);
    assert!(!mount().status.success(), "the kernel mounts what is claimed");
    refused(&dir, &[&disk.spec("")], &["is in use"]);
    assert!(server.terminate().success());
    assert!(mount().status.success());
    Mount(dir.at("m")).unmount();
}

/// The kernel keeps a loop device that is torn down until the server closes it, so clients do not notice. Each round sets the device
/// up again, starts another server on it, and verifies the content.
#[test]
fn no_write_is_lost_when_a_loop_device_is_torn_down_and_set_up() {
    let dir = Dir::in_memory();
    let image = dir.sparse("d.img", 16 * MIB);
    let mut checker: Option<Checker> = None;
    for _ in 0..10 {
        let Some(disk) = Loop::new(&image) else { return };
        let server = Nbdblk::unix(&dir, &[&disk.spec("")]);
        let raw = Raw::enter(server.address(), Mode::Structured, "");
        let mut now = match checker.take() {
            None => Checker::new(raw, 0, 1024, Durability::Often),
            Some(before) => before.on(raw),
        };
        (0..5).for_each(|_| now.round());
        // Torn down under load.
        drop(disk);
        (0..5).for_each(|_| now.round());
        now.verify_all();
        now.flush();
        assert!(server.terminate().success());
        checker = Some(now);
    }
    // The file has it all.
    let server = Nbdblk::unix(&dir, &["io_uring=d.img"]);
    let raw = Raw::enter(server.address(), Mode::Structured, "");
    checker.expect("ten rounds").on(raw).verify_all();
}

/// Runs the rest of its arguments, with io_uring forbidden by a seccomp filter, as in containers.
const FORBID: &str = "
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
stmt = lambda code, k, t=0, f=0: struct.pack('HBBI', code, t, f, k)
# The number of the system call; io_uring_setup has the same one everywhere: EPERM, and all others are allowed.
filters = stmt(0x20, 0) + stmt(0x15, 425, 0, 1) + stmt(0x06, 0x00050001) + stmt(0x06, 0x7fff0000)
buffer = ctypes.create_string_buffer(filters)
program = struct.pack('HL', 4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
";

#[test]
fn info_reports_that_io_uring_is_forbidden() {
    let dir = Dir::new();
    dir.sparse("d.img", MIB);
    let run = |args: &[&str]| {
        let server = nbdblk();
        let path = server.path().to_str().unwrap().to_owned();
        tool("python3").args(["-c", FORBID, &path]).args(args).within(dir.path()).run()
    };
    for args in [&["info", "io_uring=d.img"][..], &["serve", "io_uring=d.img", "--run", "true"]] {
        let Output { status, out, err } = run(args);
        assert!(status.code() == Some(1) && out.is_empty(), "{args:?}: {out}{err}");
        assert!(err.contains("io_uring is forbidden here") && err.contains("d.img"), "{err}");
    }
    let null = run(&["info", "null=1M"]);
    assert!(null.status.success(), "the filter forbids nothing else: {}", null.err);
}

#[test]
fn an_error_of_the_device_is_logged_once() {
    let dir = Dir::new();
    let image = dir.sparse("d.img", MIB);
    let server = Nbdblk::unix(&dir, &["io_uring=d.img"]);
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    fs::File::options().write(true).open(&image).unwrap().set_len(MIB / 2).unwrap();
    for _ in 0..100 {
        assert_ne!(client.call(0, cmd::READ, MIB - 8192, 4096, b"").error, 0);
    }
    let line = "d.img: read of 4096 bytes at offset 1040384 failed: the file or disk has shrunk";
    server.await_log(line);
    assert_eq!(server.log().matches(line).count(), 1, "{}", server.log());
    assert_eq!(server.log().lines().filter(|line| line.contains("failed")).count(), 1, "{}", server.log());
    assert!(server.terminate().success());
}

#[test]
fn a_full_file_system_is_reported_for_every_operation() {
    let dir = Dir::new();
    let Some(mount) = Mount::tmpfs(&dir) else { return };
    let image = dir.sparse("m/d.img", 256 * MIB);
    let server = Nbdblk::unix(&dir, &["io_uring=m/d.img"]);
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    // Fill all but the last pages.
    let filler = fs::File::create(dir.at("m/filler")).unwrap();
    let mut at = 0;
    while filler.write_all_at(&[1; 65536], at).is_ok() {
        at += 65536;
    }
    const ENOSPC: u32 = 28;
    const NO_HOLE: u16 = 2;
    assert_eq!(client.call(0, cmd::WRITE, 0, 1 << 20, &vec![1; 1 << 20]).error, ENOSPC);
    assert_eq!(client.call(NO_HOLE, cmd::WRITE_ZEROES, 0, 1 << 20, b"").error, ENOSPC);
    assert_eq!(client.call(0, cmd::TRIM, 0, 1 << 20, b"").error, 0);
    assert_eq!(client.call(0, cmd::FLUSH, 0, 0, b"").error, 0);
    for operation in ["write of", "write zeroes of"] {
        let lines = || server.log().lines().filter(|l| l.contains(operation) && l.contains("No space")).count();
        eventually("each kind is logged", || lines() == 1);
    }
    drop((client, image, filler));
    assert!(server.terminate().success());
    mount.unmount();
}

#[test]
fn a_new_client_gets_the_current_size() {
    let dir = Dir::new();
    let image = dir.sparse("d.img", MIB);
    let server = Nbdblk::unix(&dir, &["io_uring=d.img"]);
    let mut old = Raw::enter(server.address(), Mode::Structured, "");
    for size in [2 * MIB, MIB / 2, 3 * MIB] {
        fs::File::options().write(true).open(&image).unwrap().set_len(size).unwrap();
        assert_eq!(nbdinfo(&server.uri())["exports"][0]["export-size"], size);
        let mut new = Raw::enter(server.address(), Mode::Extended, "");
        new.write(size - 4096, &[7; 4096]);
        assert_eq!(new.read(size - 4096, 4096), [7; 4096]);
        assert_eq!(old.read(0, 4096).len(), 4096, "earlier clients go on");
    }
    assert!(server.terminate().success());
}

#[test]
fn an_end_that_direct_access_cannot_reach_is_refused() {
    let dir = Dir::new();
    dir.sparse("d.img", 1000);
    refused(&dir, &["io_uring=d.img,direct=true"], &["d.img has 1000 bytes", "leave out direct=true", "truncate"]);
    let copy = nbdblk().args(["serve", "io_uring=d.img", "--run", r#"nbdcopy "$uri" copy.img"#]).within(dir.path());
    copy.ok();
    assert_eq!(fs::metadata(dir.at("copy.img")).unwrap().len(), 1000);
}
