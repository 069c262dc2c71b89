//! `--tls` and the files that go with it, by the names that nbdkit, libvirt and qemu use.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail, ensure};
use nbd_server_core::tls::Tls;

use crate::{
    cli::{self, TlsMode},
    uri::quote,
};

/// What the server offers, and how clients are told.
#[derive(Debug)]
pub(crate) struct Security {
    pub(crate) tls: Option<Tls>,
    mode: TlsMode,
    certificates: Option<PathBuf>,
    words: Option<String>,
}

impl Security {
    /// Reads the files, so that what is wrong with them is found before anything listens.
    pub(crate) fn load(args: &cli::Tls) -> anyhow::Result<Self> {
        let given = args.certificates.is_some();
        let mode = args.mode.unwrap_or(if given { TlsMode::On } else { TlsMode::Off });
        if mode == TlsMode::Off {
            ensure!(!args.verify_peer, "--tls-verify-peer needs TLS: --tls on, or --tls require");
            return Ok(Self { tls: None, mode, certificates: None, words: None });
        }
        let dir = match &args.certificates {
            Some(dir) => absolute(dir).context("where the current directory is")?,
            None => default_dir()?,
        };
        let tls = certificates(&dir, args.verify_peer)
            .with_context(|| format!("TLS with the certificates in {}", dir.display()))?
            .required(mode == TlsMode::Require);
        let words = Some(format!("tls-certificates={}", quote(dir.as_os_str().as_bytes())));
        Ok(Self { tls: Some(tls), mode, certificates: Some(dir), words })
    }

    /// What a URI needs to say, when clients cannot do without TLS.
    pub(crate) fn words(&self) -> Option<&str> {
        self.words.as_deref().filter(|_| self.mode == TlsMode::Require)
    }

    /// What nbdkit tells the command of `--run`.
    pub(crate) fn variables(&self) -> Vec<(OsString, OsString)> {
        let mode = match self.mode {
            TlsMode::Off => "",
            TlsMode::On => "on",
            TlsMode::Require => "require",
        };
        let certificates = self.certificates.as_ref().map_or_else(OsString::new, |dir| dir.into());
        vec![("tls".into(), mode.into()), ("tls_certificates".into(), certificates)]
    }
}

#[cfg(feature = "tls")]
fn certificates(dir: &Path, verify_peer: bool) -> anyhow::Result<Tls> {
    Ok(Tls::with_certificates(&nbd_server_core::tls::Certificates::within(dir, verify_peer))?)
}

#[cfg(not(feature = "tls"))]
fn certificates(_: &Path, _: bool) -> anyhow::Result<Tls> {
    bail!("this nbdblk was built without the cargo feature tls")
}

/// Where nbdkit looks.
fn default_dir() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let homes = home.iter().flat_map(|home| [home.join(".pki/nbdkit"), home.join(".config/pki/nbdkit")]);
    let places: Vec<PathBuf> = homes.chain(["/etc/pki/nbdkit".into()]).collect();
    match places.iter().find(|dir| dir.is_dir()) {
        Some(dir) => Ok(dir.clone()),
        None => {
            let places: Vec<_> = places.iter().map(|dir| dir.display().to_string()).collect();
            bail!("no certificates for TLS: --tls-certificates says where, and there is no {}", places.join(", no "))
        }
    }
}
