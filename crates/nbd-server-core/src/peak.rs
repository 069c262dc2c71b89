//! [`Peak`]: the largest number of late.

/// The largest of the numbers that were counted, of which each takes a 1024th off what was there before.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub(crate) struct Peak(u32);

impl Peak {
    /// As after one number.
    pub(crate) const fn of(n: u32) -> Self {
        Self(if n < 1 << 22 { n << 10 } else { u32::MAX })
    }

    /// Counts one more.
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
        let mut peak = Peak::default();
        peak.count(8);
        assert_eq!(peak, Peak::of(8));
        peak.count(1);
        assert!(Peak::of(7) < peak && peak < Peak::of(8));
        (0..10_000).for_each(|_| peak.count(1));
        assert_eq!(peak, Peak::of(1));
        peak.count(u32::MAX);
        assert!(peak > Peak::of((1 << 22) - 1));
    }
}
