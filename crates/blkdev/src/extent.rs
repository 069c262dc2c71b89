//! What a stretch of the device holds, as answered to [`Op::Status`](crate::Op::Status).

/// A stretch of the device, of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// What an [`Extent`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, and may hold anything. Always a safe answer.
    Data,
    /// Not allocated, and reads as zeroes.
    Hole,
    /// Allocated, and reads as zeroes.
    Zero,
}

/// Appends `extent`, joining it to the last one when they touch and are of one kind.
pub(crate) fn append(extents: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = extents.last_mut()
        && last.kind == extent.kind
        && last.at + last.len == extent.at
    {
        last.len += extent.len;
        return;
    }
    extents.push(extent);
}
