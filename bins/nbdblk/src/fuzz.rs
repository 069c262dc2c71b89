//! The bodies of the fuzz targets, as plain functions: the fuzzer calls them, and an ordinary test replays the corpus through
//! them.

use std::{
    ffi::OsString,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::mpsc,
    time::Instant,
};

use blkdev::fuzz::Script;

use crate::{
    config::File,
    events::Event,
    reload::{REQUEST, REQUEST_MAX, Silent, answer},
};

/// A file: it has exports and valid options, or an error with a place in the file.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = match File::parse(Path::new("f.toml"), text.into()) {
        Ok(file) => file,
        Err(error) => return assert!(error.to_string().starts_with("f.toml:"), "an error names its place: {error}"),
    };
    assert!(!file.exports.is_empty(), "a file has exports");
    let own = ["nbdblk", "serve", "--config", "f.toml"].map(OsString::from);
    if let Err(error) = file.merge(&own) {
        assert!(error.to_string().starts_with("f.toml:"), "an error names its place: {error}");
    }
}

/// A client of the control socket that sends its bytes in pieces. It gets a reload, or one line that says why not.
pub fn control(data: &[u8]) {
    let script = Script::new(data);
    let (ours, mut theirs) = UnixStream::pair().expect("a socket");
    ours.set_nonblocking(true).expect("a socket");
    let (events, received) = mpsc::channel();
    let mut client = Silent { socket: ours, request: Vec::new(), deadline: Instant::now() };
    let mut sent = Vec::new();
    loop {
        if script.is_over() {
            drop(theirs);
            while let Ok(heard) = client.hear() {
                assert!(!heard, "a complete request was noticed before");
            }
            return assert!(received.try_recv().is_err(), "an incomplete request has no effect");
        }
        // Mostly the bytes of a request.
        let piece: Vec<u8> = (0..script.below(9))
            .map(|n| if script.one_in(8) { script.any() } else { *REQUEST.get(sent.len() + n as usize).unwrap_or(&0) })
            .collect();
        theirs.write_all(&piece).expect("the buffer has room");
        sent.extend(piece);
        let is_complete = client.hear().expect("the client is connected");
        let has_line = sent.contains(&b'\n') || sent.len() >= REQUEST_MAX;
        assert_eq!(is_complete, has_line, "a request is complete with its last byte");
        if is_complete {
            break;
        }
    }
    answer(client, &events);
    drop(events);
    if sent.starts_with(REQUEST) {
        let Ok(Event::Reload(Some(asker))) = received.recv() else { panic!("a reload is an event") };
        asker.tell(&Err("line\nline".into()));
    } else if let Ok(event) = received.try_recv() {
        if let Event::Upgrade(_, program) = &event {
            assert!(sent.starts_with(b"upgrade") && program.as_ref().is_none_or(|path| path.is_absolute()));
        }
        event.into_asker().expect("a client waits for the answer").tell(&Err("line\nline".into()));
    }
    assert!(received.recv().is_err(), "there is one event at most");
    let mut text = String::new();
    // Bytes that the server has not read may reset the connection. Its answer comes before.
    let _ = theirs.read_to_string(&mut text);
    let is_line = text.starts_with("error ") && text.ends_with('\n') && text.matches('\n').count() == 1;
    assert!(is_line || sent.len() > REQUEST.len(), "the client gets one line: {text:?}");
}

#[cfg(test)]
mod tests {
    use blkdev::fuzz::replay;

    #[test]
    fn config() {
        replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/config"), 400, super::config);
    }

    #[test]
    fn control() {
        replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/control"), 2000, super::control);
    }
}
