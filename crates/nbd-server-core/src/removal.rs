//! [`Removal`]: what becomes of the clients of an export that is removed.

use std::{fmt, io, str::FromStr};

/// What becomes of the clients of an export that is removed, in qemu's words; as text `hide`, `soft`, `hard`. Nobody new
/// finds it in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Removal {
    /// They are served until they leave.
    #[default]
    Hide,
    /// What they have asked for is carried out; whatever they ask from now on is answered with ESHUTDOWN, upon which a
    /// client has to leave. Who has not after [`Limits::farewell`](crate::Limits::farewell) is cut off.
    Soft,
    /// They are cut off at once. What the device has of theirs already it finishes.
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
