//! [`Removal`]: what happens to the clients of a removed export.

use std::{fmt, io, str::FromStr};

/// What happens to the clients of a removed export. The names are those of QEMU; as text `hide`, `soft`, `hard`. In any case, new
/// clients cannot open the export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Removal {
    /// Present clients are served until they disconnect.
    #[default]
    Hide,
    /// Requests that have begun are completed. Later ones get ESHUTDOWN, after which a client must disconnect. A client that has
    /// not disconnected after [`Limits::farewell`](crate::Limits::farewell) is disconnected.
    Soft,
    /// Present clients are disconnected at once. The device completes the requests that it already has.
    Hard,
}

impl FromStr for Removal {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let all = [Self::Hide, Self::Soft, Self::Hard];
        all.into_iter().find(|removal| removal.to_string() == text).ok_or_else(|| {
            let text = format!("\"{text}\" is none of \"hide\", \"soft\" and \"hard\"");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })
    }
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hide => "hide",
            Self::Soft => "soft",
            Self::Hard => "hard",
        })
    }
}
