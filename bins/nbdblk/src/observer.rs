//! [`Observer`]: what other threads may ask the running server.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use nbd_server_core::{Observation, Server};

use crate::{
    asker::{Answer, Asker},
    requests::Target,
    status::report::Report,
};

/// Most answers that are being sent at a time.
const ANSWERS_MAX: usize = 16;

/// A running server, for those who look at it. Does not keep the server alive.
#[derive(Clone, Debug)]
pub(crate) struct Observer {
    server: Weak<Server>,
    begin: Instant,
    answers: Arc<AtomicUsize>,
}

impl Observer {
    pub(crate) fn new(server: &Arc<Server>) -> Self {
        Self { server: Arc::downgrade(server), begin: Instant::now(), answers: Arc::default() }
    }

    /// What the server does; `None`: it is stopping.
    pub(crate) fn look(&self) -> Option<(Observation, Report)> {
        let seen = self.server.upgrade()?.observe();
        let report = Report::new(&seen, self.begin.elapsed());
        Some((seen, report))
    }

    /// Answers in a thread, because a client may read slowly.
    pub(crate) fn answer(&self, asker: Asker) {
        if self.answers.fetch_add(1, Ordering::Relaxed) >= ANSWERS_MAX {
            self.answers.fetch_sub(1, Ordering::Relaxed);
            return asker.tell(&Err("too many ask at the same time: try again".into()));
        }
        let (observer, answers) = (self.clone(), Arc::clone(&self.answers));
        let answer = move || {
            asker.tell_all(&observer.status());
            answers.fetch_sub(1, Ordering::Relaxed);
        };
        if thread::Builder::new().name("status".into()).spawn(answer).is_err() {
            self.answers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn status(&self) -> Answer {
        let (_, report) = self.look().ok_or("the server is stopping")?;
        serde_json::to_string(&report).map_err(|error| error.to_string())
    }

    /// Ends clients.
    pub(crate) fn disconnect(&self, target: &Target) -> Answer {
        let server = self.server.upgrade().ok_or("the server is stopping")?;
        match target {
            Target::Client(id) if server.disconnect(*id) => Ok(format!("disconnected client {id}")),
            Target::Client(id) => Err(format!("there is no client {id}: see nbdblk status --clients")),
            Target::Export(name) if !server.exports().iter().any(|export| export.name == *name) => {
                Err(format!("there is no export {name:?}: see nbdblk status"))
            }
            Target::Export(name) => {
                let count = server.disconnect_all(name);
                let noun = if count == 1 { "client" } else { "clients" };
                Ok(format!("disconnected {count} {noun} of export {name:?}"))
            }
        }
    }
}
