//! Whole images through the server and back: nbdcopy, qemu-img, and fio with verification.

use nbdblk_tests::{Dir, Export, Nbdblk, Qsd, assert_equal, tool, write_runs};

use crate::{Behind, MIB};

const SIZE: u64 = 1024 * MIB;

/// 256 MiB of random data in 64 runs with unaligned ends, and holes between them.
fn runs() -> impl Iterator<Item = (u64, u64)> {
    (0..64).map(|n| (n * 16 * MIB + n * 513, 4 * MIB + n * 77))
}

/// Copies an image in over four connections, compares it in place, copies it out, and compares again.
fn there_and_back(listen: fn(&Dir, &[&str]) -> Nbdblk, spec: impl FnOnce(&Dir) -> (Option<Qsd>, String)) {
    let dir = Dir::new();
    let (source, copy) = (dir.text("source.raw"), dir.text("copy.raw"));
    write_runs(source.as_ref(), SIZE, runs());
    let (_qsd, spec) = spec(&dir);
    let server = listen(&dir, &[&spec]);
    tool("nbdcopy").args(["--connections=4", "--flush", &source, &server.uri()]).ok();
    tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &source, &server.uri()]).ok();
    tool("nbdcopy").args(["--connections=4", &server.uri(), &copy]).ok();
    assert_equal(source.as_ref(), copy.as_ref());
    assert!(server.terminate().success());
}

/// A target full of old data, so that missing zeroes are noticed.
fn dirty(dir: &Dir) -> std::path::PathBuf {
    let path = dir.at("disk.raw");
    write_runs(&path, SIZE, (0..SIZE / (16 * MIB)).map(|n| (n * 16 * MIB + 3 * MIB, 2 * MIB)));
    path
}

fn file(dir: &Dir) -> (Option<Qsd>, String) {
    (None, format!("io_uring={}", dirty(dir).display()))
}

fn vhost_user(dir: &Dir, queues: u32) -> (Option<Qsd>, String) {
    let qsd = Qsd::start(dir, &dirty(dir), Export { queues, ..Export::default() });
    let spec = qsd.spec();
    (Some(qsd), spec)
}

fn vhost_user_qcow2(dir: &Dir) -> (Option<Qsd>, String) {
    let path = dir.at("disk.qcow2");
    tool("qemu-img").args(["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1G"]).ok();
    let qsd = Qsd::start(dir, &path, Export { format: "qcow2", queues: 4, ..Export::default() });
    let spec = format!("{},num-queues=2", qsd.spec());
    (Some(qsd), spec)
}

#[test]
fn a_file_over_unix() {
    there_and_back(Nbdblk::unix, file);
}

#[test]
fn a_file_over_tcp() {
    there_and_back(Nbdblk::tcp, file);
}

#[test]
fn vhost_user_over_unix() {
    there_and_back(Nbdblk::unix, |dir| vhost_user(dir, 1));
}

#[test]
fn vhost_user_over_tcp_with_two_queues_of_a_qcow2() {
    there_and_back(Nbdblk::tcp, vhost_user_qcow2);
}

/// Random reads and writes of 4 to 256 KiB. Everything written is read back, and its checksum compared.
fn verified_by_fio(behind: Behind) {
    let stand = behind.stand(512 * MIB, &[]);
    let uri = format!("--uri={}", stand.server.uri());
    tool("fio")
        .args(["--name=verify", "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-256k", "--size=256m"])
        .args(["--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", &uri])
        .within(stand.dir.path())
        .ok();
    assert!(stand.server.terminate().success());
}

#[test]
fn fio_verifies_a_file() {
    verified_by_fio(Behind::IoUring);
}

#[test]
fn fio_verifies_vhost_user() {
    verified_by_fio(Behind::VhostUser);
}

/// A client that opens as many connections as the server permits.
#[test]
fn a_server_for_one_connection_does_not_advertise_more() {
    let dir = Dir::new();
    write_runs(dir.at("source.raw").as_ref(), 4 * MIB, [(MIB, MIB)]);
    let server = Nbdblk::unix(&dir, &["memory=4M", "--connections", "1"]);
    tool("nbdcopy").args(["--connections=4", &dir.text("source.raw"), &server.uri()]).ok();
    let can = |args: &[&str]| tool("nbdinfo").args(["--can", "multi-conn"]).args(args).run().status.success();
    let program = nbdblk_tests::nbdblk().path().to_str().expect("the target directory has a plain name").to_owned();
    assert!(!can(&[&server.uri()]));
    assert!(!can(&["--", "[", &program, "serve", "-s", "memory=1M", "]"]));
    let server = Nbdblk::unix(&dir, &["memory=4M", "--connections", "2"]);
    assert!(can(&[&server.uri()]));
}
