//! [`Reader`]: parses a slice of bytes. Every method returns `None` instead of reading past the end.

use crate::limits::{HEADER_MAX, NAME_MAX};

/// The unread rest of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    /// Reads a 32-bit length, and so many bytes.
    pub(crate) fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.bytes(len)
    }

    /// All unread bytes.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Returns `Some` if nothing is left: the message has exactly the length of its parts.
    pub(crate) fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// Joins headers and fields that arrive in pieces. It keeps at most [`HEADER_MAX`] bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joint {
    have: usize,
    raw: [u8; HEADER_MAX],
}

impl Joint {
    /// Returns `N` bytes: directly from `input` if it has them all, or gathered over several calls with the same `N`.
    #[inline]
    pub(crate) fn take<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        match input.split_first_chunk::<N>() {
            Some((whole, rest)) if self.have == 0 => {
                *input = rest;
                Some(*whole)
            }
            _ => self.gather(input),
        }
    }

    /// Whether it keeps no bytes.
    pub(crate) fn is_empty(&self) -> bool {
        self.have == 0
    }

    /// The bytes that it keeps.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.raw[..self.have]
    }

    #[cold]
    fn gather<const N: usize>(&mut self, input: &mut &[u8]) -> Option<[u8; N]> {
        const { assert!(N <= HEADER_MAX) };
        let piece = take_up_to(input, N - self.have);
        self.raw[self.have..self.have + piece.len()].copy_from_slice(piece);
        self.have += piece.len();
        if self.have < N {
            return None;
        }
        self.have = 0;
        self.raw.first_chunk().copied()
    }
}

/// Returns `N` bytes of a header from `at` on. The caller knows that they exist.
#[inline]
pub(crate) fn part<const N: usize>(raw: &[u8], at: usize) -> [u8; N] {
    *raw[at..].first_chunk().expect("the header is long enough")
}

/// Takes up to `len` bytes off the front of `input`.
#[inline]
pub(crate) fn take_up_to<'a>(input: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, rest) = input.split_at(len.min(input.len()));
    *input = rest;
    head
}

/// Returns a string of the protocol: UTF-8, at most [`NAME_MAX`] bytes, no NUL.
pub(crate) fn string(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (text.len() <= NAME_MAX && !text.contains('\0')).then_some(text)
}

/// Returns the longest prefix of `text` that fits a string of the protocol. Texts from outside the codec can be longer.
pub(crate) fn cut(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let end = (0..=NAME_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or_default()]
}
