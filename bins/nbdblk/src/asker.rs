//! [`Asker`]: a client of the control socket that waits for the answer to its request.

use std::{
    io::{ErrorKind, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// Time for a client to read a long answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The result of a reload: the changes, or the reason of the failure.
pub(crate) type Answer = Result<String, String>;

/// A client of the control socket that waits for an [`Answer`].
#[derive(Debug)]
pub(crate) struct Asker(pub(crate) UnixStream);

impl Asker {
    /// Sends the answer. Never waits: the part that does not fit the socket's buffer is lost.
    pub(crate) fn tell(mut self, answer: &Answer) {
        // A client that has disconnected does not need it.
        let _ = self.0.write_all(words(answer).as_bytes());
    }

    /// Sends an answer of any length. Waits up to [`PATIENCE`] for the client to read it.
    pub(crate) fn tell_all(mut self, answer: &Answer) {
        let (text, deadline) = (words(answer), Instant::now() + PATIENCE);
        let mut rest = text.as_bytes();
        if self.0.set_nonblocking(false).is_err() {
            return;
        }
        while !rest.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            // Fails for a time of zero: the deadline has passed.
            if self.0.set_write_timeout(Some(left)).is_err() {
                return;
            }
            match self.0.write(rest) {
                Ok(0) => return,
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

fn words(answer: &Answer) -> String {
    match answer {
        Ok(changes) => format!("ok {changes}\n"),
        Err(error) => format!("error {}\n", error.replace('\n', "; ")),
    }
}
