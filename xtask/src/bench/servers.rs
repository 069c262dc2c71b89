//! The servers that are compared: ours, their rivals and the floor; how each is started and what it costs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::{time::clock_getcpuclockid, unistd::Pid};

use super::transport::Transport;
use crate::shell::{self, Daemon, find};
use crate::{dist, trixie};

/// A server and the device behind it. Servers of the same device are compared.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) name: &'static str,
    /// `null`, `memory`, `file` (in the page cache) or `vu` (vhost-user: a null device of qemu-storage-daemon).
    pub(crate) device: &'static str,
    pub(crate) program: Program,
    /// Its arguments, with IMAGE and VHOST for paths.
    words: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Floor,
    Nbdblk,
    /// Our plugin in nbdkit.
    Plugin,
    Nbdkit,
    QemuNbd,
    QemuStorageDaemon,
}

impl Program {
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Nbdblk | Self::Plugin)
    }

    pub(crate) fn is_rival(self) -> bool {
        !self.is_ours() && self != Self::Floor
    }
}

/// What each device of the benchmark holds.
pub(crate) const SIZE: u64 = 1 << 30;

const fn server(name: &'static str, device: &'static str, program: Program, words: &'static str) -> Server {
    Server { name, device, program, words }
}

pub(crate) const SERVERS: &[Server] = &[
    server("floor-null", "null", Program::Floor, ""),
    server("nbdblk-null", "null", Program::Nbdblk, "null=1G"),
    server("nbdkit-null", "null", Program::Nbdkit, "null 1G"),
    server("qemu-nbd-null", "null", Program::QemuNbd, "--image-opts driver=null-co,size=1073741824,read-zeroes=on"),
    server(
        "qsd-null",
        "null",
        Program::QemuStorageDaemon,
        "--blockdev driver=null-co,node-name=disk,size=1073741824,read-zeroes=on \
         --export type=nbd,id=e,node-name=disk,name=,writable=on",
    ),
    server("nbdblk-memory", "memory", Program::Nbdblk, "memory=1G"),
    server("nbdkit-memory", "memory", Program::Nbdkit, "memory 1G"),
    server("floor-file", "file", Program::Floor, "IMAGE"),
    server("nbdblk-file", "file", Program::Nbdblk, "io_uring=IMAGE"),
    server("plugin-file", "file", Program::Plugin, "io_uring path=IMAGE pin-threads=true"),
    server("nbdkit-file", "file", Program::Nbdkit, "file IMAGE"),
    server("nbdkit-blkio-file", "file", Program::Nbdkit, "blkio io_uring path=IMAGE"),
    server("qemu-nbd-file", "file", Program::QemuNbd, "-f raw --aio=io_uring IMAGE"),
    server(
        "qsd-file",
        "file",
        Program::QemuStorageDaemon,
        "--blockdev driver=file,aio=io_uring,node-name=disk,filename=IMAGE \
         --export type=nbd,id=e,node-name=disk,name=,writable=on",
    ),
    server("nbdblk-vu", "vu", Program::Nbdblk, "vhost-user=VHOST"),
    server("nbdblk-vu-nopoll", "vu", Program::Nbdblk, "--poll=0 vhost-user=VHOST"),
    server("plugin-vu", "vu", Program::Plugin, "virtio-blk-vhost-user path=VHOST pin-threads=true"),
    server("nbdkit-blkio-vu", "vu", Program::Nbdkit, "blkio virtio-blk-vhost-user path=VHOST"),
    server(
        "qemu-nbd-blkio-vu",
        "vu",
        Program::QemuNbd,
        "--image-opts driver=virtio-blk-vhost-user,path=VHOST,cache.direct=on",
    ),
];

/// Clients that a server must take at a time, where it wants to be told.
const CLIENTS: &str = "1000";

/// Where everything is that is measured.
#[derive(Debug)]
pub(crate) struct Stage {
    /// A root directory that the rivals are in, if not this machine's own.
    root: Option<PathBuf>,
    /// Sockets and logs; seen from inside the root without its prefix.
    dir: PathBuf,
    image: PathBuf,
    nbdblk: PathBuf,
    plugin: PathBuf,
    floor: PathBuf,
}

/// A server that serves.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) server: &'static Server,
    pub(crate) process: Daemon,
    pub(crate) backend: Option<Daemon>,
    pub(crate) address: Address,
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(u16),
    Tls(u16),
}

impl Address {
    pub(crate) fn uri(&self) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}"),
            // Who the server is costs nothing once the handshake is over.
            Self::Tls(port) => format!("nbds://127.0.0.1:{port}/?tls-verify-peer=false"),
        }
    }

    /// Whether a server listens there.
    fn is_served(&self) -> bool {
        match self {
            Self::Unix(path) => UnixStream::connect(path).is_ok(),
            Self::Tcp(port) | Self::Tls(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
        }
    }
}

impl Stage {
    /// Builds what is ours, finds the rivals, and makes the image. `raw`: drivers will be measured, too. `nbdblk` and
    /// `plugin`: builds to be measured instead.
    pub(crate) fn new(servers: &[&Server], raw: bool, nbdblk: Option<&str>, plugin: Option<&str>) -> Result<Self> {
        let has = |program| servers.iter().any(|server| server.program == program);
        let built = |given: Option<&str>, wanted, build: fn() -> Result<PathBuf>| match given {
            Some(path) => fs::canonicalize(path).with_context(|| format!("looking for {path}")),
            None if wanted => build(),
            None => Ok(PathBuf::new()),
        };
        let nbdblk = built(nbdblk, has(Program::Nbdblk), shell::build_nbdblk)?;
        let plugin = built(plugin, has(Program::Plugin), dist::build_plugin)?;
        let floor = built(None, has(Program::Floor), || example("nbd-proto", "floor"))?;
        let root = if raw || servers.iter().any(|server| server.needs_rivals()) { rivals_root() } else { None };
        let (dir, image) = match &root {
            Some(root) => (root.join("tmp"), root.join("tmp/nbdblk-bench.img")),
            None => (std::env::temp_dir(), shell::target_dir()?.join("bench.img")),
        };
        let dir = dir.join(format!("nbdblk-bench-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let stage = Self { root, dir, image, nbdblk, plugin, floor };
        if has(Program::Plugin) {
            fs::copy(&stage.plugin, stage.dir.join("plugin.so")).context("copying the plugin")?;
        }
        if raw || servers.iter().any(|server| server.words.contains("IMAGE")) {
            make_image(&stage.image)?;
        }
        Ok(stage)
    }

    /// Starts a server.
    ///
    /// # Errors
    /// It is not installed, or did not start: with its last words.
    pub(crate) fn start(&self, server: &'static Server, transport: Transport) -> Result<Running> {
        let backend = if server.words.contains("VHOST") { Some(self.vhost(server.name)?) } else { None };
        let socket = self.dir.join(format!("{}.sock", server.name));
        let _ = fs::remove_file(&socket);
        let address = match transport {
            Transport::Unix => Address::Unix(socket),
            Transport::Tcp => Address::Tcp(free_port()?),
            Transport::Tls => Address::Tls(free_port()?),
        };
        let mut command = self.command(server, &address)?;
        let ready = || address.is_served();
        let process = start(&mut command, &self.dir.join(format!("{}.log", server.name)), ready)?;
        Ok(Running { server, process, backend, address })
    }

    /// The vhost-user-blk export of a null device, for one server.
    pub(crate) fn vhost(&self, name: &str) -> Result<Daemon> {
        let socket = self.vhost_socket(name);
        let _ = fs::remove_file(&socket);
        let mut command = self.rival("qemu-storage-daemon")?;
        let addr = self.inside(&socket);
        command.args(["--object", "iothread,id=io"]);
        command.args(["--blockdev", "driver=null-co,node-name=disk,size=1073741824,read-zeroes=on", "--export"]);
        command.arg(format!(
            "type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues=2,iothread=io,addr.type=unix,addr.path={addr}"
        ));
        start(&mut command, &self.dir.join(format!("{name}.vhost.log")), || socket.exists())
    }

    pub(crate) fn vhost_socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.vhost"))
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    fn command(&self, server: &Server, address: &Address) -> Result<Command> {
        // Those that are not in the root see its files from outside.
        let ours = matches!(server.program, Program::Floor | Program::Nbdblk);
        let path = |path: &Path| if ours { path.display().to_string() } else { self.inside(path) };
        let (image, vhost) = (path(&self.image), path(&self.vhost_socket(server.name)));
        let words = server.words.split_whitespace().map(|w| w.replace("IMAGE", &image).replace("VHOST", &vhost));
        let mut command = match server.program {
            Program::Floor => Command::new(&self.floor),
            Program::Nbdblk => Command::new(&self.nbdblk),
            Program::Plugin | Program::Nbdkit => self.rival("nbdkit")?,
            Program::QemuNbd => self.rival("qemu-nbd")?,
            Program::QemuStorageDaemon => self.rival("qemu-storage-daemon")?,
        };
        // How each wants to be told where to listen, and with which keys.
        let listen = |unix: &str, ip: &str, port: &str| -> Vec<String> {
            match address {
                Address::Unix(socket) => [unix, &path(socket)].map(Into::into).into(),
                Address::Tcp(n) | Address::Tls(n) => [ip, "127.0.0.1", port, &n.to_string()].map(Into::into).into(),
            }
        };
        let pki = if let Address::Tls(_) = address { Some(path(&self.pki()?)) } else { None };
        let tls = |words: fn(&str) -> Vec<String>| pki.as_deref().map(words).into_iter().flatten();
        let creds: fn(&str) -> Vec<String> = |dir| {
            let object = format!("tls-creds-x509,id=tls,endpoint=server,dir={dir},verify-peer=off,sanity-check=off");
            vec!["--object".into(), object]
        };
        match server.program {
            Program::Floor => match address {
                Address::Unix(socket) => command.arg(socket),
                Address::Tcp(port) => command.arg(format!("127.0.0.1:{port}")),
                Address::Tls(_) => bail!("the floor has no TLS"),
            },
            Program::Nbdblk => {
                command.arg("serve").args(listen("--unix", "-i", "-p"));
                command.args(tls(|dir| ["--tls", "require", "--tls-certificates", dir].map(Into::into).into()))
            }
            Program::Plugin | Program::Nbdkit => {
                command.arg("-f").args(listen("-U", "-i", "-p"));
                command.args(tls(|dir| vec!["--tls=require".into(), format!("--tls-certificates={dir}")]));
                let plugin = (server.program == Program::Plugin).then(|| path(&self.dir.join("plugin.so")));
                command.args(plugin)
            }
            Program::QemuNbd => {
                command.args(["-t", "-e", CLIENTS]).args(listen("-k", "-b", "-p"));
                command.args(tls(creds)).args(tls(|_| ["--tls-creds", "tls"].map(Into::into).into()))
            }
            Program::QemuStorageDaemon => {
                let addr = match address {
                    Address::Unix(socket) => format!("addr.type=unix,addr.path={}", path(socket)),
                    Address::Tcp(port) => format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
                    Address::Tls(port) => format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=tls"),
                };
                command.args(tls(creds)).args(["--nbd-server", &format!("{addr},max-connections={CLIENTS}")])
            }
        };
        command.args(words);
        Ok(command)
    }

    /// A directory with an authority and a server's certificate by it, under the names that all servers look for.
    fn pki(&self) -> Result<PathBuf> {
        let dir = self.dir.join("pki");
        if dir.exists() {
            return Ok(dir);
        }
        fs::create_dir(&dir)?;
        let run = |program: &str, args: &str| {
            let output = shell::command(program).args(args.split(' ')).current_dir(&dir).output()?;
            ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
            Ok(())
        };
        fs::write(dir.join("ca.info"), "cn = benchmark\nca\ncert_signing_key\nexpiration_days = 30\n")?;
        let names = "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\n";
        fs::write(dir.join("server.info"), format!("{names}tls_www_server\nsigning_key\nexpiration_days = 30\n"))?;
        for who in ["ca", "server"] {
            // Not certtool, which writes half of its keys malformed (GnuTLS 3.7).
            run("openssl", &format!("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {who}-key.pem"))?;
        }
        run("certtool", "--generate-self-signed --load-privkey=ca-key.pem --template=ca.info --outfile=ca-cert.pem")?;
        let ca = "--load-ca-certificate=ca-cert.pem --load-ca-privkey=ca-key.pem";
        run(
            "certtool",
            &format!(
                "--generate-certificate {ca} --load-privkey=server-key.pem --template=server.info --outfile=server-cert.pem"
            ),
        )?;
        Ok(dir)
    }

    /// A rival's program, in the root if there is one.
    fn rival(&self, program: &str) -> Result<Command> {
        let Some(root) = &self.root else {
            find(program).with_context(|| format!("{program} is not installed"))?;
            return Ok(shell::command(program));
        };
        let mut command = shell::command("chroot");
        command.arg(root).arg(program);
        Ok(command)
    }

    /// A path as those see it who are in the root.
    fn inside(&self, path: &Path) -> String {
        let inside = self.root.as_ref().and_then(|root| path.strip_prefix(root).ok());
        inside.map_or_else(|| path.to_owned(), |path| Path::new("/").join(path)).display().to_string()
    }

    /// Name and version of each program that was measured, and of the client.
    pub(crate) fn versions(&self) -> String {
        let mut versions = format!("nbdblk {}", env!("CARGO_PKG_VERSION"));
        let rivals = ["nbdkit", "qemu-nbd", "qemu-storage-daemon"].map(|program| (program, self.rival(program).ok()));
        for (program, command) in rivals.into_iter().chain([("fio", Some(shell::command("fio")))]) {
            let Some(output) = command.and_then(|mut command| command.arg("--version").output().ok()) else { continue };
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
            if let Some(version) = text.split([' ', '-', '\n']).find(number) {
                versions += &format!(", {program} {version}");
            }
        }
        versions
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Server {
    fn needs_rivals(&self) -> bool {
        self.program.is_rival() || self.program == Program::Plugin || self.device == "vu"
    }
}

impl Running {
    /// Processor time that the server has used so far, all its threads together. None of the servers has children.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        cpu_of(&self.process)
    }

    /// That of the device process behind it, if there is one.
    pub(crate) fn backend_cpu(&self) -> Result<Duration> {
        self.backend.as_ref().map_or(Ok(Duration::ZERO), cpu_of)
    }
}

fn cpu_of(process: &Daemon) -> Result<Duration> {
    let pid = Pid::from_raw(process.id().try_into()?);
    // To the nanosecond, which /proc is not.
    let time = clock_getcpuclockid(pid).and_then(|clock| clock.now());
    Ok(time.context("a server ended while it was measured")?.into())
}

/// Builds an example of one of our packages and says where it is.
pub(crate) fn example(package: &str, name: &str) -> Result<PathBuf> {
    shell::ok(shell::cargo().args(["build", "--quiet", "--release", "-p", package, "--example", name]))?;
    Ok(shell::target_dir()?.join("release/examples").join(name))
}

/// Starts a server with its output in a file; if it does not get ready, the end of that says why.
fn start(command: &mut Command, log: &Path, ready: impl Fn() -> bool) -> Result<Daemon> {
    let file = File::create(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    Daemon::start_when(command, ready).map_err(|error| {
        let text = fs::read_to_string(log).unwrap_or_default();
        let said = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no word from it");
        error.context(said.trim().to_owned())
    })
}

/// A root directory with all rivals, if this machine does not have them all itself.
fn rivals_root() -> Option<PathBuf> {
    let blkio = shell::command("nbdkit").args(["blkio", "--version"]).output();
    let modules =
        ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib/aarch64-linux-gnu/qemu", "/usr/lib64/qemu-kvm", "/usr/lib/qemu"];
    let module = modules.iter().any(|dir| Path::new(dir).join("block-blkio.so").exists());
    if module && blkio.is_ok_and(|output| output.status.success()) {
        return None;
    }
    match trixie::with(&["nbdkit", "qemu-utils", "qemu-block-extra"]) {
        Ok(root) => Some(root),
        Err(error) => {
            eprintln!("bench: only the rivals that are installed here, without a root of Debian trixie: {error:#}");
            None
        }
    }
}

/// Makes the image if it is not there, random throughout, and brings it into the page cache.
fn make_image(path: &Path) -> Result<()> {
    if !fs::metadata(path).is_ok_and(|meta| meta.len() == SIZE) {
        let mut random = File::open("/dev/urandom")?.take(SIZE);
        let mut file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        io::copy(&mut random, &mut file)?;
        // Or the kernel writes it out in the middle of a measurement.
        file.sync_all()?;
    }
    let mut buffer = vec![0; 1 << 20];
    let mut file = File::open(path)?;
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn free_port() -> Result<u16> {
    match TcpListener::bind("127.0.0.1:0")?.local_addr()?.port() {
        0 => bail!("no free port"),
        port => Ok(port),
    }
}
