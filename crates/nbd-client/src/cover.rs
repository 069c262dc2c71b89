//! [`Cover`]: which parts of a READ have come.

/// Parts that do not touch each other, at most. Servers answer in order, or nearly so; one that does not could fill the
/// client's memory with the list of parts.
const PARTS_MAX: usize = 4096;

/// Parts of a range, in any order but never twice.
#[derive(Debug, Default)]
pub(crate) struct Cover {
    /// Start and end of each part; sorted, merged where they touch.
    parts: Vec<(u64, u64)>,
}

impl Cover {
    /// Adds `start..end`, which is not empty.
    ///
    /// # Errors
    /// It overlaps another part, or there are too many parts.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> Result<(), &'static str> {
        let next = self.parts.partition_point(|part| part.1 <= start);
        if self.parts.get(next).is_some_and(|part| part.0 < end) {
            return Err("overlaps another chunk");
        }
        let touches_left = next > 0 && self.parts[next - 1].1 == start;
        let touches_right = self.parts.get(next).is_some_and(|part| part.0 == end);
        match (touches_left, touches_right) {
            (true, true) => {
                self.parts[next - 1].1 = self.parts[next].1;
                self.parts.remove(next);
            }
            (true, false) => self.parts[next - 1].1 = end,
            (false, true) => self.parts[next].0 = start,
            (false, false) if self.parts.len() == PARTS_MAX => return Err("is one of too many pieces out of order"),
            (false, false) => self.parts.insert(next, (start, end)),
        }
        Ok(())
    }

    /// Whether all of `start..end` has come.
    pub(crate) fn is_whole(&self, start: u64, end: u64) -> bool {
        self.parts == [(start, end)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_any_order_are_one() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [2, 0, 3, 1], [1, 3, 2, 0]] {
            let mut cover = Cover::default();
            for (n, part) in order.iter().enumerate() {
                assert!(!cover.is_whole(0, 40), "{order:?}: part {n} is missing");
                cover.add(part * 10, part * 10 + 10).unwrap();
                assert!(cover.add(part * 10, part * 10 + 10).is_err());
            }
            assert!(cover.is_whole(0, 40), "{order:?}");
        }
    }

    #[test]
    fn a_part_is_never_there_twice() {
        let with = |start, end| {
            let mut cover = Cover::default();
            cover.add(10, 20).unwrap();
            cover.add(30, 40).unwrap();
            cover.add(start, end)
        };
        for (start, end) in [(9, 11), (19, 21), (10, 20), (12, 13), (0, 50), (15, 35), (25, 31), (39, 50)] {
            assert_eq!(with(start, end), Err("overlaps another chunk"), "{start}..{end}");
        }
        for (start, end) in [(0, 10), (20, 30), (40, 50), (0, 9), (21, 29)] {
            assert_eq!(with(start, end), Ok(()), "{start}..{end}");
        }
    }

    #[test]
    fn the_list_is_bounded() {
        let mut cover = Cover::default();
        for n in 0..PARTS_MAX as u64 {
            cover.add(2 * n, 2 * n + 1).unwrap();
        }
        assert!(cover.add(1 << 40, (1 << 40) + 1).is_err());
        assert!(cover.add(1, 2).is_ok(), "what fills a gap makes the list shorter");
    }
}
