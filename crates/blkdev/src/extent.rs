//! [`Extent`]: the allocation status of a range of the device, for [`Op::Status`](crate::Op::Status).

/// A range of the device with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// The status of the range.
    pub kind: ExtentKind,
}

/// The status of an [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, with any content. Always a safe answer.
    Data,
    /// Not allocated, and reads as zeroes.
    Hole,
    /// Allocated, and reads as zeroes.
    Zero,
}

/// Appends `extent`. Joins it to the last one if they are adjacent and have the same kind.
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
