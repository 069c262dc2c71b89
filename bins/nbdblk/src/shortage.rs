//! Advice if the system refuses memory, descriptors or threads: names the option or the limit.

use std::io;

use anyhow::anyhow;
use nix::errno::Errno;

use crate::{cli, info::human};

/// Adds advice to an error of such a kind. `exports`: number of exports that the server needs.
pub(crate) fn advise(error: anyhow::Error, args: &cli::Serve, exports: usize) -> anyhow::Error {
    let text = crate::whole(&error);
    let defaults = nbd_server_core::Limits::default();
    let workers = args.threads.unwrap_or(defaults.workers);
    // As the user writes them.
    let (threads, memory_option) = match args.config {
        Some(_) => ("threads", "memory"),
        None => ("--threads", "--memory"),
    };
    let advice = match errno(&error) {
        // The driver's advice is better.
        _ if text.contains("ulimit") => return error,
        Some(Errno::ENOMEM) => {
            let memory = args.memory.unwrap_or(defaults.memory);
            let all = (workers as u64).saturating_mul(exports as u64).saturating_mul(memory as u64);
            format!(
                "payload takes up to {} ({} with {memory_option}, for each of {workers} workers, {threads}, and {exports} exports): \
                 lower them, or raise ulimit -v (LimitAS=), or ulimit -l (LimitMEMLOCK=) for devices that pin memory",
                human(all),
                human(memory as u64),
            )
        }
        Some(Errno::EMFILE) => {
            format!("raise ulimit -n (LimitNOFILE=), or lower {threads}, which is {workers}, or serve fewer exports")
        }
        Some(Errno::ENFILE) => "the whole system has no file descriptors left: raise fs.file-max".into(),
        // For a thread. Sockets may return EAGAIN too, for another reason.
        Some(Errno::EAGAIN) if text.contains("starting") || text.contains("thread") => format!(
            "no thread can be made: raise ulimit -u (LimitNPROC=, TasksMax=) or ulimit -v (LimitAS=), or lower {threads}, \
             which is {workers}"
        ),
        Some(Errno::EFBIG) => {
            "raise ulimit -f (LimitFSIZE=): memory that is shared with a device counts as a file".into()
        }
        Some(Errno::ENOSPC) if text.contains("starting") => {
            format!("raise fs.epoll.max_user_watches, or lower {threads} or the number of exports")
        }
        _ => return error,
    };
    anyhow!("{text}; {advice}")
}

/// The kernel's error.
fn errno(error: &anyhow::Error) -> Option<Errno> {
    let of = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<io::Error>().and_then(blkdev::Context::os_error).map(Errno::from_raw);
        io.or_else(|| cause.downcast_ref::<Errno>().copied())
    };
    error.chain().find_map(of)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use clap::Parser;

    use super::*;

    fn serve(what: &str) -> cli::Serve {
        let words = ["nbdblk", "serve"].into_iter().chain(what.split(' ')).chain(["--threads=3", "--memory=1G"]);
        match cli::Cli::parse_from(words).command {
            cli::Command::Serve(args) => *args,
            other => unreachable!("not {other:?}"),
        }
    }

    #[test]
    fn settings_of_a_file_have_no_dashes() {
        let error = || io::Error::from_raw_os_error(Errno::ENOMEM as i32).into();
        let (words, file) = (serve("null=1"), serve("--config f.toml"));
        let (words, file) = (advise(error(), &words, 2).to_string(), advise(error(), &file, 2).to_string());
        assert_eq!(words.matches("--").count(), 2, "{words}");
        assert_eq!(file, words.replace("--", ""));
    }

    #[test]
    fn the_limit_is_named() {
        let args = serve("null=1");
        let check = |error: anyhow::Error, words: &[&str]| {
            let text = crate::whole(&advise(error, &args, 2));
            words.iter().for_each(|word| assert!(text.contains(word), "{word} in {text}"));
        };
        let raw = |errno: Errno| io::Error::from_raw_os_error(errno as i32);
        check(raw(Errno::ENOMEM).into(), &["Cannot allocate memory", "--memory", "6 GiB", "1 GiB", "ulimit -v"]);
        check(anyhow!(Errno::EMFILE).context("opening a signalfd"), &["opening a signalfd", "ulimit -n", "is 3"]);
        let wrapped = blkdev::Context::wrap(format!("disk.img: {}", raw(Errno::EMFILE)), raw(Errno::EMFILE));
        check(wrapped.into(), &["disk.img", "ulimit -n"]);
        let thread: anyhow::Result<()> = Err(raw(Errno::EAGAIN)).context("starting a thread");
        check(thread.unwrap_err(), &["ulimit -u"]);
        let other = crate::whole(&advise(raw(Errno::EAGAIN).into(), &args, 1));
        assert!(!other.contains("ulimit"), "{other}");
    }
}
