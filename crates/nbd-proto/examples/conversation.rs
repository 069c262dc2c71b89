//! A client and a server in memory: the handshake, a WRITE, a READ, a block status, a refused request. Prints what each side gets.
//!
//! ```text
//! cargo run -p nbd-proto --example conversation
//! ```

use nbd_proto::client::{Chunk, Decoder, Encoder, Event as Reply, Negotiation, Step as ClientStep, Wish};
use nbd_proto::wire::{AllocationFlags, BASE_ALLOCATION, CommandKind, TransmissionFlags};
use nbd_proto::{
    BlockSizes, Catalog, Command, Cookie, Event, Export, Extent, Fatal, Handshake, Mode, Offer, Receiver, Refusal,
    Replier, Step, Terms, Write,
};

/// A server with one disk.
struct OneDisk;

impl Catalog for OneDisk {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        each("disk", "64 KiB of memory");
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Export, Refusal> {
        if !matches!(name, "" | "disk") {
            return Err(Refusal::unknown(name));
        }
        Ok(Export {
            name: "disk".into(),
            description: "64 KiB of memory".into(),
            size: 1 << 16,
            flags: TransmissionFlags::SEND_FLUSH.with(TransmissionFlags::SEND_DF),
            block: BlockSizes::default(),
            contexts: vec![BASE_ALLOCATION.into()],
            block_size_required: false,
        })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (terms, agreed) = shake_hands()?;
    println!("agreed on {agreed:?}\n");

    // The client sends four requests at once.
    let encoder = Encoder::new(terms.mode);
    let mut requests = Vec::new();
    encoder.write_head(&mut requests, Cookie(1), 512, 5, false);
    requests.extend_from_slice(b"hello");
    encoder.read(&mut requests, Cookie(2), 510, 9);
    encoder.status(&mut requests, Cookie(3), 0, 1 << 16, false);
    encoder.read(&mut requests, Cookie(4), 1 << 16, 1);
    encoder.disconnect(&mut requests, Cookie(5));

    // They arrive in pieces, as over a socket.
    let (mut receiver, mut disk, mut replies) = (Receiver::new(terms), vec![0; 1 << 16], Vec::new());
    let mut writing = None;
    for mut piece in requests.chunks(35) {
        println!("server gets {} bytes", piece.len());
        serve(terms, &mut receiver, &mut piece, &mut writing, &mut disk, &mut replies)?;
    }

    println!();
    let (mut decoder, mut input) = (Decoder::new(terms.mode), replies.as_slice());
    while let Some(reply) = decoder.next(&mut input)? {
        match reply {
            Reply::Payload(bytes) => println!("client gets data {:?}", String::from_utf8_lossy(bytes)),
            Reply::Chunk { cookie, chunk: Chunk::Error { error, text, .. }, .. } => {
                println!("client gets an error for {}: {error} ({text})", cookie.0);
            }
            other => println!("client gets {other:?}"),
        }
    }
    Ok(())
}

/// Runs both handshakes; each gets the other's output.
fn shake_hands() -> Result<(Terms, nbd_proto::client::Agreement), Box<dyn std::error::Error>> {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let mut server = Handshake::new(Offer::default(), &mut to_client);
    let mut client = Negotiation::new(Wish {
        name: "disk".into(),
        mode: Mode::Extended,
        contexts: vec![BASE_ALLOCATION.into()],
        tls: false,
    });
    let mut terms = None;
    loop {
        println!("server says {} bytes", to_client.len());
        let step = client.next(&mut to_client.as_slice(), &mut to_server)?;
        to_client.clear();
        if let (ClientStep::Done(agreed), Some(terms)) = (step, terms) {
            return Ok((terms, *agreed));
        }
        println!("client says {} bytes", to_server.len());
        if let Step::Done(negotiated) = server.next(&mut to_server.as_slice(), &OneDisk, &mut to_client)? {
            terms = Some(negotiated.terms);
        }
        to_server.clear();
    }
}

/// The server's work. A real server would use a device, and would reply later.
fn serve(
    terms: Terms,
    receiver: &mut Receiver,
    input: &mut &[u8],
    writing: &mut Option<(Cookie, Write)>,
    disk: &mut [u8],
    out: &mut Vec<u8>,
) -> Result<(), Fatal> {
    let replier = Replier::new(terms);
    while let Some(event) = receiver.next(input)? {
        println!("  {event:?}");
        match event {
            Event::Command(cookie, Command::Read { at, len, .. }) => {
                replier.read_head(out, cookie, at, len);
                out.extend_from_slice(&disk[at as usize..][..len as usize]);
            }
            Event::Command(cookie, Command::Status { at, len, contexts, .. }) => {
                let zero = Extent { len, flags: AllocationFlags::ZERO.0 };
                for (i, id) in (1..).zip(contexts.iter()) {
                    replier.status(out, cookie, at, id, [zero], i == contexts.len());
                }
            }
            Event::Command(cookie, command) => replier.done(out, cookie, 0, command.kind()),
            Event::Write(cookie, write) => *writing = Some((cookie, write)),
            Event::Payload(bytes) => {
                let (cookie, write) = writing.expect("a payload belongs to a write");
                let end = write.at as usize + (write.len - receiver.payload_left()) as usize;
                disk[end - bytes.len()..end].copy_from_slice(bytes);
                if receiver.payload_left() == 0 {
                    replier.done(out, cookie, write.at, CommandKind::WRITE);
                }
            }
            Event::Reject(cookie, rejection) => {
                replier.error(out, cookie, rejection.at, rejection.error, rejection.text);
            }
            Event::Disconnect => {}
        }
    }
    Ok(())
}
