//! [`DecayingMax`]: an exponentially decaying maximum.

/// The largest of the counted numbers. Each count first reduces the value by a 1024th.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub(crate) struct DecayingMax(u32);

impl DecayingMax {
    /// The value after one count of `n`.
    pub(crate) const fn of(n: u32) -> Self {
        Self(if n < 1 << 22 { n << 10 } else { u32::MAX })
    }

    /// Counts `n`.
    #[inline]
    pub(crate) fn count(&mut self, n: u32) {
        self.0 = Self::of(n).0.max(self.0 - (self.0 >> 10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fades() {
        let mut recent = DecayingMax::default();
        recent.count(8);
        assert_eq!(recent, DecayingMax::of(8));
        recent.count(1);
        assert!(DecayingMax::of(7) < recent && recent < DecayingMax::of(8));
        (0..10_000).for_each(|_| recent.count(1));
        assert_eq!(recent, DecayingMax::of(1));
        recent.count(u32::MAX);
        assert!(recent > DecayingMax::of((1 << 22) - 1));
    }
}
