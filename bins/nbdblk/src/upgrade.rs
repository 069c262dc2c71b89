//! `nbdblk upgrade`: asks a server to replace its program.

use std::{os::unix::ffi::OsStringExt, path::absolute, process::ExitCode};

use anyhow::{Context, ensure};

use crate::{cli, reload};

/// Makes a server replace itself.
pub(crate) fn run(args: &cli::Upgrade) -> anyhow::Result<ExitCode> {
    let mut request = b"upgrade".to_vec();
    if let Some(program) = &args.program {
        let program = absolute(program).context("cannot get the current directory")?.into_os_string().into_vec();
        ensure!(!program.contains(&b'\n'), "--program: the path contains a line break");
        request.push(b' ');
        request.extend(program);
    }
    request.push(b'\n');
    reload::request(args.control.as_deref(), args.file.as_deref(), &request, args.timeout)
}
