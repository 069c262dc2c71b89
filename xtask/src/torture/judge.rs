//! [`Judge`]: which waits and errors of a client a fault explains. All others are failures.

use super::clock::{Millis, overlap};
use super::report::Wait;

/// Longest wait of a healthy client beyond the time of its device.
const LIMIT: Millis = 2_000;
/// Time after a fault in which its effects may still be seen.
const GRACE: Millis = 2_000;
/// The machine has lost so much time that time limits inside of the server may have passed.
const STALLED: Millis = 1_000;
/// Time for which faults are kept. No wait is longer.
const KEPT: Millis = 300_000;

/// Who is affected by a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    All,
    Export(&'static str),
    Region(u32),
}

/// The errors that a fault explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errors {
    None,
    NoSpace,
    Any,
}

#[derive(Debug)]
struct Window {
    id: u64,
    scope: Scope,
    errors: Errors,
    from: Millis,
    /// `None`: it goes on.
    until: Option<Millis>,
}

impl Window {
    fn span(&self) -> (Millis, Millis) {
        (self.from, self.until.map_or(Millis::MAX, |until| until + GRACE))
    }
}

/// A client, as far as faults concern it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client<'a> {
    pub(crate) export: &'a str,
    pub(crate) region: u32,
    /// Its device is slow by design: only errors count.
    pub(crate) is_slow: bool,
}

/// The faults so far.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    windows: Vec<Window>,
    ids: u64,
    /// The longest wait that no fault explains, and what it was.
    pub(crate) longest: (Millis, String),
}

impl Judge {
    /// A fault begins. Call it before the fault has any effect.
    pub(crate) fn open(&mut self, scope: Scope, errors: Errors, now: Millis) -> u64 {
        self.windows.retain(|window| window.until.is_none_or(|until| until + KEPT > now));
        self.ids += 1;
        self.windows.push(Window { id: self.ids, scope, errors, from: now, until: None });
        self.ids
    }

    /// A fault is over. Call it after everything works again.
    pub(crate) fn close(&mut self, id: u64, now: Millis) {
        self.windows.iter_mut().filter(|window| window.id == id).for_each(|window| window.until = Some(now));
    }

    fn windows<'a>(&'a self, client: &'a Client<'_>) -> impl Iterator<Item = &'a Window> {
        self.windows.iter().filter(|window| match &window.scope {
            Scope::All => true,
            Scope::Export(name) => *name == client.export,
            Scope::Region(region) => *region == client.region,
        })
    }

    /// Judges a wait. `lost`: the time that the machine has lost meanwhile.
    ///
    /// # Errors
    /// It was too long.
    pub(crate) fn wait(&mut self, client: Client<'_>, wait: &Wait, lost: Millis) -> Result<(), String> {
        if client.is_slow {
            return Ok(());
        }
        let span = (wait.from, wait.until);
        let mut faults: Vec<_> = self.windows(&client).map(Window::span).collect();
        faults.sort_unstable();
        let (mut explained, mut reached) = (0, 0);
        for (from, until) in faults {
            explained += overlap((from.max(reached), until), span);
            reached = reached.max(until);
        }
        let rest = (wait.until - wait.from).saturating_sub(explained + wait.own + lost);
        if rest > self.longest.0 {
            self.longest = (rest, format!("{}, export {:?}, region {}", wait.what, client.export, client.region));
        }
        if rest <= LIMIT {
            return Ok(());
        }
        Err(format!(
            "{} took {} ms, of which faults explain {explained} ms and the machine {lost} ms",
            wait.what,
            wait.until - wait.from
        ))
    }

    /// Judges an error at the end of a wait.
    ///
    /// # Errors
    /// No fault explains it.
    pub(crate) fn error(
        &self,
        client: Client<'_>,
        wait: &Wait,
        error: &str,
        no_space: bool,
        lost: Millis,
    ) -> Result<(), String> {
        // One millisecond longer, so that an instant is also within a fault.
        let span = (wait.from, wait.until + 1);
        let explains = |window: &Window| match window.errors {
            Errors::None => false,
            Errors::NoSpace => no_space,
            Errors::Any => true,
        };
        let is_explained = self.windows(&client).any(|window| explains(window) && overlap(window.span(), span) > 0);
        if is_explained || lost > STALLED {
            return Ok(());
        }
        Err(format!("{} failed after {} ms, and no fault explains it: {error}", wait.what, wait.until - wait.from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: Client<'_> = Client { export: "raw", region: 3, is_slow: false };

    fn wait(from: Millis, until: Millis) -> Wait {
        Wait { what: "READ".into(), from, until, own: 0 }
    }

    #[test]
    fn only_faults_of_the_client_explain_a_wait() {
        let mut judge = Judge::default();
        judge.wait(CLIENT, &wait(0, 2_000), 0).unwrap();
        judge.wait(CLIENT, &wait(0, 2_001), 0).unwrap_err();
        judge.wait(CLIENT, &wait(0, 2_500), 500).unwrap();
        let id = judge.open(Scope::Export("file"), Errors::Any, 0);
        judge.wait(CLIENT, &wait(0, 2_001), 0).unwrap_err();
        judge.close(id, 10_000);
        // Two faults at the same time explain that time once.
        for (scope, from, until) in [(Scope::Export("raw"), 1_000, 2_000), (Scope::Region(3), 1_500, 3_000)] {
            let id = judge.open(scope, Errors::None, from);
            judge.close(id, until);
        }
        judge.wait(CLIENT, &wait(0, 6_000), 0).unwrap();
        let text = judge.wait(CLIENT, &wait(0, 6_001), 0).unwrap_err();
        assert!(text.contains("6001 ms, of which faults explain 4000 ms"), "{text}");
    }

    #[test]
    fn only_faults_that_may_fail_explain_an_error() {
        let mut judge = Judge::default();
        judge.error(CLIENT, &wait(5, 5), "EIO", false, 0).unwrap_err();
        judge.open(Scope::Export("raw"), Errors::None, 0);
        judge.error(CLIENT, &wait(5, 5), "EIO", false, 0).unwrap_err();
        judge.open(Scope::Export("raw"), Errors::NoSpace, 0);
        judge.error(CLIENT, &wait(5, 5), "EIO", false, 0).unwrap_err();
        judge.error(CLIENT, &wait(5, 5), "ENOSPC", true, 0).unwrap();
        let id = judge.open(Scope::All, Errors::Any, 10);
        judge.close(id, 20);
        judge.error(CLIENT, &wait(5, 5), "EIO", false, 0).unwrap_err();
        judge.error(CLIENT, &wait(5, 10), "EIO", false, 0).unwrap();
        judge.error(CLIENT, &wait(20 + GRACE - 1, 90_000), "EIO", false, 0).unwrap();
        judge.error(CLIENT, &wait(20 + GRACE, 90_000), "EIO", false, 0).unwrap_err();
    }
}
