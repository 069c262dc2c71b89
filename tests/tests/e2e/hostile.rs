//! Clients that disconnect early, violate the protocol, or do not speak NBD. Afterwards the server is as before.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use nbdblk_tests::raw::{Mode, Raw, cmd, info_query, meta_query, opt, option_bytes};
use nbdblk_tests::{Address, Dir, Nbdblk, Rng, eventually, write_runs};

use crate::{Behind, MIB};

const SIZE: u64 = 64 * MIB;

/// Disconnects in the middle of an action; `n` selects it.
fn break_off(address: &Address, n: usize, rng: &mut Rng) {
    let mode = Mode::ALL[n % 4];
    let mut raw = Raw::enter(address, mode, "");
    let write = |len: u64| mode.header(0, cmd::WRITE, n as u64, place(n), len);
    match n % 7 {
        // Replies that the client does not read.
        0 => _ = raw.request_reads(&[(0, 4 * MIB as u32); 4]),
        1 => _ = raw.request_reads(&[(n as u64 * 4096, 4096); 256]),
        // A payload that never comes, completely or in part.
        2 => raw.send(&[write(MIB), rng.bytes(1 + n * 997 % MIB as usize)].concat()),
        3 => raw.send(&write(32 * MIB)),
        // Half a header.
        4 => raw.send(&write(4096)[..1 + n % 27]),
        // Whole writes, disconnected before the reply.
        5 => {
            for i in 0..8 {
                raw.request(0, cmd::WRITE, i * 65536, 65536, &[n as u8; 65536]);
            }
        }
        // One reply is started, and the rest not read.
        _ => {
            raw.request(0, cmd::READ, 0, 8 * MIB as u32, b"");
            raw.receive(16);
        }
    }
}

/// The offset for the writes of client `n`.
fn place(n: usize) -> u64 {
    (n as u64 * 65536) % (SIZE - 32 * MIB)
}

fn break_off_a_thousand_times(server: Nbdblk) {
    let mut rng = Rng(1000);
    let settle = |server: &Nbdblk| {
        // The last client is gone when its descriptors are closed.
        let mut raw = Raw::enter(server.address(), Mode::Structured, "");
        raw.write(SIZE - 4096, b"still here");
        assert_eq!(raw.read(SIZE - 4096, 10), b"still here");
    };
    // The first ones make the server allocate what it keeps: used buffers, a larger heap.
    settle(&server);
    let fds = server.fds();
    (0..210).for_each(|n| break_off(server.address(), n, &mut rng));
    settle(&server);
    eventually("the descriptors of the first clients are closed", || server.fds() <= fds);
    let resident = server.resident_private();
    (0..1000).for_each(|n| break_off(server.address(), n, &mut rng));
    settle(&server);
    eventually("the descriptors of a thousand clients are closed", || server.fds() <= fds);
    let grown = server.resident_private().saturating_sub(resident);
    assert!(grown < 16 * MIB, "resident memory grew by {grown} bytes over a thousand clients");
    // No buffer is lost: the largest requests still get theirs, several at a time.
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    raw.request_reads(&[(0, 32 * MIB as u32); 4]);
    for _ in 0..4 {
        assert_eq!(raw.answer().error, 0);
    }
    drop(raw);
    assert!(server.terminate().success());
}

#[test]
fn a_thousand_clients_killed_in_mid_request_leave_nothing_of_a_file() {
    let stand = Behind::IoUring.stand(SIZE, &[(0, SIZE)]);
    break_off_a_thousand_times(stand.server);
}

#[test]
fn a_thousand_clients_killed_in_mid_request_leave_nothing_of_vhost_user() {
    let stand = Behind::VhostUser.stand(SIZE, &[(0, SIZE)]);
    break_off_a_thousand_times(stand.server);
    drop(stand.qsd);
}

#[test]
fn a_thousand_clients_reset_over_tcp_leave_nothing() {
    let dir = Dir::new();
    write_runs(&dir.at("disk.raw"), SIZE, [(0, SIZE)]);
    break_off_a_thousand_times(Nbdblk::tcp(&dir, &["io_uring=disk.raw"]));
}

#[test]
fn a_bad_request_magic_ends_that_connection_only() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M"]);
    let mut other = Raw::enter(server.address(), Mode::Simple, "");
    for mode in Mode::ALL {
        let mut raw = Raw::enter(server.address(), mode, "");
        let mut bytes = mode.header(0, cmd::READ, 1, 0, 512);
        bytes[3] ^= 1;
        raw.send(&bytes);
        raw.await_close();
        assert_eq!(other.read(0, 512), [0; 512]);
    }
}

#[test]
fn a_request_after_disc_gets_no_reply() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M"]);
    let mut raw = Raw::enter(server.address(), Mode::Simple, "");
    raw.send(&[Mode::Simple.header(0, cmd::DISC, 1, 0, 0), Mode::Simple.header(0, cmd::READ, 2, 0, 512)].concat());
    assert_eq!(raw.await_close(), b"");
}

/// Sends bytes to a listener, and disconnects.
fn throw(address: &Address, bytes: &[u8]) {
    let _ = match address {
        Address::Unix(path) => UnixStream::connect(path).and_then(|mut stream| stream.write_all(bytes)),
        Address::Tcp(address) => TcpStream::connect(address).and_then(|mut stream| stream.write_all(bytes)),
    };
}

#[test]
fn garbage_on_the_port_is_harmless() {
    let dir = Dir::new();
    for server in [Nbdblk::unix(&dir, &["memory=1M"]), Nbdblk::tcp(&dir, &["memory=1M"])] {
        Raw::enter(server.address(), Mode::Simple, "").read(0, 1);
        let fds = server.fds();
        let mut rng = Rng(99);
        for n in 0..300 {
            throw(server.address(), &rng.bytes(n * 37 % 5000));
            throw(server.address(), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
            throw(server.address(), b"");
            // A valid beginning, then noise: in the handshake, and in the transmission phase.
            Raw::greeted(server.address()).try_send(&rng.bytes(100)).ok();
            Raw::enter(server.address(), Mode::ALL[n % 4], "").try_send(&rng.bytes(1000)).ok();
        }
        Raw::enter(server.address(), Mode::Structured, "").read(0, 512);
        eventually("the descriptors are closed", || server.fds() <= fds);
        assert!(server.terminate().success());
    }
}

#[test]
fn a_client_that_reads_no_replies_does_not_delay_others() {
    for behind in Behind::BOTH {
        let stand = behind.stand(SIZE, &[(0, SIZE)]);
        let address = stand.server.address().clone();
        let before = stand.server.resident();
        // Each requests much more than a socket holds, and reads nothing.
        let mut greedy: Vec<Raw> = (0..8).map(|_| Raw::enter(&address, Mode::Simple, "")).collect();
        greedy.iter_mut().for_each(|raw| _ = raw.request_reads(&[(0, MIB as u32); 64]));
        let mut raw = Raw::enter(&address, Mode::Structured, "");
        for n in 0..100 {
            raw.write(n * 4096, &[n as u8; 4096]);
            assert_eq!(raw.read(n * 4096, 1), [n as u8], "{behind:?}");
        }
        let grown = stand.server.resident().saturating_sub(before);
        assert!(grown < 512 * MIB, "{behind:?}: memory for payload is not bounded: {grown} bytes more");
        // The server ends while all of them still wait.
        assert!(stand.server.terminate().success());
        drop(greedy);
    }
}

#[test]
fn sigterm_ends_the_server_under_load_in_every_phase() {
    for behind in Behind::BOTH {
        let stand = behind.stand(SIZE, &[(0, SIZE)]);
        let address = stand.server.address().clone();
        let idle = [Raw::connect(&address), Raw::greeted(&address)];
        let load: Vec<_> = (0..4)
            .map(|n| {
                let mut raw = Raw::enter(&address, Mode::Simple, "");
                std::thread::spawn(move || {
                    // Until the server closes the connection.
                    while raw.try_send(&Mode::Simple.header(0, cmd::READ, 1, n * MIB, 65536)).is_ok() {
                        if raw.try_receive(16 + 65536).is_err() {
                            break;
                        }
                    }
                })
            })
            .collect();
        let mut partial = Raw::enter(&address, Mode::Simple, "");
        partial.send(&Mode::Simple.header(0, cmd::WRITE, 1, 0, MIB));
        partial.send(&[0; 1000]);
        assert!(stand.server.terminate().success(), "{behind:?}");
        load.into_iter().for_each(|thread| thread.join().unwrap());
        drop((idle, partial));
    }
}

#[test]
fn idle_clients_and_short_ones_cost_nothing_afterwards() {
    let dir = Dir::new();
    for server in [Nbdblk::unix(&dir, &["memory=64M"]), Nbdblk::tcp(&dir, &["memory=64M"])] {
        let address = server.address();
        let idle = || -> Vec<Raw> {
            let rise = |n: usize| match n % 4 {
                0 => Raw::connect(address),
                1 => Raw::greeted(address),
                _ => Raw::enter(address, Mode::ALL[n % 3], ""),
            };
            (0..200).map(rise).collect()
        };
        let at_work = || assert_eq!(Raw::enter(address, Mode::Simple, "").read(0, 512), [0; 512]);
        at_work();
        let fds = server.fds();
        // The first time, the server allocates what it keeps: its tables.
        drop(idle());
        eventually("the first clients are gone", || server.fds() <= fds);
        let resident = server.resident_private();
        let clients = idle();
        at_work();
        (0..2000).for_each(|_| throw(address, b""));
        at_work();
        // The previous client may have been counted while it was leaving.
        assert!(server.fds() >= fds + 199, "they are still there");
        drop(clients);
        eventually("all descriptors are closed", || server.fds() <= fds);
        let grown = server.resident_private().saturating_sub(resident);
        assert!(grown < MIB, "resident memory grew by {grown} bytes");
        assert!(server.terminate().success());
    }
}

#[test]
fn a_client_that_closes_at_any_byte_is_harmless() {
    const LEN: usize = 64;
    let talk = |n: usize| {
        let mode = Mode::Structured;
        [
            3_u32.to_be_bytes().to_vec(),
            option_bytes(opt::STRUCTURED_REPLY, b""),
            option_bytes(opt::SET_META_CONTEXT, &meta_query("", &["base:allocation"])),
            option_bytes(opt::LIST, b""),
            option_bytes(opt::GO, &info_query("", &[3])),
            mode.header(0, cmd::BLOCK_STATUS, 1, 0, 4096),
            mode.header(0, cmd::WRITE, 2, (n * LEN) as u64, LEN as u64),
            vec![0xff; LEN],
            mode.header(0, cmd::READ, 3, 0, 4096),
            mode.header(0, cmd::DISC, 4, 0, 0),
        ]
        .concat()
    };
    let (whole, rest) = (talk(0).len(), 2 * 28);
    let dir = Dir::new();
    for server in [Nbdblk::unix(&dir, &["memory=1M"]), Nbdblk::tcp(&dir, &["memory=1M"])] {
        let mut raw = Raw::enter(server.address(), Mode::Simple, "");
        let fds = server.fds();
        (0..=whole).for_each(|cut| throw(server.address(), &talk(cut)[..cut]));
        eventually("all descriptors are closed", || server.fds() <= fds);
        for cut in 0..=whole {
            // A write is executed or not, but never in part. Even a complete request may be cancelled when its client
            // disconnects.
            let found = raw.read((cut * LEN) as u64, LEN as u32);
            let all = |byte| found.iter().all(|found| *found == byte);
            assert!(all(0) || (all(0xff) && cut >= whole - rest), "cut at {cut} of {whole}: {found:?}");
        }
        drop(raw);
        assert!(server.terminate().success());
    }
}
