//! Listeners that the process was started with, by systemd or the like: see
//! `sd_listen_fds(3)`. They outlive the process, so whoever connects between
//! two of them waits instead of being refused.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
};

use listenfd::ListenFd;
use rustix::{
    fd::AsFd,
    io::{FdFlags, fcntl_setfd},
};

/// Those that nobody has taken yet.
#[derive(Debug, Default)]
pub struct Inherited {
    tcp: Vec<(SocketAddr, TcpListener)>,
    unix: Vec<(PathBuf, UnixListener)>,
    /// Where those listen that are for all addresses, taken or not.
    wide: Vec<SocketAddr>,
}

impl Inherited {
    /// What `LISTEN_FDS` announces to this process; nothing without it.
    ///
    /// # Errors
    /// If one of them is neither a TCP nor a Unix stream listener.
    pub fn from_env() -> io::Result<Self> {
        let mut passed = ListenFd::from_env();
        let mut inherited = Self::default();
        for index in 0..passed.len() {
            if let Ok(Some(listener)) = passed.take_tcp_listener(index) {
                keep_from_children(&listener)?;
                let address = listener.local_addr()?;
                if address.ip().is_unspecified() {
                    inherited.wide.push(address);
                }
                inherited.tcp.push((address, listener));
                continue;
            }
            let wrong = || {
                io::Error::other(format!(
                    "inherited socket {index} is no listener with a stream"
                ))
            };
            let listener = passed
                .take_unix_listener(index)
                .ok()
                .flatten()
                .ok_or_else(wrong)?;
            keep_from_children(&listener)?;
            let path = listener
                .local_addr()?
                .as_pathname()
                .ok_or_else(wrong)?
                .to_owned();
            inherited.unix.push((path, listener));
        }
        Ok(inherited)
    }

    /// The one for this address.
    pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let index = self.tcp.iter().position(|(own, _)| *own == address)?;
        Some(self.tcp.swap_remove(index).1)
    }

    /// The one for this path.
    pub fn take_unix(&mut self, path: &Path) -> Option<UnixListener> {
        let index = self.unix.iter().position(|(own, _)| own == path)?;
        Some(self.unix.swap_remove(index).1)
    }

    /// Why an address can't be listened on, where a socket for all addresses
    /// that was handed over has its port; and what to do. `setting` is that
    /// of the host.
    #[must_use]
    pub fn conflict(&self, setting: &str, addresses: &[SocketAddr]) -> Option<String> {
        let (wanted, own) = addresses.iter().find_map(|wanted| {
            let mut wide = self.wide.iter();
            let own = wide.find(|own| own.port() == wanted.port() && *own != wanted)?;
            Some((wanted, own))
        })?;
        let mapped = match own {
            SocketAddr::V6(_) => ", for IPv4 too unless BindIPv6Only=ipv6-only is set",
            SocketAddr::V4(_) => "",
        };
        Some(format!(
            "the socket {own} that was handed over (LISTEN_FDS) has this port on all addresses{mapped}; write \
             ListenStream={wanted} in the socket unit (a port alone means [::]), or set {setting} = \"{}\" to serve \
             all addresses",
            own.ip()
        ))
    }

    /// Whether there is none left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }

    /// Where those that nobody took listen.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let tcp = self.tcp.iter().map(|(address, _)| address.to_string());
        tcp.chain(self.unix.iter().map(|(path, _)| path.display().to_string()))
            .collect()
    }
}

/// A process that compiles has no use for it, and would hold it.
fn keep_from_children(listener: &impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfd(listener, FdFlags::CLOEXEC)?)
}
