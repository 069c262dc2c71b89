//! [`Settings`]: a driver with what has been set on it, from the first word to the open device.

use std::{
    ffi::OsStr,
    io,
    path::{self, PathBuf},
    time::Duration,
};

use blkdev::Device;

use crate::{
    driver::Driver,
    error::Error,
    property::{Access, Kind, Property, Value},
    suggest::nearest,
};

/// A driver and the values of its properties.
///
/// ```
/// use blkdev_drivers::{Settings, find};
///
/// let mut settings = Settings::new(find("virtio-blk-vhost-user")?);
/// settings.set("path", "/run/vhost.sock")?;
/// settings.set("num_queues", "2")?;
/// assert_eq!(settings.get("num-queues")?, "2");
/// assert_eq!(settings.get("queue-size")?, "256");
/// assert_eq!(settings.set("capacity", "0").unwrap_err().message(), "Property is read-only");
/// # Ok::<(), blkdev_drivers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Settings {
    driver: &'static Driver,
    values: Vec<(&'static str, Value)>,
    extra: Vec<(String, String)>,
}

/// The same driver, and the same set on it, in whatever order.
impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &Self, b: &Self| {
            a.values.iter().all(|value| b.values.contains(value)) && a.extra.iter().all(|value| b.extra.contains(value))
        };
        self.driver.name == other.driver.name && same(self, other) && same(other, self)
    }
}

impl Settings {
    /// Nothing set yet.
    pub fn new(driver: &'static Driver) -> Self {
        Self { driver, values: Vec::new(), extra: Vec::new() }
    }

    /// Whose settings these are.
    pub fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// Sets a property; a later value wins over an earlier one.
    ///
    /// # Errors
    /// `ENOENT`: the driver has no such property. `EACCES`: it can only be read. `EINVAL`: it cannot have that value.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let name = dashed(name);
        let property = match self.property(&name) {
            Ok(property) => property,
            Err(_) if self.driver.open_ended => {
                put(&mut self.extra, name, value.into());
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if property.access == Access::ReadOnly {
            return Err(Error::read_only(self.driver.name, property.name));
        }
        let parsed = property.parse(value).map_err(|why| Error::value(self.driver.name, property.name, value, why))?;
        put(&mut self.values, property.name, parsed);
        Ok(())
    }

    /// As [`set`](Self::set), for a value that may not be UTF-8, as paths need not be.
    ///
    /// # Errors
    /// As those of `set`; `EINVAL` for a value that is not UTF-8, unless it is a path.
    pub fn set_os(&mut self, name: &str, value: &OsStr) -> Result<(), Error> {
        if let Some(value) = value.to_str() {
            return self.set(name, value);
        }
        match self.property(&dashed(name)) {
            Ok(property) if property.kind == Kind::Path && property.access != Access::ReadOnly => {
                put(&mut self.values, property.name, Value::Path(value.into()));
                Ok(())
            }
            Err(error) if !self.driver.open_ended => Err(error),
            _ => {
                let why = "Value must be UTF-8".into();
                Err(Error::value(self.driver.name, name, &value.to_string_lossy(), why))
            }
        }
    }

    /// What a property has been set to, or its default.
    ///
    /// # Errors
    /// `ENOENT`: the driver has no such property. `ENODEV`: only the open device can tell (see [`properties`]).
    pub fn get(&self, name: &str) -> Result<String, Error> {
        let name = dashed(name);
        if let Some((_, value)) = self.extra.iter().find(|(key, _)| *key == name) {
            return Ok(value.clone());
        }
        let property = self.property(&name)?;
        let value = self.value(property).ok_or_else(|| Error::not_open(self.driver.name, property.name))?;
        Ok(value.to_string())
    }

    /// Whether the driver has this property, and it can be set.
    pub fn can_set(&self, name: &str) -> bool {
        self.property(&dashed(name)).is_ok_and(|property| property.access != Access::ReadOnly)
    }

    pub(crate) fn property(&self, name: &str) -> Result<&'static Property, Error> {
        self.driver.properties().find(|property| property.name == name).ok_or_else(|| {
            Error::unknown_property(self.driver.name, name, nearest(name, self.driver.properties().map(|p| p.name)))
        })
    }

    fn value(&self, property: &Property) -> Option<Value> {
        let set = self.values.iter().find(|(name, _)| *name == property.name);
        set.map(|(_, value)| value.clone()).or_else(|| property.default_value())
    }
}

/// What the drivers in the table read their options with. A name that is not in the driver's table, or is of another
/// kind, is a mistake in that table.
impl Settings {
    fn known(&self, name: &str) -> Option<Value> {
        let property = self.property(name).expect("a driver asks for properties of its own table");
        self.value(property)
    }

    pub(crate) fn bool(&self, name: &str) -> bool {
        let Some(Value::Bool(value)) = self.known(name) else { panic!("{name} is a bool with a default") };
        value
    }

    pub(crate) fn i32(&self, name: &str) -> Option<i32> {
        self.known(name).map(|value| match value {
            Value::I32(value) => value,
            _ => panic!("{name} is an i32"),
        })
    }

    pub(crate) fn u64(&self, name: &str) -> Option<u64> {
        self.known(name).map(|value| match value {
            Value::U64(value) => value,
            _ => panic!("{name} is a u64"),
        })
    }

    pub(crate) fn time(&self, name: &str) -> Duration {
        let Some(Value::Time(value)) = self.known(name) else { panic!("{name} is a time with a default") };
        value
    }

    /// `None` when empty, which in libblkio is the same as not set.
    pub(crate) fn str(&self, name: &str) -> Option<String> {
        self.known(name).and_then(|value| match value {
            Value::Str(value) => Some(value).filter(|value| !value.is_empty()),
            _ => panic!("{name} is a str"),
        })
    }

    /// `None` when empty.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.known(name).and_then(|value| match value {
            Value::Path(value) => Some(value).filter(|value| !value.as_os_str().is_empty()),
            _ => panic!("{name} is a path"),
        })
    }

    /// As [`str`](Self::str), for what the driver cannot do without.
    pub(crate) fn needed(&self, name: &str) -> io::Result<String> {
        self.str(name).ok_or_else(|| self.missing(name))
    }

    pub(crate) fn missing(&self, name: &str) -> io::Error {
        let (driver, value) = (self.driver.name, self.driver.value);
        Error::invalid(format!("{driver} needs a {name}: {driver}={}", value.to_uppercase())).into()
    }

    /// The same settings, with absolute paths.
    pub(crate) fn absolute(&self) -> io::Result<Self> {
        let mut settings = self.clone();
        for (_, value) in &mut settings.values {
            if let Value::Path(path) = value
                && !path.as_os_str().is_empty()
            {
                *path = path::absolute(&*path)?;
            }
        }
        Ok(settings)
    }

    /// Properties that are not in the table, in the order in which they were set.
    #[cfg_attr(not(feature = "libblkio"), expect(dead_code, reason = "only libblkio is open-ended"))]
    pub(crate) fn extra(&self) -> &[(String, String)] {
        &self.extra
    }
}

/// All properties of an open device and their values, in the order of the driver's table: what the device says where it
/// says something, else what was set, else the default.
pub fn properties(device: &dyn Device, settings: &Settings) -> Vec<(String, Value)> {
    let known = settings.driver.properties().filter_map(|property| {
        let value = match property.answer {
            Some(answer) => answer(device),
            None => settings.value(property)?,
        };
        Some((property.name.to_owned(), value))
    });
    let extra = settings.extra.iter().map(|(name, value)| (name.clone(), Value::Str(value.clone())));
    known.chain(extra).collect()
}

fn dashed(name: &str) -> String {
    name.replace('_', "-")
}

fn put<K: PartialEq, V>(values: &mut Vec<(K, V)>, key: K, value: V) {
    match values.iter_mut().find(|(name, _)| *name == key) {
        Some(place) => place.1 = value,
        None => values.push((key, value)),
    }
}
