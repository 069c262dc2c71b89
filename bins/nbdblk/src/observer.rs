//! [`Observer`]: access to the running server for the control socket and the metrics.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nbd_server_core::{Observation, Server};

use crate::{
    asker::{Answer, Asker},
    requests::Target,
    sandbox,
    status::report::Report,
};

/// Most status reports that are being sent at a time.
const ANSWERS_MAX: usize = 16;

/// Access to a running server. Does not keep the server alive.
#[derive(Clone, Debug)]
pub(crate) struct Observer {
    server: Weak<Server>,
    begin: Instant,
    answers: Arc<AtomicUsize>,
}

/// A status report that is being sent.
struct Sending(Arc<AtomicUsize>);

impl Sending {
    /// `None`: too many are being sent.
    fn begin(count: &Arc<AtomicUsize>) -> Option<Self> {
        let this = Self(Arc::clone(count));
        (count.fetch_add(1, Ordering::Relaxed) < ANSWERS_MAX).then_some(this)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Observer {
    pub(crate) fn new(server: &Arc<Server>) -> Self {
        Self { server: Arc::downgrade(server), begin: Instant::now(), answers: Arc::default() }
    }

    /// The counters and gauges of the server. `None`: it is stopping.
    pub(crate) fn observe(&self) -> Option<Observation> {
        Some(self.server.upgrade()?.observe())
    }

    /// Time since the server started.
    pub(crate) fn uptime(&self) -> Duration {
        self.begin.elapsed()
    }

    /// The status of the server. `None`: it is stopping.
    pub(crate) fn report(&self) -> Option<Report> {
        self.observe().map(|seen| Report::new(&seen, self.uptime()))
    }

    /// Sends the status on a new thread, because a client may read slowly.
    pub(crate) fn answer(&self, asker: Asker) {
        let Some(sending) = Sending::begin(&self.answers) else {
            return asker.tell(&Err("too many clients ask for the status at the same time: try again".into()));
        };
        let observer = self.clone();
        let answer = move || {
            let _sending = sending;
            asker.tell_all(&observer.status());
        };
        if let Err(error) = sandbox::spawn_service("status", answer) {
            log::warn!("the status cannot be sent: starting a thread: {error}");
        }
    }

    fn status(&self) -> Answer {
        let report = self.report().ok_or("the server is stopping")?;
        serde_json::to_string(&report).map_err(|error| error.to_string())
    }

    /// Disconnects clients.
    pub(crate) fn disconnect(&self, target: &Target) -> Answer {
        let server = self.server.upgrade().ok_or("the server is stopping")?;
        match target {
            Target::Client(id) if server.disconnect(*id) => Ok(format!("disconnected client {id}")),
            Target::Client(id) => Err(format!("there is no client {id}: see nbdblk status --clients")),
            Target::Export(name) => match server.disconnect_all(name) {
                Some(1) => Ok(format!("disconnected 1 client of export {name:?}")),
                Some(count) => Ok(format!("disconnected {count} clients of export {name:?}")),
                None => Err(format!("there is no export {name:?}: see nbdblk status")),
            },
        }
    }
}
