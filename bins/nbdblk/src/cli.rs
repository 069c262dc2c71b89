//! The arguments, and the help that goes with them.
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments on arguments are the help text, word for word")]

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use nbd_server_core::Rule;
use nix::unistd::{Group, User};

use crate::place::{self, Place};

/// Serves block devices as Network Block Devices
///
/// The device is opened once and shared by all clients; a device that cannot be opened is an error before anything
/// listens.
#[derive(Debug, Parser)]
#[command(name = "nbdblk", version, disable_version_flag = true, disable_help_subcommand = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Log more: -v what is opened and who connects, -vv details
    #[arg(short, long, global = true, action = ArgAction::Count, display_order = 900)]
    pub(crate) verbose: u8,

    /// Print the version
    #[arg(short = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve devices until a signal comes or the command of --run ends
    Serve(Box<Serve>),
    /// Have a server read its file again
    Reload(Reload),
    /// Open a device and print its size, limits, capabilities and properties
    Info(Info),
    /// List the drivers, or the properties of one of them
    Drivers(Drivers),
}

/// Serve devices until a signal comes or the command of --run ends
///
/// Several devices can be served, each under its name. The first one is also the default export: clients that ask for
/// the empty name get it.
#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct Serve {
    /// What to serve: [NAME:]DRIVER=VALUE[,PROPERTY=VALUE]...
    ///
    /// NAME is the export's name, and ends at a colon before the first "=". Write ",," for a comma in a value. "nbdblk
    /// drivers" lists the drivers, "nbdblk drivers NAME" their properties.
    #[arg(value_name = "EXPORT", required_unless_present = "config")]
    pub(crate) specs: Vec<OsString>,

    /// Read the exports, and options by their long names, from a TOML file
    ///
    /// SIGHUP and "nbdblk reload" have it read again. A file with a mistake is refused as a whole, with line and column.
    #[arg(long, value_name = "FILE", conflicts_with = "specs")]
    pub(crate) config: Option<PathBuf>,

    /// With --config: listen for "nbdblk reload" on this Unix domain socket, for this user and root only
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// Listen on a Unix domain socket; "-": on a private one, for --run. May be repeated
    ///
    /// A socket that no server listens on any more is replaced. The socket is removed at the end. "@NAME" is one in the
    /// abstract namespace, without a file.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub(crate) unix: Vec<PathBuf>,

    /// Permissions of the sockets of -U, octal, such as 0660 [default: what the umask leaves of 0777]
    ///
    /// A client needs write permission to connect. Owner, group and permissions are set before any client can.
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) socket_mode: Option<u32>,

    /// Owner of the sockets of -U, a name or a number; only root can give them away
    #[arg(long, value_name = "USER", value_parser = user)]
    pub(crate) socket_owner: Option<u32>,

    /// Group of the sockets of -U, a name or a number
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub(crate) socket_group: Option<u32>,

    /// Listen on a TCP port; 0: on a free one [default: 10809, when there is no -U]
    #[arg(short, long)]
    pub(crate) port: Option<u16>,

    /// Address or host name to listen on: "::" for all. May be repeated [default: 127.0.0.1 and ::1]
    ///
    /// Without --allow, or TLS with --tls-verify-peer, whoever can connect can read, and write unless the export is read-only.
    #[arg(short, long, value_name = "ADDRESS", visible_alias = "bind", alias = "ipaddr", value_parser = place::host)]
    pub(crate) ip_addr: Vec<String>,

    /// Of a host's addresses, take only those of IPv4
    #[arg(short = '4', long, conflicts_with = "ipv6_only")]
    pub(crate) ipv4_only: bool,

    /// Of a host's addresses, take only those of IPv6
    #[arg(short = '6', long)]
    pub(crate) ipv6_only: bool,

    /// Listen for virtual machines or for the host, on a port of vsock [default: that of --port, which is not TCP's then]
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true)]
    pub(crate) vsock: Option<Option<u32>>,

    /// Listen at a place: unix:PATH, tcp:PORT, tcp:HOST:PORT, tcp:[IPV6]:PORT or vsock:PORT. May be repeated
    ///
    /// All ways to listen can be mixed. Sockets that systemd passes (socket activation: LISTEN_FDS) are used as they are,
    /// and then no other can be asked for.
    #[arg(short, long, value_name = "PLACE")]
    pub(crate) listen: Vec<Place>,

    /// Serve one client on standard input and output, and stop when it leaves
    #[arg(short, long, visible_alias = "stdin", conflicts_with_all = ["unix", "port", "ip_addr", "ipv4_only", "ipv6_only", "vsock", "listen", "run", "print_uri", "socket_mode", "socket_owner", "socket_group"])]
    pub(crate) single: bool,

    /// Who may open an export: [NAME:]KIND=VALUE, without NAME for all of them. May be repeated
    ///
    /// An export with rules is open to whoever meets at least one of them; to others it is as if it were not there. KIND
    /// is one of ip (ADDRESS or ADDRESS/BITS: TCP clients), uid and gid (effective user and group: clients on a Unix domain
    /// socket), cid (clients on vsock), dn (subject of the client's certificate), san (another name in it, such as
    /// DNS:host.example) and psk (user of a pre-shared key).
    #[arg(long, value_name = "RULE", value_parser = allowed)]
    pub(crate) allow: Vec<(Option<String>, Rule)>,

    /// Connections at the same time; more are closed [default: 4096]
    #[arg(long, value_name = "N")]
    pub(crate) connections: Option<NonZeroUsize>,

    /// How long a client may take to choose an export [default: 10s]
    #[arg(long, value_name = "TIME", aliases = ["timeout", "time-out"], value_parser = timeout)]
    pub(crate) handshake_timeout: Option<Duration>,

    /// Refuse clients that do not ask for block sizes, where blocks are larger than a byte
    ///
    /// Without it they are served: a part of a block is read, merged and written back. The Linux kernel never asks.
    #[arg(long)]
    pub(crate) block_size_required: bool,

    #[command(flatten)]
    pub(crate) tls: Tls,

    /// Refuse writes, and open the devices for reading only
    #[arg(short, long, visible_alias = "readonly")]
    pub(crate) read_only: bool,

    /// Print the URIs on stdout, one a line, when the devices are open and the sockets listen; the default export's first
    #[arg(long, aliases = ["print-url", "show-uri", "show-url"])]
    pub(crate) print_uri: bool,

    /// Write the process id into this file when the server is ready, and remove it at the end
    #[arg(short = 'P', long, value_name = "PATH", alias = "pid-file")]
    pub(crate) pidfile: Option<PathBuf>,

    /// Write a newline to this inherited file descriptor when the server is ready, and close it
    ///
    /// Where systemd asks for it (Type=notify, NOTIFY_SOCKET), it is told as well.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) ready_fd: Option<i32>,

    /// Stop when the process that started this one has ended
    #[arg(long)]
    pub(crate) exit_with_parent: bool,

    /// Do not go into the background, which nbdblk never does
    #[arg(short, long, alias = "no-fork", hide = true)]
    foreground: bool,

    /// Run a shell command and stop when it ends, with its exit status; implies "-U -" without another socket
    ///
    /// The command finds $uri, $unixsocket, $port, $exportname and $nbd (the same as $uri) in its environment. SIGINT and
    /// SIGQUIT are left to it, SIGTERM is passed on to it.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) run: Option<OsString>,

    /// Worker threads; each opens a queue of every device that has enough of them [default: one for each CPU]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,

    /// Memory for payload, for each export and worker [default: 64M]
    ///
    /// It bounds what clients can make the server hold, and how long a request may be (up to 32M).
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub(crate) memory: Option<usize>,

    /// For how long workers look for more to do before they sleep, in microseconds [default: 100]
    ///
    /// At most: they do so while it pays, that is for devices that answer within that time, and for clients which have few
    /// requests at a time but the next one within it. These are served without the time that waking up takes. An idle server
    /// sleeps, and other programs come first. 0: never.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(crate) poll: Option<u32>,
}

impl Serve {
    /// An option that says where to listen, if one was given.
    pub(crate) fn listening(&self) -> Option<&'static str> {
        let given = [
            (!self.unix.is_empty(), "--unix"),
            (self.port.is_some(), "--port"),
            (!self.ip_addr.is_empty(), "--ip-addr"),
            (self.ipv4_only, "--ipv4-only"),
            (self.ipv6_only, "--ipv6-only"),
            (self.vsock.is_some(), "--vsock"),
            (!self.listen.is_empty(), "--listen"),
            (self.single, "--single"),
            (self.run.is_some(), "--run"),
        ];
        given.into_iter().find_map(|(given, option)| given.then_some(option)).or(self.socket_access())
    }

    /// An option about who may connect to a Unix domain socket, if one was given.
    pub(crate) fn socket_access(&self) -> Option<&'static str> {
        let given = [
            (self.socket_mode, "--socket-mode"),
            (self.socket_owner, "--socket-owner"),
            (self.socket_group, "--socket-group"),
        ];
        given.into_iter().find_map(|(given, option)| given.map(|_| option))
    }
}

/// Have a server read its file again
///
/// Prints what has changed. When the file has a mistake, or a device of it cannot be opened, that is said, the status is 1,
/// and the server goes on as it was.
#[derive(Args, Debug)]
#[group(required = true, args = ["file", "control"])]
pub(crate) struct Reload {
    /// The file of "nbdblk serve --config", in which the control socket is named
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// The control socket
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    pub(crate) control: Option<PathBuf>,

    /// How long to wait for the server's answer [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct Tls {
    /// Whether clients may use TLS (on), or must (require) [default: on with --tls-certificates or --tls-psk, or else off]
    #[arg(long = "tls", value_name = "MODE")]
    pub(crate) mode: Option<TlsMode>,

    /// Directory of server-cert.pem and server-key.pem, and of ca-cert.pem and ca-crl.pem for clients' certificates
    ///
    /// [default: the first there is of ~/.pki/nbdkit, ~/.config/pki/nbdkit and /etc/pki/nbdkit]
    #[arg(long = "tls-certificates", value_name = "DIR")]
    pub(crate) certificates: Option<PathBuf>,

    /// Refuse clients without a certificate that ca-cert.pem vouches for
    #[arg(long = "tls-verify-peer")]
    pub(crate) verify_peer: bool,

    /// File of users and their pre-shared keys, USER:HEX a line, as psktool makes it: TLS without certificates
    #[arg(long = "tls-psk", value_name = "FILE", conflicts_with_all = ["certificates", "verify_peer"])]
    pub(crate) psk: Option<PathBuf>,

    /// Serve this export under TLS only, where --tls=on lets others do without. May be repeated
    #[arg(long = "tls-only", value_name = "NAME")]
    pub(crate) only: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TlsMode {
    Off,
    On,
    Require,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    /// What to open: DRIVER=VALUE[,PROPERTY=VALUE]..., as for "nbdblk serve"
    #[arg(value_name = "DEVICE")]
    pub(crate) spec: OsString,

    /// Open the device for reading only
    #[arg(short, long, visible_alias = "readonly")]
    pub(crate) read_only: bool,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Drivers {
    /// Only this driver, with its properties
    pub(crate) name: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn memory(text: &str) -> Result<usize, String> {
    let size = blkdev_drivers::parse_size(text).map_err(|error| error.replacen("Value", "it", 1))?;
    if size < 1 << 20 {
        return Err("it must be at least 1M".into());
    }
    // No process has more than 128T of addresses.
    let size = usize::try_from(size).ok().filter(|size| *size as u64 <= 64 << 40);
    size.ok_or_else(|| "it must be at most 64T, which the address space can hold".into())
}

fn threads(text: &str) -> Result<usize, String> {
    // More would be a mistake: each needs descriptors, and memory for each export.
    text.parse()
        .ok()
        .filter(|count| (1..=1024).contains(count))
        .ok_or_else(|| "it must be a number from 1 to 1024".into())
}

fn mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777 && !digits.starts_with('+'));
    mode.ok_or_else(|| "it must be octal, from 0 to 0777".into())
}

fn user(text: &str) -> Result<u32, String> {
    let named = || User::from_name(text).map(|user| user.map(|user| user.uid.as_raw()));
    id(text, "user", named)
}

fn group(text: &str) -> Result<u32, String> {
    let named = || Group::from_name(text).map(|group| group.map(|group| group.gid.as_raw()));
    id(text, "group", named)
}

fn id(text: &str, kind: &str, named: impl Fn() -> nix::Result<Option<u32>>) -> Result<u32, String> {
    match text.parse() {
        // All ones stands for no change (chown(2)).
        Ok(u32::MAX) => Err(format!("it is no number of a {kind}")),
        Ok(id) => Ok(id),
        Err(_) => named().map_err(|error| error.to_string())?.ok_or_else(|| format!("there is no {kind} of that name")),
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match blkdev_drivers::parse_time(text).map_err(|error| error.replacen("Value", "it", 1))? {
        Duration::ZERO => Err("it must be longer than nothing".into()),
        time if time > Duration::from_secs(86400) => Err("it must be at most a day, 86400s".into()),
        time => Ok(time),
    }
}

/// As in a spec, the name of the export ends at a colon before the first "=".
fn allowed(text: &str) -> Result<(Option<String>, Rule), String> {
    let kind = text.split('=').next().unwrap_or_default();
    let (name, rule) = kind.find(':').map_or((None, text), |at| (Some(text[..at].into()), &text[at + 1..]));
    Ok((name, rule.parse().map_err(|error: std::io::Error| error.to_string())?))
}

const EXAMPLES: &str = "\
Examples:
  On nbd://localhost, for as long as it runs:
    nbdblk serve io_uring=disk.img

  On a Unix domain socket, nbd+unix://?socket=/run/nbd.sock:
    nbdblk serve vhost-user=/run/vhost.sock -U /run/nbd.sock

  For one command:
    nbdblk serve memory=1G --run 'nbdinfo \"$uri\"'

  What a device can do, and what can be set on it:
    nbdblk info io_uring=/dev/sdb
    nbdblk drivers io_uring

\"nbdblk serve --help\" tells more.";

const SERVE_EXAMPLES: &str = "\
Signals:
  SIGTERM, SIGINT and SIGQUIT stop the server with status 0; a second one ends it at once. Before the server is ready,
  the status is 128 and the signal's number.
  SIGHUP stops it as well (but not under nohup). With --config, SIGHUP has the file read again, and the result is logged.
  SIGXCPU stops it. SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT and real-time signals
  are ignored. So is SIGXFSZ: a write beyond the limit of file sizes fails with ENOSPC. SIGABRT and faults still kill it.

Examples:
  Two exports on a Unix domain socket, and the list of them:
    nbdblk serve disk:io_uring=disk.img,direct=true scratch:memory=1G -U /tmp/nbd.sock
    nbdinfo --list 'nbd+unix://?socket=/tmp/nbd.sock'

  A device behind qemu-storage-daemon or SPDK, looked at from a shell:
    nbdblk serve vhost-user=/run/vhost.sock,num-queues=2 --run 'nbdsh -u \"$uri\"'

  To user 1000 alone, and to the host's network read-only under another name:
    nbdblk serve disk:io_uring=disk.img copy:io_uring=disk.img,read-only=true -U /run/nbd.sock -i 192.0.2.1 \\
      --allow disk:uid=1000 --allow copy:ip=192.0.2.0/24

  Copy it into a file:
    nbdblk serve -r vhost-user=/run/vhost.sock --run 'nbdcopy \"$uri\" copy.img'

  Give it to a virtual machine:
    nbdblk serve io_uring=/dev/nvme0n1 -U /run/nbd.sock
    qemu-system-x86_64 -drive 'file=nbd+unix://?socket=/run/nbd.sock,format=raw,if=virtio' ...

  On the network, for clients with a certificate of ours:
    nbdblk serve io_uring=disk.img -i :: --tls require --tls-certificates /etc/pki/nbd --tls-verify-peer

  A free TCP port, for a script:
    nbdblk serve io_uring=disk.img -p 0 --print-uri";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_sound() {
        Cli::command().debug_assert();
    }
}
