//! The project's tasks: `cargo xtask setup | bench | ceph | demo | test | ci | dist | fuzz | manual | picture | torture | trixie | vm`.

mod bench;
mod ceph;
mod demo;
mod dist;
mod fuzz;
mod picture;
mod setup;
mod shell;
mod test;
mod torture;
mod trixie;
mod vm;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
usage: cargo xtask TASK

  demo             create a disk image, export it over vhost-user, serve it with nbdblk and read it from Python
  test             check formatting, lints and documentation, then run every test; hardware tests run in a virtual machine
  test --long      run a million seeds of the simulation, ten minutes of torture, the test with Ceph, and all fuzz targets for
                   an hour
  ci               the same as test, for the integration server
  setup            install the packages that demo and test need (Debian, apt-get)
  dist [DIR]       build all installed files, place them under DIR (target/dist) as under /, and make Debian packages and a
                   tarball in target/packages
  manual           write the generated sections of the manual pages in docs/man again
  bench [OPTIONS]  compare nbdblk and its plugin with other NBD servers; `bench --help` lists the options
  fuzz [--quick] [TARGET] [SECONDS]
                   fuzz a target for some seconds (60); without a target: list the targets; --quick: without AddressSanitizer,
                   which sees no access to mapped memory, so that it runs two to four times as often
  fuzz --minutes N fuzz all targets, one after the other, for N minutes in total, and print how far each came
  picture          draw docs/crates.svg, the picture of the crates
  ceph             serve an image of a Ceph cluster, through a back end that is killed and an OSD that stops; needs root, for a
                   root directory of Debian trixie with the cluster of one node in it
  torture [--seconds N] [--seed S]
                   inject random faults into a live server with verifying clients, for a minute; `torture --help` says more
  trixie           create a root directory of Debian trixie, for its nbdkit and libnbd; needs root (test does it if it can)
  vm TASK          use a virtual machine with nbdblk's devices: prepare, run, test, shell; `vm help` lists the options

demo, test and torture run setup on their own. Only setup may need root. Only torture mounts something: as root, a small
file system that it fills.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if std::env::var_os(fuzz::IS_COMPILER).is_some() {
        return fuzz::compile();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    std::env::set_current_dir(shell::root())?;
    match args[..] {
        ["setup"] => setup::run(setup::Extent::Tests),
        ["ceph"] => ceph::run(),
        ["bench", ref words @ ..] => bench::run(words),
        ["demo"] => demo::run(),
        ["test" | "ci"] => test::run(),
        ["test", "--long"] => test::run_long(),
        ["dist"] => dist::run(None),
        ["dist", dir] => dist::run(Some(dir)),
        ["manual"] => dist::manual(&["update"]),
        ["fuzz"] => fuzz::list(),
        ["fuzz", "--minutes", minutes] => fuzz::run_all(minutes.parse()?),
        ["fuzz", "--quick", target] => fuzz::run(target, 60, true),
        ["fuzz", "--quick", target, seconds] => fuzz::run(target, seconds.parse()?, true),
        ["fuzz", target] => fuzz::run(target, 60, false),
        ["fuzz", target, seconds] => fuzz::run(target, seconds.parse()?, false),
        ["picture"] => picture::draw(),
        ["torture", ref words @ ..] => torture::run(words),
        // The processes of a torture.
        ["torture-client", job] => torture::client(job),
        ["torture-bad-clients", work] => torture::bad_clients(work),
        ["trixie"] => trixie::root().map(|dir| println!("{}", dir.display())),
        ["vm", ref words @ ..] => vm::run(words),
        ["help" | "-h" | "--help"] => {
            println!("{HELP}");
            Ok(())
        }
        [] => bail!("no task given\n\n{HELP}"),
        _ => bail!("no such task: {}\n\n{HELP}", args.join(" ")),
    }
}
