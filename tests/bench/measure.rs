//! Measurements that take minutes or load the machine:
//!
//! ```text
//! cargo build --release && cargo run --release --example measure -- --help
//! ```

mod calls;
mod compare;
mod echo;
mod growth;
mod instructions;
mod restarts;
#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Measure this server, alone and beside others")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What a call costs in each isolation mode, beside native code
    Calls(calls::Arguments),
    /// This server beside what users would take instead, in turns in one run
    Compare(compare::Arguments),
    /// How the server bears more connections, services, slow calls and bytes
    Growth(growth::Arguments),
    /// The same work so many times, for instructions.py beside this file
    Instructions(instructions::Arguments),
    /// What a client says of its calls while the server is killed and started
    Restarts(restarts::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().what {
        What::Calls(arguments) => calls::run(&arguments),
        What::Compare(arguments) => compare::run(&arguments),
        What::Growth(arguments) => growth::run(&arguments),
        What::Instructions(arguments) => instructions::run(&arguments),
        What::Restarts(arguments) => restarts::run(&arguments),
    }
}
