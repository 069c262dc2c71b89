//! [`Book`]: the list of connections in the transmission phase.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use super::{client::Client, views::ClientView};
use crate::{peer::Peer, threads::lock};

/// All connections in the transmission phase. Locked when one begins or ends, and while the list is copied.
#[derive(Debug, Default)]
pub(crate) struct Book(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    /// Number of connections so far, which is the id of the next one.
    served: u64,
    clients: BTreeMap<u64, Arc<Client>>,
}

/// The entry of a connection. Dropping it removes the connection from the book.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) client: Arc<Client>,
    book: Arc<Book>,
}

impl Book {
    /// A connection begins.
    pub(crate) fn enter(
        self: &Arc<Self>,
        peer: Peer,
        export: String,
        security: String,
        protocol: &'static str,
    ) -> Entry {
        let mut pages = lock(&self.0);
        pages.served += 1;
        let client = Arc::new(Client::new(pages.served, peer, export, security, protocol));
        pages.clients.insert(client.id, Arc::clone(&client));
        Entry { client, book: Arc::clone(self) }
    }

    pub(crate) fn has(&self, id: u64) -> bool {
        lock(&self.0).clients.contains_key(&id)
    }

    /// The ids of the connections to an export.
    pub(crate) fn ids_of(&self, export: &str) -> Vec<u64> {
        lock(&self.0).clients.values().filter(|client| client.export == export).map(|client| client.id).collect()
    }

    /// All connections, the oldest first, and how many there have been.
    pub(crate) fn view(&self, now: Instant) -> (Vec<ClientView>, u64) {
        let pages = lock(&self.0);
        let (clients, served): (Vec<_>, _) = (pages.clients.values().map(Arc::clone).collect(), pages.served);
        drop(pages);
        (clients.iter().map(|client| client.view(now)).collect(), served)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.book.0).clients.remove(&self.client.id);
    }
}
