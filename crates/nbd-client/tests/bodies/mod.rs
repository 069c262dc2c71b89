//! The body of the fuzz target, as a plain function: the fuzzer calls it, and an ordinary test replays the corpus through it.

use nbd_client::Uri;

/// A URI is refused, or has the same meaning when it is written out and parsed again.
pub(crate) fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(uri) = text.parse::<Uri>() else { return };
    assert!(uri.export.len() <= 4096, "a name has a limit");
    let again = uri.to_string();
    let second: Uri = again.parse().unwrap_or_else(|error| panic!("{text:?} is {again:?}: {error}"));
    assert_eq!(second, uri, "{text:?} is {again:?}");
}
