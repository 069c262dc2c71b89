//! A server with TLS whose exports come and go while it runs, as lines on standard input request:
//!
//! ```text
//! $ cargo run -p nbd-server-core --features tls --example exports -- pki 10809
//! nbds://localhost:10809/private?tls-certificates=pki
//! add disk 1048576
//! ok
//! list
//! public: 0 clients
//! private: 0 clients
//! disk: 0 clients
//! ok
//! remove disk
//! ok
//! quit
//! ```
//!
//! The directory has the files ca-cert.pem, server-cert.pem and server-key.pem; clients need ca-cert.pem, client-cert.pem and
//! client-key.pem (nbdkit-tls(1) shows how to make them). `public` and new exports are for every client on this machine, with or
//! without TLS. `private` is for the clients whose certificate names client.example. Other clients do not see it.

use std::{env, error::Error, io, net::TcpListener, path::Path, process::ExitCode, sync::Arc};

use blkdev::memory::Memory;
use nbd_server_core::{
    Access, Export, Limits, Removal, Server,
    tls::{Certificates, Tls},
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [dir, port] = &args[..] else {
        eprintln!("usage: exports DIRECTORY PORT");
        return ExitCode::from(2);
    };
    match serve(dir, port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(dir: &str, port: &str) -> io::Result<()> {
    // With TLS, clients need a certificate of our authority. Without, they see the exports that do not require TLS.
    let tls = Tls::with_certificates(&Certificates::within(Path::new(dir), true))?;
    let mut private = export("private", 64 << 20);
    private.access = Access(vec!["san=DNS:client.example".parse()?]);
    private.tls_only = true;
    let exports = vec![export("public", 64 << 20), private];

    let listener = TcpListener::bind(format!("127.0.0.1:{port}"))?;
    let port = listener.local_addr()?.port();
    let server = Server::start(exports, vec![listener.into()], Some(tls), Limits::default())?;
    println!("nbds://localhost:{port}/private?tls-certificates={dir}");
    for line in io::stdin().lines() {
        match line?.split_whitespace().collect::<Vec<_>>()[..] {
            ["quit"] => break,
            ref words => match change(&server, words) {
                Ok(()) => println!("ok"),
                Err(e) => println!("error: {e}"),
            },
        }
    }
    server.stop();
    Ok(())
}

fn change(server: &Server, words: &[&str]) -> Result<(), Box<dyn Error>> {
    match words {
        ["add", name, size] => server.add(export(name, size.parse()?))?,
        // Clients of the export get an error for later requests, and some time to disconnect.
        ["remove", name] => server.remove(name, Removal::Soft)?,
        ["list"] => server.exports().iter().for_each(|e| println!("{}: {} clients", e.name, e.clients)),
        _ => return Err("a line is: add NAME SIZE, remove NAME, list, or quit".into()),
    }
    Ok(())
}

/// A RAM disk for every client on this machine.
fn export(name: &str, size: u64) -> Export {
    let mut export = Export::new(name, Arc::new(Memory::new(size)));
    export.access = Access(vec!["ip=127.0.0.0/8".parse().expect("a valid rule")]);
    export
}
