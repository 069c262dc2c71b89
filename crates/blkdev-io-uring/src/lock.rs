//! Locks on images, compatible with QEMU's file driver (block/file-posix.c), so that each respects the other.
//!
//! An opener holds a shared lock on byte 100 + n for each permission n that it uses, and on byte 200 + n for each permission
//! that it does not share. All locks are shared and belong to the open file description (`F_OFD_SETLK`). So they never wait,
//! and end with the last descriptor. After taking its own locks, an opener checks for conflicting locks of others.
//!
//! Openings by the same process do not exclude each other: an operator may export a file twice, or reload it with other
//! properties. Such an opening takes its locks on the first one's open file description, of which it holds a descriptor. It
//! finds that among the process's descriptors, because `/proc/self/fdinfo` lists the locks of each.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

use crate::sys;

/// First byte for permissions in use, and for permissions not shared.
const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// QEMU's permissions, by bit.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Permissions that other processes may not have, whether this opening writes or only reads.
const EXCLUDED: [i64; 2] = [WRITE, RESIZE];

/// Another opening by this process, kept open with its locks and its claim to a block device.
#[derive(Debug)]
pub(crate) struct Kin(OwnedFd);

/// How long an opening waits for others to end. The kernel closes the files of a killed process only after its last request has
/// completed; a server that is restarted at once must not fail because of that.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// Retries for [`PATIENCE`], while `is_busy` returns true for the error.
pub(crate) fn retry<T>(
    is_busy: impl Fn(&io::Error) -> bool,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(e) if is_busy(&e) && started.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// Takes the locks for `file`. With `kin`, the locks are taken and checked on that descriptor instead.
///
/// # Errors
/// Another process excludes this opening. The locks taken here are released again.
pub(crate) fn acquire(file: &File, name: &str, read_only: bool, kin: Option<&Kin>) -> io::Result<()> {
    retry(|e| e.kind() == io::ErrorKind::ResourceBusy, || try_acquire(file, name, read_only, kin))
}

fn try_acquire(file: &File, name: &str, read_only: bool, kin: Option<&Kin>) -> io::Result<()> {
    let holder = kin.map_or(file.as_fd(), |kin| kin.0.as_fd());
    let used: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    let wanted = used.iter().map(|p| USED + p).chain(EXCLUDED.map(|p| UNSHARED + p));
    let excluding = used.iter().map(|p| UNSHARED + p).chain(EXCLUDED.map(|p| USED + p));
    let had: Vec<i64> = if kin.is_some() { locks(holder) } else { Vec::new() };
    let mut taken = Vec::new();
    let result = wanted.filter(|byte| !had.contains(byte)).try_for_each(|byte| {
        set(holder, byte, libc::F_RDLCK)?;
        taken.push(byte);
        Ok(())
    });
    let result = result.and_then(|()| {
        for byte in excluding {
            if let Some(pid) = conflict(holder, byte)? {
                return Err(Failure::Held(byte, pid));
            }
        }
        Ok(())
    });
    let refusal = match result {
        Ok(()) => return Ok(()),
        Err(Failure::Held(byte, pid)) if !is_kindred(file) => in_use(name, byte, pid),
        Err(Failure::Held(..)) => return Ok(()),
        // As in QEMU.
        Err(Failure::NoLocks(errno)) => {
            log::debug!(
                "{name}: the file system does not support locks ({errno}): other processes may write to the file"
            );
            return Ok(());
        }
    };
    taken.into_iter().for_each(|byte| drop(set(holder, byte, libc::F_UNLCK)));
    Err(refusal)
}

enum Failure {
    /// A process holds the byte; its process id, if known.
    Held(i64, i32),
    NoLocks(Errno),
}

fn in_use(name: &str, byte: i64, pid: i32) -> io::Error {
    let who = match pid {
        1.. => format!("process {pid}"),
        _ => "a virtual machine, qemu-storage-daemon or another server".into(),
    };
    let what = match byte {
        UNSHARED.. => "does not share it",
        _ => "may write to it",
    };
    let text = format!(
        "{name} is in use: {who} has it open and {what}; end that program, or use force-share=true to open the image anyway"
    );
    io::Error::new(io::ErrorKind::ResourceBusy, text)
}

/// The error for a block device that cannot be claimed.
pub(crate) fn claimed(name: &str) -> io::Error {
    let text = format!(
        "{name} is in use: it is mounted, part of a volume, or claimed by another program; unmount it, use read-only=true, \
         or use force-share=true to write to it anyway"
    );
    io::Error::new(io::ErrorKind::ResourceBusy, text)
}

fn flock(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(holder: BorrowedFd<'_>, byte: i64, kind: libc::c_int) -> Result<(), Failure> {
    match fcntl(holder, FcntlArg::F_OFD_SETLK(&flock(byte, kind))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Failure::Held(byte, 0)),
        Err(errno) => Err(Failure::NoLocks(errno)),
    }
}

/// The process (0 or less: unknown) that holds a lock on `byte`, other than through `holder`.
fn conflict(holder: BorrowedFd<'_>, byte: i64) -> Result<Option<i32>, Failure> {
    let mut lock = flock(byte, libc::F_WRLCK);
    fcntl(holder, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(Failure::NoLocks)?;
    Ok((libc::c_int::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}

/// The descriptor through which this process already holds locks on the file with these device and inode numbers, if any.
pub(crate) fn kin(dev: u64, ino: u64) -> Option<Kin> {
    descriptors().find_map(|(fd, info)| {
        if !bytes(&info, ino).contains(&USED) {
            return None;
        }
        let fd = File::from(sys::duplicate(fd).ok()?);
        let meta = fd.metadata().ok()?;
        ((meta.dev(), meta.ino()) == (dev, ino)).then(|| Kin(fd.into()))
    })
}

/// Whether this process already serves the file from a file system that may hang. It then holds no descriptor with locks, but
/// one with `O_PATH`.
fn is_kindred(file: &File) -> bool {
    let place = |info: &str| Some((field(info, "mnt_id:")?.to_owned(), field(info, "ino:")?.to_owned()));
    let own = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok();
    let Some(own) = own.and_then(|info| place(&info)) else { return false };
    descriptors().any(|(_, info)| {
        let flags = field(&info, "flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        flags.is_some_and(|flags| flags & libc::O_PATH != 0) && place(&info).is_some_and(|place| place == own)
    })
}

/// All descriptors of this process, each with its `fdinfo`. This does not involve the file systems.
fn descriptors() -> impl Iterator<Item = (i32, String)> {
    fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten().filter_map(|entry| {
        let fd = entry.file_name().to_str()?.parse().ok()?;
        Some((fd, fs::read_to_string(entry.path()).ok()?))
    })
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// The bytes from [`USED`] on that are locked through `holder`.
fn locks(holder: BorrowedFd<'_>) -> Vec<i64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", holder.as_raw_fd())).unwrap_or_default();
    let ino = field(&info, "ino:").and_then(|ino| ino.parse().ok()).unwrap_or(0);
    bytes(&info, ino)
}

/// The bytes from [`USED`] on that an open file description has locked: `lock: 1: OFDLCK ADVISORY READ -1 08:01:12345 100 101`.
fn bytes(info: &str, ino: u64) -> Vec<i64> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
        let [_, "OFDLCK", _, _, _, place, start, end] = words[..] else { return None };
        let number = place.rsplit(':').next()?.parse::<u64>().ok()?;
        let range: (i64, i64) = (start.parse().ok()?, end.parse().ok()?);
        (number == ino && range.1 < UNSHARED + USED).then_some(range.0.max(USED)..=range.1)
    };
    info.lines().filter_map(parse).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_from_what_the_kernel_lists() {
        let info = "pos:\t0\nflags:\t02100002\nmnt_id:\t28\nino:\t12345\n\
                    lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:12345 100 101\n\
                    lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:12345 203 203\n\
                    lock:\t3: POSIX  ADVISORY  READ 7 fe:00:12345 201 201\n\
                    lock:\t4: OFDLCK ADVISORY  READ -1 fe:00:12345 0 EOF\n\
                    lock:\t5: OFDLCK ADVISORY  READ -1 fe:00:99 202 202\n";
        assert_eq!(bytes(info, 12345), [100, 101, 203]);
        assert_eq!(bytes(info, 99), [202]);
        assert_eq!(field(info, "ino:"), Some("12345"));
    }
}
