//! [`Owner`]: the running controller, with its watching thread.

use std::sync::Arc;

use crate::{core::Core, watch::Watch};

/// The running controller. Its drop shuts the controller down.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) core: Arc<Core>,
    pub(crate) watch: Watch,
}

/// The last owner: all queues are closed.
impl Drop for Owner {
    fn drop(&mut self) {
        self.watch.stop();
        self.core.shut_down();
    }
}
