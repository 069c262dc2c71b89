//! Where the control socket of a server is.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::config::File;

/// The name of the socket in the runtime directory of a service.
const NAME: &str = "control.sock";

/// The directory of services below the runtime directory of the system or of a user.
const SERVICES: &str = "nbdblk";

/// The default control socket of a service: in its RuntimeDirectory= (systemd.exec(5)).
pub(crate) fn of_service() -> Option<PathBuf> {
    let all = env::var_os("RUNTIME_DIRECTORY")?;
    // Several directories are separated by colons.
    let first = env::split_paths(&all).next()?;
    first.is_absolute().then(|| first.join(NAME))
}

/// Finds the control socket of a running server: `control` itself, the one that `file` names, or that of the only service.
pub(crate) fn find(control: Option<&Path>, file: Option<&Path>) -> anyhow::Result<PathBuf> {
    match (control, file) {
        (Some(path), _) => Ok(path.to_owned()),
        (None, Some(file)) => named_in(file),
        (None, None) => only_service(),
    }
}

/// The control socket of the server that uses this file: the one that the file names, or else that of the service of this name.
fn named_in(file: &Path) -> anyhow::Result<PathBuf> {
    let found = File::read(file)?.settings.into_iter().find(|setting| setting.key == "control");
    let word =
        found.and_then(|setting| setting.words.first().and_then(|w| w.strip_prefix("--control=")).map(PathBuf::from));
    let of_service = || {
        let place = |root: PathBuf| Some(root.join(file.file_stem()?).join(NAME));
        roots().into_iter().filter_map(place).find(|path| path.exists())
    };
    word.or_else(of_service).with_context(|| {
        let (file, name) = (file.display(), file.file_stem().unwrap_or_default().display());
        format!("{file} names no control socket (control = \"PATH\"), and no service {name} runs; use --control")
    })
}

/// The runtime directories of services.
fn roots() -> Vec<PathBuf> {
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    runtime.into_iter().chain(["/run".into()]).map(|root| root.join(SERVICES)).collect()
}

fn only_service() -> anyhow::Result<PathBuf> {
    let roots = roots();
    let mut found: Vec<PathBuf> = roots.iter().flat_map(|root| sockets(root)).collect();
    found.sort();
    found.dedup();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => {
            let places: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
            bail!("no server was found in {}: name its file, or its control socket with --control", places.join(" or "))
        }
        several => {
            let places: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
            bail!("there are several servers: choose one with --control: {}", places.join(", "))
        }
    }
}

/// The control sockets in a directory and in its subdirectories.
fn sockets(root: &Path) -> Vec<PathBuf> {
    let inner = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    [root.to_owned()].into_iter().chain(inner).map(|dir| dir.join(NAME)).filter(|path| path.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_have_their_sockets_in_a_directory_or_below_it() {
        let root = env::temp_dir().join(format!("nbdblk-places-{}", std::process::id()));
        fs::create_dir_all(root.join("a")).unwrap();
        assert_eq!(sockets(&root), Vec::<PathBuf>::new());
        fs::write(root.join("a").join(NAME), "").unwrap();
        assert_eq!(sockets(&root), [root.join("a").join(NAME)]);
        fs::write(root.join(NAME), "").unwrap();
        assert_eq!(sockets(&root).len(), 2);
        fs::remove_dir_all(&root).unwrap();
    }
}
