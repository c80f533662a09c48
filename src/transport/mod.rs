//! Sockets: how they are opened, and reads and writes that end at a deadline,
//! with TLS or without.

#[cfg(feature = "runtime")]
mod channel;
mod client_tls;
mod connect;
#[cfg(feature = "runtime")]
mod inherited;
mod listener;
mod pem;
#[cfg(feature = "runtime")]
mod proxy;
#[cfg(feature = "runtime")]
mod server_tls;
mod stream;
mod tls;
#[cfg(feature = "runtime")]
mod validity;

#[cfg(feature = "runtime")]
pub use channel::{Channel, Received};
pub use client_tls::{ClientTls, client_config};
pub use connect::{connect_any, secure};
#[cfg(feature = "runtime")]
pub use inherited::Inherited;
pub use listener::{BACKLOG, is_absent, listen, listen_all, resolve, resolve_until, set_options};
pub use pem::TlsError;
#[cfg(feature = "runtime")]
pub use proxy::Proxied;
#[cfg(feature = "runtime")]
pub use server_tls::{ClientCertificate, ServerTls};
pub use stream::{Socket, Stream};
#[cfg(feature = "runtime")]
pub use tls::HTTP_ALPN;
pub use tls::{ALPN, TlsFault};
