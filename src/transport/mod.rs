//! Sockets: how they are opened, and reads and writes that end at a deadline.

mod listener;
mod stream;

pub use listener::{SocketOptions, listen, resolve};
pub use stream::{Socket, half_close};
