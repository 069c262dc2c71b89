//! The callbacks from nbdkit: from C to Rust and back. A panic never leaves a callback; it fails one request.
#![allow(unsafe_code)]

use std::{
    any::Any,
    ffi::{CStr, OsStr, c_char, c_int, c_void},
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{null, null_mut},
    slice,
};

use blkdev::{Error, ExtentKind, Info, Io};
use blkdev_drivers::drivers;

use crate::{
    abi::{self, Ask, Exports, Extents, Table},
    config::{self, Fault},
    host,
    plugin::{self, Connection},
};

/// The entry point, which nbdkit looks up by name when it has loaded the plugin.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn plugin_init() -> *const c_void {
    (&raw const TABLE).cast()
}

static TABLE: Table = Table {
    struct_size: size_of::<Table>() as u64,
    api_version: abi::API_VERSION,
    thread_model: abi::THREAD_MODEL_PARALLEL,
    name: c"nbdblk".as_ptr(),
    longname: c"nbdblk: block devices over accelerated protocols".as_ptr(),
    version: VERSION.as_ptr().cast(),
    description:
        c"serves io_uring files, vhost-user-blk and other devices with libblkio's names, many requests at a time"
            .as_ptr(),
    load: None,
    unload: Some(cleanup),
    config: Some(config),
    config_complete: Some(config_complete),
    config_help: config::HELP.as_ptr(),
    open: Some(open),
    close: Some(close),
    get_size: Some(get_size),
    can_write: Some(can_write),
    can_flush: Some(yes),
    is_rotational: Some(is_rotational),
    can_trim: Some(can_trim),
    v1: [null(); 5],
    errno_is_preserved: 0,
    dump_plugin: Some(dump_plugin),
    can_zero: Some(can_write),
    can_fua: Some(can_fua),
    pread: Some(pread),
    pwrite: Some(pwrite),
    flush: Some(flush),
    trim: Some(trim),
    zero: Some(zero),
    magic_config_key: c"driver".as_ptr(),
    can_multi_conn: Some(yes),
    can_extents: Some(can_extents),
    extents: Some(extents),
    can_cache: Some(can_cache),
    cache: Some(cache),
    thread_model_now: None,
    can_fast_zero: Some(can_fast_zero),
    preconnect: None,
    get_ready: Some(get_ready),
    after_fork: Some(after_fork),
    list_exports: Some(list_exports),
    default_export: Some(default_export),
    export_description: Some(export_description),
    cleanup: Some(cleanup),
    block_size: Some(block_size),
};

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// The longest request that nbdkit accepts from a client (MAX_REQUEST_SIZE); any length up to it works.
const REQUEST_MAX: u32 = 64 << 20;
/// The largest preferred block size that nbdkit accepts.
const PREFERRED_MAX: u32 = 32 << 20;

/// Runs a callback. On failure, reports the error to nbdkit and returns `failed`.
fn guarded<T>(name: &str, failed: T, act: impl FnOnce() -> Result<T, Fault>) -> T {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(Ok(answer)) => answer,
        Ok(Err(fault)) => {
            if !fault.text.is_empty() {
                host::error(&fault.text);
            }
            host::set_error(fault.errno);
            failed
        }
        Err(panic) => {
            host::error(&format!("panic in {name}: {}", message(&*panic)));
            host::set_error(libc::EIO);
            failed
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// # Safety
/// `handle` is from `open`, and not closed yet: nbdkit passes nothing else.
unsafe fn connection<'a>(handle: *mut c_void) -> &'a Connection {
    // SAFETY: `open` made it from a Box that `close` takes back after all other callbacks of the connection.
    unsafe { &*handle.cast::<Connection>() }
}

/// # Safety
/// `text` is a NUL-terminated string, or NULL.
unsafe fn bytes<'a>(text: *const c_char) -> &'a OsStr {
    // SAFETY: guaranteed by the caller.
    OsStr::from_bytes(if text.is_null() { b"" } else { unsafe { CStr::from_ptr(text) }.to_bytes() })
}

unsafe extern "C" fn config(key: *const c_char, value: *const c_char) -> c_int {
    guarded("config", -1, || {
        // SAFETY: nbdkit passes two strings that outlive the call.
        let (key, value) = unsafe { (bytes(key), bytes(value)) };
        let key = key.to_str().ok_or_else(|| Fault::invalid(format!("{}: not UTF-8", key.display())))?;
        plugin::config(key, value).map(|()| 0)
    })
}

extern "C" fn config_complete() -> c_int {
    guarded("config_complete", -1, || plugin::config_complete().map(|()| 0))
}

extern "C" fn get_ready() -> c_int {
    guarded("get_ready", -1, || {
        host::pass_on_logs();
        plugin::get_ready()?;
        host::before_fork(before_fork);
        // If nbdkit fails to start after this, it does not inform the plugin.
        host::at_exit(cleanup);
        Ok(0)
    })
}

extern "C" fn before_fork() {
    guarded("before_fork", (), || {
        plugin::before_fork();
        Ok(())
    });
}

extern "C" fn after_fork() -> c_int {
    guarded("after_fork", -1, || plugin::after_fork().map(|()| 0))
}

extern "C" fn cleanup() {
    guarded("cleanup", (), || {
        plugin::cleanup();
        Ok(())
    });
}

extern "C" fn dump_plugin() {
    guarded("dump_plugin", (), || {
        host::dump(&format!("nbdblk_version={}", env!("CARGO_PKG_VERSION")));
        host::dump(&format!("nbdblk_drivers={}", config::driver_names()));
        for driver in drivers() {
            host::dump(&format!("nbdblk_driver_{}={}", driver.name, config::settable(driver.properties())));
        }
        Ok(())
    });
}

extern "C" fn open(_readonly: c_int) -> *mut c_void {
    guarded("open", null_mut(), || Ok(Box::into_raw(Box::new(plugin::open()?)).cast()))
}

unsafe extern "C" fn close(handle: *mut c_void) {
    guarded("close", (), || {
        // SAFETY: nbdkit closes each handle once, after all other callbacks of the connection.
        drop(unsafe { Box::from_raw(handle.cast::<Connection>()) });
        Ok(())
    });
}

unsafe extern "C" fn get_size(handle: *mut c_void) -> i64 {
    guarded("get_size", -1, || {
        // SAFETY: a handle of `open`.
        let size = unsafe { connection(handle) }.capacity();
        size.try_into()
            .map_err(|_| Fault { errno: libc::EOVERFLOW, text: format!("{size} bytes are too many for NBD") })
    })
}

/// # Safety
/// `handle` is from nbdkit.
unsafe fn answer(handle: *mut c_void, name: &str, ask: impl FnOnce(&Info) -> c_int) -> c_int {
    // SAFETY: a handle of `open`.
    guarded(name, -1, || Ok(ask(unsafe { connection(handle) }.info())))
}

macro_rules! questions {
    ($($(#[$doc:meta])* $name:ident: $ask:expr;)*) => {$(
        $(#[$doc])*
        unsafe extern "C" fn $name(handle: *mut c_void) -> c_int {
            // SAFETY: a handle of `open`.
            unsafe { answer(handle, stringify!($name), $ask) }
        }
        const _: Ask = $name;
    )*};
}

questions! {
    /// A flush on one connection covers the writes of all: there is one device, and a write gets its reply when it has completed.
    /// On a device without a volatile cache, a flush has nothing to do.
    yes: |_| 1;
    can_write: |info| (!info.caps.read_only).into();
    can_trim: |info| info.caps.discard.into();
    is_rotational: |info| info.caps.rotational.into();
    can_extents: |info| info.caps.status.into();
    /// If the device cannot make zeroes, it is no faster than writing.
    can_fast_zero: |info| info.caps.zero.into();
    can_fua: |info| {
        let caps = info.caps;
        match (caps.read_only, caps.fua || !caps.flush) {
            (true, _) => abi::FUA_NONE,
            (false, true) => abi::FUA_NATIVE,
            (false, false) => abi::FUA_EMULATE,
        }
    };
    can_cache: |info| if info.caps.prefetch { abi::CACHE_NATIVE } else { abi::CACHE_NONE };
}

/// Ends a request. An error names the request. That an operation is not fast is not reported as an error text.
fn ended(result: Result<(), Error>, what: &str, len: u32, at: u64) -> Result<c_int, Fault> {
    match result {
        Ok(()) => Ok(0),
        Err(error) => Err(failure(error, what, len, at)),
    }
}

#[cold]
fn failure(error: Error, what: &str, len: u32, at: u64) -> Fault {
    let text = match error {
        Error::NotSupported => String::new(),
        error => format!("{what} of {len} bytes at {at}: {error}"),
    };
    Fault { errno: error.errno(), text }
}

unsafe extern "C" fn pread(handle: *mut c_void, into: *mut c_void, len: u32, at: u64, _flags: u32) -> c_int {
    guarded("pread", -1, || {
        // SAFETY: a handle of `open`; nbdkit's buffer has `len` bytes, and this call has exclusive use of it.
        let (connection, bytes) = unsafe { (connection(handle), slice::from_raw_parts_mut(into.cast(), len as usize)) };
        #[cfg(feature = "panic-test")]
        assert!(connection.panic_at() != Some(at), "told to panic at {at}");
        ended(connection.read(at, bytes), "read", len, at)
    })
}

unsafe extern "C" fn pwrite(handle: *mut c_void, from: *const c_void, len: u32, at: u64, flags: u32) -> c_int {
    guarded("pwrite", -1, || {
        // SAFETY: as in `pread`; nothing changes the buffer during the call.
        let (connection, bytes) = unsafe { (connection(handle), slice::from_raw_parts(from.cast(), len as usize)) };
        ended(connection.write(at, bytes, flags & abi::FLAG_FUA != 0), "write", len, at)
    })
}

unsafe extern "C" fn flush(handle: *mut c_void, _flags: u32) -> c_int {
    guarded("flush", -1, || {
        // SAFETY: a handle of `open`.
        let result = unsafe { connection(handle) }.run(Io::Flush);
        result.map(|()| 0).map_err(|error| Fault { errno: error.errno(), text: format!("flush: {error}") })
    })
}

unsafe extern "C" fn trim(handle: *mut c_void, len: u32, at: u64, flags: u32) -> c_int {
    guarded("trim", -1, || {
        let io = Io::Discard { at, len: len.into(), fua: flags & abi::FLAG_FUA != 0 };
        // SAFETY: a handle of `open`.
        ended(unsafe { connection(handle) }.run(io), "trim", len, at)
    })
}

unsafe extern "C" fn zero(handle: *mut c_void, len: u32, at: u64, flags: u32) -> c_int {
    guarded("zero", -1, || {
        let has = |flag| flags & flag != 0;
        let (fua, unmap, fast) = (has(abi::FLAG_FUA), has(abi::FLAG_MAY_TRIM), has(abi::FLAG_FAST_ZERO));
        let io = Io::Zero { at, len: len.into(), fua, unmap, fast };
        // SAFETY: a handle of `open`.
        ended(unsafe { connection(handle) }.run(io), "zero", len, at)
    })
}

unsafe extern "C" fn cache(handle: *mut c_void, len: u32, at: u64, _flags: u32) -> c_int {
    guarded("cache", -1, || {
        // SAFETY: a handle of `open`.
        ended(unsafe { connection(handle) }.run(Io::Prefetch { at, len: len.into() }), "cache", len, at)
    })
}

unsafe extern "C" fn extents(handle: *mut c_void, len: u32, at: u64, _flags: u32, list: *mut Extents) -> c_int {
    guarded("extents", -1, || {
        // SAFETY: a handle of `open`; the list is valid during this call.
        let (connection, mut list) = unsafe { (connection(handle), host::Status::new(list)) };
        let found = connection.status(at, len.into()).map_err(|error| failure(error, "block status", len, at))?;
        for extent in found {
            let kind = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Hole => abi::EXTENT_HOLE | abi::EXTENT_ZERO,
                ExtentKind::Zero => abi::EXTENT_ZERO,
            };
            if !list.add(extent.at, extent.len, kind) {
                return Ok(-1);
            }
        }
        Ok(0)
    })
}

unsafe extern "C" fn block_size(handle: *mut c_void, min: *mut u32, preferred: *mut u32, max: *mut u32) -> c_int {
    guarded("block_size", -1, || {
        // SAFETY: a handle of `open`; nbdkit has room for the three results.
        unsafe {
            let info = connection(handle).info();
            *min = info.block_size;
            *preferred = info.preferred_block_size.max(info.block_size).min(PREFERRED_MAX);
            *max = REQUEST_MAX;
        }
        Ok(0)
    })
}

unsafe extern "C" fn list_exports(_readonly: c_int, _tls: c_int, exports: *mut Exports) -> c_int {
    guarded("list_exports", -1, || {
        let about = plugin::open()?.description().to_string_lossy().into_owned();
        // SAFETY: the list is valid during this call.
        Ok(if unsafe { host::add_export(exports, "", &about) } { 0 } else { -1 })
    })
}

extern "C" fn default_export(_readonly: c_int, _tls: c_int) -> *const c_char {
    c"".as_ptr()
}

unsafe extern "C" fn export_description(handle: *mut c_void) -> *const c_char {
    // SAFETY: a handle of `open`; the text lives as long as the device, which the connection keeps open.
    guarded("export_description", null(), || Ok(unsafe { connection(handle) }.description().as_ptr()))
}
