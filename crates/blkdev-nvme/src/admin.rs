//! [`Admin`]: the admin queue pair, with one command at a time, and asynchronous events.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use blkdev::{
    liveness::Liveness,
    wake::{Wake, now, wait},
};

use crate::{
    pair::{List, Pair},
    spec::{self, Command, Completion, IDENTIFY_LEN, Status},
};

/// Size of the admin queue: one command, one event request, and room for late completions.
pub(crate) const SIZE: u16 = 16;

/// The admin queue. One thread uses it at a time.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) pair: Pair<Purpose>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) life: Arc<Liveness>,
    pub(crate) timeout: Duration,
    /// The completion of the current command, once it has arrived.
    answer: Option<Completion>,
    /// Unhandled events: word 0 of their completions.
    pub(crate) events: Vec<u32>,
    /// A command was not completed in time. No further commands are sent until the controller has been reset.
    pub(crate) is_late: bool,
}

/// Purpose of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A thread waits for its completion.
    Now,
    /// Asynchronous Event Request: the controller completes it when an event occurs.
    Event,
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The controller completed it with an error status.
    Refused(Status),
    /// It, or an earlier command, was not completed in time.
    Late,
    /// The device is dead.
    Dead,
}

impl Failure {
    pub(crate) fn explain(&self, what: &str) -> io::Error {
        match self {
            Self::Refused(status) => {
                let kind = status.result().err().map_or(io::ErrorKind::Other, |e| io::Error::from(e).kind());
                io::Error::new(kind, format!("{what}: {status}"))
            }
            Self::Late => io::Error::new(io::ErrorKind::TimedOut, format!("{what}: the controller does not respond")),
            Self::Dead => io::Error::new(io::ErrorKind::NotConnected, format!("{what}: the device is dead")),
        }
    }
}

impl Admin {
    pub(crate) fn new(pair: Pair<Purpose>, wake: Arc<Wake>, life: Arc<Liveness>, timeout: Duration) -> Self {
        Self { pair, wake, life, timeout, answer: None, events: Vec::new(), is_late: false }
    }

    /// Starts over after a reset of the controller.
    pub(crate) fn restart(&mut self) {
        self.pair.restart(0);
        (self.answer, self.is_late) = (None, false);
        self.events.clear();
    }

    /// Sends a command and waits for its completion.
    pub(crate) fn ask(&mut self, command: Command) -> Result<Completion, Failure> {
        self.ask_for(self.timeout, |_| command)
    }

    /// As [`ask`](Self::ask), with a shorter time-out.
    pub(crate) fn ask_within(&mut self, time: Duration, command: Command) -> Result<Completion, Failure> {
        self.ask_for(time, |_| command)
    }

    /// As [`ask`](Self::ask), for a command that returns at most `N` bytes, in one memory page.
    pub(crate) fn ask_bytes<const N: usize>(&mut self, command: Command) -> Result<[u8; N], Failure> {
        let answer = self.ask_for(self.timeout, |list| {
            // Clear data from earlier commands, so that it cannot be taken for this one's.
            list.clear(N);
            command.prps(list.address(), 0)
        })?;
        Ok(self.pair.answer(answer.id))
    }

    pub(crate) fn identify(&mut self, cns: u8, nsid: u32) -> Result<[u8; IDENTIFY_LEN], Failure> {
        self.ask_bytes(Command::identify(cns, nsid))
    }

    fn ask_for(&mut self, time: Duration, command: impl FnOnce(List<'_>) -> Command) -> Result<Completion, Failure> {
        if self.life.is_dead() {
            return Err(Failure::Dead);
        }
        if self.is_late {
            return Err(Failure::Late);
        }
        let pushed = self.pair.push(Purpose::Now, |_, list| command(list));
        pushed.expect("the admin queue has room: one command is in flight at a time");
        self.pair.publish();
        let deadline = now() + time;
        loop {
            self.wake.clear();
            self.collect();
            if let Some(answer) = self.answer.take() {
                if !self.events.is_empty() {
                    // Wake the thread that handles events: we consumed its wake-up.
                    self.wake.ring();
                }
                return if answer.status.is_success() { Ok(answer) } else { Err(Failure::Refused(answer.status)) };
            }
            if self.life.is_dead() {
                return Err(Failure::Dead);
            }
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                self.is_late = true;
                // Wake the thread that resets the controller.
                self.wake.ring();
                return Err(Failure::Late);
            }
            // Wait in steps, to notice a dead device, and to work without interrupts if necessary.
            wait([self.wake.as_fd()], Some(left.min(Duration::from_millis(100))));
        }
    }

    /// Handles new completions.
    pub(crate) fn collect(&mut self) {
        loop {
            match self.pair.pop() {
                Ok(Some((Purpose::Now, answer))) => self.answer = Some(answer),
                Ok(Some((Purpose::Event, answer))) if answer.status.is_success() => self.events.push(answer.result),
                // Event requests are not supported, or were aborted with the queue: no events in either case.
                Ok(Some((Purpose::Event, _))) => {}
                Ok(None) => break,
                Err(nonsense) => return self.life.end(&format!("admin queue: {nonsense}")),
            }
        }
        self.pair.acknowledge();
    }

    /// Sends an Asynchronous Event Request.
    pub(crate) fn expect_event(&mut self) {
        let request = Command::new(spec::admin::ASYNC_EVENT_REQUEST, 0);
        self.pair
            .push(Purpose::Event, |_, _| request)
            .expect("the admin queue has room: one event request is in flight");
        self.pair.publish();
    }
}
