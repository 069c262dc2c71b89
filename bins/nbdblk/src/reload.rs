//! `nbdblk reload`, and the server's side of it: a unix socket on which one word asks for the file to be read again.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use crate::{cli, config::File, control::Event, files::OwnFile, listen::bind_unix};

/// What a client says.
const REQUEST: &[u8] = b"reload\n";

/// How long it may take for that.
const PATIENCE: Duration = Duration::from_secs(5);

/// What became of it: what has changed, or what is wrong with the file.
pub(crate) type Answer = Result<String, String>;

/// Has a server read its file again.
pub(crate) fn run(args: &cli::Reload) -> anyhow::Result<ExitCode> {
    let path = match (&args.control, &args.file) {
        (Some(path), _) => path.clone(),
        (None, Some(file)) => named_in(file)?,
        (None, None) => unreachable!("one of them is required"),
    };
    let ask = || -> io::Result<String> {
        let mut socket = UnixStream::connect(&path)?;
        socket.write_all(REQUEST)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().with_context(|| format!("asking the server at {}", path.display()))?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", changes)) => crate::print(&format!("{changes}\n")),
        Some(("error", error)) => Err(anyhow!("{error}")),
        _ => bail!("the server at {} has ended without an answer", path.display()),
    }
}

/// The control socket of the server that serves this file.
fn named_in(file: &Path) -> anyhow::Result<PathBuf> {
    let found = File::read(file)?.settings.into_iter().find(|setting| setting.key == "control");
    let word =
        found.and_then(|setting| setting.words.first().and_then(|w| w.strip_prefix("--control=")).map(PathBuf::from));
    word.with_context(|| {
        format!("{} names no control socket (control = \"PATH\"); say --control, or send SIGHUP", file.display())
    })
}

/// Listens for [`run`], and passes on what it asks for. Only the server's own user and root are heard.
pub(crate) fn listen(path: &Path, events: mpsc::Sender<Event>) -> anyhow::Result<OwnFile> {
    let listener = bind_unix(path).with_context(|| format!("listening on {}", path.display()))?;
    let path = std::path::absolute(path).context("where the current directory is")?;
    let file = OwnFile::new(&path, None)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(|| path.display().to_string())?;
    let serve = move || {
        loop {
            match listener.accept() {
                Ok((mut client, _)) => {
                    // Whoever goes without waiting for the answer does not want it.
                    if let Err(error) = answer(&mut client, &events) {
                        log::debug!("the control socket: {error}");
                    }
                }
                Err(error) => {
                    log::warn!("the control socket: {error}");
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(serve).context("starting a thread")?;
    Ok(file)
}

fn answer(client: &mut UnixStream, events: &mpsc::Sender<Event>) -> io::Result<()> {
    let uid = getsockopt(&*client, PeerCredentials)?.uid();
    if uid != 0 && uid != geteuid().as_raw() {
        return client.write_all(b"error only the server's user and root may ask for that\n");
    }
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut request = [0; REQUEST.len()];
    client.read_exact(&mut request)?;
    if request != *REQUEST {
        return client.write_all(b"error the control socket understands \"reload\"\n");
    }
    let (sender, answer) = mpsc::channel();
    let asked = events.send(Event::Reload(Some(sender)));
    match asked.ok().and_then(|()| answer.recv().ok()) {
        Some(Ok(changes)) => client.write_all(format!("ok {changes}\n").as_bytes()),
        Some(Err(error)) => client.write_all(format!("error {}\n", error.replace('\n', "; ")).as_bytes()),
        None => client.write_all(b"error the server is stopping\n"),
    }
}
