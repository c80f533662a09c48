//! The commands, the client library, clients in one file, and the server as the
//! only program.

mod client;
mod clients;
mod commands;
mod minimal;
