//! The real binary, on ports of its own, spoken to in raw bytes.

#[path = "../support/mod.rs"]
mod support;

mod access;
mod admin;
mod admin_gateway;
mod architecture;
mod authors;
mod capabilities;
mod cli;
mod client;
mod clients;
mod connections;
mod contract;
mod deploy;
mod documents;
mod drain;
mod fairness;
mod hostile;
mod http;
mod languages;
mod live_settings;
mod mcp;
mod memory;
mod minimal;
mod openapi;
mod overtaking;
mod projects;
mod reload;
mod reset;
mod routing;
mod sandbox;
mod stalls;
mod state;
mod store;
mod tls;
mod untrusted;
mod waiting;
mod websocket;
mod wire;
mod words;

use support::{Setup, TestServer};

/// The binary that is tested.
const BINARY: &str = env!("CARGO_BIN_EXE_mb-server");

fn setup() -> Setup {
    Setup::new(BINARY)
}

fn start() -> TestServer {
    setup().start()
}
