//! The parameters of the plugin: collected as nbdkit passes them, checked when all are there.

use std::{
    ffi::{CStr, OsStr, OsString},
    fs,
    os::unix::fs::FileTypeExt,
};

use blkdev_drivers::{Access, Driver, Error, Kind, Property, Settings, drivers, find, parse_size};

use crate::{host, options};

/// The error of a callback: an errno, and a line for people.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) errno: i32,
    /// Empty: nbdkit has already reported it, or it needs no report.
    pub(crate) text: String,
}

impl Fault {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self { errno: libc::EINVAL, text: text.into() }
    }
}

/// For `nbdkit --help nbdblk`.
pub(crate) const HELP: &CStr = c"\
[driver=]DRIVER   how the device is reached: io_uring, virtio-blk-vhost-user, ...
                  (nbdkit --dump-plugin lists them; required)
path=PATH         the file, device or socket
PROPERTY=VALUE    any other property of the driver, as in libblkio
get=PROPERTY      print a property when the device is open (with nbdkit -v)
payload-memory=SIZE
                  memory for requests in flight, for each queue (64M)
pin-threads=BOOL  keep all threads of a busy connection on one CPU (false)";

/// Drivers of libblkio: those that this build lacks get a special error.
const LIBBLKIO: [&str; 5] =
    ["io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"];

/// The smallest memory of a channel: room for several of the longest pieces.
const MEMORY_MIN: u64 = 8 << 20;
const MEMORY_MAX: u64 = 1 << 32;

/// The parameters so far.
#[derive(Debug, Default)]
pub(crate) struct Words {
    driver: Option<String>,
    /// In the order of the command line.
    properties: Vec<(String, OsString)>,
    gets: Vec<String>,
    memory: Option<usize>,
    pin: bool,
    #[cfg(feature = "panic-test")]
    panic_at: Option<u64>,
}

/// The checked parameters.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) settings: Settings,
    /// The path of the device, if it is a file.
    path: Option<OsString>,
    /// Properties to print.
    pub(crate) gets: Vec<String>,
    /// Payload memory of each channel, in bytes.
    pub(crate) memory: usize,
    /// Pin the threads of a busy connection.
    pub(crate) pin: bool,
    #[cfg(feature = "panic-test")]
    pub(crate) panic_at: Option<u64>,
}

impl Words {
    /// Takes one `key=value`.
    ///
    /// # Errors
    /// It is invalid on its own.
    pub(crate) fn add(&mut self, key: &str, value: &OsStr) -> Result<(), Fault> {
        let text = value.to_string_lossy();
        match (key.replace('_', "-").as_str(), &self.driver) {
            ("driver", Some(first)) => return Err(second_driver(first, &text)),
            ("driver", None) => self.driver = Some(text.into()),
            ("read-only", _) => {
                return Err(Fault::invalid(
                    "do not set the libblkio \"read-only\" parameter, use the nbdkit -r flag if read-only is required",
                ));
            }
            ("get", _) => self.gets.push(text.into()),
            ("payload-memory", _) => {
                let size = parse_size(&text).ok().filter(|size| (MEMORY_MIN..=MEMORY_MAX).contains(size));
                let refuse = || Fault::invalid(format!("{key}={text}: value must be a size from 8M to 4G"));
                self.memory = Some(size.and_then(|size| size.try_into().ok()).ok_or_else(refuse)?);
            }
            ("pin-threads", _) => {
                let refuse = || Fault::invalid(format!("{key}={text}: value must be true or false"));
                self.pin = parse_bool(&text).ok_or_else(refuse)?;
            }
            #[cfg(feature = "panic-test")]
            ("panic-at", _) => self.panic_at = text.parse().ok(),
            // nbdblk's short form, io_uring=disk.img.
            (_, None) if find(key).is_ok() => {
                let name = find(key).map_or("path", |driver| driver.value);
                self.driver = Some(key.into());
                self.properties.push((name.into(), value.into()));
            }
            _ => self.properties.push((key.into(), value.into())),
        }
        Ok(())
    }

    /// Checks all parameters together.
    ///
    /// # Errors
    /// No driver, an unknown driver, or a property that the driver does not have.
    pub(crate) fn check(&self) -> Result<Choice, Fault> {
        let missing = || {
            Fault::invalid("you must supply the driver=<DRIVER> parameter after the plugin name on the command line")
        };
        let name = self.driver.as_deref().ok_or_else(missing)?;
        let driver = find(name).map_err(|error| unknown(name, &error))?;
        let (mut settings, mut path) = (Settings::new(driver), None);
        for (name, value) in &self.properties {
            // nbdkit has another current directory when it serves.
            let is_path = is_path(driver, name);
            let value = if is_path { absolute(value)? } else { value.clone() };
            settings.set_os(name, &value).map_err(|error| refused(name, &value.to_string_lossy(), &error))?;
            if is_path {
                path = Some(value);
            }
        }
        if options::read_only() {
            restrict(&mut settings);
        }
        Ok(Choice {
            settings,
            path,
            gets: self.gets.clone(),
            memory: self.memory.unwrap_or(64 << 20),
            pin: self.pin,
            #[cfg(feature = "panic-test")]
            panic_at: self.panic_at,
        })
    }
}

/// A truth value, in all of nbdkit's spellings.
fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Some(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Some(false),
        _ => None,
    }
}

impl Choice {
    /// Whether the device is another process behind a socket. Such a process may serve a single front end and then exit.
    pub(crate) fn is_behind_socket(&self) -> bool {
        let meta = self.path.as_ref().and_then(|path| fs::metadata(path).ok());
        meta.is_some_and(|meta| meta.file_type().is_socket())
    }
}

/// Changes the settings to read-only. `false`: the driver has no such property.
pub(crate) fn restrict(settings: &mut Settings) -> bool {
    settings.can_set("read-only") && settings.set("read-only", "true").is_ok()
}

/// The drivers of this build, with all their names.
pub(crate) fn driver_names() -> String {
    let names = drivers().iter().flat_map(|driver| std::iter::once(&driver.name).chain(driver.aliases));
    names.copied().collect::<Vec<_>>().join(",")
}

/// The error for a `get=` of this property.
pub(crate) fn unreadable(name: &str, settings: &Settings) -> Fault {
    match settings.get(name) {
        Err(error) => refuse(&error, &format!("get={name}")),
        Ok(_) => Fault { errno: libc::ENODEV, text: format!("get={name}: the device does not report it") },
    }
}

/// Whether the value of a property is a path.
fn is_path(driver: &Driver, name: &str) -> bool {
    let known = driver.properties().find(|property| is_named(property.name, name));
    // Unknown properties belong to libblkio, where only `path` is one.
    known.map_or(driver.open_ended && name == "path", |property| property.kind == Kind::Path)
}

fn absolute(path: &OsStr) -> Result<OsString, Fault> {
    // Empty means not set, as in libblkio.
    if path.is_empty() {
        return Ok(OsString::new());
    }
    host::absolute_path(path).ok_or_else(|| Fault { errno: libc::EINVAL, text: String::new() })
}

/// nbdkit turns every argument without `=` into `driver=ARGUMENT`.
fn second_driver(first: &str, second: &str) -> Fault {
    let text = "'driver' property set more than once";
    let hint = match (find(first), find(second)) {
        (Ok(driver), Err(_)) => format!(": {first}, and then {second}; write {}={second}", driver.value),
        (Err(_), Ok(driver)) => format!(": {first}, and then {second}; write {}={first}", driver.value),
        _ => String::new(),
    };
    Fault::invalid(format!("{text}{hint}"))
}

/// Suggests the right parameters for the name of a file.
fn suggest(name: &str) -> Option<String> {
    let kind = fs::metadata(name).ok()?.file_type();
    let driver = if kind.is_socket() { "virtio-blk-vhost-user" } else { "io_uring" };
    (!kind.is_dir()).then(|| format!("; to serve the file of this name write {driver} path={name}"))
}

fn unknown(name: &str, error: &Error) -> Fault {
    let known = driver_names().replace(',', ", ");
    let text = if LIBBLKIO.contains(&name.replace("nvme-io-uring", "nvme-io_uring").as_str()) {
        format!("driver={name}: a driver of libblkio that this plugin does not have yet; it has {known}")
    } else {
        format!("driver={name}: {}: {error}{}", error.message(), suggest(name).unwrap_or_default())
    };
    Fault { errno: error.errno(), text }
}

fn refused(name: &str, value: &str, error: &Error) -> Fault {
    refuse(error, &format!("{name}={value}"))
}

/// libblkio's error text, followed by ours if it has more information.
fn refuse(error: &Error, word: &str) -> Fault {
    let hint = if error.errno() == libc::ENOENT { format!(": {error}") } else { String::new() };
    Fault { errno: error.errno(), text: format!("{word}: {}{hint}", error.message()) }
}

/// Whether `name` in `get=` means this property: `_` and `-` are the same.
pub(crate) fn is_named(property: &str, name: &str) -> bool {
    property == name.replace('_', "-")
}

/// The properties of a driver that can be set, for the manual and `--dump-plugin`.
pub(crate) fn settable(properties: impl Iterator<Item = &'static Property>) -> String {
    let names = properties.filter(|property| property.access != Access::ReadOnly);
    names.map(|property| property.name).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[(&str, &str)]) -> Result<Choice, Fault> {
        let mut words = Words::default();
        for (key, value) in line {
            words.add(key, OsStr::new(value))?;
        }
        words.check()
    }

    fn check(line: &[(&str, &str)], expected: &[(&str, &str)]) {
        let choice = words(line).unwrap_or_else(|fault| panic!("{line:?}: {fault:?}"));
        for (name, value) in expected {
            assert_eq!(choice.settings.get(name).as_deref(), Ok(*value), "{line:?}: {name}");
        }
    }

    fn refuse(line: &[(&str, &str)], errno: i32, text: &str) {
        let fault = words(line).expect_err(text);
        assert_eq!((fault.errno, fault.text.as_str()), (errno, text), "{line:?}");
    }

    #[test]
    fn lines_that_the_stock_plugin_takes() {
        check(&[("driver", "io_uring"), ("path", "/f")], &[("driver", "io_uring"), ("path", "/f")]);
        check(&[("path", "/f"), ("driver", "io_uring")], &[("path", "/f")]);
        check(&[("driver", "virtio-blk-vhost-user"), ("path", "/s")], &[("queue-size", "256")]);
        check(&[("driver", "virtio_blk_vhost_user"), ("path", "/s"), ("queue_size", "64")], &[("queue-size", "64")]);
        check(&[("driver", "io_uring"), ("num-queues", "+2"), ("direct", "true")], &[("num-queues", "2")]);
        check(&[("driver", "io_uring"), ("num-entries", "1"), ("num-entries", "2")], &[("num-entries", "2")]);
    }

    #[test]
    fn a_path_is_made_absolute_and_nothing_else_is() {
        let here = std::env::current_dir().unwrap().join("a b").display().to_string();
        check(&[("driver", "io_uring"), ("path", "a b")], &[("path", &here)]);
        check(&[("io_uring", "a b")], &[("path", &here)]);
        check(&[("driver", "io_uring"), ("path", "")], &[("path", "")]);
        check(&[("memory", "1M")], &[("size", "1048576")]);
    }

    #[test]
    fn a_path_need_not_be_utf8() {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};

        let mut words = Words::default();
        words.add("driver", OsStr::new("io_uring")).unwrap();
        words.add("path", OsStr::from_bytes(b"a\xff")).unwrap();
        let path = words.check().unwrap().path.unwrap();
        assert!(path.as_bytes().ends_with(b"/a\xff") && path.as_bytes()[0] == b'/', "{path:?}");

        words.add("num-queues", &OsString::from_vec(vec![b'2', 0xff])).unwrap();
        let fault = words.check().unwrap_err();
        assert_eq!((fault.errno, fault.text.contains("num-queues=2\u{fffd}: ")), (libc::EINVAL, true), "{fault:?}");
        assert!(Words::default().add("driver", OsStr::from_bytes(b"\xff")).is_ok(), "it is refused as unknown");
    }

    #[test]
    fn errors_have_the_texts_of_libblkio_and_nbdkit() {
        refuse(
            &[],
            libc::EINVAL,
            "you must supply the driver=<DRIVER> parameter after the plugin name on the command line",
        );
        refuse(&[("driver", "io_uring"), ("driver", "io_uring")], libc::EINVAL, "'driver' property set more than once");
        refuse(
            &[("driver", "io_uring"), ("driver", "disk.raw")],
            libc::EINVAL,
            "'driver' property set more than once: io_uring, and then disk.raw; write path=disk.raw",
        );
        refuse(
            &[("driver", "disk.raw"), ("driver", "io_uring")],
            libc::EINVAL,
            "'driver' property set more than once: disk.raw, and then io_uring; write path=disk.raw",
        );
        refuse(
            &[("driver", "memory"), ("driver", "1M")],
            libc::EINVAL,
            "'driver' property set more than once: memory, and then 1M; write size=1M",
        );
        let sentence =
            "do not set the libblkio \"read-only\" parameter, use the nbdkit -r flag if read-only is required";
        refuse(&[("driver", "io_uring"), ("read-only", "true")], libc::EINVAL, sentence);
        refuse(&[("driver", "io_uring"), ("read_only", "false")], libc::EINVAL, sentence);
        refuse(
            &[("driver", "io_uring"), ("num-queues", "x")],
            libc::EINVAL,
            "num-queues=x: Value must be a signed 32-bit integer",
        );
        refuse(&[("driver", "io_uring"), ("capacity", "1")], libc::EACCES, "capacity=1: Property is read-only");
        refuse(
            &[("driver", "io_uring"), ("num-queue", "1")],
            libc::ENOENT,
            "num-queue=1: Unknown property name: io_uring has no property \"num-queue\"; did you mean num-queues?",
        );
        refuse(
            &[("driver", "io_urnig")],
            libc::ENOENT,
            "driver=io_urnig: Unknown driver name: unknown driver \"io_urnig\"; did you mean io_uring?",
        );
        refuse(
            &[("driver", "io_uring"), ("payload-memory", "1M")],
            libc::EINVAL,
            "payload-memory=1M: value must be a size from 8M to 4G",
        );
        let fault = words(&[("driver", "Cargo.toml")]).unwrap_err();
        assert!(fault.text.contains("write io_uring path=Cargo.toml"), "{}", fault.text);
    }

    #[test]
    fn every_driver_of_libblkio_exists_or_is_reported_as_missing() {
        for name in LIBBLKIO {
            match words(&[("driver", name)]) {
                Ok(choice) => assert_eq!(choice.settings.get("driver").as_deref(), Ok(name)),
                Err(fault) => {
                    assert_eq!(fault.errno, libc::ENOENT);
                    let start =
                        format!("driver={name}: a driver of libblkio that this plugin does not have yet; it has ");
                    assert!(fault.text.starts_with(&start) && fault.text.contains("vhost-user"), "{}", fault.text);
                }
            }
        }
    }
}
