//! The status page for browsers. It is one file without outside resources; its script draws what /status.json returns.

use rustix::rand::{GetRandomFlags, getrandom};

/// The page. `{nonce}` is replaced in each response.
const PAGE: &str = include_str!("page.html");

/// The page, and the header fields that restrict it.
pub(super) fn page() -> (String, String) {
    let nonce = nonce();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let fields = format!("Content-Security-Policy: {policy}\r\nReferrer-Policy: no-referrer\r\n");
    (PAGE.replace("{nonce}", &nonce), fields)
}

/// A number that cannot be guessed. Without one, the browser runs no script.
fn nonce() -> String {
    let mut bytes = [0; 16];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(16) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        _ => String::new(),
    }
}
