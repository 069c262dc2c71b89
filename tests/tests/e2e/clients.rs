//! Each client reports the true properties of an export, and every way to negotiate one works.

use std::io::Write;
use std::sync::Barrier;

use nbdblk_tests::{Address, Dir, Export, Nbdblk, Qsd, nbdinfo, nbdsh, nbdsh_unconnected, tool, write_runs};
use serde_json::Value;

use crate::{Behind, KIB, MIB};

fn check_size(server: &Nbdblk, size: u64) {
    let uri = server.uri();
    assert_eq!(tool("nbdinfo").args(["--size", &uri]).ok().out.trim(), size.to_string());
    assert_eq!(nbdinfo(&uri)["exports"][0]["export-size"], size);
    let info = tool("qemu-img").args(["info", "--output=json", &uri]).ok().out;
    let info: Value = serde_json::from_str(&info).unwrap();
    // QEMU counts in sectors.
    let sectors = Value::from(size.next_multiple_of(512));
    assert_eq!((&info["virtual-size"], &info["format"]), (&sectors, &Value::from("raw")));
}

/// nbdinfo must report every `(key, value)`.
fn check_info(server: &Nbdblk, expected: &[(&str, Value)]) {
    let info = nbdinfo(&server.uri());
    assert_eq!((&info["protocol"], &info["structured"]), (&Value::from("newstyle-fixed"), &Value::from(true)));
    for (key, value) in expected {
        assert_eq!(&info["exports"][0][key], value, "{key} of {info:#}");
    }
}

/// Capabilities of every writable export.
fn writable() -> Vec<(&'static str, Value)> {
    let yes = ["can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"];
    let yes = yes.map(|key| (key, Value::from(true)));
    yes.into_iter().chain([("is_read_only", false.into())]).collect()
}

#[test]
fn a_file_is_described_correctly() {
    // Not a multiple of 512: a file is served to its last byte.
    let size = 16 * MIB + 100;
    let stand = Behind::IoUring.stand(size, &[]);
    check_size(&stand.server, size);
    check_info(&stand.server, &writable());
    check_info(
        &stand.server,
        &[("can_cache", true.into()), ("block_size_minimum", 1.into()), ("contexts", vec!["base:allocation"].into())],
    );
}

#[test]
fn a_direct_file_is_described_correctly_and_takes_any_byte() {
    let dir = Dir::new();
    write_runs(&dir.at("disk.raw"), 8 * MIB, [(0, MIB)]);
    let server = Nbdblk::unix(&dir, &["io_uring=disk.raw,direct=true"]);
    check_size(&server, 8 * MIB);
    check_info(&server, &writable());
    let min = nbdinfo(&server.uri())["exports"][0]["block_size_minimum"].as_u64().unwrap();
    assert!(min.is_power_of_two() && min <= 4096, "minimum block size {min}");
    let script = format!(
        "h.set_strict_mode(0)
before = h.pread(3 * 4096, 0); h.pwrite(b'x' * {min}, 4096 + {min})
after = bytearray(before); after[4096 + {min} : 4096 + 2 * {min}] = b'x' * {min}
assert h.pread(3 * 4096, 0) == after"
    );
    nbdsh(&server.uri(), &script);
}

#[test]
fn vhost_user_is_described_correctly() {
    let stand = Behind::VhostUser.stand(64 * MIB, &[]);
    check_size(&stand.server, 64 * MIB);
    check_info(&stand.server, &writable());
    let min = nbdinfo(&stand.server.uri())["exports"][0]["block_size_minimum"].as_u64().unwrap();
    assert!(min == 1 || min == 512, "minimum block size {min}");
}

#[test]
fn memory_and_null_are_described_correctly() {
    let dir = Dir::new();
    for (spec, size) in [("memory=64M", 64 * MIB), ("null=1G", 1024 * MIB), ("memory=1048576", MIB)] {
        let server = Nbdblk::unix(&dir, &[spec]);
        check_size(&server, size);
        check_info(&server, &writable());
    }
}

#[test]
fn the_printed_uri_is_understood_by_every_client() {
    let dir = Dir::new();
    for args in [&["memory=1M"][..], &["odd name/ü:memory=1M"]] {
        for server in [Nbdblk::unix(&dir, args), Nbdblk::tcp(&dir, args)] {
            let uri = server.printed_uri();
            assert_eq!(tool("nbdinfo").args(["--size", uri]).ok().out.trim(), MIB.to_string(), "{uri}");
            tool("qemu-io").args(["-f", "raw", "-c", "read 0 512", uri]).ok();
        }
    }
}

#[test]
fn read_only_is_described_correctly() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let server = Nbdblk::tcp(&dir, &["-r", "io_uring=disk.raw"]);
    check_info(&server, &[("is_read_only", true.into()), ("export-size", MIB.into())]);
    assert!(!tool("qemu-io").args(["-f", "raw", "-c", "write 0 512", &server.uri()]).run().status.success());
}

/// The rows of `nbdinfo --map`: offset, length, type.
fn map(uri: &str) -> Vec<(u64, u64, u64)> {
    let json = tool("nbdinfo").args(["--map", "--json", uri]).ok().out;
    let rows: Vec<Value> = serde_json::from_str(&json).unwrap();
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap();
    rows.iter().map(|row| (number(row, "offset"), number(row, "length"), number(row, "type"))).collect()
}

#[test]
fn the_map_of_a_sparse_file_shows_its_holes() {
    let stand = Behind::IoUring.stand(16 * MIB, &[(MIB, MIB), (5 * MIB, 64 * KIB)]);
    let expected = [
        (0, MIB, 3),
        (MIB, MIB, 0),
        (2 * MIB, 3 * MIB, 3),
        (5 * MIB, 64 * KIB, 0),
        (5 * MIB + 64 * KIB, 11 * MIB - 64 * KIB, 3),
    ];
    assert_eq!(map(&stand.server.uri()), expected);
    // A hole that is made through the server is visible at once on another connection.
    nbdsh(&stand.server.uri(), "h.trim(512 * 1024, 1024 * 1024)");
    assert_eq!(map(&stand.server.uri())[0], (0, MIB + 512 * KIB, 3));
}

#[test]
fn the_map_of_vhost_user_is_all_data() {
    // Virtio-blk cannot report holes, and "data" is always a safe answer.
    let stand = Behind::VhostUser.stand(16 * MIB, &[]);
    assert_eq!(map(&stand.server.uri()), [(0, 16 * MIB, 0)]);
}

#[test]
fn several_exports_are_listed_and_the_first_is_the_default() {
    let dir = Dir::new();
    dir.sparse("c.raw", 3 * MIB);
    let server = Nbdblk::unix(&dir, &["a:memory=1M", "b:null=2M", "c:io_uring=c.raw"]);
    for (name, size) in [("", MIB), ("a", MIB), ("b", 2 * MIB), ("c", 3 * MIB)] {
        assert_eq!(
            tool("nbdinfo").args(["--size", &server.uri_of(name)]).ok().out.trim(),
            size.to_string(),
            "{name:?}"
        );
    }
    let list = tool("nbdinfo").args(["--list", "--json", &server.uri()]).ok().out;
    let list: Value = serde_json::from_str(&list).unwrap();
    let names: Vec<&str> =
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let Address::Unix(socket) = server.address() else { unreachable!("a unix server") };
    let list = tool("qemu-nbd").args(["-L", "-k", socket.to_str().unwrap()]).ok().out;
    assert!(list.contains("exports available: 3") && list.contains("export: 'b'"), "{list}");
    // They are different devices.
    nbdsh(&server.uri_of("a"), "h.pwrite(b'a' * 512, 0)");
    assert_eq!(nbdsh(&server.uri_of("c"), "print(bytes(h.pread(3, 0)))").trim(), r"b'\x00\x00\x00'");
    assert!(!tool("nbdinfo").args([server.uri_of("nosuch")]).run().status.success());
    assert_eq!(nbdsh(&server.uri(), "print(bytes(h.pread(3, 0)))").trim(), "b'aaa'");
}

/// A file with two exports for all clients, and one for a user that is not tested.
fn write_list(dir: &Dir) {
    let exports = r#"
        [[export]]
        name = "first/Größe"
        description = "the first one, which is the default — Größe"
        device = "memory=4M"
        [[export]]
        name = "hidden"
        description = "for another user"
        device = "memory=5M"
        allow = ["uid=4294967294", "ip=192.0.2.1"]
        [[export]]
        name = "second"
        device = "null=6T"
    "#;
    std::fs::write(dir.at("list.toml"), exports).unwrap();
}

/// Checks the output of `nbdinfo --list --json` for it.
fn check_list(list: &Value) {
    let exports: Vec<_> = list["exports"].as_array().unwrap().iter().collect();
    let told = |key: &str| exports.iter().map(|export| export[key].clone()).collect::<Vec<_>>();
    assert_eq!(told("export-name"), ["first/Größe", "second"]);
    assert_eq!(told("description"), ["the first one, which is the default — Größe", "null"]);
    assert_eq!(told("export-size"), [4 * MIB, 6 * 1024 * 1024 * MIB]);
    assert!(exports.iter().all(|export| export["contexts"][0] == "base:allocation"), "{list:#}");
}

#[test]
fn list_and_info_return_names_and_descriptions_of_permitted_exports() {
    let dir = Dir::new();
    write_list(&dir);
    for server in [Nbdblk::unix(&dir, &["--config", "list.toml"]), Nbdblk::tcp(&dir, &["--config", "list.toml"])] {
        let list = tool("nbdinfo").args(["--list", "--json", &server.uri()]).ok().out;
        check_list(&serde_json::from_str(&list).unwrap());
        let default = &nbdinfo(&server.uri())["exports"][0];
        assert_eq!(default["export-name"], "first/Größe", "INFO_NAME tells which one the default is");
        let script = "
h.set_full_info(True); h.set_opt_mode(True); h.connect_uri(uri)
for name in ('', 'second', 'hidden', 'absent'):
    h.set_export_name(name)
    try: h.opt_info(); print(h.get_canonical_export_name(), h.get_export_description(), sep='; ')
    except nbd.Error as error: print(error.errno)";
        let said = nbdsh_unconnected(&server.uri(), script);
        let first = "first/Größe; the first one, which is the default — Größe";
        assert_eq!(said, format!("{first}\nsecond; null\nENOENT\nENOENT\n"));
    }
}

#[test]
fn clients_without_block_sizes_are_refused_by_exports_that_require_them() {
    let dir = Dir::new();
    let node = "driver=null-co,node-name=disk,size=1048576,read-zeroes=on";
    let qsd = Qsd::start_node_with(&dir, node, Export::default(), ",logical-block-size=4096");
    // The other export has a block size of one byte: clients need not request it.
    for (required, blocks_told) in [("block-size-required = true\n", false), ("", true)] {
        let export = |name, device: &str| format!("[[export]]\nname = \"{name}\"\ndevice = \"{device}\"\n{required}");
        let text = export("blocks", &qsd.spec()) + &export("bytes", "memory=1M");
        std::fs::write(dir.at("sizes.toml"), text).unwrap();
        let server = Nbdblk::unix(&dir, &["--config", "sizes.toml"]);
        assert_eq!(nbdinfo(&server.uri_of("blocks"))["exports"][0]["block_size_minimum"], 4096, "nbdinfo asks");
        let script = "
for name in ('blocks', 'bytes'):
    for flags, asks in ((0, False), (3, False), (3, True)):
        h = nbd.NBD(); h.set_handshake_flags(flags); h.set_request_block_size(asks); h.set_strict_mode(0)
        try: h.connect_uri(uri.replace('blocks', name)); print(*h.pread(3, 1))
        except nbd.Error: print('refused')";
        let said = nbdsh_unconnected(&server.uri_of("blocks"), script);
        let blocks = if blocks_told { ["0 0 0"; 3] } else { ["refused", "refused", "0 0 0"] };
        assert_eq!(said.lines().collect::<Vec<_>>(), [blocks, ["0 0 0"; 3]].concat());
        assert!(server.terminate().success());
    }
}

#[test]
fn qemu_io_reads_back_the_patterns_it_wrote() {
    for behind in Behind::BOTH {
        let stand = behind.stand(64 * MIB, &[(0, 4 * MIB)]);
        let commands = [
            "write -P 0x5a 0 64k",
            "write -f -P 0xa5 64k 1M",
            "aio_write -P 0x11 2M 4M",
            "aio_flush",
            "write -z -u 3M 512k",
            "discard 8M 1M",
            "read -P 0x5a 0 64k",
            "read -P 0xa5 64k 1M",
            "read -P 0x11 2M 1M",
            "read -P 0 3M 512k",
            "read -P 0x11 3584k 512k",
            "flush",
        ];
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let output = tool("qemu-io").args(["-f", "raw"]).args(commands).args([stand.server.uri()]).ok();
        assert!(!output.out.contains("failed") && !output.err.contains("failed"), "{behind:?}: {output:?}");
    }
}

/// Every combination of omitted handshake settings. Each reads, writes and zeroes the same.
const COMBINATIONS: &str = r"
import itertools, nbd
knows_extended = hasattr(nbd.NBD, 'set_request_extended_headers')
def connect(fixed, zeroes, structured, context, sizes, go, extended=False):
    h = nbd.NBD()
    if knows_extended: h.set_request_extended_headers(extended)
    h.set_strict_mode(0)
    h.set_handshake_flags((nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE if fixed else 0) | (nbd.HANDSHAKE_FLAG_NO_ZEROES if zeroes else 0))
    h.set_request_structured_replies(structured)
    # Older libraries ask for a context when one was added, newer ones only when told to as well.
    if hasattr(h, 'set_request_meta_context'): h.set_request_meta_context(context)
    h.set_request_block_size(sizes)
    if context: h.add_meta_context('base:allocation')
    h.set_opt_mode(go)
    h.connect_uri(uri)
    if go and h.aio_is_negotiating(): h.opt_go()
    return h
n = 0
for combination in itertools.product((False, True), repeat=7 if knows_extended else 6):
    h = connect(*combination)
    n += 1
    data = bytes([n]) * 5000
    h.pwrite(data, 4096 * n)
    assert h.pread(5000, 4096 * n) == data, combination
    h.zero(1000, 4096 * n + 512)
    assert h.pread(2000, 4096 * n) == data[:512] + bytes(1000) + data[:488], combination
    h.flush()
    # A structured reply is there when it was asked for, and block status with it.
    assert h.get_structured_replies_negotiated() == (combination[0] and combination[2]), combination
    if knows_extended:
        assert h.get_extended_headers_negotiated() == (combination[0] and combination[2] and combination[6]), combination
    assert h.can_df() == h.get_structured_replies_negotiated()
    if h.can_meta_context('base:allocation'):
        extents = []
        h.block_status(8192, 0, lambda name, at, entries, error: extents.extend(entries))
        assert sum(extents[::2]) >= 4096, extents
    else:
        assert not (combination[0] and combination[2] and combination[3]), combination
    h.shutdown()
print(n)
";

#[test]
fn every_combination_of_handshake_settings_works() {
    for behind in Behind::BOTH {
        let stand = behind.stand(4 * MIB, &[]);
        assert_eq!(nbdsh_unconnected(&stand.server.uri(), COMBINATIONS).trim(), "64", "{behind:?}");
    }
}

/// libnbd 1.22 supports extended headers, and uses them unless it is configured otherwise. It is in the root of Debian trixie,
/// which `cargo xtask test` makes.
#[test]
fn libnbd_of_trixie_has_extended_headers_and_every_fallback() {
    let Ok(root) = std::env::var("NBDBLK_NBDKIT_ROOT") else {
        // Not with eprintln: a passing test does not show its output.
        let said = b"\nSKIPPED: libnbd 1.22 takes NBDBLK_NBDKIT_ROOT, a root of Debian trixie\n";
        return std::io::stderr().write_all(said).unwrap();
    };
    let client = |name: &str| tool("chroot").args([&root, name]);
    let dir = Dir::new();
    write_list(&dir);
    let server = Nbdblk::tcp(&dir, &["--config", "list.toml"]);
    let uri = server.uri();
    let combinations = format!("uri = {uri:?}\n{COMBINATIONS}");
    assert_eq!(client("nbdsh").args(["-c", &combinations]).ok().out.trim(), "128");
    let list: Value = serde_json::from_str(&client("nbdinfo").args(["--list", "--json", &uri]).ok().out).unwrap();
    assert_eq!(list["extended"], true);
    check_list(&list);
    let script = format!(
        "h.add_meta_context('base:allocation'); h.connect_uri({:?})
whole = h.get_size(); extents = []
h.zero(whole, 0); h.trim(whole, 0)
h.block_status_64(whole, 0, lambda name, at, entries, error: extents.extend(entries))
print(whole, extents)",
        server.uri_of("second")
    );
    let whole = 6 * 1024 * 1024 * MIB;
    assert_eq!(client("nbdsh").args(["-c", &script]).ok().out.trim(), format!("{whole} [({whole}, 3)]"));
}

#[test]
fn nbdsh_has_five_hundred_requests_in_flight_on_one_connection() {
    for behind in Behind::BOTH {
        let stand = behind.stand(64 * MIB, &[(0, 64 * MIB)]);
        let script = "
import sys
bufs = [nbd.Buffer(4096) for n in range(512)]
cookies = [h.aio_pread(buf, n * 131072 % (64 << 20)) for n, buf in enumerate(bufs)]
while h.aio_in_flight() > 0: h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
sys.stdout.write(str(sum(buf.to_bytearray() == h.pread(4096, n * 131072 % (64 << 20)) for n, buf in enumerate(bufs))))";
        assert_eq!(nbdsh(&stand.server.uri(), script), "512", "{behind:?}");
    }
}

#[test]
fn qcow2_inside_qcow2_is_read_by_qemu_through_the_server() {
    // The content of the export is a qcow2 image: QEMU opens it over NBD, and reads and writes its metadata there.
    let dir = Dir::new();
    let image = dir.sparse("disk.raw", 64 * MIB);
    let qsd = Qsd::start(&dir, &image, Export { queues: 2, ..Export::default() });
    let server = Nbdblk::unix(&dir, &[&qsd.spec()]);
    tool("qemu-img").args(["create", "-q", "-f", "qcow2", &server.uri(), "32M"]).ok();
    let io = ["-c", "write -P 7 1M 3M", "-c", "read -P 7 2M 1M", "-c", "read -P 0 8M 1M"];
    tool("qemu-io").args(["-f", "qcow2"]).args(io).args([server.uri()]).ok();
    tool("qemu-img").args(["check", "-f", "qcow2", &server.uri()]).ok();
}

#[test]
fn all_clients_at_the_same_time() {
    const SIZE: u64 = 64 * MIB;
    let dir = Dir::new();
    write_runs(&dir.at("disk.raw"), SIZE, [(48 * MIB, 16 * MIB)]);
    write_runs(&dir.at("part.raw"), 4 * MIB, [(0, 4 * MIB)]);
    let disk = "disk:io_uring=disk.raw";
    let server = Nbdblk::unix(&dir, &[disk, "copy:memory=64M", "-p", "0"]);
    let log = server.log();
    let tcp = log.lines().find(|uri| uri.starts_with("nbd://") && uri.ends_with("/disk")).expect("it listens on TCP");
    let Address::Unix(socket) = server.address() else { unreachable!("a unix server") };
    let (unix, socket) = (server.uri_of("disk"), socket.display().to_string());
    let copy = server.uri_of("copy");
    // Each client has its own place on the disk, so all its writes must be there at the end. 0 to 1 MiB is for the combinations
    // of handshake settings, then 4 MiB for each of the others. From 48 MiB on, nothing is written.
    let clients: [(&str, &(dyn Fn() + Sync)); 9] = [
        ("every handshake", &|| assert_eq!(nbdsh_unconnected(tcp, COMBINATIONS).trim(), "64")),
        ("nbdinfo", &|| assert_eq!(nbdinfo(&unix)["exports"][0]["export-size"], SIZE)),
        ("nbdinfo --list", &|| {
            let list = tool("nbdinfo").args(["--list", "--json", tcp]).ok().out;
            assert_eq!(serde_json::from_str::<Value>(&list).unwrap()["exports"].as_array().unwrap().len(), 2, "{list}");
        }),
        ("qemu-nbd -L", &|| {
            let list = tool("qemu-nbd").args(["-L", "-k", &socket]).ok().out;
            assert!(list.contains("exports available: 2"), "{list}");
        }),
        ("qemu-img", &|| {
            let source = dir.text("part.raw");
            let at = format!(
                "driver=raw,offset=4M,size=4M,file.driver=nbd,file.export=disk,file.server.type=unix,file.server.path={socket}"
            );
            tool("qemu-img").args(["convert", "-n", "-f", "raw", "--target-image-opts", &source, &at]).ok();
            let json = format!(
                r#"json:{{"driver":"raw","offset":4194304,"size":4194304,"file":{{"driver":"nbd","export":"disk","server":{{"type":"unix","path":"{socket}"}}}}}}"#
            );
            tool("qemu-img").args(["compare", &source, &json]).ok();
        }),
        ("qemu-io", &|| {
            let commands = ["-c", "write -P 7 8M 3M", "-c", "read -P 7 8M 3M", "-c", "write -z -u 9M 1M"];
            tool("qemu-io").args(["-f", "raw"]).args(commands).args(["-c", "read -P 0 9M 1M", &unix]).ok();
        }),
        ("nbdkit's nbd plugin", &|| {
            let run = "nbdsh -u \"$uri\" -c 'd = bytes(range(256)) * 4096' -c 'h.pwrite(d, 12 << 20); assert h.pread(1 << 20, 12 << 20) == d; h.flush()'";
            tool("nbdkit").args(["-U", "-", "nbd", &format!("uri={tcp}"), "--run", run]).ok();
        }),
        ("fio", &|| {
            let args = ["--name=all", "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-64k", "--iodepth=32"];
            let more = ["--offset=16m", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
            tool("fio").args(args).args(more).args([format!("--uri={unix}")]).within(dir.path()).ok();
        }),
        ("nbdcopy", &|| {
            tool("nbdcopy").args(["--connections=4", tcp, &copy]).ok();
            tool("qemu-io").args(["-f", "raw", "-r", "-c", "read 48M 16M", &copy]).ok();
        }),
    ];
    let start = Barrier::new(clients.len());
    std::thread::scope(|scope| {
        for (name, client) in clients {
            let start = &start;
            let rounds = move || {
                start.wait();
                (0..3).for_each(|_| client());
            };
            std::thread::Builder::new().name(name.into()).spawn_scoped(scope, rounds).unwrap();
        }
    });
    let same = format!(
        "import hashlib
part = lambda u: (lambda h: (h.connect_uri(u), hashlib.sha256(h.pread(16 << 20, 48 << 20)).digest()))(nbd.NBD())[1]
assert part({tcp:?}) == part({copy:?})"
    );
    tool("nbdsh").args(["-c", &same]).ok();
    assert!(server.terminate().success());
}
