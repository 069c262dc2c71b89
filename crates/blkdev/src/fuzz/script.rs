//! [`Script`]: bytes as a sequence of decisions.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::{Arbitrary, Unstructured};

/// Numbers at which programs go wrong: limits of types, and powers of two with their neighbours.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    255,
    511,
    512,
    4095,
    4096,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Decisions from the bytes of a fuzzer. All clones draw from the same bytes. After the last byte every number is 0, so 0 should
/// mean the usual case.
#[derive(Clone, Debug)]
pub struct Script(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    at: usize,
}

impl Script {
    /// A script that draws from these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new(State { bytes: bytes.to_vec(), at: 0 })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw<T: Default>(&self, act: impl FnOnce(&mut Unstructured<'_>) -> arbitrary::Result<T>) -> T {
        let mut state = self.state();
        let mut rest = Unstructured::new(&state.bytes[state.at..]);
        let drawn = act(&mut rest).unwrap_or_default();
        state.at = state.bytes.len() - rest.len();
        drawn
    }

    /// Whether all bytes are used.
    pub fn is_over(&self) -> bool {
        let state = self.state();
        state.at == state.bytes.len()
    }

    /// A number of any size.
    pub fn any<T: Default + for<'a> Arbitrary<'a>>(&self) -> T {
        self.draw(|rest| rest.arbitrary())
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&self, end: u64) -> u64 {
        match end {
            0 | 1 => 0,
            _ => self.draw(|rest| rest.int_in_range(0..=end - 1)),
        }
    }

    /// `true` once in `n` times. Never after the last byte.
    pub fn one_in(&self, n: u8) -> bool {
        self.below(n.into()) + 1 == n.into()
    }

    /// A number that is often one at which programs go wrong.
    pub fn number(&self) -> u64 {
        let kind: u8 = self.any();
        match usize::from(kind) {
            n if n < EDGES.len() => EDGES[n],
            n if n < 64 => 1 << n,
            n if n < 128 => n as u64 - 64,
            n if n < 192 => self.any::<u16>().into(),
            _ => self.any(),
        }
    }

    /// One of the elements.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<'a, T>(&self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_draws_each_byte_once_and_then_zeroes() {
        let script = Script::new(&[5, 0xff, 0xff, 3]);
        let twin = script.clone();
        assert_eq!((script.below(4), twin.any::<u16>(), script.is_over()), (1, 0xffff, false));
        assert_eq!((script.below(4), script.is_over()), (3, true));
        assert_eq!((twin.below(9), twin.number(), twin.any::<u64>(), twin.one_in(2)), (0, 0, 0, false));
    }
}
