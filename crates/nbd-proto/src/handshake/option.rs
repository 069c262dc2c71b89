//! Parses the data of INFO, GO and the context options strictly: every length inside must fit, and no bytes may be left over.

use crate::limits::NAME_MAX;
use crate::reader::{Reader, string};
use crate::terms::Refusal;
use crate::wire::{InfoKind, Rep};

/// The data of INFO and GO.
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    /// The requested kinds, as on the wire: two bytes each, including unknown ones.
    kinds: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Refusal> {
        let mut reader = Reader::new(data);
        let parsed = (|| {
            let name = reader.counted()?;
            let count = reader.u16()?;
            let kinds = reader.bytes(usize::from(count) * 2)?;
            reader.end()?;
            Some((name, kinds))
        })();
        let (name, kinds) = parsed.ok_or_else(|| invalid("the lengths inside do not fit the option"))?;
        Ok(Self { name: name_of(name)?, kinds })
    }

    pub(super) fn asks(&self, kind: InfoKind) -> bool {
        self.kinds.chunks_exact(2).any(|wanted| wanted == kind.0.to_be_bytes())
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) struct MetaRequest<'a> {
    pub(super) name: &'a str,
    pub(super) queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Refusal> {
        let mut reader = Reader::new(data);
        let parsed = (|| {
            let name = reader.counted()?;
            let count = reader.u32()?;
            // Do not trust the count for an allocation. Each query takes at least four bytes, so the loop ends with the data.
            let mut queries = Vec::new();
            for _ in 0..count {
                queries.push(reader.counted()?);
            }
            reader.end()?;
            Some((name, queries))
        })();
        let (name, queries) = parsed.ok_or_else(|| invalid("the lengths inside do not fit the option"))?;
        Ok(Self { name: name_of(name)?, queries: queries.into_iter().map(query_of).collect::<Result<_, _>>()? })
    }
}

fn name_of(bytes: &[u8]) -> Result<&str, Refusal> {
    string(bytes).ok_or_else(|| {
        invalid(format!("the export name, of {} bytes, is not UTF-8 without NUL of at most {NAME_MAX}", bytes.len()))
    })
}

fn query_of(bytes: &[u8]) -> Result<&str, Refusal> {
    string(bytes).filter(|query| query.contains(':')).ok_or_else(|| {
        invalid(format!("a context query, of {} bytes, is not a namespace, a colon and a name", bytes.len()))
    })
}

fn invalid(text: impl Into<String>) -> Refusal {
    Refusal::new(Rep::ERR_INVALID, text)
}
