//! The server is replaced on each device. A file system of the Linux kernel stays in use while the server and the back end are
//! replaced in turn.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw};
use nbdblk_tests::{Cmd, Daemon, Dir, Export, Nbdblk, Qsd, Rng, nbdblk, restarts, tool};

use crate::client::{KernelLog, NbdDisk};
use crate::target::{Target, check};

/// Writes files, makes them durable, and verifies them; without the page cache, so that reads reach the disk. Blocks of the file
/// `plain` are changed in place and never flushed on purpose. At the end, `verify` reads everything that `load` has written.
const FILES: &str = "
import json, os, random, sys
task, mount, stop, state = sys.argv[1:]
PLAIN, BLOCK = 1 << 20, 4096
def content(version):
    return random.Random(version).randbytes(1 + version * 7919 % 150000)
def read(name):
    with open(f'{mount}/{name}', 'rb', buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.readall()
def verify(name, version):
    if read(name) != content(version):
        raise SystemExit(f'{name} is not as version {version}')
def load():
    rng, versions, plain = random.Random(1), {}, bytearray(PLAIN)
    whole = open(f'{mount}/plain', 'w+b', buffering=0)
    whole.write(plain)
    while not os.path.exists(stop):
        version = versions.get('next', 0) + 1
        versions['next'] = version
        name = f'file{rng.randrange(24)}'
        with open(f'{mount}/new', 'wb') as file:
            file.write(content(version))
            file.flush()
            os.fsync(file.fileno())
        os.rename(f'{mount}/new', f'{mount}/{name}')
        directory = os.open(mount, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        versions[name] = version
        at = rng.randrange(PLAIN // BLOCK) * BLOCK
        plain[at:at + BLOCK] = bytes([version % 256]) * BLOCK
        os.pwrite(whole.fileno(), plain[at:at + BLOCK], at)
        name = rng.choice([name for name in versions if name != 'next'])
        verify(name, versions[name])
        print('round', version, flush=True)
    json.dump({'versions': versions, 'plain': plain.hex()}, open(state, 'w'))
def after():
    known = json.load(open(state))
    for name, version in known['versions'].items():
        if name != 'next':
            verify(name, version)
    if read('plain') != bytes.fromhex(known['plain']):
        raise SystemExit('plain differs')
load() if task == 'load' else after()
";

/// A file system in a qcow2 image behind a qemu-storage-daemon.
struct Stand {
    dir: Dir,
    image: PathBuf,
    qsd: Option<Qsd>,
    server: Nbdblk,
    disk: NbdDisk,
    log: KernelLog,
}

impl Stand {
    fn new() -> Self {
        let dir = Dir::in_memory();
        let image = dir.at("disk.qcow2");
        tool("qemu-img").args(["create", "-q", "-f", "qcow2"]).args([&image]).args(["64M"]).ok();
        let qsd = start(&dir, &image);
        let server = Nbdblk::unix(&dir, &[&format!("disk:{}", qsd.spec()), "--control", "control.sock"]);
        let socket = dir.text("nbd0.sock");
        let log = KernelLog::start();
        let disk = NbdDisk::new(&["-unix", &socket, "-N", "disk", "-C", "2"]);
        tool("mkfs.ext4").args(["-q", "-F", disk.path()]).ok();
        std::fs::create_dir(dir.at("mnt")).expect("the directory is empty");
        let stand = Self { dir, image, qsd: Some(qsd), server, disk, log };
        stand.mount();
        stand
    }

    fn mount(&self) {
        tool("mount").args([self.disk.path(), &self.dir.text("mnt")]).ok();
    }

    fn unmount(&self) {
        tool("umount").args([self.dir.text("mnt")]).ok();
    }

    fn files(&self, task: &str) -> Cmd {
        let paths = ["mnt", "stop", "state"].map(|name| self.dir.text(name));
        tool("python3").args(["-c", FILES, task]).args(paths)
    }

    /// Starts the load, and waits until it has done something.
    fn load(&self) -> Daemon {
        let mut load = self.files("load").spawn(self.dir.at("load.log"));
        load.await_text("round 3\n");
        load
    }

    fn upgrade(&self) {
        nbdblk().args(["upgrade", "--control", "control.sock"]).within(self.dir.path()).ok();
    }

    /// Kills the back end, and starts it again after a while.
    fn restart(&mut self, away: Duration) {
        self.qsd.take().expect("it runs").kill();
        thread::sleep(away);
        self.qsd = Some(start(&self.dir, &self.image));
    }

    /// Ends the load. All files are right, also after another mount, and so are the file system and the image.
    fn finish(self, load: Daemon) {
        std::fs::write(self.dir.at("stop"), "").expect("there is room for an empty file");
        let (status, said) = load.await_end();
        assert!(status.success(), "{status}: {said}");
        self.unmount();
        self.mount();
        self.files("after").ok();
        self.unmount();
        tool("fsck.ext4").args(["-f", "-n", self.disk.path()]).ok();
        self.log.assert_clean(&self.disk);
        let Self { server, disk, qsd, image, .. } = self;
        drop(disk);
        assert!(server.terminate().success());
        drop(qsd);
        // A kill may leave clusters that are allocated and not used. Nothing else may be wrong.
        let check = tool("qemu-img").args(["check", "-f", "qcow2"]).args([&image]).run();
        assert!([Some(0), Some(3)].contains(&check.status.code()), "{check:?}");
    }
}

fn start(dir: &Dir, image: &Path) -> Qsd {
    Qsd::start(dir, image, Export { format: "qcow2", queues: 2, ..Export::default() })
}

/// The test waits for more load after each upgrade and each restart, so that both meet requests in flight.
#[test]
fn a_file_system_survives_upgrades_and_a_killed_back_end() {
    check("the kernel's client", || {
        let mut stand = Stand::new();
        let mut load = stand.load();
        let mut rng = Rng(11);
        for _ in 0..restarts(10) {
            stand.upgrade();
            await_rounds(&mut load, 2);
            thread::sleep(Duration::from_millis(rng.below(300)));
            stand.restart(Duration::from_millis(rng.below(2) * rng.below(2000)));
            await_rounds(&mut load, 2);
            thread::sleep(Duration::from_millis(rng.below(300)));
        }
        stand.finish(load);
    });
}

/// Waits for more rounds of the load.
fn await_rounds(load: &mut Daemon, count: usize) {
    let rounds = |log: &str| log.matches("round ").count();
    let now = rounds(&load.log());
    load.await_that("that the load goes on", |log| rounds(log) >= now + count);
}

/// A client continues when the server is replaced, and reads what it wrote before.
pub(crate) fn upgraded(target: &Target) {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &[&target.spec(), "--control", "control.sock"]);
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    for n in 0..3_u8 {
        client.write(u64::from(n) << 20, &[n; 65536]);
        nbdblk().args(["upgrade", "--control", "control.sock"]).within(dir.path()).ok();
        for n in 0..=n {
            assert!(client.read(u64::from(n) << 20, 65536).iter().all(|&byte| byte == n), "after an upgrade");
        }
    }
    assert!(server.terminate().success());
}
