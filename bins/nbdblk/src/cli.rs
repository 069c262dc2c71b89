//! The command-line arguments and their help texts.
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments on arguments are the help text, word for word")]

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use nbd_server_core::Rule;
use nix::unistd::{Group, User};

use crate::place::{self, Place};

/// Serves block devices as Network Block Devices
///
/// nbdblk opens each device once, and all clients share it. If it cannot open one, it fails before it listens.
#[derive(Debug, Parser)]
#[command(name = "nbdblk", version, disable_version_flag = true, disable_help_subcommand = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Log more: -v devices and connections, -vv details
    #[arg(short, long, global = true, action = ArgAction::Count, display_order = 900)]
    pub(crate) verbose: u8,

    /// Format of the lines on stderr: text, or json (one object per line, with time in seconds since 1970, level and message)
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "text",
        hide_default_value = true,
        display_order = 901
    )]
    pub(crate) log_format: LogFormat,

    /// Print the version
    #[arg(short = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve devices until a signal or the end of the command of --run
    Serve(Box<Serve>),
    /// Make a server read its file again
    Reload(Reload),
    /// Make a server replace its program without losing a client
    Upgrade(Upgrade),
    /// Show what a server does: exports, devices, clients, rates and latencies
    Status(Status),
    /// Disconnect clients of a server
    Disconnect(Disconnect),
    /// Check a file of "nbdblk serve --config" without opening anything
    Check(Check),
    /// Judge whether this program can replace a server
    #[command(hide = true)]
    Judge(Judge),
    /// Open a device and print its size, limits, capabilities and properties
    Info(Info),
    /// List the drivers, or the properties of one of them
    Drivers(Drivers),
}

/// Serve devices until a signal or the end of the command of --run
///
/// Each device is served under its name. The first one is also the default export, which has the empty name.
#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct Serve {
    /// What to serve: [NAME:]DRIVER=VALUE[,PROPERTY=VALUE]...
    ///
    /// NAME is the name of the export; it ends at a colon before the first "=". Write ",," for a comma in a value. "nbdblk
    /// drivers" lists the drivers, "nbdblk drivers NAME" the properties of one.
    #[arg(value_name = "EXPORT", required_unless_present = "config")]
    pub(crate) specs: Vec<OsString>,

    /// Read exports, and options by their long names, from a TOML file
    ///
    /// SIGHUP and "nbdblk reload" make the server read it again. If it has an error, the server reports line and column and
    /// changes nothing.
    #[arg(long, value_name = "FILE", conflicts_with = "specs")]
    pub(crate) config: Option<PathBuf>,

    /// Listen for "nbdblk status", "reload", "upgrade" and "disconnect" on this Unix domain socket, for this user and root only
    ///
    /// [default for a service with RuntimeDirectory=: control.sock in that directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// Listen on a Unix domain socket; "-": a private one, for --run. May be repeated
    ///
    /// A stale socket, on which no server listens, is replaced. The server removes the socket at exit. "@NAME" is a socket in
    /// the abstract namespace, without a file.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub(crate) unix: Vec<PathBuf>,

    /// Permissions of the sockets of -U, octal, such as 0660 [default: 0777 without the bits of the umask]
    ///
    /// A client needs write permission to connect. Owner, group and permissions are set before a client can connect.
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) socket_mode: Option<u32>,

    /// Owner of the sockets of -U, a name or a number; needs root
    #[arg(long, value_name = "USER", value_parser = user)]
    pub(crate) socket_owner: Option<u32>,

    /// Group of the sockets of -U, a name or a number
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub(crate) socket_group: Option<u32>,

    /// Listen on a TCP port; 0: a free port [default: 10809, without -U]
    #[arg(short, long, value_parser = port)]
    pub(crate) port: Option<u16>,

    /// Address or host name to listen on: "::" for all. May be repeated [default: 127.0.0.1 and ::1]
    ///
    /// Without --allow, or TLS with --tls-verify-peer, every client that can connect can read the exports, and write to those
    /// that are not read-only.
    #[arg(short, long, value_name = "ADDRESS", visible_alias = "bind", alias = "ipaddr", value_parser = place::host)]
    pub(crate) ip_addr: Vec<String>,

    /// Use only the IPv4 addresses of a host
    #[arg(short = '4', long, conflicts_with = "ipv6_only")]
    pub(crate) ipv4_only: bool,

    /// Use only the IPv6 addresses of a host
    #[arg(short = '6', long)]
    pub(crate) ipv6_only: bool,

    /// Listen on a vsock port [default: the number of --port, which then does not listen on TCP]
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true, value_parser = vsock_port)]
    pub(crate) vsock: Option<Option<u32>>,

    /// Listen at a place: unix:PATH, tcp:PORT, tcp:HOST:PORT, tcp:[IPV6]:PORT or vsock:PORT. May be repeated
    ///
    /// All options to listen can be combined. With sockets from systemd (socket activation, LISTEN_FDS), no other can be given.
    #[arg(short, long, value_name = "PLACE")]
    pub(crate) listen: Vec<Place>,

    /// Serve one client on standard input and output, and exit when it disconnects
    #[arg(short, long, visible_alias = "stdin", conflicts_with_all = ["unix", "port", "ip_addr", "ipv4_only", "ipv6_only", "vsock", "listen", "run", "print_uri", "socket_mode", "socket_owner", "socket_group"])]
    pub(crate) single: bool,

    /// Clients that may open an export: [NAME:]KIND=VALUE, without NAME for all exports. May be repeated
    ///
    /// A client must match at least one rule of the export; other clients cannot see it. KIND is one of ip (ADDRESS or
    /// ADDRESS/BITS: TCP clients), uid and gid (effective user and group: clients on a Unix domain socket), cid (clients on
    /// vsock), dn (subject of the client's certificate), san (another name in it, such as DNS:host.example) and psk (user of
    /// a pre-shared key).
    #[arg(long, value_name = "RULE", value_parser = allowed)]
    pub(crate) allow: Vec<(Option<String>, Rule)>,

    /// Most connections at a time; more are closed [default: 4096]
    #[arg(long, value_name = "N", value_parser = connections)]
    pub(crate) connections: Option<NonZeroUsize>,

    /// Longest handshake of a client [default: 10s]
    #[arg(long, value_name = "TIME", aliases = ["timeout", "time-out"], value_parser = timeout)]
    pub(crate) handshake_timeout: Option<Duration>,

    /// Refuse clients that do not ask for block sizes, if blocks are larger than a byte
    ///
    /// By default the server reads, merges and writes back the blocks of an unaligned write. The Linux kernel never asks.
    #[arg(long)]
    pub(crate) block_size_required: bool,

    #[command(flatten)]
    pub(crate) tls: Tls,

    /// Wait at start for devices that are not there yet, at most for this time [default: 0s]
    ///
    /// A device is not there yet if its path, socket or address does not exist, no process listens on its socket, or another
    /// process uses it. The server listens and is ready when all devices are open.
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) wait: Option<Duration>,

    /// Refuse writes, and open the devices read-only
    #[arg(short, long, visible_alias = "readonly")]
    pub(crate) read_only: bool,

    /// Print the URIs on stdout, one per line, once the server is ready; that of the default export first
    #[arg(long, aliases = ["print-url", "show-uri", "show-url"])]
    pub(crate) print_uri: bool,

    /// Write the process ID to this file once the server is ready, and remove the file at exit
    #[arg(short = 'P', long, value_name = "PATH", alias = "pid-file")]
    pub(crate) pidfile: Option<PathBuf>,

    /// Write a newline to this inherited file descriptor once the server is ready, and close it
    ///
    /// The server also notifies systemd (Type=notify, NOTIFY_SOCKET).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) ready_fd: Option<i32>,

    /// Exit when the parent process ends
    #[arg(long)]
    pub(crate) exit_with_parent: bool,

    /// Stay in the foreground; nbdblk always does
    #[arg(short, long, alias = "no-fork", hide = true)]
    foreground: bool,

    /// Run a shell command, and exit with its status when it ends; implies "-U -" without another socket
    ///
    /// The environment of the command has $uri, $unixsocket, $port, $exportname and $nbd (the same as $uri). The server leaves
    /// SIGINT and SIGQUIT to the command, and passes SIGTERM on.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) run: Option<OsString>,

    /// Confine the threads of the server: off, on (as far as the kernel can; the log names the rest) or require [default: on]
    ///
    /// Threads that serve clients and devices cannot open files, connect, or execute programs, and have no capabilities. A command
    /// of --run is not confined.
    #[arg(long, value_name = "MODE", hide_possible_values = true)]
    pub(crate) sandbox: Option<SandboxMode>,

    /// Change to this user, a name or a number, and to its groups, once the devices are open; needs root
    ///
    /// What the server opens later, for a reload, a device that comes back or an upgrade, must be accessible to that user.
    #[arg(long, value_name = "USER", value_parser = user)]
    pub(crate) user: Option<u32>,

    /// Change to this group, a name or a number, once the devices are open; needs root [default: that of the user]
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub(crate) group: Option<u32>,

    /// Worker threads; each opens a queue of every device that has enough of them [default: one for each CPU]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,

    /// Payload memory for each export and worker [default: 64M]
    ///
    /// It bounds the memory that clients can make the server use, and the length of a request (up to 32M).
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub(crate) memory: Option<usize>,

    /// Log a warning about a request that takes longer, at most one per export in that time; 0: never [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = pause)]
    pub(crate) slow: Option<Duration>,

    /// Serve metrics for Prometheus, and a status page, over HTTP: tcp:PORT, tcp:HOST:PORT or unix:PATH
    ///
    /// /metrics has the metrics, /healthz returns 200 while all devices work, and / is a page for browsers. Read-only; every
    /// client that can connect can read it. tcp:PORT listens on the loopback addresses.
    #[arg(long, value_name = "PLACE", value_parser = metrics)]
    pub(crate) metrics: Vec<Place>,

    /// Longest busy-poll before a worker sleeps, in microseconds (adaptive; 0: never) [default: 100]
    ///
    /// A worker busy-polls when it expects the next event within that time: from a fast device, or from a client with few
    /// requests in flight. This saves the time to wake up. An idle server sleeps, and other programs run first.
    #[arg(long, value_name = "MICROSECONDS", value_parser = poll)]
    pub(crate) poll: Option<u32>,
}

impl Serve {
    /// An option for listening, if one was given.
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

    /// An option for access to a Unix domain socket, if one was given.
    pub(crate) fn socket_access(&self) -> Option<&'static str> {
        let given = [
            (self.socket_mode, "--socket-mode"),
            (self.socket_owner, "--socket-owner"),
            (self.socket_group, "--socket-group"),
        ];
        given.into_iter().find_map(|(given, option)| given.map(|_| option))
    }
}

/// Make a server read its file again
///
/// Prints the changes. If the file has an error, or a device cannot be opened, prints the reason and exits with status 1; the
/// server changes nothing. Without FILE and --control, it reloads the only service.
#[derive(Args, Debug)]
pub(crate) struct Reload {
    /// The configuration file of the server; if it names no control socket, the service of that name is meant
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// The control socket
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    pub(crate) control: Option<PathBuf>,

    /// Longest wait for the server [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) timeout: Option<Duration>,
}

/// Make a server replace its program without losing a client
///
/// The process of the server executes the program again, or another version of it, which continues all connections; clients only
/// see a pause. First, the new program judges the configuration and the state of the server. If that fails, or a device does not
/// complete its requests within 5 seconds, prints the reason and exits with status 1; the server goes on as before. Clients that
/// use TLS are disconnected, unless the kernel does it. Without FILE and --control, it replaces the only service.
///
/// SIGUSR2 does the same.
#[derive(Args, Debug)]
pub(crate) struct Upgrade {
    /// The configuration file of the server; if it names no control socket, the service of that name is meant
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// The control socket
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    pub(crate) control: Option<PathBuf>,

    /// The new program [default: the one that the server was started with, as it is now]
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,

    /// Longest wait for the server [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) timeout: Option<Duration>,
}

/// Show what a server does: exports, devices, clients, rates and latencies
///
/// Prints a table with a line for each export: the state of its device, its clients, the requests and bytes of each second, the
/// requests in flight, the median latency (P50) and the 99th percentile (P99), and the errors so far. Without FILE and --control,
/// it searches the runtime directories of services for a control socket.
#[derive(Args, Debug)]
pub(crate) struct Status {
    /// The configuration file of the server; if it names no control socket, the service of that name is meant
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// The control socket
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    pub(crate) control: Option<PathBuf>,

    /// Print JSON, with counters since the start instead of rates; status.md in the documentation describes it
    #[arg(long, conflicts_with_all = ["watch", "clients", "queues"])]
    pub(crate) json: bool,

    /// Refresh the table until interrupted, with a bar for each export
    #[arg(short, long)]
    pub(crate) watch: bool,

    /// List the clients
    #[arg(short, long)]
    pub(crate) clients: bool,

    /// List the queues of the devices: their workers, their memory, and the positions in their rings
    #[arg(short, long)]
    pub(crate) queues: bool,

    /// Interval of rates and percentiles, and of --watch [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) interval: Option<Duration>,
}

/// Disconnect clients of a server
///
/// Replies that the server has not sent yet are lost. A client that reconnects is served again.
#[derive(Args, Debug)]
pub(crate) struct Disconnect {
    /// The ID of a client, from "nbdblk status --clients", or the name of an export: all its clients
    #[arg(value_name = "ID|EXPORT")]
    pub(crate) target: String,

    /// The configuration file of the server; if it names no control socket, the service of that name is meant
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// The control socket
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    pub(crate) control: Option<PathBuf>,

    /// Take a number as the name of an export, not as an ID
    #[arg(long)]
    pub(crate) export: bool,
}

/// Check a file of "nbdblk serve --config" without opening anything
///
/// If it has an error, prints file, line, column and the reason, and exits with status 1.
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// The file
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

/// The question of a server that wants to be replaced.
#[derive(Args, Debug)]
pub(crate) struct Judge {
    /// The version of the server's state.
    #[arg(long)]
    pub(crate) version: u32,

    /// Standard input has the state.
    #[arg(long)]
    pub(crate) state: bool,

    /// The arguments of the server, with its name.
    #[arg(last = true)]
    pub(crate) args: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Tls {
    /// Offer TLS (on), or refuse clients without it (require) [default: on with --tls-certificates or --tls-psk, else off]
    #[arg(long = "tls", value_name = "MODE")]
    pub(crate) mode: Option<TlsMode>,

    /// Directory of server-cert.pem and server-key.pem, and of ca-cert.pem and ca-crl.pem for client certificates
    ///
    /// [default: the first that exists of ~/.pki/nbdkit, ~/.config/pki/nbdkit and /etc/pki/nbdkit]
    #[arg(long = "tls-certificates", value_name = "DIR")]
    pub(crate) certificates: Option<PathBuf>,

    /// Refuse clients without a certificate signed by ca-cert.pem
    #[arg(long = "tls-verify-peer")]
    pub(crate) verify_peer: bool,

    /// File of pre-shared keys, for TLS without certificates: USER:HEX per line, as psktool writes it
    #[arg(long = "tls-psk", value_name = "FILE", conflicts_with_all = ["certificates", "verify_peer"])]
    pub(crate) psk: Option<PathBuf>,

    /// Serve this export only over TLS, even with --tls=on. May be repeated
    #[arg(long = "tls-only", value_name = "NAME")]
    pub(crate) only: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TlsMode {
    Off,
    On,
    Require,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SandboxMode {
    Off,
    #[default]
    On,
    Require,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
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
    // No process has more than 128 TiB of address space.
    let size = usize::try_from(size).ok().filter(|size| *size as u64 <= 64 << 40);
    size.ok_or_else(|| "it must be at most 64T, which the address space can hold".into())
}

fn threads(text: &str) -> Result<usize, String> {
    // More would be a mistake: each thread needs descriptors, and memory for each export.
    text.parse()
        .ok()
        .filter(|count| (1..=1024).contains(count))
        .ok_or_else(|| "it must be a number from 1 to 1024".into())
}

fn connections(text: &str) -> Result<NonZeroUsize, &'static str> {
    text.parse().map_err(|_| "it must be a number, at least 1")
}

fn poll(text: &str) -> Result<u32, &'static str> {
    let us = text.parse().ok().filter(|us| *us <= 1_000_000);
    us.ok_or("it must be a number from 0 to 1000000")
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

fn port(text: &str) -> Result<u16, &'static str> {
    text.parse().map_err(|_| "it must be a number from 0 to 65535")
}

fn vsock_port(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(|_| "it must be a number from 0 to 4294967295")
}

fn group(text: &str) -> Result<u32, String> {
    let named = || Group::from_name(text).map(|group| group.map(|group| group.gid.as_raw()));
    id(text, "group", named)
}

fn id(text: &str, kind: &str, named: impl Fn() -> nix::Result<Option<u32>>) -> Result<u32, String> {
    match text.parse() {
        // All ones mean no change (chown(2)).
        Ok(u32::MAX) => Err(format!("it is not a valid {kind} number")),
        Ok(id) => Ok(id),
        Err(_) => named().map_err(|error| error.to_string())?.ok_or_else(|| format!("there is no {kind} of that name")),
    }
}

/// As [`timeout`], or 0.
fn pause(text: &str) -> Result<Duration, String> {
    if text == "0" || text == "0s" { Ok(Duration::ZERO) } else { timeout(text) }
}

fn metrics(text: &str) -> Result<Place, String> {
    match text.parse()? {
        place @ (Place::Unix(_) | Place::Tcp(..)) => Ok(place),
        _ => Err("metrics are served at tcp:PORT, tcp:HOST:PORT or unix:PATH".into()),
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match blkdev_drivers::parse_time(text).map_err(|error| error.replacen("Value", "it", 1))? {
        Duration::ZERO => Err("it must be longer than 0".into()),
        time if time > Duration::from_secs(86400) => Err("it must be at most a day, 86400s".into()),
        time => Ok(time),
    }
}

/// Splits a rule. As in a device argument, the name of the export ends at a colon before the first "=".
fn allowed(text: &str) -> Result<(Option<String>, Rule), String> {
    let kind = text.split('=').next().unwrap_or_default();
    let (name, rule) = kind.find(':').map_or((None, text), |at| (Some(text[..at].into()), &text[at + 1..]));
    Ok((name, rule.parse().map_err(|error: std::io::Error| error.to_string())?))
}

const EXAMPLES: &str = "\
Examples:
  Serve on nbd://localhost until the server is stopped:
    nbdblk serve io_uring=disk.img

  Serve on a Unix domain socket, nbd+unix://?socket=/run/nbd.sock:
    nbdblk serve vhost-user=/run/vhost.sock -U /run/nbd.sock

  Serve while one command runs:
    nbdblk serve memory=1G --run 'nbdinfo \"$uri\"'

  Print the properties of a device, and those that can be set:
    nbdblk info io_uring=/dev/sdb
    nbdblk drivers io_uring

\"nbdblk serve --help\" lists all options.";

const SERVE_EXAMPLES: &str = "\
Signals:
  SIGTERM, SIGINT and SIGQUIT stop the server, which exits with status 0; a
  second one ends it at once. Before the server is ready, the status is 128
  plus the signal number.
  With --config, SIGHUP makes the server read the file again and log the
  result. Otherwise it stops the server, unless nohup started it.
  SIGXCPU stops the server.
  The server ignores SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF,
  SIGIO, SIGPWR, SIGSTKFLT and real-time signals. It ignores SIGXFSZ too: a
  write beyond the file size limit fails with ENOSPC. SIGABRT and faults still
  kill it.

Examples:
  Serve two exports on a Unix domain socket, and list them:
    nbdblk serve disk:io_uring=disk.img,direct=true scratch:memory=1G \\
      -U /tmp/nbd.sock
    nbdinfo --list 'nbd+unix://?socket=/tmp/nbd.sock'

  Open a device behind qemu-storage-daemon or SPDK in a shell:
    nbdblk serve vhost-user=/run/vhost.sock,num-queues=2 \\
      --run 'nbdsh -u \"$uri\"'

  Serve a disk to user 1000 only, and read-only under another name to a network:
    nbdblk serve disk:io_uring=disk.img copy:io_uring=disk.img,read-only=true \\
      -U /run/nbd.sock -i 192.0.2.1 \\
      --allow disk:uid=1000 --allow copy:ip=192.0.2.0/24

  Copy a device into a file:
    nbdblk serve -r vhost-user=/run/vhost.sock \\
      --run 'nbdcopy \"$uri\" copy.img'

  Attach a device to a virtual machine:
    nbdblk serve io_uring=/dev/nvme0n1 -U /run/nbd.sock
    qemu-system-x86_64 \\
      -drive 'file=nbd+unix://?socket=/run/nbd.sock,format=raw,if=virtio' ...

  Serve on the network, for clients with a certificate signed by our CA:
    nbdblk serve io_uring=disk.img -i :: --tls require \\
      --tls-certificates /etc/pki/nbd --tls-verify-peer

  Listen on a free TCP port, for a script:
    nbdblk serve io_uring=disk.img -p 0 --print-uri";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_sound() {
        Cli::command().debug_assert();
    }

    /// clap would break longer lines, and with them the commands.
    #[test]
    fn examples_fit_a_terminal() {
        for text in [EXAMPLES, SERVE_EXAMPLES] {
            let long: Vec<_> = text.lines().filter(|line| line.len() > 80).collect();
            assert!(long.is_empty(), "{long:#?}");
        }
    }

    #[test]
    fn reload_takes_a_file_or_a_socket() {
        let parse = |args: &str| Cli::try_parse_from(args.split(' ')).map(drop).map_err(|error| error.to_string());
        // Without both, it reloads the only service.
        for good in
            ["nbdblk reload", "nbdblk reload a.toml", "nbdblk reload --control s", "nbdblk reload a.toml --timeout 5s"]
        {
            assert_eq!(parse(good), Ok(()));
        }
        let both = "nbdblk reload a.toml --control s";
        assert!(parse(both).is_err(), "{both}");
    }
}
