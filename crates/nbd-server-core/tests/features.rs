//! The types of TLS are the same whatever the features, so callers need no `cfg`.

use std::{
    io::{self, ErrorKind},
    path::Path,
};

use nbd_server_core::tls::{Certificates, Tls};

#[test]
fn a_missing_feature_is_an_error_that_names_it() {
    let check = |tls: io::Result<Tls>, is_built, feature: &str| {
        let error = tls.map(|tls| tls.required(true)).expect_err("there are no such files");
        assert_eq!(error.kind() != ErrorKind::Unsupported, is_built, "{error}");
        assert!(is_built || error.to_string().ends_with(feature), "{error}");
    };
    let files = Certificates::within(Path::new("/nonexistent"), true);
    check(Tls::with_certificates(&files), cfg!(feature = "tls"), " tls");
    check(Tls::with_keys(Path::new("/nonexistent/keys.psk")), cfg!(feature = "tls-psk"), " tls-psk");
}
