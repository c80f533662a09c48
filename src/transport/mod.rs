//! Sockets: how they are opened, and reads and writes that end at a deadline.

mod listener;
mod stream;

pub use listener::{SocketOptions, is_absent, listen, listen_all, resolve};
pub use stream::{Socket, half_close};
