//! Arguments to command, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    mb_server::commands::Arguments::parse().run().into()
}
