//! `--tls` and its files, with the names that nbdkit, libvirt and QEMU use.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail, ensure};
use nbd_server_core::tls::{Certificates, Tls};

use crate::{
    cli::{self, TlsMode},
    files::open_regular,
    uri::quote,
};

/// The server's TLS configuration, and what clients need to know of it.
#[derive(Debug)]
pub(crate) struct Security {
    pub(crate) tls: Option<Tls>,
    mode: TlsMode,
    certificates: Option<PathBuf>,
    psk: Option<PathBuf>,
}

impl Security {
    /// Reads the files, so that their errors are found before the server listens.
    pub(crate) fn load(args: &cli::Tls) -> anyhow::Result<Self> {
        let given = args.certificates.is_some() || args.psk.is_some();
        let mode = args.mode.unwrap_or(if given { TlsMode::On } else { TlsMode::Off });
        if mode == TlsMode::Off {
            ensure!(!args.verify_peer, "--tls-verify-peer needs TLS: --tls on, or --tls require");
            ensure!(args.only.is_empty(), "--tls-only needs TLS: --tls on, or --tls require");
            return Ok(Self { tls: None, mode, certificates: None, psk: None });
        }
        let full = |path: &Path| absolute(path).context("cannot get the current directory");
        let (mut certificates, mut psk) = (None, None);
        let tls = if let Some(file) = &args.psk {
            psk = Some(full(file)?);
            with_keys(file).context("TLS with pre-shared keys")?
        } else {
            let dir = args.certificates.as_deref().map_or_else(default_dir, full)?;
            let tls = with_certificates(&dir, args.verify_peer)
                .with_context(|| format!("TLS with the certificates in {}", dir.display()))?;
            certificates = Some(dir);
            tls
        };
        Ok(Self { tls: Some(tls.required(mode == TlsMode::Require)), mode, certificates, psk })
    }

    /// The credentials in a URI, if clients need TLS.
    pub(crate) fn words(&self) -> Option<String> {
        let word = |key: &str, path: &Path| format!("{key}={}", quote(path.as_os_str().as_bytes()));
        let certificates = self.certificates.as_ref().map(|dir| word("tls-certificates", dir));
        let psk = self.psk.as_ref().map(|file| word("tls-psk-file", file));
        certificates.or(psk).filter(|_| self.mode == TlsMode::Require)
    }

    /// Variables that nbdkit sets for the command of `--run`.
    pub(crate) fn variables(&self) -> Vec<(OsString, OsString)> {
        let mode = match self.mode {
            TlsMode::Off => "",
            TlsMode::On => "on",
            TlsMode::Require => "require",
        };
        let path = |path: &Option<PathBuf>| path.as_ref().map_or_else(OsString::new, |path| path.into());
        vec![
            ("tls".into(), mode.into()),
            ("tls_certificates".into(), path(&self.certificates)),
            ("tls_psk".into(), path(&self.psk)),
        ]
    }
}

fn with_certificates(dir: &Path, verify_peer: bool) -> anyhow::Result<Tls> {
    let files = Certificates::within(dir, verify_peer);
    let all = [Some(&files.certificate), Some(&files.key), files.client_ca.as_ref(), files.client_crl.as_ref()];
    all.into_iter().flatten().try_for_each(|file| check_regular(file))?;
    built(Tls::with_certificates(&files), "TLS", "tls")
}

fn with_keys(file: &Path) -> anyhow::Result<Tls> {
    check_regular(file)?;
    built(Tls::with_keys(file), "pre-shared keys", "tls-psk")
}

/// Explains how to get a build with `feature`, if this one lacks it.
fn built(tls: io::Result<Tls>, what: &str, feature: &str) -> anyhow::Result<Tls> {
    match tls {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => bail!(
            "this nbdblk was built without {what}; take it from a package (\"cargo xtask dist\" makes one with every feature), \
             or build it with \"cargo build --release -p nbdblk --features {feature}\""
        ),
        tls => Ok(tls?),
    }
}

/// A missing file gets a better error elsewhere. Reading from a FIFO could block forever.
fn check_regular(file: &Path) -> anyhow::Result<()> {
    match open_regular(file) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
}

/// The directory that nbdkit uses.
fn default_dir() -> anyhow::Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let homes = home.iter().flat_map(|home| [home.join(".pki/nbdkit"), home.join(".config/pki/nbdkit")]);
    let places: Vec<PathBuf> = homes.chain(["/etc/pki/nbdkit".into()]).collect();
    match places.iter().find(|dir| dir.is_dir()) {
        Some(dir) => Ok(dir.clone()),
        None => {
            let places: Vec<_> = places.iter().map(|dir| dir.display().to_string()).collect();
            bail!("no certificates for TLS: set --tls-certificates; there is no {}", places.join(", no "))
        }
    }
}
