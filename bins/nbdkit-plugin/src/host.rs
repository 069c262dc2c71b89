//! What nbdkit offers to plugins, as safe functions.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

#[cfg(not(test))]
use crate::abi;
use crate::abi::{Exports, Extents};

/// Prints an error, and in nbdkit from 1.42 on sends it to the client. Before a connection it is why nbdkit does not start.
pub(crate) fn error(text: &str) {
    let text = c_string(text);
    #[cfg(not(test))]
    // SAFETY: the format takes one string, which lives until the call returns.
    unsafe {
        abi::nbdkit_error(c"%s".as_ptr(), text.as_ptr());
    }
    #[cfg(test)]
    eprintln!("nbdkit: error: {text:?}");
}

/// Prints a line with `-v`.
pub(crate) fn debug(text: &str) {
    let text = c_string(text);
    #[cfg(not(test))]
    // SAFETY: as in `error`.
    unsafe {
        abi::nbdkit_debug(c"%s".as_ptr(), text.as_ptr());
    }
    #[cfg(test)]
    eprintln!("nbdkit: debug: {text:?}");
}

/// The errno that the client is answered with when the callback that runs now fails.
pub(crate) fn set_error(errno: i32) {
    #[cfg(not(test))]
    abi::nbdkit_set_error(errno);
    #[cfg(test)]
    eprintln!("nbdkit: errno {errno}");
}

/// A path that still means the same file once nbdkit has gone to `/`. `None`: nbdkit has said why not.
pub(crate) fn absolute_path(path: &OsStr) -> Option<OsString> {
    #[cfg(not(test))]
    {
        // It came as a string of C's.
        let path = CString::new(path.as_bytes()).ok()?;
        // SAFETY: the string lives until the call returns. What comes back is NULL or a string from malloc that is ours.
        let absolute = unsafe { abi::nbdkit_absolute_path(path.as_ptr()) };
        if absolute.is_null() {
            return None;
        }
        // SAFETY: not NULL, so a string with its NUL.
        let copy = OsString::from_vec(unsafe { std::ffi::CStr::from_ptr(absolute) }.to_bytes().to_vec());
        // SAFETY: from malloc, freed once.
        unsafe { libc::free(absolute.cast()) };
        Some(copy)
    }
    #[cfg(test)]
    std::path::absolute(path).ok().map(|path| OsString::from_vec(path.into_os_string().as_bytes().to_vec()))
}

/// Has this process call `prepare` before each fork, in the thread that forks.
pub(crate) fn before_fork(prepare: extern "C" fn()) {
    let prepare: unsafe extern "C" fn() = prepare;
    // SAFETY: the function takes no argument, and lives as long as the plugin; with the plugin glibc forgets it. Without
    // memory for it, the device is opened in the process that serves all the same.
    unsafe { libc::pthread_atfork(Some(prepare), None, None) };
}

/// Has `act` called when this process exits with the plugin loaded.
pub(crate) fn at_exit(act: extern "C" fn()) {
    // SAFETY: as for `before_fork`. Without memory for it, the kernel closes the device, a moment after the process has ended.
    unsafe { libc::atexit(act) };
}

/// Waits for a second; `true`: nbdkit was asked to end. In a thread that is not nbdkit's: there it also ends for a client's sake.
#[cfg(not(test))]
pub(crate) fn is_ending() -> bool {
    abi::nbdkit_nanosleep(1, 0) != 0
}

/// What drivers log: errors and warnings as errors of nbdkit's, the rest with `-v`.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        if record.level() <= log::Level::Warn { error(&text) } else { debug(&text) }
    }

    fn flush(&self) {}
}

/// Passes on what drivers log.
pub(crate) fn pass_on_logs() {
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

/// A line of `nbdkit --dump-plugin`, through C's stdout as nbdkit's own lines, so that they come in order.
pub(crate) fn dump(line: &str) {
    let line = c_string(line);
    // SAFETY: the string lives until the call returns.
    unsafe { libc::puts(line.as_ptr()) };
}

/// A list of block status that nbdkit lends for the time of a callback.
pub(crate) struct Status(*mut Extents);

impl Status {
    /// # Safety
    /// `extents` is what nbdkit gave to the callback that runs, and is not used after it.
    pub(crate) unsafe fn new(extents: *mut Extents) -> Self {
        Self(extents)
    }

    /// Adds a stretch behind the last one. `false`: nbdkit has said what is wrong with it.
    pub(crate) fn add(&mut self, at: u64, len: u64, kind: u32) -> bool {
        #[cfg(not(test))]
        // SAFETY: whoever made this vouches for the list.
        return unsafe { abi::nbdkit_add_extent(self.0, at, len, kind) } == 0;
        #[cfg(test)]
        return !self.0.is_null() && len > 0 && kind < 4 && at < u64::MAX;
    }
}

/// Adds an export to a list that nbdkit lends for the time of a callback. `false`: no memory.
///
/// # Safety
/// `exports` is what nbdkit gave to the callback that runs.
pub(crate) unsafe fn add_export(exports: *mut Exports, name: &str, about: &str) -> bool {
    let (name, about) = (c_string(name), c_string(about));
    #[cfg(not(test))]
    // SAFETY: the caller vouches for the list; nbdkit copies the strings.
    return unsafe { abi::nbdkit_add_export(exports, name.as_ptr(), about.as_ptr()) } == 0;
    #[cfg(test)]
    return !exports.is_null() && !name.is_empty() && !about.is_empty();
}

/// The text up to its first NUL, which no text of ours has.
pub(crate) fn c_string(text: &str) -> CString {
    let text = text.split('\0').next().unwrap_or_default();
    CString::new(text).unwrap_or_default()
}
