//! x
#[cfg(feature = "server")]
pub mod catalog;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod dispatch;
#[cfg(feature = "server")]
pub mod host;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod sandbox;
#[cfg(feature = "server")]
pub mod server;
pub mod transport;
pub mod wire;
