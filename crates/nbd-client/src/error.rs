//! [`Error`]: why a connection or a request failed.

use std::{error, fmt, io, time::Duration};

use nbd_proto::{
    Fatal, Refusal, WireError,
    client::Failure,
    wire::{Opt, Rep},
};

/// Why a connection or a request failed. After any error but [`Server`](Self::Server), [`Invalid`](Self::Invalid) and
/// [`Timeout`](Self::Timeout) of a call, the connection cannot be used any more.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A URI cannot be used.
    Uri {
        /// The URI.
        uri: String,
        /// Which part is wrong, and how.
        reason: String,
    },
    /// The caller asked for what cannot be sent: a range past the end, a length above the server's limit, a command that
    /// the export does not have. Nothing was sent.
    Invalid(String),
    /// The system or TLS reported an error.
    Io {
        /// What failed, and on which object.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The server broke the protocol.
    Protocol(String),
    /// The server refused an option of the handshake.
    Refused {
        /// The option: GO for an unknown export, STARTTLS for a server without TLS.
        option: Opt,
        /// The reason, for the program.
        code: Rep,
        /// The reason, for people; may be empty.
        text: String,
    },
    /// The server answered a request with an error. The connection goes on.
    Server {
        /// The request, for people.
        request: String,
        /// The reason, for the program.
        error: WireError,
        /// The reason, for people; may be empty.
        text: String,
        /// Where in the export, if the server reported it.
        at: Option<u64>,
    },
    /// The connection is closed.
    Closed,
    /// No answer came in time.
    Timeout {
        /// What took too long.
        what: String,
        /// The limit.
        limit: Duration,
    },
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    /// An error of a connected socket. That the server has gone is the same, however the kernel reports it.
    pub(crate) fn of_connection(what: &str, source: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        match source.kind() {
            BrokenPipe | ConnectionAborted | ConnectionReset => Self::Closed,
            _ => Self::io(what, source),
        }
    }

    pub(crate) fn refused(option: Opt, Refusal { code, text }: Refusal) -> Self {
        Self::Refused { option, code, text: printable(&text) }
    }

    pub(crate) fn server(request: String, error: WireError, text: &str, at: Option<u64>) -> Self {
        Self::Server { request, error, text: printable(text), at }
    }
}

/// A server's text without control characters, which could do anything to a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uri { uri, reason } => write!(f, "{uri:?}: {reason}"),
            Self::Invalid(reason) => f.write_str(reason),
            Self::Io { what, source } => write!(f, "{what}: {source}"),
            Self::Protocol(what) => write!(f, "protocol error: {what}"),
            Self::Refused { option, code, text } => {
                write!(f, "server refused {option} with {code}")?;
                if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
            }
            Self::Server { request, error, text, at } => {
                write!(f, "{request}: server reported: {error}")?;
                if let Some(at) = at {
                    write!(f, " at offset {at}")?;
                }
                if text.is_empty() { Ok(()) } else { write!(f, " ({text})") }
            }
            Self::Closed => f.write_str("the connection is closed"),
            Self::Timeout { what, limit } => write!(f, "{what}: no answer within {limit:?}"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Fatal> for Error {
    fn from(fatal: Fatal) -> Self {
        Self::Protocol(fatal.to_string())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Fatal(fatal) => fatal.into(),
            Failure::Refused(option, refusal) => Self::refused(option, refusal),
            Failure::NotResumed => unreachable!("the handshake resumes every upgrade"),
        }
    }
}
