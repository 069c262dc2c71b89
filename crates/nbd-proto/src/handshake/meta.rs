//! LIST_META_CONTEXT and SET_META_CONTEXT.

use super::option::MetaRequest;
use super::reply::Replies;
use super::{Answer, Handshake, Selection};
use crate::limits::CONTEXTS_MAX;
use crate::reader::string;
use crate::terms::{Catalog, Export, Refusal};
use crate::wire::{Mode, Opt, Rep};

impl Handshake {
    /// Lists the contexts that match a query, or all if there is no query. Valid before structured replies too, because the
    /// answer is useful then as well (proto.md: a server MAY refuse).
    pub(super) fn list_contexts(&mut self, data: &[u8], catalog: &dyn Catalog, replies: &mut Replies<'_>) -> Answer {
        let request = MetaRequest::parse(data)?;
        let export = self.export(request.name, Opt::LIST_META_CONTEXT, catalog)?;
        let mut full = false;
        for (_, context) in offered(&export) {
            // A query that ends with a colon (of the namespace, or within the leaf name) matches all contexts with this prefix.
            let matches = |query: &str| context == query || (query.ends_with(':') && context.starts_with(query));
            if request.queries.is_empty() || request.queries.iter().any(|query| matches(query)) {
                full |= !replies.within(self.budget);
                if !full {
                    // The id is reserved here and should be 0.
                    replies.context(0, context);
                }
            }
        }
        self.spend(replies, full)
    }

    /// Selects contexts by their full names. The caller has already cleared the previous selection.
    pub(super) fn set_contexts(&mut self, data: &[u8], catalog: &dyn Catalog, replies: &mut Replies<'_>) -> Answer {
        if self.choices.mode == Mode::Simple {
            return Err(Refusal::new(Rep::ERR_INVALID, "structured replies must be negotiated first"));
        }
        let request = MetaRequest::parse(data)?;
        let export = self.export(request.name, Opt::SET_META_CONTEXT, catalog)?;
        let (mut contexts, mut full) = (Vec::new(), false);
        for (id, context) in offered(&export) {
            if request.queries.contains(&context) {
                full |= !replies.within(self.budget);
                if !full {
                    replies.context(id, context);
                    contexts.push((id, context.to_owned()));
                }
            }
        }
        self.spend(replies, full)?;
        self.choices.selection = Some(Selection { name: request.name.to_owned(), contexts });
        Ok(())
    }
}

/// The contexts that can be negotiated, with their ids.
fn offered(export: &Export) -> impl Iterator<Item = (u32, &str)> {
    let contexts = export.contexts.iter().map(String::as_str);
    (0..).zip(contexts.take(CONTEXTS_MAX)).filter(|(_, context)| string(context.as_bytes()).is_some())
}
