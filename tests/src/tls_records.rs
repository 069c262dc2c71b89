//! What a server does with TLS records that no honest client sends, and how a connection ends. For servers whose library, or whose
//! kernel, handles the records.

use rustls::{AlertDescription, Error};

use crate::raw::{Mode, Raw, cmd};
use crate::{Nbdblk, Pki, Version};

/// Types of records (RFC 8446, 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// A KeyUpdate message that requests none from the other side (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Runs every check on a server that requires TLS; clients have the certificate of `pki`.
pub fn check(server: &Nbdblk, pki: &Pki, version: Version) {
    let enter = || Raw::greeted(server.address()).start_tls(pki, version).entered(Mode::Simple, "");
    // A server that sees the attack in the middle of its own work fails more readily.
    let busy = || {
        let mut raw = enter();
        raw.read(0, 4096);
        raw
    };

    corrupted(busy());

    of_another_type(busy());

    empty(busy());

    endless_message(busy());
    if version == Version::Tls13 {
        flood_of_key_updates(busy());

        half_a_key_update(busy());

        keys_that_change_under_load(busy());
    }

    closed_by_the_client(busy());
    closed_by_the_server(busy());
    // None of that has harmed the server.
    enter().read(0, 4096);
}

/// The alert with which the server ended the connection.
#[track_caller]
fn alert(raw: Raw) -> AlertDescription {
    let error = raw.await_end().expect_err("the server ends such a connection with an error");
    match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
        Some(Error::AlertReceived(alert)) => *alert,
        _ => panic!("the connection ended without an alert: {error:?}"),
    }
}

fn read_request() -> Vec<u8> {
    Mode::Simple.request(0, cmd::READ, 7, 0, 4096, b"")
}

fn corrupted(mut raw: Raw) {
    raw.send_corrupted(&read_request()).expect("the server takes it");
    assert_eq!(alert(raw), AlertDescription::BadRecordMac);
}

fn of_another_type(mut raw: Raw) {
    raw.send_record(CHANGE_CIPHER_SPEC, &[1, 2, 3]).expect("the server takes it");
    let alert = alert(raw);
    assert!([AlertDescription::UnexpectedMessage, AlertDescription::DecodeError].contains(&alert), "{alert:?}");
}

/// Empty records are legal, but a library ends a connection with many of them. The kernel skips them.
fn empty(mut raw: Raw) {
    raw.send_record(DATA, b"").expect("the server takes it");
    raw.read(0, 4096);
    let sent = (0..1000).try_for_each(|_| raw.send_record(DATA, b""));
    let served = sent.and_then(|()| raw.try_send(&read_request())).and_then(|()| raw.try_receive(16 + 4096));
    if served.is_err() {
        raw.await_end().expect_err("the server ended the connection");
    }
}

/// The beginning of a handshake message that promises 16 MiB.
fn endless_message(mut raw: Raw) {
    let _ = raw.send_record(HANDSHAKE, &[24, 0xff, 0xff, 0xff]);
    let _ = (0..4096).try_for_each(|_| raw.send_record(HANDSHAKE, &[0; 1000]));
    raw.await_end().expect_err("the server ends such a connection");
}

fn flood_of_key_updates(mut raw: Raw) {
    let _ = (0..1000).try_for_each(|_| {
        raw.change_keys();
        raw.send_record(HANDSHAKE, b"")
    });
    raw.await_end().expect_err("the server ends such a connection");
}

/// A half message, while the server has a reply to send.
fn half_a_key_update(mut raw: Raw) {
    raw.send(&read_request());
    raw.send_record(HANDSHAKE, &KEY_UPDATE[..2]).expect("the server takes it");
    // Whether the READ is served depends on what the server reads first. Data within the message is illegal.
    let _ = raw.try_receive(16 + 4096);
    let _ = raw.try_send(&read_request());
    raw.await_end().expect_err("the server ends such a connection");
}

fn keys_that_change_under_load(mut raw: Raw) {
    for n in 0..50_u64 {
        let data = vec![n as u8 + 1; 100_000];
        raw.write(n * 100_000 % 500_000, &data);
        raw.change_keys();
        assert!(raw.read(n * 100_000 % 500_000, 100_000) == data, "round {n}");
    }
}

/// Without the alert at the end, a client cannot tell the end from truncation (RFC 8446, 6.1).
fn closed_by_the_client(mut raw: Raw) {
    raw.send_record(ALERT, &CLOSE_NOTIFY).expect("the server takes it");
    raw.await_end().expect("the server sends the alert too");
}

fn closed_by_the_server(mut raw: Raw) {
    raw.send(&Mode::Simple.request(0, cmd::DISC, 7, 0, 0, b""));
    raw.await_end().expect("the server sends the alert");
}
