//! Data through nbdblk, looked at through nbdblk and by the other way.

use nbdblk_tests::{Dir, Rng, assert_equal, nbdsh, tool, write_runs};

use crate::target::Target;

const MIB: u64 = 1 << 20;

/// What the scripts share: a pattern, its place, and how to look for it.
const SCRIPT: &str = "
import os, random
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_ALIGN)
size, MIB = h.get_size(), 1 << 20
def pieces(at, end):
    while at < end:
        yield at, min(4 * MIB, end - at)
        at += 4 * MIB
def fill(at, end, byte):
    for at, n in pieces(at, end):
        h.pwrite(bytes([byte]) * n, at)
def expect(at, end, byte):
    for at, n in pieces(at, end):
        data = h.pread(n, at)
        if data != bytes([byte]) * n:
            bad = next(i for i in range(n) if data[i] != byte)
            raise SystemExit('at %d: %#x instead of %#x' % (at + bad, data[bad], byte))
";

fn script(uri: &str, text: &str) -> String {
    nbdsh(uri, &format!("{SCRIPT}{text}"))
}

/// An image with data and holes, over old data that must not show.
pub(crate) fn copied_in_and_out(target: &Target) {
    let dir = Dir::new();
    let (source, copy) = (dir.text("source"), dir.text("copy"));
    let server = target.serve(&dir);
    let size = script(&server.uri(), "for at in range(5 * MIB, size, 16 * MIB): fill(at, at + MIB, 0x5a)\nprint(size)");
    let size: u64 = size.trim().parse().expect("a size is a number");
    write_runs(source.as_ref(), size, (0..size / (16 * MIB)).map(|n| (n * 16 * MIB + n * 513, 3 * MIB + n * 77)));
    tool("nbdcopy").args(["--connections=4", "--flush", &source, &server.uri()]).ok();
    tool("nbdcopy").args(["--connections=4", &server.uri(), &copy]).ok();
    assert_equal(source.as_ref(), copy.as_ref());
    assert!(server.terminate().success());
    target.assert_holds(source.as_ref(), 0, size);
}

/// Random reads and writes, everything written read back and its checksum compared.
pub(crate) fn verified_by_fio(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let uri = format!("--uri={}", server.uri());
    tool("fio")
        .args(["--name=verify", "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-256k", "--size=32m"])
        .args(["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", &uri])
        .within(dir.path())
        .ok();
    assert!(server.terminate().success());
}

/// Zeroes and trims of 17 MiB, more than one request of some devices, with data on both sides that must stay.
pub(crate) fn zeroes_and_trims(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let text = "
at = 3 * MIB + 4096
end = at + 17 * MIB
for flags in 0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA:
    fill(at - MIB, end + MIB, 0xa5)
    h.zero(end - at, at, flags)
    expect(at - MIB, at, 0xa5)
    expect(at, end, 0)
    expect(end, end + MIB, 0xa5)
for flags in 0, nbd.CMD_FLAG_FUA:
    fill(at - MIB, end + MIB, 0x5a)
    h.trim(end - at, at, flags)
    expect(at - MIB, at, 0x5a)
    expect(end, end + MIB, 0x5a)
    h.pread(17 * MIB, at)
    fill(at, end, 0xc3)
    expect(at, end, 0xc3)
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
}

/// The whole device in one request.
pub(crate) fn whole_device_zeroed_and_trimmed(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let text = "
places = [0, *range(3 * MIB, size - MIB, 16 * MIB), size - MIB]
def dirty():
    for at in places:
        fill(at, at + MIB, 0xa5)
dirty()
h.zero(size, 0)
expect(0, size, 0)
dirty()
h.trim(size, 0)
for at in places:
    h.pread(MIB, at)
dirty()
expect(size - MIB, size, 0xa5)
h.zero(size, 0, nbd.CMD_FLAG_NO_HOLE)
for at in places:
    expect(at, at + MIB, 0)
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
    let zeroes = dir.sparse("zeroes", 16 * MIB);
    target.assert_holds(&zeroes, 0, 16 * MIB);
}

/// What was written with FUA is on the device, whatever happens to nbdblk then.
pub(crate) fn fua_survives_a_kill(target: &Target) {
    let dir = Dir::new();
    let path = dir.at("data");
    std::fs::write(&path, Rng(target.block).bytes(MIB as usize)).expect("there is room for 1 MiB");
    let server = target.serve(&dir);
    let text = format!(
        "
assert h.can_fua()
fill(7 * MIB, 9 * MIB, 0xff)
h.pwrite(open({path:?}, 'rb').read(), 8 * MIB, nbd.CMD_FLAG_FUA)
h.zero(4096, 8 * MIB - 4096, nbd.CMD_FLAG_FUA)
"
    );
    script(&server.uri(), &text);
    drop(server); // SIGKILL
    target.assert_holds(&path, 8 * MIB, MIB);
    target.assert_holds(&dir.sparse("zeroes", 4096), 8 * MIB - 4096, 4096);
}

/// Reads, writes and zeroes at odd places against a model; what is there at the end is seen by the other way too.
pub(crate) fn unaligned_requests(target: &Target) {
    let dir = Dir::new();
    let path = dir.at("model");
    let server = target.serve(&dir);
    let text = format!(
        "
rng = random.Random(4)
base, n = 6 * MIB, MIB
model = bytearray(rng.randbytes(n))
h.pwrite(model, base)
for step in range(250):
    at = rng.randrange(n)
    len = min(rng.choice([1, 7, 511, 513, 4095, 4097, 70001]), n - at)
    kind = rng.choice('rrwwwz')
    if kind == 'w':
        data = rng.randbytes(len)
        h.pwrite(data, base + at)
        model[at:at + len] = data
    elif kind == 'z':
        h.zero(len, base + at)
        model[at:at + len] = bytes(len)
    else:
        assert h.pread(len, base + at) == model[at:at + len], (step, at, len)
for at in range(0, n, 1 << 18):
    assert h.pread(1 << 18, base + at) == model[at:at + (1 << 18)], at
h.flush()
open({path:?}, 'wb').write(model)
"
    );
    script(&server.uri(), &text);
    assert!(server.terminate().success());
    target.assert_holds(&path, 6 * MIB, MIB);
}

/// The longest request that clients may send, which is above every device's own limit.
pub(crate) fn longest_requests(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let text = "
longest = h.get_block_size(nbd.SIZE_MAXIMUM)
assert longest == 32 * MIB, longest
data = random.Random(5).randbytes(longest)
for at in 0, 4096, size - longest:
    h.pwrite(data, at)
    assert h.pread(longest, at) == data, at
h.pwrite(data[:-1], 1)
assert h.pread(longest, 0)[1:] == data[:-1]
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
}

/// Two clients write records that lie beside each other in the same blocks; no record is lost.
pub(crate) fn two_clients_in_the_same_blocks(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let uri = server.uri();
    let write = |client: u32| {
        let text = format!(
            "
for n in range({client}, 400, 2):
    h.pwrite(n.to_bytes(2, 'little') * 500, 64 * MIB + n * 1000)
"
        );
        script(&uri, &text);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| write(0));
        scope.spawn(|| write(1));
    });
    let text = "
for n in range(400):
    assert h.pread(1000, 64 * MIB + n * 1000) == n.to_bytes(2, 'little') * 500, n
";
    script(&uri, text);
    assert!(server.terminate().success());
}
