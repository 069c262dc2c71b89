//! The arguments, and the help that goes with them.
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments on arguments are the help text, word for word")]

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{ArgAction, Args, Parser, Subcommand};

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
    Serve(Serve),
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
    #[arg(value_name = "EXPORT", required = true)]
    pub(crate) specs: Vec<String>,

    /// Listen on a Unix domain socket; "-": on a private one, for --run. May be repeated
    ///
    /// A socket that no server listens on any more is replaced. The socket is removed at the end.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub(crate) unix: Vec<PathBuf>,

    /// Listen on a TCP port; 0: on a free one [default: 10809, when there is no -U]
    #[arg(short, long)]
    pub(crate) port: Option<u16>,

    /// Address or host name to listen on: "::" for all. May be repeated [default: 127.0.0.1 and ::1]
    ///
    /// There is no authentication: whoever can connect can read, and write unless the export is read-only.
    #[arg(short, long, value_name = "ADDRESS", visible_alias = "ipaddr")]
    pub(crate) ip_addr: Vec<String>,

    /// Refuse writes, and open the devices for reading only
    #[arg(short, long, visible_alias = "readonly")]
    pub(crate) read_only: bool,

    /// Print the URIs on stdout, one a line, when the devices are open and the sockets listen; the default export's first
    #[arg(long)]
    pub(crate) print_uri: bool,

    /// Run a shell command and stop when it ends, with its exit status; implies "-U -" without another socket
    ///
    /// The command finds $uri, $unixsocket, $port, $exportname and $nbd (the same as $uri) in its environment. SIGINT and
    /// SIGQUIT are left to it, SIGTERM is passed on to it.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) run: Option<String>,

    /// Worker threads; each opens a queue of every device that has enough of them [default: one for each CPU]
    #[arg(short, long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// Memory for payload, for each export and worker [default: 64M]
    ///
    /// It bounds what clients can make the server hold, and how long a request may be (up to 32M).
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub(crate) memory: Option<usize>,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    /// What to open: DRIVER=VALUE[,PROPERTY=VALUE]..., as for "nbdblk serve"
    #[arg(value_name = "DEVICE")]
    pub(crate) spec: String,

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
    size.try_into().map_err(|_| "it does not fit the address space".into())
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
  SIGTERM, SIGINT and SIGQUIT stop the server with status 0; a second one ends it at once.

Examples:
  Two exports on a Unix domain socket, and the list of them:
    nbdblk serve disk:io_uring=disk.img,direct=true scratch:memory=1G -U /tmp/nbd.sock
    nbdinfo --list 'nbd+unix://?socket=/tmp/nbd.sock'

  A device behind qemu-storage-daemon or SPDK, looked at from a shell:
    nbdblk serve vhost-user=/run/vhost.sock,num-queues=2 --run 'nbdsh -u \"$uri\"'

  Copy it into a file:
    nbdblk serve -r vhost-user=/run/vhost.sock --run 'nbdcopy \"$uri\" copy.img'

  Give it to a virtual machine:
    nbdblk serve io_uring=/dev/nvme0n1 -U /run/nbd.sock
    qemu-system-x86_64 -drive 'file=nbd+unix://?socket=/run/nbd.sock,format=raw,if=virtio' ...

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
