//! The machine: what QEMU is told, what the guest is told, and how the command's output and status come back.
//!
//! The guest's scripts, its configuration and the command are in the first root (initramfs) that QEMU hands to the
//! kernel, so that a machine needs no talk to start. Output comes back through virtio ports, each a socket here: one
//! for each of stdout and stderr, and one for two lines, `ready` and `status N`. After that the guest powers off, and
//! the end of the sockets is the end of the output.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::cpio::Archive;
use super::image::Image;
use crate::shell::{TempDir, find, quote};

/// How long the guest may take to start. It takes 4 s on an idle computer.
const START_MAX: Duration = Duration::from_secs(120);
/// How long the guest may take to notice that its command's time is over, and to power off.
const STOP_MAX: Duration = Duration::from_secs(60);
/// The status when the machine fails, as `timeout` and `git bisect` have it.
const MACHINE_FAILED: i32 = 125;

/// What to start.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) image: &'a Image,
    /// Directories that the guest sees at the same paths.
    pub(crate) shares: Vec<PathBuf>,
    /// Directories of programs, first in the guest's PATH.
    pub(crate) binaries: Vec<PathBuf>,
    /// Size of each disk.
    pub(crate) disk_mib: u64,
    /// More arguments for the kernel.
    pub(crate) append: &'a str,
    pub(crate) iommu: bool,
    /// The clock counts instructions of the one processor.
    pub(crate) instructions: bool,
    pub(crate) verbose: bool,
    pub(crate) system: System<'a>,
}

/// What runs in the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum System<'a> {
    /// Our own process 1, which makes the devices under test.
    Devices,
    /// systemd, in a root that has no devices but a second disk, and these files in `/run/job`: name, content.
    Systemd { root: &'a Image, files: &'a [(String, Vec<u8>)] },
}

/// What to do in it.
#[derive(Debug)]
pub(crate) enum Job {
    /// A shell on this terminal.
    Shell,
    /// A command.
    Command { words: Vec<String>, dir: PathBuf, seconds_max: u64 },
}

impl Machine<'_> {
    /// Starts the machine, does the job and answers its status.
    pub(crate) fn run(&self, job: &Job) -> Result<i32> {
        let dir = TempDir::new("vm")?;
        let dir = dir.path();
        self.check_shares()?;
        std::fs::write(dir.join("initramfs"), self.initramfs(job)?)?;
        // Each disk begins as zeroes; what is written goes to a file without a name.
        std::fs::File::create(dir.join("disk"))?.set_len(self.disk_mib << 20)?;
        match *job {
            Job::Shell => {
                let mut qemu = self.qemu(dir);
                qemu.args(["-chardev", "stdio,id=console,signal=off"]);
                let status = qemu.status().context("starting the machine")?;
                ensure!(status.success(), "qemu ended with {status}");
                Ok(0)
            }
            Job::Command { seconds_max, .. } => {
                let ports = PORTS.map(|port| UnixListener::bind(dir.join(port)));
                let mut qemu = self.qemu(dir);
                qemu.arg("-chardev").arg(option("file,id=console,path=", &dir.join("console")));
                qemu.stdin(Stdio::null()).stdout(Stdio::null());
                let status = self.attend(&mut qemu, ports, Duration::from_secs(seconds_max));
                let console = std::fs::read(dir.join("console")).unwrap_or_default();
                if !console.is_empty() && (self.verbose || status.is_err()) {
                    eprintln!("vm: the console:\n{}", String::from_utf8_lossy(&console));
                }
                status.or_else(|error| {
                    eprintln!("vm: {error:#}");
                    Ok(MACHINE_FAILED)
                })
            }
        }
    }

    /// Runs the machine to its end, and passes on what the command says.
    fn attend(&self, qemu: &mut Command, ports: [std::io::Result<UnixListener>; 3], job_max: Duration) -> Result<i32> {
        let start = Instant::now();
        let mut child = ChildGuard(qemu.spawn().context("starting the machine")?);
        let [control, out, err] = ports.map(|port| accept(&port?, &mut child.0));
        let (control, out, err) = (control?, out?, err?);
        let out = std::thread::spawn(move || pass_on(out, std::io::stdout()));
        let err = std::thread::spawn(move || pass_on(err, std::io::stderr()));
        let mut control = BufReader::new(control);

        let ready = line(&mut control, start + START_MAX).context("the machine did not start")?;
        let steps = ready.strip_prefix("ready").with_context(|| format!("the guest says {ready:?}"))?;
        if self.verbose {
            eprintln!("vm: ready after {:.1} s; seconds of the guest:{steps}", start.elapsed().as_secs_f64());
        }
        let start = Instant::now();
        let status = line(&mut control, start + job_max + STOP_MAX).context("the machine stopped answering")?;
        let status = status.strip_prefix("status ").with_context(|| format!("the guest says {status:?}"))?.parse()?;
        if self.verbose {
            eprintln!("vm: the command ended with status {status} after {:.1} s", start.elapsed().as_secs_f64());
        }
        // The guest has written everything; what is on its way here arrives before the sockets end.
        let start = Instant::now();
        while child.0.try_wait()?.is_none() && start.elapsed() < STOP_MAX {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(child);
        for thread in [out, err] {
            thread.join().expect("copying does not panic").context("passing on what the command said")?;
        }
        Ok(status)
    }

    fn check_shares(&self) -> Result<()> {
        for share in &self.shares {
            let own = [
                "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr",
                "/var",
            ];
            let hides = share.parent().is_none() || own.iter().any(|own| share == Path::new(own));
            ensure!(!hides, "sharing {} would hide the guest's own", share.display());
            let text = share.to_str().with_context(|| format!("{} is not UTF-8", share.display()))?;
            ensure!(!text.contains(['\n', ',']), "{text} cannot be shared: a comma or a line break is in it");
        }
        Ok(())
    }

    /// The first root: busybox, the modules that reach the disk, the scripts, what they are to do.
    fn initramfs(&self, job: &Job) -> Result<Vec<u8>> {
        let read = |path: PathBuf| std::fs::read(&path).with_context(|| format!("reading {}", path.display()));
        let mut archive = Archive::default();
        for dir in ["bin", "dev", "proc", "sys", "disk"] {
            archive.dir(dir);
        }
        archive.file("bin/busybox", &read(self.image.root().join("usr/bin/busybox"))?);
        let mut early = String::new();
        for (n, module) in self.image.early_modules()?.into_iter().enumerate() {
            archive.file(&format!("{n}.ko"), &read(module)?);
            writeln!(early, "/{n}.ko")?;
        }
        archive.file("early", early.as_bytes());
        archive.file("mount-root.sh", include_bytes!("../../vm/mount-root.sh"));
        match self.system {
            System::Devices => self.add_own_system(&mut archive, job)?,
            System::Systemd { files, .. } => add_systemd(&mut archive, job, files),
        }
        Ok(archive.finish())
    }

    /// The scripts of our own process 1, and what they are to do.
    fn add_own_system(&self, archive: &mut Archive, job: &Job) -> Result<()> {
        archive.dir("nbdblk");
        archive.file("init", include_bytes!("../../vm/initramfs.sh"));
        archive.file("nbdblk/init.sh", include_bytes!("../../vm/init.sh"));
        let shares: String = self.shares.iter().map(|share| format!("{}\n", share.display())).collect();
        archive.file("nbdblk/shares", shares.as_bytes());
        let (seconds_max, script) = match job {
            Job::Shell => (0, String::new()),
            Job::Command { words, dir, seconds_max } => {
                let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
                let dir = quote(&dir.to_string_lossy());
                (*seconds_max, format!("cd {dir} || exit 126\nexec {}\n", words.join(" ")))
            }
        };
        archive.file("nbdblk/job", script.as_bytes());
        let binaries: Vec<String> = self.binaries.iter().map(|dir| dir.display().to_string()).collect();
        let config =
            format!("SECONDS_MAX={seconds_max} MIB={} BINARIES={}\n", self.disk_mib, quote(&binaries.join(":")));
        archive.file("nbdblk/config", config.as_bytes());
        Ok(())
    }

    fn qemu(&self, dir: &Path) -> Command {
        let root = self.image.root();
        // The image's own QEMU with the image's own libraries, so that this computer needs none, and every one has the
        // same. It dies with this process.
        let mut qemu = Command::new(find("setpriv").unwrap_or_else(|| "setpriv".into()));
        qemu.args(["--pdeathsig", "KILL", "--"]);
        qemu.arg(root.join("lib64/ld-linux-x86-64.so.2")).arg("--library-path");
        qemu.arg(root.join("usr/lib/x86_64-linux-gnu")).arg(root.join("usr/bin/qemu-system-x86_64"));
        qemu.arg("-L").arg(root.join("usr/share/qemu")).arg("-L").arg(root.join("usr/share/seabios"));
        // This firmware does less than the usual one, and is done sooner.
        qemu.arg("-bios").arg(root.join("usr/share/qemu/qboot.rom"));
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        // Without la57 page tables are shorter. Without erms and fsrm the guest does not copy by `rep movsb`, which is
        // emulated byte by byte.
        let cpu = "max,la57=off,erms=off,fsrm=off";
        if self.instructions {
            qemu.args(["-accel", "tcg,thread=single,tb-size=512", "-smp", "1", "-icount", "shift=0,sleep=off"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi,tb-size=512", "-smp", "2"]);
        }
        qemu.args(["-cpu", cpu, "-m", "2048"]);
        qemu.arg("-kernel").arg(self.image.kernel()).arg("-initrd").arg(dir.join("initramfs"));
        qemu.arg("-append").arg(self.kernel_args());
        if self.iommu {
            qemu.args(["-device", "intel-iommu,intremap=on,device-iotlb=on"]);
        }
        let root = match self.system {
            System::Devices => self.image,
            System::Systemd { root, .. } => root,
        };
        qemu.arg("-drive").arg(option("if=none,id=root,format=raw,snapshot=on,file=", &root.disk()));
        qemu.args(["-device", "virtio-blk-pci,drive=root,addr=0x4,disable-legacy=on,serial=root"]);
        match self.system {
            System::Devices => self.add_disks(&mut qemu, dir),
            System::Systemd { .. } => {
                qemu.arg("-drive").arg(option("if=none,id=second,format=raw,snapshot=on,file=", &dir.join("disk")));
                qemu.args(["-device", "virtio-blk-pci,drive=second,addr=0x5,disable-legacy=on"]);
            }
        }
        self.add_ports(&mut qemu, dir);
        for (n, share) in self.shares.iter().enumerate() {
            qemu.arg("-fsdev");
            qemu.arg(option(&format!("local,id=share{n},security_model=none,multidevs=remap,path="), share));
            qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev=share{n},mount_tag=share{n}"));
        }
        qemu.args(["-serial", "chardev:console"]);
        qemu
    }

    fn kernel_args(&self) -> String {
        let quick = "quiet loglevel=4 mitigations=off nokaslr audit=0 nowatchdog no_timer_check tsc=reliable \
                     cryptomgr.notests rcupdate.rcu_expedited=1 i8042.noaux i8042.nokbd i8042.nopnp";
        // A busy computer misleads the guest about the speed of the processor's own clock, which would then run several
        // times too fast, and with it every time-out.
        // Instructions are its ticks, though, when they are counted, and reading it needs no system call.
        let clock = if self.instructions { "clocksource=tsc" } else { "clocksource=hpet" };
        // One of the NVMe queues is polled, for nvme-io_uring's poll queues.
        let devices = "hugepages=32 nvme.poll_queues=1";
        let iommu = if self.iommu { "intel_iommu=on" } else { "vfio.enable_unsafe_noiommu_mode=1" };
        format!("console=ttyS0 panic=-1 oops=panic {quick} {clock} {devices} {iommu} {}", self.append)
    }

    /// The hardware under test; `vm/README.md` has the same list for its users.
    fn add_disks(&self, qemu: &mut Command, dir: &Path) {
        let platform = if self.iommu { "on" } else { "off" };
        let blocks_4k = "logical_block_size=4096,physical_block_size=4096";
        // All of them offer packed rings, which is what the guest's kernel takes. With its split rings of 1024 entries, memory of
        // the guest was destroyed within minutes: 4 bytes at the start of a page, the length of a used-ring entry. One entry of
        // such a ring lies across two pages, and it seems that QEMU 10.0 writes the second half to the wrong page when an IOMMU
        // translates. (nbdblk's own split rings have no such entry.)
        let virtio = |id: &str, place: &str, more: &str| {
            format!(
                "virtio-blk-pci,id={id},drive={id},serial={id},{place},disable-legacy=on,iommu_platform={platform},num-queues=4,packed=on{more}"
            )
        };
        let disks_and_devices = [
            (None, "nvme,id=nvme-kernel,serial=nvme-kernel,addr=0x5,max_ioqpairs=4".into()),
            (Some("kernel-512"), "nvme-ns,drive=kernel-512,bus=nvme-kernel,nsid=1".into()),
            (Some("kernel-4k"), format!("nvme-ns,drive=kernel-4k,bus=nvme-kernel,nsid=2,{blocks_4k}")),
            (Some("kernel-twin"), "nvme-ns,drive=kernel-twin,bus=nvme-kernel,nsid=3".into()),
            (None, "nvme,id=nvme-vfio,serial=nvme-vfio,addr=0x6,max_ioqpairs=4".into()),
            (Some("vfio-512"), "nvme-ns,drive=vfio-512,bus=nvme-vfio,nsid=1".into()),
            (Some("vfio-4k"), format!("nvme-ns,drive=vfio-4k,bus=nvme-vfio,nsid=2,{blocks_4k}")),
            (Some("vfio-metadata"), "nvme-ns,drive=vfio-metadata,bus=nvme-vfio,nsid=3,ms=8".into()),
            (Some("vblk-512"), virtio("vblk-512", "addr=0x7", "")),
            (Some("vblk-4k"), virtio("vblk-4k", "addr=0x8", &format!(",vectors=2,{blocks_4k}"))),
            (Some("vblk-packed"), virtio("vblk-packed", "addr=0x9", "")),
            (Some("vblk-vdpa"), virtio("vblk-vdpa", "addr=0xa", "")),
            // Behind ports of their own, so that they can be pulled out.
            (None, "pcie-root-port,id=socket,addr=0x1c,chassis=1".into()),
            (None, "pcie-root-port,id=socket2,addr=0x1d,chassis=2".into()),
            (Some("vblk-socket"), virtio("vblk-socket", "bus=socket2", "")),
            // 2^2 pages of 4 KiB.
            (None, "nvme,id=nvme-mdts,serial=nvme-mdts,bus=socket,max_ioqpairs=1,mdts=2".into()),
            (Some("mdts-512"), "nvme-ns,drive=mdts-512,bus=nvme-mdts,nsid=1".into()),
        ];
        for (disk, device) in disks_and_devices {
            if let Some(disk) = disk {
                let drive = format!("if=none,id={disk},format=raw,snapshot=on,discard=unmap,detect-zeroes=off,file=");
                qemu.arg("-drive").arg(option(&drive, &dir.join("disk")));
            }
            qemu.args(["-device", &device]);
        }
    }

    fn add_ports(&self, qemu: &mut Command, dir: &Path) {
        qemu.args(["-device", "virtio-serial-pci,addr=0xb,max_ports=8"]);
        // The guest's way to QEMU's monitor (QMP): QEMU calls itself.
        let monitor = dir.join("monitor");
        qemu.arg("-chardev").arg(option("socket,id=monitor,server=on,wait=off,path=", &monitor));
        qemu.args(["-mon", "chardev=monitor,mode=control", "-chardev"])
            .arg(option("socket,id=to-monitor,path=", &monitor));
        qemu.args(["-device", "virtserialport,chardev=to-monitor,name=monitor"]);
        for port in PORTS {
            let socket = dir.join(port);
            if socket.exists() {
                qemu.arg("-chardev").arg(option(&format!("socket,id={port},path="), &socket));
            } else {
                qemu.args(["-chardev", &format!("null,id={port}")]);
            }
            qemu.args(["-device", &format!("virtserialport,chardev={port},name={port}")]);
        }
    }
}

/// The scripts that start systemd with one more unit, and what it is to do: the first word of the job names a file.
fn add_systemd(archive: &mut Archive, job: &Job, files: &[(String, Vec<u8>)]) {
    archive.dir("job");
    archive.file("init", include_bytes!("../../vm/clean-initramfs.sh"));
    archive.file("job/start.sh", include_bytes!("../../vm/clean-start.sh"));
    if let Job::Command { words, seconds_max, .. } = job {
        let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
        archive.file("job/job.sh", format!("cd /run/job\nexec {}\n", words.join(" ")).as_bytes());
        archive.file("job/seconds", seconds_max.to_string().as_bytes());
    }
    for (name, content) in files {
        if let Some((dir, _)) = name.rsplit_once('/') {
            archive.dir(&format!("job/{dir}"));
        }
        archive.file(&format!("job/{name}"), content);
    }
}

/// The ports that come back here: the two lines, and the command's stdout and stderr.
const PORTS: [&str; 3] = ["control", "out", "err"];

/// A child that is killed when this is dropped.
#[derive(Debug)]
struct ChildGuard(Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An argument of QEMU that ends with a path, in which a comma is doubled.
fn option(start: &str, path: &Path) -> OsString {
    format!("{start}{}", path.to_string_lossy().replace(',', ",,")).into()
}

/// The connection that the child makes.
fn accept(listener: &UnixListener, child: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = child.try_wait()? {
            bail!("qemu ended with {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The next line, without its end.
fn line(from: &mut BufReader<UnixStream>, until: Instant) -> Result<String> {
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    from.get_ref().set_read_timeout(Some(left))?;
    let mut line = String::new();
    let len = from.read_line(&mut line).with_context(|| format!("silent for {} s", left.as_secs()))?;
    ensure!(len > 0, "it has gone");
    line.truncate(line.trim_end().len());
    Ok(line)
}

fn pass_on(mut from: UnixStream, mut to: impl Write) -> std::io::Result<()> {
    let mut bytes = vec![0; 1 << 16];
    loop {
        let len = from.read(&mut bytes)?;
        if len == 0 {
            return Ok(());
        }
        // The reader may be gone; the command goes on.
        let _ = to.write_all(&bytes[..len]).and_then(|()| to.flush());
    }
}
