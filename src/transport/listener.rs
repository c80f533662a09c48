//! Opening listeners and setting options.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// Options of every socket that is accepted or connected.
#[derive(Debug, Clone, Copy)]
pub struct SocketOptions {
    /// Quiet time before TCP probes the peer; none for no probes.
    pub keep_alive: Option<Duration>,
    /// Small writes leave at once.
    pub no_delay: bool,
}

impl SocketOptions {
    /// Sets them.
    ///
    /// # Errors
    /// If the system refuses; the peer may be gone already.
    pub fn apply(self, socket: &TcpStream) -> io::Result<()> {
        socket.set_nodelay(self.no_delay)?;
        if let Some(quiet) = self.keep_alive {
            SockRef::from(socket).set_tcp_keepalive(&TcpKeepalive::new().with_time(quiet))?;
        }
        Ok(())
    }
}

/// All addresses of a name or an address; `host` may be IPv6 with or without
/// brackets.
///
/// # Errors
/// If the name can't be resolved.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    Ok((bare, port).to_socket_addrs()?.collect())
}

/// Listens on one address. `std::net` alone would hold the backlog at 128.
///
/// # Errors
/// If the address is taken, not this machine's, or not allowed.
pub fn listen(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restarted server shall not wait for old connections to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `::` and `0.0.0.0` can then be given side by side.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}
