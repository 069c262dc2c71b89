//! Data through nbdblk, checked through nbdblk and by the other way.

use nbdblk_tests::{Dir, Nbdkit, Rng, assert_equal, tool, write_runs};

use crate::target::{Other, Target, expand};

const MIB: u64 = 1 << 20;

/// Shared by the scripts: a pattern, its place, and a check. They run without nbdsh, whose start takes twice as long.
const SCRIPT: &str = "
import nbd, random, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_ALIGN)
size, MIB, MARK = h.get_size(), 1 << 20, 64 << 10
def pieces(at, end):
    while at < end:
        yield at, min(4 * MIB, end - at)
        at += 4 * MIB
def fill(at, end, byte):
    for at, n in pieces(at, end):
        h.pwrite(bytes([byte]) * n, at)
def mark(places, byte):
    for at in places:
        fill(at, at + MARK, byte)
def expect_marks(places, byte):
    for at in places:
        expect(at, at + MARK, byte)
def expect(at, end, byte):
    for at, n in pieces(at, end):
        data = h.pread(n, at)
        if data != bytes([byte]) * n:
            bad = next(i for i in range(n) if data[i] != byte)
            raise SystemExit('at %d: %#x instead of %#x' % (at + bad, data[bad], byte))
";

fn script(uri: &str, text: &str) -> String {
    tool("python3").args(["-c", &format!("{SCRIPT}{text}"), uri]).ok().out
}

/// An image with data and holes, over old data that must not be visible.
pub(crate) fn copied_in_and_out(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let size = copied_in(&dir, &server.uri());
    let (source, copy) = (dir.at("source"), dir.text("copy"));
    tool("nbdcopy").args(["--connections=4", &server.uri(), &copy]).ok();
    assert_equal(&source, copy.as_ref());
    assert!(server.terminate().success());
    target.assert_holds(&source, 0, size);
}

/// An image copied in through the nbdkit plugin; parts of it are read.
pub(crate) fn copied_in_by_the_plugin(target: &Target) {
    let dir = Dir::new();
    let spec = target.spec();
    let server = Nbdkit::start(&dir, &spec.split(',').collect::<Vec<_>>());
    let size = copied_in(&dir, &server.uri());
    let source = dir.at("source");
    let text = format!(
        "
source = open({source:?}, 'rb').read()
for at in [*range(0, size - MARK, 2 * MIB + 511), size - MARK]:
    assert h.pread(MARK, at) == source[at:at + MARK], at
assert h.can_fua() and h.can_zero() and h.can_trim() and h.can_multi_conn()
"
    );
    script(&server.uri(), &text);
    assert!(server.terminate().success());
    target.assert_holds(&source, 0, size);
}

/// Copies an image, the file `source`, over the whole device. Returns the size.
fn copied_in(dir: &Dir, uri: &str) -> u64 {
    let source = dir.text("source");
    let size = script(uri, "mark(range(MIB // 2, size - MARK, 5 * MIB), 0x5a)\nprint(size)");
    let size: u64 = size.trim().parse().expect("a size is a number");
    let runs = (0..size / (16 * MIB)).map(|n| (n * 16 * MIB + n * 513, 2 * MIB + n * 77));
    write_runs(source.as_ref(), size, runs);
    tool("nbdcopy").args(["--connections=4", "--flush", &source, uri]).ok();
    size
}

/// Random reads and writes. Everything written is read back, and its checksum compared.
pub(crate) fn verified_by_fio(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let uri = format!("--uri={}", server.uri());
    tool("fio")
        .args(["--name=verify", "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-256k", "--size=8m"])
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
inside, around = [*range(at, end - MARK, MIB), end - MARK], [at - MARK, end]
for flags in 0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA:
    mark(inside + around, 0xa5)
    h.zero(end - at, at, flags)
    expect_marks(around, 0xa5)
    expect_marks(inside, 0)
expect(at, end, 0)
for flags in 0, nbd.CMD_FLAG_FUA:
    mark(inside + around, 0x5a)
    h.trim(end - at, at, flags)
    expect_marks(around, 0x5a)
    for place in inside:
        h.pread(MARK, place)
    mark(inside, 0xc3)
    expect_marks(inside, 0xc3)
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
}

/// The whole device in one request.
pub(crate) fn whole_device_zeroed_and_trimmed(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let text = "
places = [*range(0, size - MARK, 3 * MIB + MARK), size - MARK]
mark(places, 0xa5)
h.zero(size, 0)
expect(0, size, 0)
mark(places, 0xa5)
h.trim(size, 0)
for at in places:
    h.pread(MARK, at)
mark(places, 0xa5)
expect_marks(places, 0xa5)
h.zero(size, 0, nbd.CMD_FLAG_NO_HOLE)
expect_marks(places, 0)
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
    let zeroes = dir.sparse("zeroes", 8 * MIB);
    target.assert_holds(&zeroes, 0, 8 * MIB);
}

/// Data written with FUA is on the device, whatever happens to nbdblk then.
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

/// Reads, writes and zeroes at unaligned places, checked against a model. The final content is also checked by the other way.
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
for step in range(120):
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

/// The longest request of clients, which exceeds every device's own limit.
pub(crate) fn longest_requests(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let text = "
longest = h.get_block_size(nbd.SIZE_MAXIMUM)
assert longest == 32 * MIB, longest
data = random.Random(5).randbytes(65521)
data = (data * (longest // len(data) + 1))[:longest]
at = size - longest - 4096
h.pwrite(data, at)
assert h.pread(longest, at) == data
h.pwrite(data[:-1], 1)
assert h.pread(longest, 0)[1:] == data[:-1]
";
    script(&server.uri(), text);
    assert!(server.terminate().success());
}

/// Two clients write adjacent records in the same blocks; no record is lost.
pub(crate) fn two_clients_in_the_same_blocks(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let uri = server.uri();
    let write = |client: u32| {
        let text = format!(
            "
for n in range({client}, 200, 2):
    h.pwrite(n.to_bytes(2, 'little') * 500, 24 * MIB + n * 1000)
"
        );
        script(&uri, &text);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| write(0));
        scope.spawn(|| write(1));
    });
    let text = "
for n in range(200):
    assert h.pread(1000, 24 * MIB + n * 1000) == n.to_bytes(2, 'little') * 500, n
";
    script(&uri, text);
    assert!(server.terminate().success());
}

/// QEMU's own NVMe driver reads the writes of nbdblk, and the other way round.
#[test]
fn qemu_and_nvme() {
    let target = Target { spec: "nvme=$NBDBLK_NVME/1", block: 512, other: Other::Nvme("$NBDBLK_NVME", 1) };
    target.check(|target| {
        let dir = Dir::new();
        let server = target.serve(&dir);
        script(&server.uri(), "fill(3 * MIB, 5 * MIB, 0x5a); h.flush()");
        assert!(server.terminate().success());
        let uri = expand("nvme://$NBDBLK_NVME/1");
        tool("qemu-io").args(["-f", "raw", "-c", "read -P 0x5a 3M 2M", "-c", "write -P 0xa5 4M 1M", &uri]).ok();
        let server = target.serve(&dir);
        script(&server.uri(), "expect(3 * MIB, 4 * MIB, 0x5a); expect(4 * MIB, 5 * MIB, 0xa5)");
        assert!(server.terminate().success());
    });
}
