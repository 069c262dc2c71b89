//! nbdkit's plugin API, version 2, as in C: the table of callbacks, and the functions of nbdkit.
#![allow(unsafe_code)]

#[cfg(not(test))]
use std::ffi::c_uint;
use std::ffi::{c_char, c_int, c_void};
#[cfg(not(test))]
use std::sync::atomic::{AtomicI32, Ordering};

/// `struct nbdkit_plugin` of nbdkit 1.32 to 1.48 (nbdkit-plugin.h). An nbdkit with fewer fields reads those that it knows. One
/// with more fields sees from `struct_size` where ours end.
#[repr(C)]
pub(crate) struct Table {
    pub(crate) struct_size: u64,
    pub(crate) api_version: c_int,
    pub(crate) thread_model: c_int,
    pub(crate) name: *const c_char,
    pub(crate) longname: *const c_char,
    pub(crate) version: *const c_char,
    pub(crate) description: *const c_char,
    pub(crate) load: Option<extern "C" fn()>,
    pub(crate) unload: Option<extern "C" fn()>,
    pub(crate) config: Option<unsafe extern "C" fn(*const c_char, *const c_char) -> c_int>,
    pub(crate) config_complete: Option<extern "C" fn() -> c_int>,
    pub(crate) config_help: *const c_char,
    pub(crate) open: Option<extern "C" fn(c_int) -> *mut c_void>,
    pub(crate) close: Option<unsafe extern "C" fn(*mut c_void)>,
    pub(crate) get_size: Option<unsafe extern "C" fn(*mut c_void) -> i64>,
    pub(crate) can_write: Option<Ask>,
    pub(crate) can_flush: Option<Ask>,
    pub(crate) is_rotational: Option<Ask>,
    pub(crate) can_trim: Option<Ask>,
    /// The data callbacks of version 1.
    pub(crate) v1: [*const c_void; 5],
    pub(crate) errno_is_preserved: c_int,
    pub(crate) dump_plugin: Option<extern "C" fn()>,
    pub(crate) can_zero: Option<Ask>,
    pub(crate) can_fua: Option<Ask>,
    pub(crate) pread: Option<unsafe extern "C" fn(*mut c_void, *mut c_void, u32, u64, u32) -> c_int>,
    pub(crate) pwrite: Option<unsafe extern "C" fn(*mut c_void, *const c_void, u32, u64, u32) -> c_int>,
    pub(crate) flush: Option<unsafe extern "C" fn(*mut c_void, u32) -> c_int>,
    pub(crate) trim: Option<unsafe extern "C" fn(*mut c_void, u32, u64, u32) -> c_int>,
    pub(crate) zero: Option<unsafe extern "C" fn(*mut c_void, u32, u64, u32) -> c_int>,
    pub(crate) magic_config_key: *const c_char,
    pub(crate) can_multi_conn: Option<Ask>,
    pub(crate) can_extents: Option<Ask>,
    pub(crate) extents: Option<unsafe extern "C" fn(*mut c_void, u32, u64, u32, *mut Extents) -> c_int>,
    pub(crate) can_cache: Option<Ask>,
    pub(crate) cache: Option<unsafe extern "C" fn(*mut c_void, u32, u64, u32) -> c_int>,
    pub(crate) thread_model_now: Option<extern "C" fn() -> c_int>,
    pub(crate) can_fast_zero: Option<Ask>,
    pub(crate) preconnect: Option<extern "C" fn(c_int) -> c_int>,
    pub(crate) get_ready: Option<extern "C" fn() -> c_int>,
    pub(crate) after_fork: Option<extern "C" fn() -> c_int>,
    pub(crate) list_exports: Option<unsafe extern "C" fn(c_int, c_int, *mut Exports) -> c_int>,
    pub(crate) default_export: Option<extern "C" fn(c_int, c_int) -> *const c_char>,
    pub(crate) export_description: Option<unsafe extern "C" fn(*mut c_void) -> *const c_char>,
    pub(crate) cleanup: Option<extern "C" fn()>,
    pub(crate) block_size: Option<unsafe extern "C" fn(*mut c_void, *mut u32, *mut u32, *mut u32) -> c_int>,
}

/// A question about a connection: 1 yes, 0 no, -1 error; for FUA and cache, one of the constants below.
pub(crate) type Ask = unsafe extern "C" fn(*mut c_void) -> c_int;

// SAFETY: all pointees are constant.
unsafe impl Sync for Table {}

/// nbdkit's list for extents of block status.
#[repr(C)]
pub(crate) struct Extents(c_void);

/// nbdkit's list for exports.
#[repr(C)]
pub(crate) struct Exports(c_void);

pub(crate) const API_VERSION: c_int = 2;
pub(crate) const THREAD_MODEL_PARALLEL: c_int = 3;

pub(crate) const FLAG_MAY_TRIM: u32 = 1 << 0;
pub(crate) const FLAG_FUA: u32 = 1 << 1;
pub(crate) const FLAG_FAST_ZERO: u32 = 1 << 3;

pub(crate) const FUA_NONE: c_int = 0;
pub(crate) const FUA_EMULATE: c_int = 1;
pub(crate) const FUA_NATIVE: c_int = 2;

pub(crate) const CACHE_NONE: c_int = 0;
pub(crate) const CACHE_NATIVE: c_int = 2;

pub(crate) const EXTENT_HOLE: u32 = 1 << 0;
pub(crate) const EXTENT_ZERO: u32 = 1 << 1;

#[cfg(not(test))]
unsafe extern "C" {
    pub(crate) fn nbdkit_error(format: *const c_char, ...);
    pub(crate) fn nbdkit_debug(format: *const c_char, ...);
    pub(crate) safe fn nbdkit_set_error(errno: c_int);
    pub(crate) safe fn nbdkit_nanosleep(seconds: c_uint, nanoseconds: c_uint) -> c_int;
    pub(crate) fn nbdkit_absolute_path(path: *const c_char) -> *mut c_char;
    pub(crate) fn nbdkit_add_extent(extents: *mut Extents, at: u64, len: u64, kind: u32) -> c_int;
    pub(crate) fn nbdkit_add_export(exports: *mut Exports, name: *const c_char, about: *const c_char) -> c_int;
}

/// Set by `nbdkit -D nbdblk.stats=1`: nbdkit finds the variable by its name, and writes an int to it.
#[cfg(not(test))]
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "nbdkit's naming")]
static nbdblk_debug_stats: AtomicI32 = AtomicI32::new(0);

/// Whether the statistics include latencies. Then each request reads the clock.
#[inline]
pub(crate) fn wants_latencies() -> bool {
    #[cfg(not(test))]
    return nbdblk_debug_stats.load(Ordering::Relaxed) != 0;
    #[cfg(test)]
    true
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write, mem::offset_of, process::Command};

    use super::*;

    /// C names of the fields in the order of the header, with our offsets.
    const FIELDS: &[(&str, usize)] = &[
        ("_struct_size", offset_of!(Table, struct_size)),
        ("_api_version", offset_of!(Table, api_version)),
        ("_thread_model", offset_of!(Table, thread_model)),
        ("name", offset_of!(Table, name)),
        ("longname", offset_of!(Table, longname)),
        ("version", offset_of!(Table, version)),
        ("description", offset_of!(Table, description)),
        ("load", offset_of!(Table, load)),
        ("unload", offset_of!(Table, unload)),
        ("config", offset_of!(Table, config)),
        ("config_complete", offset_of!(Table, config_complete)),
        ("config_help", offset_of!(Table, config_help)),
        ("open", offset_of!(Table, open)),
        ("close", offset_of!(Table, close)),
        ("get_size", offset_of!(Table, get_size)),
        ("can_write", offset_of!(Table, can_write)),
        ("can_flush", offset_of!(Table, can_flush)),
        ("is_rotational", offset_of!(Table, is_rotational)),
        ("can_trim", offset_of!(Table, can_trim)),
        ("_pread_v1", offset_of!(Table, v1)),
        ("_zero_v1", offset_of!(Table, v1) + 4 * size_of::<usize>()),
        ("errno_is_preserved", offset_of!(Table, errno_is_preserved)),
        ("dump_plugin", offset_of!(Table, dump_plugin)),
        ("can_zero", offset_of!(Table, can_zero)),
        ("can_fua", offset_of!(Table, can_fua)),
        ("pread", offset_of!(Table, pread)),
        ("pwrite", offset_of!(Table, pwrite)),
        ("flush", offset_of!(Table, flush)),
        ("trim", offset_of!(Table, trim)),
        ("zero", offset_of!(Table, zero)),
        ("magic_config_key", offset_of!(Table, magic_config_key)),
        ("can_multi_conn", offset_of!(Table, can_multi_conn)),
        ("can_extents", offset_of!(Table, can_extents)),
        ("extents", offset_of!(Table, extents)),
        ("can_cache", offset_of!(Table, can_cache)),
        ("cache", offset_of!(Table, cache)),
        ("thread_model", offset_of!(Table, thread_model_now)),
        ("can_fast_zero", offset_of!(Table, can_fast_zero)),
        ("preconnect", offset_of!(Table, preconnect)),
        ("get_ready", offset_of!(Table, get_ready)),
        ("after_fork", offset_of!(Table, after_fork)),
        ("list_exports", offset_of!(Table, list_exports)),
        ("default_export", offset_of!(Table, default_export)),
        ("export_description", offset_of!(Table, export_description)),
        ("cleanup", offset_of!(Table, cleanup)),
        ("block_size", offset_of!(Table, block_size)),
    ];

    const CONSTANTS: &[(&str, i64)] = &[
        ("NBDKIT_THREAD_MODEL_PARALLEL", THREAD_MODEL_PARALLEL as i64),
        ("NBDKIT_FLAG_MAY_TRIM", FLAG_MAY_TRIM as i64),
        ("NBDKIT_FLAG_FUA", FLAG_FUA as i64),
        ("NBDKIT_FLAG_FAST_ZERO", FLAG_FAST_ZERO as i64),
        ("NBDKIT_FUA_NONE", FUA_NONE as i64),
        ("NBDKIT_FUA_EMULATE", FUA_EMULATE as i64),
        ("NBDKIT_FUA_NATIVE", FUA_NATIVE as i64),
        ("NBDKIT_CACHE_NONE", CACHE_NONE as i64),
        ("NBDKIT_CACHE_NATIVE", CACHE_NATIVE as i64),
        ("NBDKIT_EXTENT_HOLE", EXTENT_HOLE as i64),
        ("NBDKIT_EXTENT_ZERO", EXTENT_ZERO as i64),
    ];

    /// Compiles a check against the installed header. The compiler refuses it if a field is missing, has another offset, or has
    /// another type (for the types listed below).
    #[test]
    fn the_table_is_that_of_the_installed_header() {
        let mut source = String::from(
            "#include <stddef.h>\n#define NBDKIT_API_VERSION 2\n#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL\n\
             #include <nbdkit-plugin.h>\n#define SAME(a, b) _Static_assert ((a) == (b), #a \" is \" #b)\n",
        );
        for (name, at) in FIELDS {
            writeln!(source, "SAME (offsetof (struct nbdkit_plugin, {name}), {at});").unwrap();
        }
        for (name, value) in CONSTANTS {
            writeln!(source, "SAME ({name}, {value});").unwrap();
        }
        let (_, last) = FIELDS.last().unwrap();
        // A later header may have more fields, but never fewer.
        writeln!(source, "_Static_assert (sizeof (struct nbdkit_plugin) >= {}, \"size\");", last + 8).unwrap();
        source += "int r (void *h, void *b, uint32_t n, uint64_t at, uint32_t f);\n\
             int w (void *h, const void *b, uint32_t n, uint64_t at, uint32_t f);\n\
             int s (void *h, uint32_t n, uint64_t at, uint32_t f);\n\
             int e (void *h, uint32_t n, uint64_t at, uint32_t f, struct nbdkit_extents *x);\n\
             int b (void *h, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum);\n\
             int l (int readonly, int is_tls, struct nbdkit_exports *x);\n\
             const char *d (int readonly, int is_tls);\n\
             struct nbdkit_plugin p = { .pread = r, .pwrite = w, .trim = s, .zero = s, .cache = s, .extents = e, .block_size = b,\n\
               .list_exports = l, .default_export = d };\n";
        let path = std::env::temp_dir().join(format!("nbdkit-plugin-layout-{}.c", std::process::id()));
        std::fs::write(&path, source).unwrap();
        let output = Command::new("cc").args(["-std=c11", "-Werror", "-fsyntax-only"]).arg(&path).output();
        std::fs::remove_file(&path).unwrap();
        let output = output.expect("cc is installed: run `cargo xtask setup`");
        assert!(
            output.status.success(),
            "nbdkit-plugin.h (package nbdkit-plugin-dev, see `cargo xtask setup`) differs:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(size_of::<Table>(), last + 8);
        assert_eq!(size_of::<Table>(), 384);
    }
}
