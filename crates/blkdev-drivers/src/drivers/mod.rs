//! The list of drivers, and how one is found by its name. A new driver is a file in this directory and a line of [`DRIVERS`].

#[cfg(feature = "io-uring")]
mod io_uring;
#[cfg(feature = "libblkio")]
mod libblkio;
mod memory;
mod null;
#[cfg(feature = "nvme")]
mod nvme;
#[cfg(feature = "nvme-io_uring")]
mod nvme_io_uring;
#[cfg(feature = "vdpa")]
mod vdpa;
#[cfg(feature = "vhost-user")]
mod vhost_user;
#[cfg(feature = "virtio-pci")]
mod virtio_pci;

use crate::{driver::Driver, error::Error, suggest::nearest};

static DRIVERS: &[Driver] = &[
    #[cfg(feature = "io-uring")]
    io_uring::DRIVER,
    #[cfg(feature = "vhost-user")]
    vhost_user::DRIVER,
    #[cfg(feature = "nvme")]
    nvme::DRIVER,
    #[cfg(feature = "nvme-io_uring")]
    nvme_io_uring::DRIVER,
    #[cfg(feature = "vdpa")]
    vdpa::DRIVER,
    #[cfg(feature = "virtio-pci")]
    virtio_pci::DRIVER,
    memory::DRIVER,
    null::DRIVER,
    #[cfg(feature = "libblkio")]
    libblkio::DRIVER,
];

/// All drivers of this build.
pub fn drivers() -> &'static [Driver] {
    DRIVERS
}

/// The driver of this name or alias; `_` and `-` are the same.
///
/// # Errors
/// `ENOENT`, with a suggestion or the names that there are.
pub fn find(name: &str) -> Result<&'static Driver, Error> {
    let dashed = name.replace('_', "-");
    let names = |driver: &'static Driver| std::iter::once(driver.name).chain(driver.aliases.iter().copied());
    let found = DRIVERS.iter().find(|driver| names(driver).any(|known| known.replace('_', "-") == dashed));
    found.ok_or_else(|| {
        let hint = if let Some(meant) = meant(&dashed) {
            format!("did you mean {meant}?")
        } else if dashed == "libblkio" {
            "this build has no libblkio: build it with \"cargo build --release -p nbdblk --features libblkio\"".into()
        } else if let Some(near) = nearest(name, DRIVERS.iter().flat_map(names)) {
            format!("did you mean {near}?")
        } else {
            format!("known drivers: {}", DRIVERS.iter().map(|driver| driver.name).collect::<Vec<_>>().join(", "))
        };
        Error::unknown_driver(name, &hint)
    })
}

/// The driver that other programs know under this name.
pub(crate) fn meant(name: &str) -> Option<&'static str> {
    Some(match name.to_ascii_lowercase().replace('_', "-").as_str() {
        "file" | "path" | "filename" | "raw" | "disk" | "image" | "img" | "dev" | "device" | "block" | "bdev"
        | "aio" | "linux-aio" | "host-device" | "uring" | "io-uring" => "io_uring",
        "socket" | "sock" | "unix" | "vhost" | "vhost-user-blk" => "vhost-user",
        "ram" | "mem" | "malloc" | "ramdisk" => "memory",
        "vhost-vdpa" | "virtio-blk-vdpa" => "vdpa",
        "zero" | "null-co" | "null-aio" => "null",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, io};

    use super::*;
    use crate::settings::Settings;

    #[test]
    fn the_table_is_sound() {
        let mut names = HashSet::new();
        for driver in DRIVERS {
            for name in std::iter::once(&driver.name).chain(driver.aliases) {
                assert!(names.insert(*name), "{name} means one driver");
                assert_eq!(find(name).unwrap().name, driver.name);
            }
            let settings = Settings::new(driver);
            assert!(settings.can_set(driver.value), "{}={}", driver.name, driver.value.to_uppercase());
            let mut names = HashSet::new();
            for property in driver.properties() {
                assert!(names.insert(property.name), "{}: {} stands there once", driver.name, property.name);
                assert!(
                    !property.name.contains('_') && !property.about.is_empty(),
                    "{}: {}",
                    driver.name,
                    property.name
                );
                // Parses the default, too.
                assert_eq!(settings.get(property.name).is_ok(), property.default.is_some(), "{}", property.name);
            }
        }
    }

    #[test]
    fn libblkio_s_properties_have_its_defaults() {
        let check = |driver, expected: &[(&str, &str)]| {
            let settings = Settings::new(find(driver).unwrap());
            for (name, value) in expected {
                assert_eq!(settings.get(name).as_deref(), Ok(*value), "{driver}: {name}");
            }
        };
        let common = [("path", ""), ("read-only", "false"), ("num-poll-queues", "0")];
        check("io_uring", &common);
        check("io_uring", &[("driver", "io_uring"), ("fd", "-1"), ("direct", "false"), ("num-entries", "128")]);
        check("virtio-blk-vhost-user", &common);
        check("virtio-blk-vhost-user", &[("driver", "virtio-blk-vhost-user"), ("queue-size", "256")]);
        check("nvme-io_uring", &common);
        check("nvme-io_uring", &[("driver", "nvme-io_uring"), ("fd", "-1"), ("num-entries", "128")]);
        check("nvme", &[("queue-size", "256"), ("no-iommu", "false")]);
        check("vhost-user", &[("connect-timeout", "5s"), ("request-timeout", "30s")]);
    }

    #[test]
    fn values_are_refused_in_libblkio_s_words() {
        let check = |driver, name, value, errno, message| {
            let error = Settings::new(find(driver).unwrap()).set(name, value).expect_err(value);
            assert_eq!((error.errno(), error.message()), (errno, message), "{driver}: {name}={value}");
        };
        check("io_uring", "nosuch", "1", libc::ENOENT, "Unknown property name");
        check("io_uring", "queue-size", "1", libc::ENOENT, "Unknown property name");
        check("io_uring", "capacity", "1", libc::EACCES, "Property is read-only");
        check("io_uring", "driver", "io_uring", libc::EACCES, "Property is read-only");
        check("io_uring", "direct", "1", libc::EINVAL, "Value must be \"true\" or \"false\"");
        check("io_uring", "direct", "True", libc::EINVAL, "Value must be \"true\" or \"false\"");
        check("io_uring", "num-queues", "0x1", libc::EINVAL, "Value must be a signed 32-bit integer");
        check("io_uring", "num-queues", "2147483648", libc::EINVAL, "Value must be a signed 32-bit integer");
        check("io_uring", "num-entries", "0", libc::EINVAL, "num-entries must be greater than 0");
        check("io_uring", "num-poll-queues", "-1", libc::EINVAL, "num_poll_queues must be equal to or greater than 0");
        check("io_uring", "num-poll-queues", "1", libc::EINVAL, "Poll queues not supported");
        check("vhost-user", "queue-size", "0", libc::EINVAL, "queue_size must be greater than 0");
        check("nvme", "queue-size", "1", libc::EINVAL, "queue_size must be greater than 1");
        check("nvme", "queue-size", "1025", libc::EINVAL, "Value must not be greater than 1024");
        check("vhost-user", "queue-size", "100", libc::EINVAL, "queue_size must be a power of two");
        check("vhost-user", "queue-size", "65536", libc::EINVAL, "Value must not be greater than 32768");
        check(
            "vhost-user",
            "request-timeout",
            "soon",
            libc::EINVAL,
            "Value must be a time in whole milliseconds, such as 5, 0.5s or 500ms",
        );
        check("memory", "size", "8E", libc::EINVAL, "Value must be less than 8E");
        assert_eq!(Settings::new(find("io_uring").unwrap()).get("capacity").unwrap_err().errno(), libc::ENODEV);
        assert_eq!(find("nosuch").unwrap_err().message(), "Unknown driver name");
    }

    #[test]
    fn an_open_device_tells_its_properties() {
        let mut settings = Settings::new(find("memory").unwrap());
        settings.set("size", "1M").unwrap();
        settings.set("num-queues", "+3").unwrap();
        let device = settings.open().unwrap();
        let values = crate::properties(&*device, &settings);
        let check = |name, value| {
            let found = values.iter().find(|(key, _)| key == name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(found.1.to_string(), value, "{name}");
        };
        check("size", "1048576");
        check("capacity", "1048576");
        check("num-queues", "3");
        check("max-queues", "3");
        check("request-alignment", "1");
        check("optimal-io-alignment", "4096");
        check("max-transfer", "33554432");
        check("max-discard-len", "0");
        check("supports-fua-natively", "true");
        check("flush-needed", "false");
    }

    #[test]
    fn what_is_missing_is_said() {
        let check = |driver, line: &str| {
            let error = Settings::new(find(driver).unwrap()).open().expect_err(driver);
            assert_eq!(error.to_string(), line);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        };
        check("io_uring", "io_uring needs a path: io_uring=PATH");
        check("vhost-user", "vhost-user needs a path: vhost-user=PATH");
        check("nvme", "nvme needs a path: nvme=PATH");
        check("nvme-io_uring", "nvme-io_uring needs a path: nvme-io_uring=PATH");
        check("memory", "memory needs a size: memory=SIZE");
    }

    #[test]
    fn more_queues_than_there_are_is_an_error() {
        let mut settings = Settings::new(find("null").unwrap());
        settings.set("size", "1M").unwrap();
        settings.set("num-queues", "65535").unwrap();
        let line = settings.open().expect_err("65535 queues").to_string();
        assert!(line.starts_with("null: num-queues=65535: the device has "), "{line}");
    }
}
