//! [`Admin`]: the admin queue pair, one command at a time, and the events that come through it.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

use crate::{
    liveness::Liveness,
    pair::Pair,
    spec::{self, Command, Completion, IDENTIFY_LEN, Status},
};

/// Places in the admin queue: a command, an event request, and what comes late.
pub(crate) const SIZE: u16 = 16;

/// The admin queue, which one thread uses at a time.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) pair: Pair<Asked>,
    pub(crate) wake: Arc<EventFd>,
    pub(crate) life: Arc<Liveness>,
    pub(crate) timeout: Duration,
    /// The answer to the command that is being waited for.
    answer: Option<Completion>,
    /// Events that came and were not dealt with yet: word 0 of their completions.
    pub(crate) events: Vec<u32>,
    /// A command was not answered in time. Nothing is asked any more until the controller has been reset.
    pub(crate) is_late: bool,
}

/// What a command was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Somebody waits for it.
    Now,
    /// The controller answers when something happens.
    Event,
}

/// How a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The controller refused it.
    Refused(Status),
    /// It was not answered in time, or an earlier one was not.
    Late,
    /// There is nobody to ask any more.
    Dead,
}

impl Failure {
    pub(crate) fn explain(&self, what: &str) -> io::Error {
        match self {
            Self::Refused(status) => {
                let kind = status.result().err().map_or(io::ErrorKind::Other, |e| io::Error::from(e).kind());
                io::Error::new(kind, format!("{what}: {status}"))
            }
            Self::Late => io::Error::new(io::ErrorKind::TimedOut, format!("{what}: the controller does not answer")),
            Self::Dead => io::Error::new(io::ErrorKind::NotConnected, format!("{what}: the device is gone")),
        }
    }
}

impl Admin {
    pub(crate) fn new(pair: Pair<Asked>, wake: Arc<EventFd>, life: Arc<Liveness>, timeout: Duration) -> Self {
        Self { pair, wake, life, timeout, answer: None, events: Vec::new(), is_late: false }
    }

    /// Begins anew, as a controller that was reset does.
    pub(crate) fn restart(&mut self) {
        self.pair.restart(0);
        (self.answer, self.is_late) = (None, false);
        self.events.clear();
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn ask(&mut self, command: Command) -> Result<Completion, Failure> {
        self.ask_for(self.timeout, |_| command)
    }

    /// As [`ask`](Self::ask), for less time.
    pub(crate) fn ask_within(&mut self, time: Duration, command: Command) -> Result<Completion, Failure> {
        self.ask_for(time, |_| command)
    }

    /// As [`ask`](Self::ask), for a command with an answer of `N` bytes at most, in one memory page.
    pub(crate) fn ask_bytes<const N: usize>(&mut self, command: Command) -> Result<[u8; N], Failure> {
        let answer = self.ask_for(self.timeout, |address| command.prps(address, 0))?;
        Ok(self.pair.answer(answer.id))
    }

    pub(crate) fn identify(&mut self, cns: u8, nsid: u32) -> Result<[u8; IDENTIFY_LEN], Failure> {
        self.ask_bytes(Command::identify(cns, nsid))
    }

    fn ask_for(&mut self, time: Duration, command: impl FnOnce(u64) -> Command) -> Result<Completion, Failure> {
        if self.life.is_dead() {
            return Err(Failure::Dead);
        }
        if self.is_late {
            return Err(Failure::Late);
        }
        let pushed = self.pair.push(Asked::Now, |_, list| {
            // What an earlier command got here is not an answer to this one.
            for word in 0..IDENTIFY_LEN / 8 {
                list.put(word, 0);
            }
            command(list.address())
        });
        pushed.expect("the admin queue has room: one command is asked at a time");
        self.pair.publish();
        let deadline = Instant::now() + time;
        loop {
            let _ = self.wake.read();
            self.collect();
            if let Some(answer) = self.answer.take() {
                if !self.events.is_empty() {
                    // For the thread that deals with them: we have taken its wake-up.
                    let _ = self.wake.write(1);
                }
                return if answer.status.is_success() { Ok(answer) } else { Err(Failure::Refused(answer.status)) };
            }
            if self.life.is_dead() {
                return Err(Failure::Dead);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.is_late = true;
                // For the thread that resets the controller.
                let _ = self.wake.write(1);
                return Err(Failure::Late);
            }
            // In steps, to see in time that the device has died, and to do without an interrupt if need be.
            wait(&self.wake, left.min(Duration::from_millis(100)));
        }
    }

    /// Takes in what the controller has answered.
    pub(crate) fn collect(&mut self) {
        loop {
            match self.pair.pop() {
                Ok(Some((Asked::Now, answer))) => self.answer = Some(answer),
                Ok(Some((Asked::Event, answer))) if answer.status.is_success() => self.events.push(answer.result),
                // Not supported, or withdrawn with the queue: no events then.
                Ok(Some((Asked::Event, _))) => {}
                Ok(None) => break,
                Err(nonsense) => return self.life.end(&format!("admin queue: {nonsense}")),
            }
        }
        self.pair.acknowledge();
    }

    /// Asks to be told of the next event.
    pub(crate) fn expect_event(&mut self) {
        let request = Command::new(spec::admin::ASYNC_EVENT_REQUEST, 0);
        self.pair.push(Asked::Event, |_, _| request).expect("the admin queue has room: one event is waited for");
        self.pair.publish();
    }
}

/// Waits until `fd` is readable, for a time. `false`: it is not.
pub(crate) fn wait(fd: &EventFd, time: Duration) -> bool {
    // Rounded up: a wait of 0 ms just before the end would spin.
    let timeout = PollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(count) => count > 0,
        // The caller looks at the clock again.
        Err(Errno::EINTR) => false,
        Err(_) => false,
    }
}
