//! What the server is started with, and on what policy it listens.

use std::{net::IpAddr, sync::Arc};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::{
    access::ListenerPolicy,
    budget::Budget,
    config::{
        Config, MAX_IN_FLIGHT,
        access::{Listener, Protocol},
        memory::READ_BUFFER,
    },
    transport::ServerTls,
};

/// What the server is started with.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// The settings, within their bounds.
    pub config: Arc<Config>,
    /// Where to listen, and on what policy.
    pub listeners: Vec<Arc<ListenerSettings>>,
    /// Connections at the same time: no more than memory and the system's open
    /// files allow.
    pub max_connections: usize,
    /// Of them, those reserved for authenticated peers.
    pub reserved: usize,
    /// Further connections that are ending; one more is closed at once.
    pub max_ending: usize,
    /// Sizes of each connection's buffers.
    pub buffers: Buffers,
    /// Stack of each thread that serves connections, in bytes.
    pub thread_stack: usize,
    /// Bytes for large messages and answers; shared with the sandbox.
    pub memory: Arc<Budget>,
}

/// Sizes of a connection's buffers in bytes, and what else it collects. The tests and the simulation take
/// smaller ones.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// First size of the read buffer.
    pub read: usize,
    /// Answers of this size together leave without waiting for more.
    pub write: usize,
    /// So many answers do, too; and so many slow calls run side by side.
    pub in_flight: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            read: READ_BUFFER.0,
            write: 64 * 1024,
            in_flight: MAX_IN_FLIGHT,
        }
    }
}

/// One listener: where, and on what policy.
#[derive(Debug)]
pub struct ListenerSettings {
    /// Its settings.
    pub config: Listener,
    /// TLS is spoken, with what is there when a connection comes.
    pub tls: Option<Arc<ArcSwap<ServerTls>>>,
    /// What is asked of peers.
    pub policy: Arc<ListenerPolicy>,
}

impl ListenerSettings {
    pub(crate) fn admits(&self, address: IpAddr) -> bool {
        let is_in = |networks: &[IpNet]| contains(networks, address);
        let Listener { allow, deny, .. } = &self.config;
        (allow.is_empty() || is_in(allow)) && !is_in(deny)
    }

    /// Peers may show certificates, which the handshake checks.
    pub(crate) fn takes_certificates(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.load().takes_certificates())
    }

    /// Whether it speaks frames, and whether it speaks HTTP.
    pub(crate) fn speaks(&self, config: &Config) -> (bool, bool) {
        let spoken = self.config.protocols.as_ref().unwrap_or(&config.protocols);
        let has = |protocol| spoken.contains(&protocol);
        (has(Protocol::Frames), has(Protocol::Http))
    }

    pub(crate) fn is_proxy(&self, address: IpAddr) -> bool {
        contains(&self.config.proxy_from, address)
    }
}

pub(crate) fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    // IPv4 within IPv6 is IPv4.
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}
