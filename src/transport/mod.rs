//! Sockets: how they are opened, and reads and writes that end at a deadline,
//! with TLS or without.

mod channel;
mod client_tls;
mod connect;
mod fault;
#[cfg(feature = "runtime")]
mod inherited;
mod listener;
mod pem;
mod proxy;
#[cfg(feature = "runtime")]
mod server_tls;
mod socket;
mod stream;
mod tls;
#[cfg(feature = "runtime")]
mod validity;

pub use channel::Channel;
pub use client_tls::{ClientTls, client_config};
pub use connect::{connect_any, host_and_port, secure, server_name};
pub use fault::TlsFault;
#[cfg(feature = "runtime")]
pub use inherited::Inherited;
pub use listener::{BACKLOG, is_absent, listen, listen_all, resolve, resolve_until, set_options};
pub use pem::TlsError;
pub use proxy::Proxied;
#[cfg(feature = "runtime")]
pub use server_tls::{ClientCertificate, ServerTls};
pub use socket::Received;
pub use stream::{Socket, Stream};
pub use tls::ALPN;
#[cfg(feature = "runtime")]
pub use tls::HTTP_ALPN;
