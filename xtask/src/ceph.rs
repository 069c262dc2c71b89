//! `cargo xtask ceph`: an image of a Ceph cluster, which qemu-storage-daemon exports over vhost-user and nbdblk serves.
//!
//! The cluster has one monitor, and one OSD that keeps everything in memory. It runs in a root directory of its own and listens
//! on the loopback address only.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::shell::{self, Daemon};
use crate::{setup, trixie};

/// Where the cluster keeps its files, in its root.
const HOME: &str = "/nbdblk-ceph";

/// Size of the image.
const SIZE: usize = 64 << 20;

/// Longest wait for a step of the cluster.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the OSD stops.
const STOP: Duration = Duration::from_secs(5);

pub(crate) fn run() -> Result<()> {
    setup::run(setup::Extent::Tests)?;
    let nbdblk = shell::build_nbdblk()?;
    let cluster = Cluster::start(trixie::ceph_root()?)?;
    let disk = cluster.export()?;
    let socket = cluster.at("nbd.sock");
    let mut serve = Command::new(nbdblk);
    // The lock of a killed client ends 30 s later (`osd_client_watch_timeout`).
    serve.arg("serve").arg(format!("disk:vhost-user={},request-timeout=60s", cluster.at("rbd.sock").display()));
    let server = Daemon::start(serve.arg("-U").arg(&socket), &socket)?;
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());

    println!("ceph: copying {} MiB to the image, and comparing with what `rbd export` returns", SIZE >> 20);
    let source = cluster.at("source");
    let mut random = File::open("/dev/urandom").context("opening /dev/urandom")?;
    std::io::copy(&mut std::io::Read::take(&mut random, SIZE as u64), &mut File::create(&source)?)?;
    shell::ok(shell::command("nbdcopy").arg(&source).arg(&uri))?;
    ensure!(cluster.image()? == fs::read(&source)?, "the image differs from what was copied to it");

    println!(
        "ceph: fio writes and verifies, while qemu-storage-daemon is killed (-9) and started again, and the OSD stops"
    );
    // It leaves a file in its directory.
    let mut fio = verify(&uri).current_dir(cluster.at("")).spawn().context("starting fio")?;
    sleep(Duration::from_secs(2));
    drop(disk);
    let disk = cluster.export()?;
    signal(&cluster.osd, Signal::SIGSTOP);
    sleep(STOP);
    signal(&cluster.osd, Signal::SIGCONT);
    let status = fio.wait()?;
    ensure!(status.success(), "fio ended with {status}");

    println!("ceph: comparing what clients read with what `rbd export` returns");
    let copy = cluster.at("copy");
    shell::ok(shell::command("nbdcopy").arg(&uri).arg(&copy))?;
    server.stop()?;
    // It has the lock of the image.
    drop(disk);
    ensure!(cluster.image()? == fs::read(&copy)?, "clients read something else than what is in the image");
    println!("ceph: passed");
    Ok(())
}

/// fio, for ten seconds at least.
fn verify(uri: &str) -> Command {
    let mut fio = shell::command("fio");
    fio.args(["--name=ceph", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c"]);
    fio.args(["--thread", "--time_based", "--runtime=10", "--output=/dev/null"]);
    fio.arg(format!("--size={SIZE}")).arg(format!("--uri={uri}"));
    fio
}

fn signal(daemon: &Daemon, signal: Signal) {
    let _ = kill(Pid::from_raw(daemon.id().cast_signed()), signal);
}

/// A cluster; ended and removed when this is dropped.
struct Cluster {
    // In this order: the OSD ends first.
    osd: Daemon,
    _monitor: Daemon,
    root: PathBuf,
}

impl Cluster {
    fn start(root: PathBuf) -> Result<Self> {
        let home = root.join(HOME.trim_start_matches('/'));
        let _ = fs::remove_dir_all(&home);
        fs::create_dir_all(home.join("osd"))?;
        let id = || Ok::<_, anyhow::Error>(fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned());
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (cluster, monitor) = (id()?, format!("[v2:127.0.0.1:{port}]"));
        fs::write(home.join("ceph.conf"), configuration(&cluster, &monitor))?;

        println!("ceph: starting a monitor and an OSD");
        let run = |words: &[&str]| shell::output(&mut inside(&root, words)).map(drop);
        let keyring = format!("{HOME}/keyring");
        run(&["ceph-authtool", "--create-keyring", &keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])?;
        let map = format!("{HOME}/map");
        run(&["monmaptool", "--create", "--fsid", &cluster, "--addv", "a", &monitor, &map])?;
        run(&["ceph-mon", "--mkfs", "-i", "a", "--monmap", &map, "--keyring", &keyring])?;
        let daemon = |words: &[&str], log: &str| {
            let mut command = inside(&root, words);
            let log = File::create(home.join(log))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            Daemon::start_when(&mut command, || true)
        };
        let monitor = daemon(&["ceph-mon", "-i", "a", "-f"], "monitor.out")?;
        run(&["ceph", "osd", "create"])?;
        run(&["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", &id()?])?;
        let osd = daemon(&["ceph-osd", "-i", "0", "-f"], "osd.out")?;
        let cluster = Self { osd, _monitor: monitor, root };
        let start = Instant::now();
        while !cluster.ask(&["ceph", "osd", "stat"])?.contains("1 up") {
            ensure!(start.elapsed() < PATIENCE, "the OSD is not up after {PATIENCE:?}");
            sleep(Duration::from_millis(200));
        }
        cluster.ask(&["ceph", "osd", "pool", "create", "rbd", "8", "8"])?;
        cluster.ask(&["rbd", "create", "disk", "--size", &format!("{}B", SIZE)])?;
        Ok(cluster)
    }

    /// qemu-storage-daemon with the image, over vhost-user.
    fn export(&self) -> Result<Daemon> {
        let (socket, conf) = (self.at("rbd.sock"), format!("{HOME}/ceph.conf"));
        let _ = fs::remove_file(&socket);
        let disk = format!("driver=rbd,node-name=disk,pool=rbd,image=disk,conf={conf}");
        let export =
            format!("type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={HOME}/rbd.sock,writable=on");
        Daemon::start(
            &mut inside(&self.root, &["qemu-storage-daemon", "--blockdev", &disk, "--export", &export]),
            &socket,
        )
    }

    /// The content of the image.
    fn image(&self) -> Result<Vec<u8>> {
        let path = self.at("exported");
        let _ = fs::remove_file(&path);
        self.ask(&["rbd", "export", "--no-progress", "disk", &format!("{HOME}/exported")])?;
        Ok(fs::read(path)?)
    }

    /// Runs a program, and returns its output. It must end in good time: Ceph's clients wait forever for a cluster.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let limit = PATIENCE.as_secs().to_string();
        let Ok(output) = shell::output(&mut inside(&self.root, &[&["timeout", &limit], words].concat())) else {
            let log = |name: &str| fs::read_to_string(self.at(name)).unwrap_or_default();
            bail!("{} failed\nthe monitor: {}\nthe OSD: {}", words.join(" "), log("monitor.out"), log("osd.out"));
        };
        Ok(output)
    }

    /// A file of the cluster, as this process sees it.
    fn at(&self, name: &str) -> PathBuf {
        self.root.join(HOME.trim_start_matches('/')).join(name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // What the processes still write there is lost with them.
        let _ = fs::remove_dir_all(self.root.join(HOME.trim_start_matches('/')));
    }
}

/// A command in the root, with its own /dev and /proc. It dies with this process.
fn inside(root: &Path, words: &[&str]) -> Command {
    let mut command = shell::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "sh", "-c"]);
    command.arg(r#"mount --bind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@""#);
    command.arg(root).args(words).env("CEPH_CONF", format!("{HOME}/ceph.conf"));
    command
}

fn configuration(cluster: &str, monitor: &str) -> String {
    format!(
        "[global]
fsid = {cluster}
mon_host = {monitor}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 1G
mon_data_avail_warn = 2
mon_data_avail_crit = 1
ms_bind_msgr1 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
run_dir = {HOME}
admin_socket =
log_file = {HOME}/$name.log
mon_data = {HOME}/monitor
osd_data = {HOME}/osd
keyring = {HOME}/keyring
"
    )
}
