//! [`Client`]: one connection with calls that wait for their reply.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use crate::{
    deadline::Deadline,
    engine::Engine,
    error::Error,
    export::Export,
    options::Options,
    request::{Completion, Request, Status},
    uri::Uri,
};

/// Longest buffer that is kept between calls, in bytes.
const SPARE_MAX: usize = 1 << 20;

/// One connection, with calls that wait for their reply: one request at a time. [`Engine`] has many in flight.
///
/// A call fails with [`Error::Invalid`] if the export does not allow it, [`Error::Server`] if the server executed it without
/// success, [`Error::Timeout`] after [`Options::call_timeout`], and any other error if the connection has ended. The client
/// splits no request: [`Export::block_sizes`] has the longest READ and WRITE. Offsets and lengths are in bytes. A drop
/// disconnects.
///
/// ```no_run
/// use nbd_client::{Client, Options};
///
/// let mut client = Client::connect(&"nbd://localhost/disk".parse()?, &Options::default())?;
/// let mut sector = [0; 512];
/// client.read(0, &mut sector)?;
/// # Ok::<(), nbd_client::Error>(())
/// ```
pub struct Client {
    engine: Engine,
    limit: Option<Duration>,
    done: Vec<Completion>,
    /// The buffer of the last call.
    spare: Vec<u8>,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// As [`Engine::connect`].
    pub fn connect(uri: &Uri, options: &Options) -> Result<Self, Error> {
        Ok(Self::new(Engine::connect(uri, options)?, options.call))
    }

    /// Negotiates on a socket that is connected to a server already.
    ///
    /// # Errors
    /// As [`Engine::over`].
    pub fn over(socket: OwnedFd, options: &Options) -> Result<Self, Error> {
        Ok(Self::new(Engine::over(socket, options)?, options.call))
    }

    fn new(engine: Engine, limit: Option<Duration>) -> Self {
        Self { engine, limit, done: Vec::new(), spare: Vec::new() }
    }

    /// The connection, to have many requests in flight. A call that timed out may still complete there.
    pub fn into_engine(self) -> Engine {
        self.engine
    }

    /// What the server reports about the export.
    pub fn export(&self) -> &Export {
        self.engine.export()
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.export().size()
    }

    /// Fills `buffer` from `at` on. If it fails, the buffer is as it was.
    ///
    /// # Errors
    /// As for all calls.
    pub fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
        if buffer.is_empty() {
            return Ok(());
        }
        let mut memory = std::mem::take(&mut self.spare);
        memory.resize(buffer.len(), 0);
        let done = self.call(Request::Read { at, buffer: memory, df: false })?;
        if let Request::Read { buffer: memory, .. } = done.request {
            buffer.copy_from_slice(&memory);
            self.keep(memory);
        }
        Ok(())
    }

    /// Writes `data` at `at`.
    ///
    /// # Errors
    /// As for all calls.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        let mut memory = std::mem::take(&mut self.spare);
        memory.clear();
        memory.extend_from_slice(data);
        let done = self.call(Request::write(at, memory))?;
        if let Request::Write { data: memory, .. } = done.request {
            self.keep(memory);
        }
        Ok(())
    }

    /// Makes a range read as zeroes. The server may unallocate it.
    ///
    /// # Errors
    /// As for all calls.
    pub fn zero(&mut self, at: u64, len: u64) -> Result<(), Error> {
        self.call(Request::Zero { at, len, no_hole: false, fast: false, fua: false }).map(drop)
    }

    /// Reports that a range is not needed any more.
    ///
    /// # Errors
    /// As for all calls.
    pub fn trim(&mut self, at: u64, len: u64) -> Result<(), Error> {
        self.call(Request::Trim { at, len, fua: false }).map(drop)
    }

    /// Makes all writes durable that have completed.
    ///
    /// # Errors
    /// As for all calls.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.call(Request::Flush).map(drop)
    }

    /// Asks the server to cache a range.
    ///
    /// # Errors
    /// As for all calls.
    pub fn cache(&mut self, at: u64, len: u64) -> Result<(), Error> {
        self.call(Request::Cache { at, len }).map(drop)
    }

    /// The status of a range in every selected context. A server may answer for less than the range, or for more.
    ///
    /// # Errors
    /// As for all calls.
    pub fn block_status(&mut self, at: u64, len: u64) -> Result<Vec<Status>, Error> {
        Ok(self.call(Request::Status { at, len, one: false })?.status)
    }

    /// Sends any request, with its flags, and waits until it has completed with success.
    ///
    /// # Errors
    /// As for all calls.
    pub fn call(&mut self, request: Request) -> Result<Completion, Error> {
        let what = if self.limit.is_some() { request.to_string() } else { String::new() };
        let (cookie, deadline) = (self.engine.submit(request)?, Deadline::after(self.limit));
        loop {
            let progress = self.engine.progress(&mut self.done);
            // Others are of calls that have timed out.
            match self.done.drain(..).find(|done| done.cookie == cookie) {
                Some(Completion { result: Err(Error::Closed), .. }) => {
                    return Err(progress.err().unwrap_or(Error::Closed));
                }
                Some(Completion { result: Err(error), .. }) => return Err(error),
                Some(done) => return Ok(done),
                None => progress?,
            }
            if deadline.is_over() || !self.engine.wait(deadline.left())? {
                return Err(deadline.passed(what));
            }
        }
    }

    /// Disconnects in good order: returns when the server has closed the connection. [`Options::call_timeout`] limits that
    /// too.
    ///
    /// # Errors
    /// The connection had ended before, or the server does not close it.
    pub fn disconnect(mut self) -> Result<(), Error> {
        let deadline = Deadline::after(self.limit);
        self.engine.disconnect();
        loop {
            self.engine.progress(&mut self.done)?;
            if self.engine.is_closed() {
                return Ok(());
            }
            if deadline.is_over() || !self.engine.wait(deadline.left())? {
                return Err(deadline.passed("disconnecting"));
            }
        }
    }

    fn keep(&mut self, memory: Vec<u8>) {
        if memory.capacity() <= SPARE_MAX {
            self.spare = memory;
        }
    }
}

impl From<Engine> for Client {
    /// Calls have no time limit. What was in flight completes unseen.
    fn from(engine: Engine) -> Self {
        Self::new(engine, None)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("engine", &self.engine).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.engine.as_fd()
    }
}
