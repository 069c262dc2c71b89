//! [`Dma`]: registered memory, as a device sees it.
#![allow(unsafe_code)]

use std::{
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::mem::Mapping;

/// The memory that a driver has registered. A device in a test reads and writes it by I/O address.
///
/// The copies are not atomic. A test must not rely on the order in which another thread sees the bytes of one copy.
#[derive(Debug, Default)]
pub struct Dma(Mutex<Vec<Arc<Mapping>>>);

impl Dma {
    fn mappings(&self) -> MutexGuard<'_, Vec<Arc<Mapping>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device access to `mapping`. No effect if it has access.
    pub fn register(&self, mapping: &Arc<Mapping>) {
        let mut mappings = self.mappings();
        if !mappings.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            mappings.push(Arc::clone(mapping));
        }
    }

    /// Ends the access to `mapping`. No effect if the device has none.
    pub fn unregister(&self, mapping: &Arc<Mapping>) {
        self.mappings().retain(|known| !Arc::ptr_eq(known, mapping));
    }

    /// Ends all access.
    pub fn clear(&self) {
        self.mappings().clear();
    }

    /// Fills `bytes` from an I/O address. `false`: they do not lie in one mapping.
    #[must_use]
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> bool {
        let mappings = self.mappings();
        let Some((mapping, at)) = find(&mappings, iova, bytes.len()) else { return false };
        let from = mapping.as_ptr().wrapping_add(at);
        // SAFETY: `find` checked that the range lies in a mapping, which the lock keeps registered and so mapped. `bytes` is
        // memory of this process that no device knows.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        true
    }

    /// Copies `bytes` to an I/O address. `false`: they do not lie in one mapping.
    #[must_use]
    pub fn write(&self, iova: u64, bytes: &[u8]) -> bool {
        let mappings = self.mappings();
        let Some((mapping, at)) = find(&mappings, iova, bytes.len()) else { return false };
        mapping.touch(at + bytes.len());
        let to = mapping.as_ptr().wrapping_add(at);
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }
}

/// The mapping that `len` bytes lie in, and where they start in it.
fn find(mappings: &[Arc<Mapping>], iova: u64, len: usize) -> Option<(&Mapping, usize)> {
    mappings.iter().find_map(|mapping| {
        let at = usize::try_from(iova.checked_sub(mapping.iova().get())?).ok()?;
        (at <= mapping.len() && len <= mapping.len() - at).then_some((&**mapping, at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reaches_registered_memory_and_no_byte_more() {
        let (dma, memory) = (Dma::default(), Mapping::new(1).unwrap());
        let (start, end) = (memory.iova().get(), memory.iova().get() + memory.len() as u64);
        assert!(!dma.write(start, b"x"), "not registered");
        dma.register(&memory);
        assert!(dma.write(end - 2, b"ab"));
        let mut bytes = [0; 2];
        assert!(dma.read(end - 2, &mut bytes));
        assert_eq!(&bytes, b"ab");
        assert!(!dma.write(end - 1, b"ab") && !dma.write(start - 1, b"ab") && !dma.write(u64::MAX, b"ab"));
        dma.unregister(&memory);
        assert!(!dma.read(start, &mut bytes), "not registered any more");
    }
}
