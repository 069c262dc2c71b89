//! What a client checks: the bytes of replies, and their meaning.

use nbd_proto::{
    Mode, WireError,
    client::{self, Chunk},
    wire::{CommandFlags as Flags, CommandKind as Kind},
};

use crate::world::World;

impl World {
    /// Delivers some bytes of replies to a client.
    pub(crate) fn collect(&mut self, n: usize) {
        if self.clients[n].gone || self.clients[n].is_stopped {
            return;
        }
        let longest = *self.rng.pick(&[1, 100, 10_000, 200_000]);
        let len = self.rng.range(0, longest) as usize + 1;
        let piece = self.take(n, len);
        let mut input = &piece[..];
        loop {
            let client = &mut self.clients[n];
            match client.decoder.next(&mut input).expect("the server follows the protocol") {
                None => break,
                Some(client::Event::Simple(cookie, result)) => {
                    let request = &client.requests[&cookie.0];
                    assert!(client.mode == Mode::Simple || request.kind != Kind::READ, "reads are answered in chunks");
                    if request.kind == Kind::READ && result.is_ok() && request.len > 0 {
                        client.decoder.expect_payload(request.len as u32);
                        client.incoming = Some((cookie.0, request.at));
                    } else {
                        self.answered(n, cookie.0, result);
                    }
                }
                Some(client::Event::Chunk { cookie, done, chunk, .. }) => {
                    let request = &client.requests[&cookie.0];
                    match chunk {
                        Chunk::Data { at, len } => {
                            assert_eq!((request.kind, at), (Kind::READ, client.part(cookie)));
                            assert_eq!(done, at + u64::from(len) == request.at + request.len, "the last chunk says so");
                            assert!(
                                !request.flags.contains(Flags::DF) || done && at == request.at,
                                "DF asks for one chunk"
                            );
                            client.incoming = Some((cookie.0, at));
                        }
                        Chunk::Hole { at, len } => {
                            assert_eq!((request.kind, at), (Kind::READ, client.part(cookie)));
                            assert!(!request.flags.contains(Flags::DF), "DF asks for data");
                            let next = at + u64::from(len);
                            assert_eq!(done, next == request.at + request.len, "the last chunk says so");
                            client.incoming = Some((cookie.0, next));
                            self.disks[client.seat.disk].model.must_be_zero(at, next);
                            if done {
                                self.answered(n, cookie.0, Ok(()));
                            }
                        }
                        Chunk::Status { context: 0, extents } => {
                            let (mut at, end) = (request.at, request.at + request.len);
                            assert!(!request.flags.contains(Flags::REQ_ONE) || extents.len() == 1);
                            for e in &extents {
                                if e.flags & 2 != 0 {
                                    self.disks[client.seat.disk].model.must_be_zero(at, (at + e.len).min(end));
                                }
                                at += e.len;
                            }
                            assert!(extents.iter().all(|e| e.len > 0) && at <= end && done);
                            self.answered(n, cookie.0, Ok(()));
                        }
                        Chunk::Error { error, .. } => self.answered(n, cookie.0, Err(error)),
                        Chunk::None => self.answered(n, cookie.0, Ok(())),
                        other => panic!("an unexpected chunk: {other:?}"),
                    }
                }
                Some(client::Event::Payload(bytes)) => {
                    let (cookie, at) = client.incoming.expect("data belongs to a read");
                    self.disks[client.seat.disk].model.must_hold(at, bytes);
                    let request = &client.requests[&cookie];
                    let next = at + bytes.len() as u64;
                    client.incoming = Some((cookie, next));
                    if next == request.at + request.len {
                        self.answered(n, cookie, Ok(()));
                    }
                }
            }
        }
    }

    /// Checks the reply to a request: exactly one, and correct.
    fn answered(&mut self, n: usize, cookie: u64, result: Result<(), WireError>) {
        let client = &mut self.clients[n];
        let request = client.requests.remove(&cookie).expect("one answer for each request");
        let disk = &mut self.disks[client.seat.disk];
        disk.model.busy.remove(&(n, cookie));
        if result == Err(WireError::Shutdown) {
            // Nothing has changed, so the model does not change either.
            return assert!(client.refused, "ESHUTDOWN only for refused clients");
        }
        if let Some(expected) = request.expected {
            return assert_eq!(result, Err(expected), "{:?} {:?}", request.kind, request.flags);
        }
        match result {
            _ if disk.model.is_void => {}
            Ok(()) => disk.model.apply(&request),
            // The request must not have changed anything.
            Err(WireError::NotSup) => assert!(request.flags.contains(Flags::FAST_ZERO)),
            Err(error) => {
                assert!(disk.faulty, "{:?} of {} at {} failed with {error:?}", request.kind, request.len, request.at);
                disk.model.forget(&request);
            }
        }
    }
}
