//! The handshake: from a connected socket to the transmission phase.

use nbd_proto::client::{Agreement, Negotiation, Step, Wish};

use crate::{deadline::Deadline, error::Error, options::Options, stream::Stream, target::Target};

/// What the time limit of a handshake is reported under.
pub(crate) const WHAT: &str = "handshake";

/// Bytes that are received at a time: most handshakes fit.
pub(crate) const PIECE: usize = 4096;

/// Negotiates the newest protocol that both sides know, up to the transmission phase.
///
/// # Errors
/// The server breaks the protocol, refuses the export or TLS, closes, or is too slow.
pub(crate) fn negotiate(
    stream: &mut Stream,
    target: &Target,
    options: &Options,
    deadline: Deadline,
) -> Result<Agreement, Error> {
    let wish = Wish {
        name: target.export.clone(),
        mode: options.mode,
        contexts: options.contexts.clone(),
        tls: target.tls.is_some(),
    };
    let mut negotiation = Negotiation::new(wish);
    let (mut piece, mut out) = ([0; PIECE], Vec::new());
    loop {
        let n = stream.receive_by(&mut piece, deadline, WHAT)?;
        let mut input = &piece[..n];
        let step = negotiation.next(&mut input, &mut out)?;
        let agreed = match (step, &target.tls) {
            (Step::More, _) => None,
            (Step::StartTls(upgrade), Some(tls)) => {
                stream.start_tls(tls, &target.host, deadline)?;
                negotiation = upgrade.resume(&mut out);
                None
            }
            (Step::StartTls(_), None) => unreachable!("TLS was not asked for"),
            (Step::Done(_), _) if !input.is_empty() => {
                return Err(Error::Protocol("replies came before the first request".into()));
            }
            (Step::Done(agreed), _) => Some(*agreed),
        };
        stream.send_by(&out, deadline, WHAT)?;
        out.clear();
        if let Some(agreed) = agreed {
            return Ok(agreed);
        }
    }
}
