//! [`Owner`]: the controller, brought up, with the thread that watches it.

use std::sync::Arc;

use crate::{core::Core, watch::Watch};

/// The controller, brought up. Dropped last of all, it shuts it down.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) core: Arc<Core>,
    pub(crate) watch: Watch,
}

/// The queues are closed: what holds this last.
impl Drop for Owner {
    fn drop(&mut self) {
        self.watch.stop();
        self.core.shut_down();
    }
}
