//! Files on disk, with their modes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::files::File;

/// Writes files below a directory. Directories can be entered by all.
pub(crate) fn write<'a>(root: &Path, files: impl Iterator<Item = &'a File>) -> Result<()> {
    for file in files {
        let to = root.join(&file.path);
        let parent = to.parent().context("a file lies in a directory")?;
        create_dirs(root, parent)?;
        match &file.content {
            None => create_dirs(root, &to)?,
            Some(content) => {
                // A new file, because a process may have the old one mapped.
                let _ = fs::remove_file(&to);
                fs::write(&to, content).with_context(|| format!("writing {}", to.display()))?;
                fs::set_permissions(&to, fs::Permissions::from_mode(file.mode))?;
            }
        }
    }
    Ok(())
}

/// Creates a directory and its parents, whatever the umask.
fn create_dirs(root: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let below: Vec<PathBuf> = dir.ancestors().take_while(|path| path.starts_with(root)).map(Path::to_owned).collect();
    for path in below {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
