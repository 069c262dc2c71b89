//! [`Spares`]: values of earlier runs of a fuzz target for reuse, because making new ones takes longer than most runs.

use std::{io, sync::Arc};

/// Most values that are kept.
const COUNT: usize = 16;

/// Values that are kept for reuse.
#[derive(Debug)]
pub(crate) struct Spares<T>(Vec<Arc<T>>);

impl<T> Spares<T> {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// One that is not in use and that `fits`, after `renew`; otherwise a new one.
    pub(crate) fn get(
        &mut self,
        fits: impl Fn(&T) -> bool,
        renew: impl FnOnce(&T),
        make: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Arc<T>> {
        let found = self.0.iter().position(|spare| Arc::strong_count(spare) == 1 && fits(spare));
        let spare = match found {
            Some(at) => {
                let spare = self.0.remove(at);
                renew(&spare);
                spare
            }
            None => Arc::new(make()?),
        };
        // The first was not needed for longest.
        if self.0.len() == COUNT {
            self.0.remove(0);
        }
        self.0.push(Arc::clone(&spare));
        Ok(spare)
    }
}
