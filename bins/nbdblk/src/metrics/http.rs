//! One HTTP request of a connection, and its response.

use super::{page, prometheus};
use crate::{
    observer::Observer,
    status::report::{DeviceState, Report},
};

/// Longest head of a request, in bytes, and most header fields.
const HEAD_MAX: usize = 8192;
const FIELDS_MAX: usize = 64;

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC_METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The response to a request; `None`: it is not complete yet.
pub(super) fn respond(request: &[u8], observer: &Observer) -> Option<Vec<u8>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Request::new(&mut fields);
    match head.parse(request) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if request.len() <= HEAD_MAX => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Some(
                Response::text("431 Request Header Fields Too Large", "the request is too long\n").bytes(true),
            );
        }
        Err(error) => return Some(Response::text("400 Bad Request", format!("{error}\n")).bytes(true)),
    }
    let (method, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    let response = match method {
        "GET" | "HEAD" => get(target.split('?').next().unwrap_or_default(), head.headers, observer),
        _ => Response {
            fields: "Allow: GET, HEAD\r\n".into(),
            ..Response::text("405 Method Not Allowed", "read only\n")
        },
    };
    Some(response.bytes(method != "HEAD"))
}

fn get(path: &str, fields: &[httparse::Header<'_>], observer: &Observer) -> Response {
    let found = match path {
        "/" => {
            let (page, fields) = page::page();
            Some(Response { fields, ..Response::new("200 OK", HTML, page) })
        }
        "/metrics" => observer.observe().map(|seen| match prometheus::encode(seen, observer.uptime()) {
            Ok(text) if accepts_open_metrics(fields) => Response::new("200 OK", OPEN_METRICS, text),
            Ok(text) => Response::new("200 OK", CLASSIC_METRICS, prometheus::classic(&text)),
            Err(error) => Response::text("500 Internal Server Error", format!("{error}\n")),
        }),
        "/healthz" => observer.report().map(|report| health(&report)),
        "/status.json" => observer.report().map(|report| match serde_json::to_string(&report) {
            Ok(text) => Response::new("200 OK", JSON, text),
            Err(error) => Response::text("500 Internal Server Error", format!("{error}\n")),
        }),
        _ => Some(Response::text("404 Not Found", "there are /, /metrics, /healthz and /status.json\n")),
    };
    found.unwrap_or_else(|| Response::text("503 Service Unavailable", "the server is stopping\n"))
}

/// Whether the client accepts OpenMetrics. All clients understand the classic format.
fn accepts_open_metrics(fields: &[httparse::Header<'_>]) -> bool {
    let accepted = fields.iter().filter(|field| field.name.eq_ignore_ascii_case("Accept"));
    let ranges = accepted.filter_map(|field| str::from_utf8(field.value).ok()).flat_map(|value| value.split(','));
    ranges.map(|range| range.split(';').map(str::trim)).any(|mut parts| {
        let is_open = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"));
        // A weight of 0 excludes a format.
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
        is_open && weight.unwrap_or(1.0) > 0.0
    })
}

/// The health check: status 200 if all devices work and all threads live.
fn health(report: &Report) -> Response {
    let devices =
        report.exports.iter().filter(|export| export.removal.is_none() && export.state != DeviceState::Working);
    let devices = devices.map(|export| format!("the device of export {:?} is {}", export.name, export.state.name()));
    let workers = report.workers.iter().enumerate().filter(|(_, worker)| !worker.alive);
    let reasons: Vec<String> = devices.chain(workers.map(|(n, _)| format!("worker {n} has ended"))).collect();
    if reasons.is_empty() {
        Response::text("200 OK", "ok\n")
    } else {
        Response::text("503 Service Unavailable", format!("{}\n", reasons.join("\n")))
    }
}

/// A response. The connection is closed after it.
#[derive(Debug)]
struct Response {
    status: &'static str,
    kind: &'static str,
    /// More header fields, each with its line break.
    fields: String,
    body: String,
}

impl Response {
    fn new(status: &'static str, kind: &'static str, body: impl Into<String>) -> Self {
        Self { status, kind, fields: String::new(), body: body.into() }
    }

    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self::new(status, TEXT, body)
    }

    fn bytes(&self, with_body: bool) -> Vec<u8> {
        let Self { status, kind, fields, body } = self;
        let mut bytes = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n{fields}\r\n",
            body.len()
        )
        .into_bytes();
        if with_body {
            bytes.extend_from_slice(body.as_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_chooses_the_format_of_metrics() {
        let accepts = |value: &str| {
            accepts_open_metrics(&[
                httparse::Header { name: "Host", value: b"application/openmetrics-text" },
                httparse::Header { name: "accept", value: value.as_bytes() },
            ])
        };
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for value in [prometheus, "text/plain, Application/OpenMetrics-Text", "application/openmetrics-text ; q=0.001"]
        {
            assert!(accepts(value), "{value}");
        }
        for value in ["", "*/*", "text/plain;version=0.0.4", "application/openmetrics-text;version=1.0.0;q=0.0, */*"] {
            assert!(!accepts(value), "{value}");
        }
        assert!(!accepts_open_metrics(&[]));
    }
}
