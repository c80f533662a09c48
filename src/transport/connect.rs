//! Connecting to a server that has one or more addresses.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, pki_types::ServerName};

use super::{Socket, Stream, set_options};

/// Time that each address has, if that much is left: one SYN and its answer over
/// any network.
const SHORTEST_SHARE: Duration = Duration::from_millis(500);

/// Connects to the first of these addresses that answers. Each has an equal
/// share of the time that is left, so that one that is silent does not use up
/// that of the others.
///
/// # Errors
/// Why the last one was not reached; `NotFound` without an address.
pub fn connect_any(
    addresses: &[SocketAddr],
    deadline: Instant,
) -> io::Result<(TcpStream, SocketAddr)> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (tried, address) in addresses.iter().enumerate() {
        let left = (addresses.len() - tried) as u32;
        let remaining = deadline.saturating_duration_since(Instant::now());
        let share = (remaining / left).max(SHORTEST_SHARE).min(remaining);
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => {
                // It works without them.
                let _ = set_options(&stream);
                return Ok((stream, *address));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Makes a connection a stream: with TLS, before its handshake, where there are
/// a configuration and the name that the server's certificate must have.
///
/// # Errors
/// If the name can't be that of a server.
pub fn secure(stream: TcpStream, tls: Option<(&Arc<ClientConfig>, &str)>) -> io::Result<Stream> {
    let socket = Socket::new(stream);
    let Some((config, name)) = tls else {
        return Ok(Stream::plain(socket));
    };
    let session = rustls::ClientConnection::new(Arc::clone(config), server_name(name)?)
        .map_err(io::Error::other)?;
    Ok(Stream::tls(socket, session.into()))
}

/// The name that a server's certificate must have.
///
/// # Errors
/// If it can't be that of a server.
pub fn server_name(name: &str) -> io::Result<ServerName<'static>> {
    ServerName::try_from(name.to_owned())
        .map_err(|error| io::Error::other(format!("server name {name:?}: {error}")))
}

/// Reads an address: `localhost:8081`, `[::1]:8081`. Returns the host without
/// brackets, and the port.
///
/// # Errors
/// Shows what one looks like.
pub fn host_and_port(address: &str) -> Result<(String, u16), String> {
    let parse = || {
        let (whole, port) = address.rsplit_once(':')?;
        let bare = whole
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let host = match bare {
            Some(bare) => bare.contains(':').then_some(bare)?,
            None => (!whole.is_empty() && !whole.contains(':')).then_some(whole)?,
        };
        Some((host.to_owned(), port.parse().ok()?))
    };
    parse()
        .ok_or_else(|| format!("{address:?} is no HOST:PORT, as localhost:8081 or [::1]:8081 is"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        let parsed = |address| host_and_port(address).ok();
        assert_eq!(parsed("a.example:80"), Some(("a.example".into(), 80)));
        assert_eq!(parsed("[]:80"), None);
        assert_eq!(parsed("[::1]:0"), Some(("::1".into(), 0)));
        for wrong in [
            "", ":", ":80", "a", "a:", "a:x", "a:65536", "::1:80", "[::1:80", "a b",
        ] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_first_address_that_answers_is_taken() {
        let later = Instant::now() + Duration::from_secs(30);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_addr().unwrap();
        let refuses = {
            let closed = TcpListener::bind("127.0.0.1:0").unwrap();
            closed.local_addr().unwrap()
        };
        let (_, reached) = connect_any(&[refuses, there], later).unwrap();
        assert_eq!(reached, there);
        let kind = |addresses: &[SocketAddr]| connect_any(addresses, later).unwrap_err().kind();
        assert_eq!(kind(&[refuses]), io::ErrorKind::ConnectionRefused);
        assert_eq!(kind(&[]), io::ErrorKind::NotFound);
    }

    /// A backlog that is full takes no more connections and refuses none.
    #[test]
    fn a_silent_address_leaves_time_for_the_next_one() {
        let full =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        full.bind(&any.into()).unwrap();
        full.listen(0).unwrap();
        let silent = full.local_addr().unwrap().as_socket().unwrap();
        let _waiting: Vec<_> = (0..4)
            .map_while(|_| TcpStream::connect_timeout(&silent, Duration::from_millis(100)).ok())
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_addr().unwrap();
        let deadline = Instant::now() + Duration::from_secs(2);
        let (_, reached) = connect_any(&[silent, there], deadline).unwrap();
        assert_eq!(reached, there);
    }
}
