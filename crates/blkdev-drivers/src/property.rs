//! What can be set on a driver, or read from it: names, types, defaults and limits, as data.

use std::{borrow::Cow, fmt, path::PathBuf, time::Duration};

use blkdev::Device;

use crate::units::{parse_size, parse_time};

/// One property of a driver.
#[derive(Clone, Copy, Debug)]
pub struct Property {
    /// With dashes, `num-queues`.
    pub name: &'static str,
    /// What its values look like.
    pub kind: Kind,
    /// The value if it is not set; `None`: only the open device has it.
    pub default: Option<&'static str>,
    /// When it can be set.
    pub access: Access,
    /// One line for people.
    pub about: &'static str,
    /// What the device says it is; `None`: what was set.
    pub(crate) answer: Option<fn(&dyn Device) -> Value>,
    /// What is wrong with a value that is of the right kind: a sentence of libblkio's.
    pub(crate) check: Option<Check>,
}

/// Says what is wrong with a value, or that nothing is.
pub(crate) type Check = fn(&Value) -> Result<(), Cow<'static, str>>;

/// When a property can be set, in libblkio's terms. Here it makes no difference whether `Created` or `Connected`: both are
/// set before the device is opened, in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// In libblkio before `blkio_connect`.
    Created,
    /// In libblkio between `blkio_connect` and `blkio_start`.
    Connected,
    /// Never: the device says it.
    ReadOnly,
}

/// The type of a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A decimal number with or without sign.
    I32,
    /// A decimal number.
    U64,
    /// Anything.
    Str,
    /// A file: relative to the current directory at the time of opening.
    Path,
    /// Bytes, with a suffix `K` to `E` ([`parse_size`]).
    Size,
    /// Seconds, or with the suffix `ms` or `s` ([`parse_time`]).
    Time,
}

/// The value of a property. [`Display`](fmt::Display) renders it as libblkio does: `true`, `128`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::I32`].
    I32(i32),
    /// Of [`Kind::U64`] and [`Kind::Size`].
    U64(u64),
    /// Of [`Kind::Str`].
    Str(String),
    /// Of [`Kind::Path`], which need not be UTF-8; rendered as far as it is.
    Path(PathBuf),
    /// Of [`Kind::Time`]; rendered as `5s` or `500ms`.
    Time(Duration),
}

impl Property {
    /// One that is set before libblkio's `blkio_connect`.
    pub(crate) const fn created(
        name: &'static str,
        kind: Kind,
        default: Option<&'static str>,
        about: &'static str,
    ) -> Self {
        Self { name, kind, default, access: Access::Created, about, answer: None, check: None }
    }

    /// One that is set before libblkio's `blkio_start`.
    pub(crate) const fn connected(
        name: &'static str,
        kind: Kind,
        default: Option<&'static str>,
        about: &'static str,
    ) -> Self {
        Self { access: Access::Connected, ..Self::created(name, kind, default, about) }
    }

    /// One that is always the same.
    pub(crate) const fn constant(name: &'static str, kind: Kind, value: &'static str, about: &'static str) -> Self {
        Self { access: Access::ReadOnly, ..Self::created(name, kind, Some(value), about) }
    }

    /// One that the open device tells.
    pub(crate) const fn told(
        name: &'static str,
        kind: Kind,
        answer: fn(&dyn Device) -> Value,
        about: &'static str,
    ) -> Self {
        Self { access: Access::ReadOnly, ..Self::created(name, kind, None, about) }.answered(answer)
    }

    /// Once the device is open, its own value counts, and not the one that was set.
    pub(crate) const fn answered(self, answer: fn(&dyn Device) -> Value) -> Self {
        Self { answer: Some(answer), ..self }
    }

    /// Not every value of the kind will do.
    pub(crate) const fn checked(self, check: Check) -> Self {
        Self { check: Some(check), ..self }
    }

    /// The meaning of `text`, or what is wrong with it.
    pub(crate) fn parse(&self, text: &str) -> Result<Value, Cow<'static, str>> {
        let value = self.kind.parse(text)?;
        self.check.map_or(Ok(()), |check| check(&value))?;
        Ok(value)
    }

    pub(crate) fn default_value(&self) -> Option<Value> {
        let valid = |text| self.parse(text).expect("a default in the table is a value of its kind");
        self.default.map(valid)
    }
}

impl Kind {
    /// One word for lists: `i32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::I32 => "i32",
            Self::U64 => "u64",
            Self::Str => "str",
            Self::Path => "path",
            Self::Size => "size",
            Self::Time => "time",
        }
    }

    fn parse(self, text: &str) -> Result<Value, Cow<'static, str>> {
        Ok(match self {
            Self::Bool => Value::Bool(text.parse().map_err(|_| "Value must be \"true\" or \"false\"")?),
            Self::I32 => Value::I32(text.parse().map_err(|_| "Value must be a signed 32-bit integer")?),
            Self::U64 => Value::U64(text.parse().map_err(|_| "Value must be an unsigned 64-bit integer")?),
            Self::Str => Value::Str(text.into()),
            Self::Path => Value::Path(text.into()),
            Self::Size => Value::U64(parse_size(text)?),
            Self::Time => Value::Time(parse_time(text)?),
        })
    }
}

impl Access {
    /// One word for lists: `created`, `connected` or `read-only`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Connected => "connected",
            Self::ReadOnly => "read-only",
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::I32(value) => value.fmt(f),
            Self::U64(value) => value.fmt(f),
            Self::Str(value) => value.fmt(f),
            Self::Path(value) => value.display().fmt(f),
            Self::Time(value) if value.subsec_millis() == 0 => write!(f, "{}s", value.as_secs()),
            Self::Time(value) => write!(f, "{}ms", value.as_millis()),
        }
    }
}
