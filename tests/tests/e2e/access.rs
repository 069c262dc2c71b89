//! Access rules of exports, as clients see them.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;

use nbdblk_tests::{Address, Cmd, Dir, Nbdblk, Pki, tool};
use nix::unistd::geteuid;
use serde_json::Value;

use crate::NOBODY;

/// A client that runs with the user ID [`NOBODY`].
fn as_nobody(name: &str) -> Cmd {
    let id = NOBODY.to_string();
    tool("setpriv").args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]).args([tool(name).path()])
}

/// The names in the list that a client gets.
fn list(client: Cmd, server: &Nbdblk) -> Vec<String> {
    let list: Value = serde_json::from_str(&client.args(["--list", "--json", &server.uri()]).ok().out).unwrap();
    let exports = list["exports"].as_array().unwrap();
    exports.iter().map(|export| export["export-name"].as_str().unwrap().to_owned()).collect()
}

/// The client's error when it cannot open an export, without the export's name.
fn refusal(client: Cmd, server: &Nbdblk, name: &str) -> String {
    let output = client.args(["--size", &server.uri_of(name)]).run();
    assert!(!output.status.success(), "{name}: {output:?}");
    output.err.replace(name, "NAME")
}

#[test]
fn a_user_sees_only_permitted_exports() {
    let dir = Dir::new();
    let me = geteuid().to_string();
    let rules = [format!("mine:uid={me}"), format!("both:uid={me}"), format!("both:uid={NOBODY}")];
    let mut args = vec!["mine:memory=1M", "nobodys:memory=2M", "both:memory=3M", "all:memory=4M"];
    rules.iter().for_each(|rule| args.extend(["--allow", rule]));
    args.extend(["--allow", "nobodys:uid=65534"]);
    let server = Nbdblk::unix(&dir, &args);
    assert_eq!(list(tool("nbdinfo"), &server), ["mine", "both", "all"]);
    let size = |client: Cmd, name: &str| client.args(["--size", &server.uri_of(name)]).ok().out.trim().to_owned();
    assert_eq!(size(tool("nbdinfo"), "mine"), "1048576");
    assert_eq!(size(tool("nbdinfo"), ""), "1048576");
    assert_eq!(refusal(tool("nbdinfo"), &server, "nobodys"), refusal(tool("nbdinfo"), &server, "absents"));
    // Only root can run a client as another user.
    if geteuid().is_root() {
        let Address::Unix(path) = server.address() else { unreachable!("a unix server") };
        set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        assert_eq!(list(as_nobody("nbdinfo"), &server), ["nobodys", "both", "all"]);
        assert_eq!(size(as_nobody("nbdinfo"), "nobodys"), "2097152");
        assert_eq!(size(as_nobody("nbdinfo"), "both"), "3145728");
        assert_eq!(refusal(as_nobody("nbdinfo"), &server, "mine"), refusal(as_nobody("nbdinfo"), &server, "none"));
        // Every way in is closed, including the oldest.
        let script = format!(
            "for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
    for name in ('mine', '', 'none'):
        h = nbd.NBD(); h.set_handshake_flags(flags); h.set_export_name(name)
        try:
            h.connect_unix({path:?}); print('let in')
        except nbd.Error as error:
            print(flags, str(error).replace(repr(name), 'NAME').replace(f'\"{{name}}\"', 'NAME'))"
        );
        let said = as_nobody("nbdsh").args(["-c", &script]).ok().out;
        let lines: Vec<&str> = said.lines().collect();
        assert!(lines.len() == 6 && !said.contains("let in"), "{said}");
        for same in lines.chunks(3) {
            assert!(same[0] == same[1] && same[1] == same[2], "{said}");
        }
    }
}

#[test]
fn a_network_sees_only_permitted_exports() {
    let dir = Dir::new();
    let args = ["four:memory=1M", "six:memory=2M", "both:memory=3M", "unix:memory=4M"];
    let rules = ["four:ip=127.0.0.0/8", "six:ip=::1", "both:ip=127.0.0.1", "both:ip=::/0", "unix:gid=0"];
    let rules = rules.map(|rule| format!("--allow={rule}"));
    let args = [&args[..], &rules.each_ref().map(String::as_str)].concat();
    let server = Nbdblk::tcp(&dir, &args);
    let port = server.printed_uri().rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    let list = |host: &str| {
        let uri = format!("nbd://{host}:{port}");
        let list: Value = serde_json::from_str(&tool("nbdinfo").args(["--list", "--json", &uri]).ok().out).unwrap();
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(list("127.0.0.1"), ["four", "both"]);
    assert_eq!(list("[::1]"), ["six", "both"]);
    let open = |host: &str, name| {
        tool("qemu-io").args(["-f", "raw", "-c", "read 0 512", &format!("nbd://{host}:{port}/{name}")]).run()
    };
    for (host, name, admitted) in [
        ("127.0.0.1", "four", true),
        ("127.0.0.1", "six", false),
        ("[::1]", "six", true),
        ("[::1]", "four", false),
        ("[::1]", "", false),
        ("[::1]", "unix", false),
    ] {
        assert_eq!(open(host, name).status.success(), admitted, "{host} {name}");
    }
}

#[test]
fn the_owner_of_a_certificate_sees_only_permitted_exports() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    let exports = ["open:memory=1M", "subject:memory=2M", "name:memory=3M", "others:memory=4M"];
    let rules = ["subject:dn=CN=client,O=Example", "name:san=DNS:client.example", "others:dn=CN=client"];
    let rules = rules.map(|rule| format!("--allow={rule}"));
    let tls = ["--tls=on", "--tls-verify-peer", "--tls-certificates", pki.dir()];
    let server = Nbdblk::tcp(&dir, &[&exports[..], &rules.each_ref().map(String::as_str), &tls].concat());
    let Address::Tcp(address) = server.address() else { unreachable!("a TCP server") };
    let script = format!(
        "for tls in (nbd.TLS_DISABLE, nbd.TLS_REQUIRE):
    h = nbd.NBD(); h.set_tls(tls); h.set_tls_certificates({:?}); h.set_opt_mode(True)
    h.connect_tcp('localhost', '{}')
    names = []; h.opt_list(lambda name, description: names.append(name)); print(*names)
    for name in ('open', 'subject', 'name', 'others'):
        try: h.set_export_name(name); h.opt_info(); print(name, h.get_size())
        except nbd.Error as error: print('no')",
        pki.dir(),
        address.port()
    );
    let said = tool("nbdsh").args(["-c", &script]).ok().out;
    let plain = "open\nopen 1048576\nno\nno\nno\n";
    let secure = "open subject name\nopen 1048576\nsubject 2097152\nname 3145728\nno\n";
    assert_eq!(said, [plain, secure].concat());
}
