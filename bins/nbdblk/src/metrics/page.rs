//! The page for people. It is one file without outside resources; its script draws what /status.json returns.

use std::{fs::File, io::Read};

use super::http::Response;

/// The page. `{nonce}` is replaced in each response.
const PAGE: &str = include_str!("page.html");

pub(super) fn page() -> Response {
    let nonce = nonce();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = Response::new("200 OK", "text/html; charset=utf-8", PAGE.replace("{nonce}", &nonce));
    response.fields = format!("Content-Security-Policy: {policy}\r\nReferrer-Policy: no-referrer\r\n");
    response
}

/// A number that nobody can guess. Without one, the browser runs no script.
fn nonce() -> String {
    let mut bytes = [0; 16];
    match File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        Err(_) => String::new(),
    }
}
