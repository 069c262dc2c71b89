//! A server pauses: it goes on as if nothing had happened, or another server continues where it was.

use std::{
    io::{ErrorKind, Read, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use blkdev::{
    Device,
    fault::{Fault, Faults},
    memory::Memory,
};
use nbd_proto::{Cookie, WireError};
use nbd_server_core::{Handover, Limits, Removal, Server};

use crate::{Client, PATIENCE, Running, export};

/// A copy of the state, for a server in the same process.
fn copy(state: &Handover) -> Handover {
    let (guests, connections) = (state.guests.clone(), state.connections.clone());
    Handover { listeners: state.listeners.clone(), guests, connections }
}

#[test]
fn a_paused_server_begins_no_request_and_then_goes_on() {
    let disk = Arc::new(Memory::new(1 << 20));
    let server =
        Running::start(vec![("", Arc::<Memory>::clone(&disk) as Arc<dyn Device>)], |limits| limits.workers = 2);
    let mut client = server.client("");
    client.write(0, b"before").unwrap();
    let paused = server.server.pause(PATIENCE).unwrap();
    client.encoder.write_head(&mut client.out, Cookie(1), 0, 6, false);
    client.out.extend_from_slice(b"during");
    client.send();
    let mut comes = server.connect();
    comes.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(comes.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock, "it waits in the backlog");
    let mut content = [0; 6];
    disk.read(0, &mut content);
    assert_eq!(&content, b"before");
    let busy = |error: std::io::Error| assert_eq!(error.kind(), ErrorKind::ResourceBusy, "{error}");
    busy(server.server.pause(PATIENCE).unwrap_err());
    busy(server.server.add(export("x", Arc::<Memory>::clone(&disk), &[])).unwrap_err());
    assert_eq!((paused.state().listeners.len(), paused.state().connections.len(), paused.leaving()), (1, 1, 0));
    drop(paused);
    client.reply(1).unwrap();
    assert_eq!(client.read(0, 6), Ok(b"during".to_vec()));
    comes.set_read_timeout(Some(PATIENCE)).unwrap();
    comes.read_exact(&mut [0; 18]).unwrap();
    server.server.add(export("x", disk, &[])).unwrap();
    server.server.pause(PATIENCE).unwrap();
}

#[test]
fn another_server_continues_the_connections() {
    let disk: Arc<dyn Device> = Arc::new(Memory::new(16 << 20));
    let mut server = Running::start(vec![("a", Arc::clone(&disk)), ("b", Arc::clone(&disk))], |_| {});
    let mut clients: Vec<Client> = ["a", "b", "a"].map(|name| server.client(name)).into();
    let mut guest = server.connect();
    guest.read_exact(&mut [0; 18]).unwrap();
    // NBD_OPT_LIST in two parts.
    let list = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &3_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat();
    guest.write_all(&list[..9]).unwrap();
    for round in 0..10_u8 {
        for (n, client) in clients.iter_mut().enumerate() {
            let data = vec![round; 50_000];
            client.encoder.write_head(&mut client.out, Cookie(7), n as u64 * 50_000, data.len() as u32, false);
            client.out.extend_from_slice(&data);
            let rest = client.out.split_off(1 + usize::from(round) * 4000);
            client.send();
            client.out = rest;
        }
        // A client whose bytes are still on their way is as good as one whose bytes were taken.
        let paused = server.server.pause(PATIENCE).unwrap();
        let state = copy(paused.state());
        assert_eq!((state.connections.len(), paused.leaving()), (3, 0));
        let exports = ["a", "b"].map(|name| export(name, Arc::clone(&disk), &[])).into();
        let old = std::mem::replace(
            &mut server.server,
            Server::resume(Vec::new(), Handover::default(), None, Limits::default()).unwrap(),
        );
        drop(old);
        drop(paused);
        server.server = Server::resume(exports, state, None, Limits::default()).unwrap();
        for (n, client) in clients.iter_mut().enumerate() {
            client.send();
            client.reply(7).unwrap();
            assert!(client.read(n as u64 * 50_000, 50_000) == Ok(vec![round; 50_000]));
        }
    }
    guest.write_all(&list[9..]).unwrap();
    let mut reply = [0; 20];
    guest.read_exact(&mut reply).unwrap();
    assert_eq!(reply[8..16], [&3_u32.to_be_bytes()[..], &2_u32.to_be_bytes()].concat(), "NBD_REP_SERVER");
    assert_eq!(server.client("b").size, 16 << 20);
}

#[test]
fn clients_without_an_export_or_with_longer_requests_are_disconnected() {
    let disk: Arc<dyn Device> = Arc::new(Memory::new(1 << 20));
    let server = Running::start(vec![("a", Arc::clone(&disk)), ("b", Arc::clone(&disk))], |_| {});
    let (mut a, mut b) = (server.client("a"), server.client("b"));
    let paused = server.server.pause(PATIENCE).unwrap();
    let mut state = copy(paused.state());
    state.connections.iter_mut().find(|one| one.export == "a").unwrap().state.terms.block.payload_max = 2 << 20;
    let mut limits = Limits::default();
    limits.memory = 2 << 20;
    // Before the paused server goes on: both would read from the sockets.
    let next = Server::resume(vec![export("a", disk, &[])], state, None, limits).unwrap();
    a.write(0, b"goes on").unwrap();
    assert_eq!(next.exports()[0].clients, 1);
    assert_eq!(next.exports().len(), 1);
    drop(next);
    drop(paused);
    assert_eq!(b.read(0, 7), Ok(b"goes on".to_vec()), "the paused server still has it");
}

#[test]
fn clients_that_cannot_be_handed_over_get_eshutdown() {
    let disk: Arc<dyn Device> = Arc::new(Memory::new(1 << 20));
    let server = Running::start(vec![("stays", Arc::clone(&disk)), ("goes", disk)], |limits| limits.workers = 1);
    let (mut stays, mut goes) = (server.client("stays"), server.client("goes"));
    goes.write(0, b"before").unwrap();
    server.server.remove("goes", Removal::Hide).unwrap();
    let paused = server.server.pause(PATIENCE).unwrap();
    assert_eq!((paused.state().connections.len(), paused.leaving()), (1, 1));
    goes.encoder.read(&mut goes.out, Cookie(1), 0, 6);
    goes.encoder.flush(&mut goes.out, Cookie(2));
    goes.send();
    paused.dismiss();
    assert_eq!(goes.reply(1), Err(WireError::Shutdown));
    assert_eq!(goes.reply(2), Err(WireError::Shutdown));
    assert!(goes.next_reply().is_none());
    drop(paused);
    assert_eq!(stays.read(0, 6), Ok(b"before".to_vec()));
}

#[test]
fn the_devices_complete_the_requests_that_have_begun() {
    // A request takes up to 2000 looks at the device.
    let slow = Fault::new(Memory::new(1 << 20), Faults { delay_max: 2000, ..Faults::new(1) });
    let server = Running::start(vec![("", Arc::new(slow))], |_| {});
    let mut client = server.client("");
    for round in 0..20 {
        for cookie in 0..10 {
            client.encoder.read(&mut client.out, Cookie(cookie), 0, 4096);
        }
        client.send();
        if round % 2 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let paused = server.server.pause(PATIENCE).unwrap();
        assert_eq!(paused.state().connections.len(), 1);
        drop(paused);
        let mut cookies: Vec<u64> = (0..10)
            .map(|_| client.any_reply())
            .map(|(cookie, data)| {
                data.unwrap();
                cookie
            })
            .collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..10).collect::<Vec<_>>());
    }
    // A request that never ends stops the pause, and nothing else.
    let silent = Fault::new(Memory::new(1 << 20), Faults { lost: 1.0, ..Faults::new(1) });
    let disks: Vec<(&str, Arc<dyn Device>)> = vec![("silent", Arc::new(silent)), ("", Arc::new(Memory::new(1 << 20)))];
    let server = Running::start(disks, |limits| limits.workers = 1);
    let (mut stuck, mut other) = (server.client("silent"), server.client(""));
    stuck.encoder.read(&mut stuck.out, Cookie(1), 0, 4096);
    stuck.send();
    other.write(0, b"before").unwrap();
    thread::sleep(Duration::from_millis(20));
    let error = server.server.pause(Duration::from_millis(100)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(other.read(0, 6), Ok(b"before".to_vec()));
}
