//! The transmission phase at the level of bytes: every command, valid or not, gets its reply in step and in every mode.

use nbdblk_tests::raw::{Mode, Raw, cmd, errno, flag};
use nbdblk_tests::{Dir, Nbdblk, Rng, allocated, eventually, write_runs};

use crate::{Behind, KIB, MIB};

const SIZE: u64 = 8 * MIB;

/// Runs `test` in each mode over each device.
fn everywhere(test: impl Fn(&mut Raw)) {
    for behind in Behind::BOTH {
        let stand = behind.stand(SIZE, &[(0, SIZE)]);
        for mode in Mode::ALL {
            let mut raw = Raw::enter(stand.server.address(), mode, "");
            assert_eq!(raw.size, SIZE);
            test(&mut raw);
            // After any test, the stream is in step.
            raw.write(0, b"in step.");
            assert_eq!(raw.read(0, 8), b"in step.", "{behind:?} {mode:?}");
        }
        assert!(stand.server.terminate().success());
    }
}

#[test]
fn commands_beyond_the_end_are_refused_and_their_payload_discarded() {
    everywhere(|raw| {
        for (at, len) in
            [(SIZE, 1_u32), (SIZE - 1, 2), (SIZE - 512, 1024), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 4096)]
        {
            let payload = vec![0xee; len as usize];
            assert_eq!(raw.call(0, cmd::READ, at, len, b"").error, errno::EINVAL, "READ {len}@{at}");
            assert_eq!(raw.call(0, cmd::WRITE, at, len, &payload).error, errno::ENOSPC, "WRITE {len}@{at}");
            assert_eq!(raw.call(0, cmd::WRITE_ZEROES, at, len, b"").error, errno::ENOSPC, "WRITE_ZEROES {len}@{at}");
            assert_eq!(raw.call(0, cmd::TRIM, at, len, b"").error, errno::EINVAL, "TRIM {len}@{at}");
            assert_eq!(raw.call(0, cmd::CACHE, at, len, b"").error, errno::EINVAL, "CACHE {len}@{at}");
            assert_eq!(raw.call(0, cmd::BLOCK_STATUS, at, len, b"").error, errno::EINVAL, "BLOCK_STATUS {len}@{at}");
        }
        for (command, error) in [(cmd::WRITE_ZEROES, errno::ENOSPC), (cmd::TRIM, errno::EINVAL)] {
            assert_eq!(raw.call(0, command, 0, u32::MAX, b"").error, error, "{command} of 2^32-1 bytes");
        }
        // The last byte can be read.
        raw.read(SIZE - 1, 1);
    });
}

#[test]
fn unknown_commands_and_flags_are_refused() {
    everywhere(|raw| {
        for command in [8_u16, 9, 100, u16::MAX] {
            assert_eq!(raw.call(0, command, 0, 0, b"").error, errno::EINVAL, "command {command}");
        }
        for bit in 6..16 {
            let flags = 1 << bit;
            assert_eq!(raw.call(flags, cmd::READ, 0, 512, b"").error, errno::EINVAL, "READ flags {flags:#x}");
            assert_eq!(raw.call(flags, cmd::WRITE, 0, 512, &[0; 512]).error, errno::EINVAL, "WRITE flags {flags:#x}");
            for command in [cmd::FLUSH, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
                let len = if command == cmd::FLUSH { 0 } else { 512 };
                assert_eq!(raw.call(flags, command, 0, len, b"").error, errno::EINVAL, "{command} flags {flags:#x}");
            }
        }
        // Known flags on commands that do not allow them.
        for (flags, command) in [
            (flag::NO_HOLE, cmd::READ),
            (flag::REQ_ONE, cmd::READ),
            (flag::FAST_ZERO, cmd::TRIM),
            (flag::DF, cmd::TRIM),
            (flag::NO_HOLE, cmd::CACHE),
        ] {
            assert_eq!(raw.call(flags, command, 0, 512, b"").error, errno::EINVAL, "{command} flags {flags:#x}");
        }
        assert_eq!(raw.call(flag::DF, cmd::WRITE, 0, 512, &[0; 512]).error, errno::EINVAL);
    });
}

#[test]
fn fua_is_accepted_on_every_command() {
    everywhere(|raw| {
        let data = raw.read(4096, 4096);
        assert_eq!(raw.call(flag::FUA, cmd::READ, 4096, 4096, b"").data, data);
        assert_eq!(raw.call(flag::FUA, cmd::WRITE, 4096, 4096, &data).error, 0);
        assert_eq!(raw.call(flag::FUA, cmd::FLUSH, 0, 0, b"").error, 0);
        assert_eq!(raw.call(flag::FUA, cmd::TRIM, MIB, MIB as u32, b"").error, 0);
        // A device that cannot prefetch does not offer CACHE, and refuses it.
        let cache = if raw.flags & (1 << 10) != 0 { 0 } else { errno::EINVAL };
        assert_eq!(raw.call(flag::FUA, cmd::CACHE, 0, 4096, b"").error, cache);
        assert_eq!(raw.call(flag::FUA, cmd::WRITE_ZEROES, 8192, 4096, b"").error, 0);
        assert_eq!(raw.call(flag::FUA | flag::NO_HOLE, cmd::WRITE_ZEROES, 12288, 4096, b"").error, 0);
        assert_eq!(raw.read(8192, 8192), [0; 8192]);
    });
}

#[test]
fn requests_of_no_bytes_get_a_reply() {
    everywhere(|raw| {
        // Length 0 is unspecified: any reply is allowed, but there must be one.
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, cmd::BLOCK_STATUS] {
            for at in [0, SIZE, SIZE + 1] {
                raw.call(0, command, at, 0, b"");
            }
        }
        // Also a flush with a range: it is reserved, and accepted or refused in step.
        raw.call(0, cmd::FLUSH, 512, 512, b"");
    });
}

#[test]
fn status_is_correct_and_only_for_clients_that_negotiated_it() {
    everywhere(|raw| {
        let answer = raw.call(0, cmd::BLOCK_STATUS, 4096, MIB as u32, b"");
        let one = raw.call(flag::REQ_ONE, cmd::BLOCK_STATUS, 4096, MIB as u32, b"");
        if raw.context.is_none() {
            assert_eq!((answer.error, one.error), (errno::EINVAL, errno::EINVAL), "no context was negotiated");
        } else {
            assert_eq!((answer.error, one.error), (0, 0));
            assert!(one.extents.len() == 1 && one.extents[0].0 <= MIB, "{:?}", one.extents);
        }
    });
}

#[test]
fn a_fast_zero_is_fast_or_refused() {
    everywhere(|raw| {
        raw.write(MIB, &[0x77; 65536]);
        let fast_zero_offered = raw.flags & (1 << 11) != 0;
        let answer = raw.call(flag::FAST_ZERO, cmd::WRITE_ZEROES, MIB, 65536, b"");
        match answer.error {
            0 => assert_eq!(raw.read(MIB, 65536), [0; 65536]),
            errno::ENOTSUP => assert_eq!(raw.read(MIB, 65536), [0x77; 65536]),
            errno::EINVAL if !fast_zero_offered => assert_eq!(raw.read(MIB, 65536), [0x77; 65536]),
            error => panic!("error {error}"),
        }
        // Without the flag it always works.
        assert_eq!(raw.call(0, cmd::WRITE_ZEROES, MIB, 65536, b"").error, 0);
        assert_eq!(raw.read(MIB, 65536), [0; 65536]);
    });
}

#[test]
fn an_unaligned_write_leaves_its_neighbours_alone() {
    everywhere(|raw| {
        let mut rng = Rng(7);
        for (at, len) in
            [(7_u64, 100_usize), (500, 24), (511, 2), (513, 511), (4095, 8193), (1, 1), (SIZE - 1, 1), (65535, 131_074)]
        {
            let around = at.saturating_sub(4096);
            let end = (at + len as u64 + 4096).min(SIZE);
            let mut expected = raw.read(around, (end - around) as u32);
            let data = rng.bytes(len);
            raw.write(at, &data);
            expected[(at - around) as usize..][..len].copy_from_slice(&data);
            assert!(raw.read(around, (end - around) as u32) == expected, "WRITE {len}@{at}");
            assert_eq!(raw.call(0, cmd::WRITE_ZEROES, at, len as u32, b"").error, 0);
            expected[(at - around) as usize..][..len].fill(0);
            assert!(raw.read(around, (end - around) as u32) == expected, "WRITE_ZEROES {len}@{at}");
        }
    });
}

#[test]
fn unaligned_writes_into_one_block_at_the_same_time_all_arrive() {
    everywhere(|raw| {
        raw.write(0, &[0; 4096]);
        for n in 0..64_u64 {
            raw.request(0, cmd::WRITE, n * 64, 64, &[n as u8 + 1; 64]);
        }
        for _ in 0..64 {
            assert_eq!(raw.answer().error, 0);
        }
        let expected: Vec<u8> = (0..4096).map(|at| (at / 64) as u8 + 1).collect();
        assert_eq!(raw.read(0, 4096), expected);
    });
}

#[test]
fn five_hundred_requests_are_in_flight_on_one_connection() {
    everywhere(|raw| {
        let mut rng = Rng(500);
        let whole = raw.read(0, SIZE as u32);
        let reads: Vec<(u64, u32)> = (0..512).map(|_| (rng.below(SIZE - 8192), 1 + rng.below(8192) as u32)).collect();
        let first = raw.request_reads(&reads);
        let mut left: std::collections::HashSet<u64> = (first..first + 512).collect();
        while !left.is_empty() {
            let answer = raw.answer();
            assert!(left.remove(&answer.cookie), "{} is answered twice, or was never asked", answer.cookie);
            assert_eq!(answer.error, 0);
            let (at, len) = reads[(answer.cookie - first) as usize];
            let (at, len) = (at as usize, len as usize);
            assert!(answer.data == whole[at..at + len], "READ {len}@{at}");
        }
    });
}

#[test]
fn df_gets_one_chunk() {
    let stand = Behind::IoUring.stand(SIZE, &[(MIB, MIB)]);
    let mut raw = Raw::enter(stand.server.address(), Mode::Structured, "");
    assert!(raw.flags & (1 << 7) != 0, "SEND_DF is offered with structured replies");
    let whole = raw.read(0, 4 * MIB as u32);
    // Check the chunk header: DONE, OFFSET_DATA, our cookie, and all data at once.
    raw.send(&Mode::Structured.header(flag::DF, cmd::READ, 99, 0, 65536 + 4096));
    let header = raw.receive(20);
    assert_eq!(&header[..4], 0x668e_33ef_u32.to_be_bytes());
    assert_eq!(&header[6..8], 1_u16.to_be_bytes(), "OFFSET_DATA");
    assert_eq!(&header[8..16], 99_u64.to_be_bytes());
    assert_eq!(&header[16..], (8_u32 + 65536 + 4096).to_be_bytes());
    assert_eq!(raw.receive(8), 0_u64.to_be_bytes());
    assert!(raw.receive(65536 + 4096) == whole[..65536 + 4096]);
    if header[5] == 0 {
        // DONE may come in a separate, empty chunk.
        assert_eq!(raw.receive(20)[4..8], [0, 1, 0, 0]);
    }
    raw.read(0, 512);
}

#[test]
fn zeroes_are_sent_as_holes() {
    // Holes of at least 64 KiB; the server may cut unaligned reads anywhere.
    let (few, any) = (|holes: &[(u64, u64)]| Some(holes.to_vec()), None);
    let reads = [
        (0, 4 * MIB, few(&[(0, MIB), (2 * MIB, MIB), (3 * MIB + 64 * KIB, MIB - 64 * KIB)])),
        (4 * MIB, MIB, few(&[(4 * MIB, MIB)])),
        (MIB, MIB, few(&[])),
        (0, 65535, few(&[])),
        (7, 2 * MIB, any.clone()),
        (MIB + 1, 2 * MIB, any),
    ];
    for behind in Behind::BOTH {
        let stand = behind.stand(8 * MIB, &[(MIB, MIB), (3 * MIB, 64 * KIB)]);
        let whole = std::fs::read(&stand.image).unwrap();
        for mode in Mode::ALL {
            let mut raw = Raw::enter(stand.server.address(), mode, "");
            let chunks = matches!(mode, Mode::Structured | Mode::Extended);
            for (at, len, expected) in &reads {
                let answer = raw.call(0, cmd::READ, *at, *len as u32, b"");
                assert!(answer.data == whole[*at as usize..][..*len as usize], "{behind:?} {mode:?} READ {len}@{at}");
                let holes: Vec<(u64, u64)> = answer.holes.iter().map(|hole| (hole.0, hole.1.into())).collect();
                match expected {
                    _ if !chunks => assert_eq!(holes, []),
                    Some(expected) => assert_eq!(holes, *expected),
                    None => assert!(!holes.is_empty()),
                }
                let one = raw.call(if chunks { flag::DF } else { 0 }, cmd::READ, *at, *len as u32, b"");
                assert!(one.data == answer.data && one.holes.is_empty() && one.chunks == u32::from(chunks), "DF");
            }
        }
    }
}

#[test]
fn a_payload_at_the_limit_is_served_and_one_above_it_gets_a_reply_in_step() {
    for behind in Behind::BOTH {
        let stand = behind.stand(64 * MIB, &[(0, 64 * MIB)]);
        for mode in Mode::ALL {
            let mut raw = Raw::enter(stand.server.address(), mode, "");
            // Every client may use 32 MiB.
            let data = Rng(mode as u64).bytes(32 * MIB as usize);
            raw.write(512, &data);
            assert!(raw.read(512, 32 * MIB as u32) == data, "{behind:?} {mode:?}");
            // Above it, served or refused, but never truncated.
            for len in [32 * MIB + 1, 33 * MIB] {
                let answer = raw.call(0, cmd::WRITE, 0, len as u32, &vec![mode as u8; len as usize]);
                let written = match answer.error {
                    0 => true,
                    errno::EINVAL | errno::EOVERFLOW => false,
                    error => panic!("WRITE of {len} bytes: error {error}"),
                };
                let first = raw.read(4096, 1)[0];
                assert_eq!(first == mode as u8 && raw.read(len - 1, 1)[0] == mode as u8, written);
                let answer = raw.call(0, cmd::READ, 0, len as u32, b"");
                assert!([0, errno::EINVAL, errno::EOVERFLOW].contains(&answer.error), "READ: error {}", answer.error);
            }
        }
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, SIZE, [(0, SIZE)]);
    let server = Nbdblk::unix(&dir, &["--read-only", "io_uring=disk.raw"]);
    check_refuses_changes(&server);
}

/// The export is read-only, and a client that ignores the flag gets EPERM.
pub(crate) fn check_refuses_changes(server: &Nbdblk) {
    for mode in Mode::ALL {
        let mut raw = Raw::enter(server.address(), mode, "");
        assert!(raw.flags & 2 != 0, "READ_ONLY is in the flags");
        let before = raw.read(0, 65536);
        assert_eq!(raw.call(0, cmd::WRITE, 0, 65536, &[9; 65536]).error, errno::EPERM);
        assert_eq!(raw.call(0, cmd::WRITE, 7, 100, &[9; 100]).error, errno::EPERM);
        assert_eq!(raw.call(0, cmd::TRIM, 0, 65536, b"").error, errno::EPERM);
        assert_eq!(raw.call(0, cmd::WRITE_ZEROES, 0, 65536, b"").error, errno::EPERM);
        assert_eq!(raw.call(0, cmd::FLUSH, 0, 0, b"").error, 0);
        assert!(raw.read(0, 65536) == before);
    }
}

#[test]
fn seventeen_mebibytes_are_zeroed_and_so_are_a_hundred_and_twenty_eight() {
    for behind in Behind::BOTH {
        let stand = behind.stand(256 * MIB, &[(0, 160 * MIB)]);
        let mut raw = Raw::enter(stand.server.address(), Mode::Structured, "");
        let (before, after) = (raw.read(MIB - 512, 512), raw.read(18 * MIB, 512));
        assert_eq!(raw.call(0, cmd::WRITE_ZEROES, MIB, 17 * MIB as u32, b"").error, 0, "{behind:?}");
        assert!(raw.read(MIB, 17 * MIB as u32).iter().all(|byte| *byte == 0));
        assert_eq!((raw.read(MIB - 512, 512), raw.read(18 * MIB, 512)), (before, after), "the neighbours");
        for flags in [0, flag::NO_HOLE, flag::FUA] {
            assert_eq!(raw.call(flags, cmd::WRITE_ZEROES, 20 * MIB, 128 * MIB as u32, b"").error, 0, "{behind:?}");
            for at in (20 * MIB..148 * MIB).step_by(32 * MIB as usize) {
                assert!(raw.read(at, 32 * MIB as u32).iter().all(|byte| *byte == 0), "{behind:?} old data at {at}");
            }
        }
        assert!(raw.read(148 * MIB, 4096).iter().any(|byte| *byte != 0));
    }
}

#[test]
fn a_trim_frees_the_space() {
    for behind in Behind::BOTH {
        let stand = behind.stand(64 * MIB, &[(0, 32 * MIB)]);
        let before = allocated(&stand.image);
        assert!(before >= 32 * MIB);
        let mut raw = Raw::enter(stand.server.address(), Mode::Simple, "");
        assert_eq!(raw.call(0, cmd::TRIM, MIB, 8 * MIB as u32, b"").error, 0, "{behind:?}");
        assert_eq!(raw.call(flag::FUA, cmd::TRIM, 16 * MIB, 8 * MIB as u32, b"").error, 0, "{behind:?}");
        let after = allocated(&stand.image);
        assert!(after + 15 * MIB <= before, "{behind:?}: {before} bytes before, {after} after");
        // It is only a hint, at unaligned places: never an error, never more than requested.
        let neighbour = raw.read(0, 7);
        assert_eq!(raw.call(0, cmd::TRIM, 7, 100, b"").error, 0, "{behind:?}");
        assert_eq!(raw.read(0, 7), neighbour);
    }
}

#[test]
fn a_disk_beyond_four_gibibytes_is_described_and_zeroed() {
    let dir = Dir::new();
    let size = 9 * 1024 * MIB;
    write_runs(&dir.at("disk.raw"), size, [(size - MIB, MIB)]);
    let server = Nbdblk::unix(&dir, &["io_uring=disk.raw"]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    assert_eq!(raw.size, size);
    // The longest request, in whole blocks. The hole is longer.
    const ALIGNED: u32 = !511;
    for (at, len) in [(0, u32::MAX), (0, ALIGNED), (5 * 1024 * MIB, ALIGNED), (4096, 1 << 31)] {
        let answer = raw.call(0, cmd::BLOCK_STATUS, at, len, b"");
        if at + u64::from(len) > size {
            assert_eq!(answer.error, errno::EINVAL);
            continue;
        }
        assert_eq!(answer.error, 0, "BLOCK_STATUS {len}@{at}");
        let sum: u64 = answer.extents.iter().map(|extent| extent.0).sum();
        assert!(sum > 0 && answer.extents.iter().all(|extent| extent.0 > 0), "{:?}", answer.extents);
        assert_eq!(answer.extents[0].1, 3, "a hole that reads as zeroes");
    }
    raw.write(size - 512, &[1; 512]);
    assert_eq!(raw.read(size - 512, 512), [1; 512]);
    // More at once than any internal limit: all of it or an error, never less.
    raw.write(4 * 1024 * MIB - 512, &[2; 1024]);
    assert_eq!(raw.call(0, cmd::WRITE_ZEROES, MIB, ALIGNED, b"").error, 0);
    assert_eq!(raw.read(4 * 1024 * MIB - 512, 1024), [0; 1024]);
    assert_eq!(raw.call(0, cmd::TRIM, 0, u32::MAX, b"").error, 0);
}

#[test]
fn one_extended_request_reaches_over_six_tebibytes() {
    const TIB: u64 = 1 << 40;
    const EDGE: u64 = 1 << 32;
    let dir = Dir::new();
    dir.sparse("disk.raw", 6 * TIB);
    let server = Nbdblk::unix(&dir, &["io_uring=disk.raw"]);
    let mut raw = Raw::enter(server.address(), Mode::Extended, "");
    for (command, flags) in [(cmd::WRITE_ZEROES, 0), (cmd::WRITE_ZEROES, flag::FAST_ZERO), (cmd::TRIM, flag::FUA)] {
        raw.write(EDGE - 4096, &[1; 8192]);
        raw.write(5 * TIB, &[2; 4096]);
        let status = raw.call_long(0, cmd::BLOCK_STATUS, 0, 6 * TIB, b"");
        let (hole, data) = (3, 0);
        let far = 5 * TIB - EDGE - 4096;
        assert_eq!(
            status.extents,
            [(EDGE - 4096, hole), (8192, data), (far, hole), (4096, data), (TIB - 4096, hole)],
            "extents around 2^32 are exact"
        );
        assert_eq!(raw.call_long(flag::REQ_ONE, cmd::BLOCK_STATUS, EDGE + 4096, far + 1, b"").extents, [(far, hole)]);
        assert_eq!(raw.call_long(flags, command, 0, 6 * TIB, b"").error, 0, "command {command}, flags {flags}");
        assert_eq!(raw.call_long(0, cmd::BLOCK_STATUS, 0, 6 * TIB, b"").extents, [(6 * TIB, hole)]);
        assert_eq!((raw.read(EDGE - 4096, 8192), raw.read(5 * TIB, 1)), (vec![0; 8192], vec![0]));
        // One byte more is past the end, and so is a range that would wrap around.
        for len in [6 * TIB + 1, u64::MAX] {
            let error = if command == cmd::TRIM { errno::EINVAL } else { errno::ENOSPC };
            assert_eq!(raw.call_long(flags, command, 0, len, b"").error, error);
        }
    }
    // With 32 bits, a hole is reported up to the last whole block.
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    for (at, len) in [(0, u32::MAX), (EDGE - 512, u32::MAX), (4096, 1 << 31)] {
        assert_eq!(raw.call(0, cmd::BLOCK_STATUS, at, len, b"").extents, [(len.into(), 3)], "{len}@{at}");
    }
}

#[test]
fn one_connection_reads_the_writes_of_another() {
    for behind in Behind::BOTH {
        let stand = behind.stand(SIZE, &[]);
        let mut raws: Vec<Raw> = (0..8).map(|n| Raw::enter(stand.server.address(), Mode::ALL[n % 4], "")).collect();
        assert!(raws.iter().all(|raw| raw.flags & (1 << 8) != 0), "CAN_MULTI_CONN");
        for n in 0..8 {
            raws[n].write(n as u64 * 64 * KIB, &vec![n as u8 + 1; 65536]);
            for raw in &mut raws {
                assert!(raw.read(n as u64 * 64 * KIB, 65536).iter().all(|byte| *byte == n as u8 + 1));
            }
        }
    }
}

#[test]
fn disc_after_writes_finishes_them() {
    for behind in Behind::BOTH {
        let stand = behind.stand(SIZE, &[]);
        let mut raw = Raw::enter(stand.server.address(), Mode::Simple, "");
        for n in 0..32_u64 {
            raw.request(0, cmd::WRITE, n * 4096, 4096, &[n as u8 + 1; 4096]);
        }
        raw.request(0, cmd::DISC, 0, 0, b"");
        for _ in 0..32 {
            assert_eq!(raw.answer().error, 0, "each write is done and answered before the connection ends");
        }
        assert_eq!(raw.await_close(), b"");
        let mut raw = Raw::enter(stand.server.address(), Mode::Simple, "");
        for n in 0..32_u64 {
            assert_eq!(raw.read(n * 4096, 1), [n as u8 + 1]);
        }
    }
}

#[test]
fn a_polling_server_sleeps_when_idle() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M", "--poll", "1000"]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    raw.write(0, b"polled");
    assert_eq!(raw.read(0, 6), b"polled");
    eventually("the workers sleep", || {
        let before = server.cpu_time();
        std::thread::sleep(std::time::Duration::from_millis(300));
        server.cpu_time() == before
    });
    assert_eq!(raw.read(0, 6), b"polled");
    assert!(server.terminate().success());
}
