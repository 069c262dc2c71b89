//! [`Continuation`]: a connection between two requests, as plain data, with which another process can continue it.

use nbd_proto::{
    Command, Cookie, Position, Put, Terms, Write,
    client::Encoder,
    wire::{CommandFlags, CommandKind, Mode},
};

/// The transmission phase of a connection, at a moment when none of its requests is at a device.
///
/// Requests that were taken but have not begun are in [`input`](Self::input) again, as if they had not been taken. Only READs that
/// wait for memory are not: other requests may have overtaken them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The terms that were negotiated.
    pub terms: Terms,
    /// READs that wait for memory, in order.
    pub reads: Vec<Read>,
    /// Where in its stream the client is. [`Position::taken`] is empty: those bytes are in `input`.
    pub position: Position,
    /// Bytes of the client that must be taken next.
    pub input: Vec<u8>,
    /// Unsent replies.
    pub output: Vec<Unsent>,
}

/// A READ that has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// The cookie of the request.
    pub cookie: Cookie,
    /// First byte.
    pub at: u64,
    /// Length in bytes.
    pub len: u32,
    /// NBD_CMD_FLAG_DF: reply in one chunk.
    pub df: bool,
}

/// A part of unsent replies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsent {
    /// Headers.
    Bytes(Vec<u8>),
    /// The content of the device, which must be read again.
    Content {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: usize,
    },
}

/// Appends a command as a client would send it.
pub(crate) fn encode_command(terms: &Terms, cookie: Cookie, command: Command, out: &mut impl Put) {
    let encoder = Encoder::new(terms.mode);
    match command {
        Command::Read { at, len, df } => {
            let flags = CommandFlags::NONE.with_if(df, CommandFlags::DF);
            encoder.request(out, cookie, CommandKind::READ, flags, at, len.into());
        }
        Command::Flush { at } => encoder.request(out, cookie, CommandKind::FLUSH, CommandFlags::NONE, at, 0),
        Command::Trim { at, len, fua } => encoder.trim(out, cookie, at, len, fua),
        Command::Cache { at, len } => encoder.cache(out, cookie, at, len),
        Command::Zero { at, len, unmap, fast, fua } => {
            let flags = CommandFlags::NONE.with_if(!unmap, CommandFlags::NO_HOLE);
            let flags = flags.with_if(fast, CommandFlags::FAST_ZERO).with_if(fua, CommandFlags::FUA);
            encoder.zero(out, cookie, at, len, flags);
        }
        Command::Status { at, len, one, contexts } if contexts == terms.contexts || terms.mode != Mode::Extended => {
            encoder.status(out, cookie, at, len, one);
        }
        Command::Status { at, len, one, contexts } => {
            encoder.status_of(out, cookie, at, len, one, &contexts.iter().collect::<Vec<_>>());
        }
    }
}

/// Appends the header of a WRITE as a client would send it.
pub(crate) fn encode_write(terms: &Terms, cookie: Cookie, write: Write, out: &mut impl Put) {
    Encoder::new(terms.mode).write_head(out, cookie, write.at, write.len, write.fua);
}

#[cfg(test)]
mod tests {
    use nbd_proto::{BlockSizes, ContextSet, Event, Receiver, wire::TransmissionFlags};

    use super::*;

    #[test]
    fn an_encoded_request_is_parsed_as_the_same_request() {
        let flags = TransmissionFlags::KNOWN.without(TransmissionFlags::READ_ONLY);
        let (contexts, one) = ([0, 1].into_iter().collect(), [1].into_iter().collect::<ContextSet>());
        let (at, len) = (512, 4096);
        let mut commands = vec![
            Command::Flush { at: 77 },
            Command::Cache { at, len },
            Command::Status { at, len, one: true, contexts },
            Command::Status { at, len, one: false, contexts },
        ];
        for bits in 0..8 {
            let [a, b, c] = [1, 2, 4].map(|bit| bits & bit > 0);
            commands.extend([Command::Read { at, len: 512, df: a }, Command::Trim { at, len, fua: a }]);
            commands.push(Command::Zero { at, len, unmap: a, fast: b, fua: c });
        }
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let block = BlockSizes::default();
            let terms = Terms { mode, flags, size: 1 << 20, block, enforce_alignment: false, contexts };
            let has = |command: &Command| match command {
                Command::Status { .. } => mode != Mode::Simple,
                Command::Read { df, .. } => mode != Mode::Simple || !df,
                _ => true,
            };
            let subset = Command::Status { at, len, one: true, contexts: one };
            let more = (mode == Mode::Extended).then_some(subset);
            for command in commands.iter().copied().filter(has).chain(more) {
                let mut bytes = Vec::new();
                encode_command(&terms.told(), Cookie(7), command, &mut bytes);
                let mut input = &bytes[..];
                let event = Receiver::new(terms).next(&mut input);
                assert_eq!(event, Ok(Some(Event::Command(Cookie(7), command))), "{mode:?}");
                assert!(input.is_empty());
            }
            for fua in [false, true] {
                let (mut bytes, write) = (Vec::new(), Write { at, len: 9, fua });
                encode_write(&terms.told(), Cookie(7), write, &mut bytes);
                assert_eq!(Receiver::new(terms).next(&mut &bytes[..]), Ok(Some(Event::Write(Cookie(7), write))));
            }
        }
    }
}
