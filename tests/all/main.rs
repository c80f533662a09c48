//! The real binary, on ports of its own, spoken to in raw bytes.

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod cli;
mod project;
mod protocols;
mod sandbox;
mod security;
mod server;
mod services;
mod store;

use support::{Setup, TestServer};

/// The binary that is tested.
const BINARY: &str = env!("CARGO_BIN_EXE_mb-server");

fn setup() -> Setup {
    Setup::new(BINARY)
}

fn start() -> TestServer {
    setup().start()
}
