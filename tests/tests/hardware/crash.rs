//! The end of nbdblk in the middle of its work.

use nbdblk_tests::{Dir, nbdsh, tool};

use crate::target::Target;

/// If nbdblk is killed while a client writes, the next start can use the device at once. With VDUSE, it is killed between two
/// writes: qemu-storage-daemon 10, the device behind it, aborts when it is reset with requests in flight, and the kernel resets
/// it when nbdblk's end closes the device.
pub(crate) fn killed_in_mid_write(target: &Target) {
    let dir = Dir::new();
    let server = target.serve(&dir);
    let script = format!(
        "
import itertools, time
bufs = [nbd.Buffer.from_bytearray(bytearray(65536)) for _ in range(32)]
for n in itertools.count():
    while h.aio_in_flight() >= 32:
        h.poll(-1)
    h.aio_pwrite(bufs[n % 32], n % 256 * 65536, completion=lambda error: 1)
    if n == 64:
        while {between} and h.aio_in_flight():
            h.poll(-1)
        print('writing', flush=True)
        time.sleep(600 if {between} else 0)
",
        between = if target.spec == "vdpa=$NBDBLK_VDPA" { "True" } else { "False" }
    );
    let mut client = tool("nbdsh").args(["-u", &server.uri(), "-c", &script]).spawn(dir.at("client"));
    client.await_text("writing");
    drop(server); // SIGKILL
    let server = target.serve(&dir);
    let script = "
data = b'\\x5a' * (1 << 20)
h.pwrite(data, 1 << 20)
h.flush()
assert h.pread(1 << 20, 1 << 20) == data
";
    nbdsh(&server.uri(), script);
    assert!(server.terminate().success());
}
