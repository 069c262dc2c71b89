//! nbdkit's functions for plugins, as safe functions.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

#[cfg(not(test))]
use crate::abi;
use crate::abi::{Exports, Extents};

/// Prints an error, and in nbdkit from 1.42 on sends it to the client. Before a connection, it is the reason why nbdkit does not
/// start.
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

/// Sets the errno for the client, for the case that the running callback fails.
pub(crate) fn set_error(errno: i32) {
    #[cfg(not(test))]
    abi::nbdkit_set_error(errno);
    #[cfg(test)]
    eprintln!("nbdkit: errno {errno}");
}

/// Returns a path that is still valid when nbdkit has changed to `/`. `None`: nbdkit has reported the error.
pub(crate) fn absolute_path(path: &OsStr) -> Option<OsString> {
    #[cfg(not(test))]
    {
        // It came from a C string.
        let path = CString::new(path.as_bytes()).ok()?;
        // SAFETY: the string lives until the call returns. The result is NULL, or a string from malloc that we own.
        let absolute = unsafe { abi::nbdkit_absolute_path(path.as_ptr()) };
        if absolute.is_null() {
            return None;
        }
        // SAFETY: not NULL, so a NUL-terminated string.
        let copy = OsString::from_vec(unsafe { std::ffi::CStr::from_ptr(absolute) }.to_bytes().to_vec());
        // SAFETY: from malloc, freed once.
        unsafe { libc::free(absolute.cast()) };
        Some(copy)
    }
    #[cfg(test)]
    std::path::absolute(path).ok().map(|path| OsString::from_vec(path.into_os_string().as_bytes().to_vec()))
}

/// Registers `prepare`, to be called before each fork in the thread that forks.
pub(crate) fn before_fork(prepare: extern "C" fn()) {
    let prepare: unsafe extern "C" fn() = prepare;
    // SAFETY: the function takes no argument, and lives as long as the plugin; glibc removes it together with the plugin. If no
    // memory is left for it, the serving process still opens the device.
    unsafe { libc::pthread_atfork(Some(prepare), None, None) };
}

/// Registers `act`, to be called when this process exits with the plugin loaded.
pub(crate) fn at_exit(act: extern "C" fn()) {
    // SAFETY: as for `before_fork`. If no memory is left for it, the kernel closes the device shortly after the process has
    // ended.
    unsafe { libc::atexit(act) };
}

/// Waits for a second. `true`: nbdkit is ending. Only for threads that are not nbdkit's: in those, it also returns for the end of
/// a client.
#[cfg(not(test))]
pub(crate) fn is_ending() -> bool {
    abi::nbdkit_nanosleep(1, 0) != 0
}

/// Log messages of drivers: errors and warnings become errors of nbdkit, the rest needs `-v`.
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

/// Passes on log messages of drivers.
pub(crate) fn pass_on_logs() {
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

/// Prints a line of `nbdkit --dump-plugin`, through C's stdout like nbdkit's own lines, so that the order is right.
pub(crate) fn dump(line: &str) {
    let line = c_string(line);
    // SAFETY: the string lives until the call returns.
    unsafe { libc::puts(line.as_ptr()) };
}

/// nbdkit's list of extents, valid during a callback.
pub(crate) struct Status(*mut Extents);

impl Status {
    /// # Safety
    /// `extents` is from the running callback, and is not used after it.
    pub(crate) unsafe fn new(extents: *mut Extents) -> Self {
        Self(extents)
    }

    /// Appends an extent. `false`: nbdkit has reported the error.
    pub(crate) fn add(&mut self, at: u64, len: u64, kind: u32) -> bool {
        #[cfg(not(test))]
        // SAFETY: guaranteed by the caller of `new`.
        return unsafe { abi::nbdkit_add_extent(self.0, at, len, kind) } == 0;
        #[cfg(test)]
        return !self.0.is_null() && len > 0 && kind < 4 && at < u64::MAX;
    }
}

/// Adds an export to nbdkit's list, which is valid during a callback. `false`: no memory.
///
/// # Safety
/// `exports` is from the running callback.
pub(crate) unsafe fn add_export(exports: *mut Exports, name: &str, about: &str) -> bool {
    let (name, about) = (c_string(name), c_string(about));
    #[cfg(not(test))]
    // SAFETY: the caller guarantees the list; nbdkit copies the strings.
    return unsafe { abi::nbdkit_add_export(exports, name.as_ptr(), about.as_ptr()) } == 0;
    #[cfg(test)]
    return !exports.is_null() && !name.is_empty() && !about.is_empty();
}

/// The text up to its first NUL. Our texts have none.
pub(crate) fn c_string(text: &str) -> CString {
    let text = text.split('\0').next().unwrap_or_default();
    CString::new(text).unwrap_or_default()
}
