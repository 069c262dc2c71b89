//! [`Flights`]: the requests in flight, by their cookies.

use nbd_proto::Cookie;

use crate::{
    cover::Cover,
    error::Error,
    request::{Completion, Request, Status},
};

/// A request in flight, and what has come of its reply.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) request: Request,
    /// The payload is being sent, and is not in `request` until that is over.
    pub(crate) is_sending: bool,
    /// The reply is complete. The request is over when its payload is sent too.
    pub(crate) result: Option<Result<(), Error>>,
    /// Chunks have come.
    pub(crate) has_begun: bool,
    /// Parts of a READ that have come.
    pub(crate) cover: Cover,
    /// Chunks with data or holes.
    pub(crate) pieces: u64,
    /// The first error.
    pub(crate) error: Option<Error>,
    /// Chunks with errors.
    pub(crate) errors: u32,
    pub(crate) status: Vec<Status>,
}

/// The requests in flight. A cookie is a slot and how often the slot was used before, so late replies find nothing.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flight: Option<Flight>,
}

impl Flights {
    pub(crate) fn insert(&mut self, request: Request, is_sending: bool) -> Cookie {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("memory ends before so many requests")
        });
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.flight = Some(Flight {
            request,
            is_sending,
            result: None,
            has_begun: false,
            cover: Cover::default(),
            pieces: 0,
            error: None,
            errors: 0,
            status: Vec::new(),
        });
        Cookie(u64::from(slot.generation) << 32 | u64::from(index))
    }

    /// The request of that cookie. Any number may be asked for.
    pub(crate) fn get(&mut self, cookie: Cookie) -> Option<&mut Flight> {
        let index = usize::try_from(cookie.0 & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get_mut(index).filter(|slot| u64::from(slot.generation) == cookie.0 >> 32)?;
        slot.flight.as_mut()
    }

    /// Ends the request of that cookie, which is in flight, if its reply is complete and its payload is sent.
    pub(crate) fn settle(&mut self, cookie: Cookie, done: &mut Vec<Completion>) {
        let flight = self.get(cookie).expect("the request is in flight");
        if flight.is_sending || flight.result.is_none() {
            return;
        }
        let index = (cookie.0 & u64::from(u32::MAX)) as u32;
        let flight = self.slots[index as usize].flight.take().expect("it was just there");
        self.free.push(index);
        let result = flight.result.expect("it was just there");
        let status = if result.is_ok() { flight.status } else { Vec::new() };
        done.push(Completion { cookie, request: flight.request, status, result });
    }

    /// Requests in flight.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Ends all requests, since no reply will come any more. One that has its reply keeps that.
    pub(crate) fn abandon(&mut self, done: &mut Vec<Completion>) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let Some(flight) = &mut slot.flight else { continue };
            flight.is_sending = false;
            flight.result.get_or_insert(Err(Error::Closed));
            self.settle(Cookie(u64::from(self.slots[index].generation) << 32 | index as u64), done);
        }
    }
}
