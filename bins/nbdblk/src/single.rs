//! `--single`: one client, on standard input and output.

use std::{
    fs::File,
    io::{self, ErrorKind, IsTerminal, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::UnixStream,
        },
    },
    sync::mpsc,
};

use anyhow::{Context, ensure};
use nbd_server_core::Listener;
use nix::unistd::{dup2_stdin, dup2_stdout};

use crate::{control::Control, events::Event, sandbox};

/// Takes standard input and output as the only client. Reports its end to `control`.
pub(crate) fn client(control: &Control) -> anyhow::Result<Listener> {
    ensure!(!io::stdin().is_terminal(), "--single: standard input is a terminal, not a client");
    let take = || -> io::Result<(OwnedFd, OwnedFd)> {
        let taken = (io::stdin().as_fd().try_clone_to_owned()?, io::stdout().as_fd().try_clone_to_owned()?);
        // A descriptor that stays open here would hide the end of the stream from the client.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        Ok(taken)
    };
    let (input, output) = take().context("--single: taking standard input and output")?;
    let (over, end) = mpsc::channel();
    let events = control.sender();
    let stop = move || {
        // If the server is already stopping, nothing receives this.
        let _ = events.send(Event::Ended(0));
    };
    if is_one_socket(&input, &output)? {
        spawn(move || {
            let _ = end.recv();
            stop();
        })?;
        return Ok(Listener::Connected { socket: input, over });
    }
    // The server accepts only sockets.
    let (ours, theirs) = UnixStream::pair().context("--single: making a pair of sockets")?;
    let (mut into, mut from) = (ours.try_clone()?, ours);
    let (mut input, mut output) = (File::from(input), File::from(output));
    spawn(move || {
        pump(&mut input, &mut into);
        let _ = into.shutdown(Shutdown::Write);
    })?;
    spawn(move || {
        pump(&mut from, &mut output);
        stop();
    })?;
    Ok(Listener::Connected { socket: theirs.into(), over })
}

fn spawn(work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    sandbox::spawn_service("single", work).context("starting a thread")
}

/// Forwards bytes as they come, until either end has closed. (io::copy does not: from a socket to a pipe it waits for more.)
fn pump(from: &mut impl Read, into: &mut impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(got) if into.write_all(&buffer[..got]).is_ok() => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

fn is_one_socket(a: &OwnedFd, b: &OwnedFd) -> anyhow::Result<bool> {
    let look = |fd: &OwnedFd| File::from(fd.try_clone()?).metadata();
    let (a, b) = (look(a)?, look(b)?);
    Ok(a.file_type().is_socket() && (a.dev(), a.ino()) == (b.dev(), b.ino()))
}
