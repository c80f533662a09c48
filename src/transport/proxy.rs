//! The header that a load balancer puts in front of a connection to say for
//! whom it speaks: PROXY protocol version 2 (haproxy.org, proxy-protocol.txt).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use super::Socket;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_SIZE: usize = 16;
/// Addresses and what may follow them; the header's own field allows 64 KiB.
const MAX_REST: usize = 4096;

/// For whom a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxied {
    /// For this peer.
    Peer(SocketAddr),
    /// For the balancer itself, as its health checks do, or for somebody who
    /// has no IP address.
    Balancer,
}

/// Reads the header, and not a byte more.
///
/// # Errors
/// `InvalidData` if it is none, `TimedOut` at the deadline, `UnexpectedEof`
/// if the stream ends.
pub fn read_proxy_header(socket: &Socket, deadline: Instant) -> io::Result<Proxied> {
    let mut fixed = [0; FIXED_SIZE];
    read_exact(socket, &mut fixed, deadline)?;
    let (command, family, length) = parse_fixed(&fixed).map_err(invalid)?;
    let mut rest = vec![0; length];
    read_exact(socket, &mut rest, deadline)?;
    parse_rest(command, family, &rest).map_err(invalid)
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

fn read_exact(socket: &Socket, mut buf: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !buf.is_empty() {
        match socket.read(buf, deadline)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => buf = &mut buf[count..],
        }
    }
    Ok(())
}

/// Command, address family and the length of what follows.
fn parse_fixed(fixed: &[u8; FIXED_SIZE]) -> Result<(u8, u8, usize), &'static str> {
    if fixed[..12] != SIGNATURE {
        return Err("no PROXY header of version 2 where one is expected");
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    match (fixed[12] >> 4, fixed[12] & 0xf) {
        (2, command @ (0 | 1)) if length <= MAX_REST => Ok((command, fixed[13], length)),
        (2, 0 | 1) => Err("the PROXY header is longer than 4112 bytes"),
        (2, _) => Err("the PROXY header has an unknown command"),
        _ => Err("the PROXY header has another version than 2"),
    }
}

fn parse_rest(command: u8, family: u8, rest: &[u8]) -> Result<Proxied, &'static str> {
    let short = "the PROXY header is too short for its addresses";
    match (command, family) {
        (0, _) => Ok(Proxied::Balancer),
        // TCP over IPv4: source, destination, source port, destination port.
        (_, 0x11) => {
            let addresses = rest.first_chunk::<12>().ok_or(short)?;
            let [a, b, c, d, _, _, _, _, p, q, _, _] = *addresses;
            let ip = IpAddr::V4(Ipv4Addr::new(a, b, c, d));
            Ok(Proxied::Peer(SocketAddr::new(
                ip,
                u16::from_be_bytes([p, q]),
            )))
        }
        (_, 0x21) => {
            let addresses = rest.first_chunk::<36>().ok_or(short)?;
            let source = addresses.first_chunk::<16>().ok_or(short)?;
            let ip = IpAddr::V6(Ipv6Addr::from(*source));
            Ok(Proxied::Peer(SocketAddr::new(
                ip,
                u16::from_be_bytes([addresses[32], addresses[33]]),
            )))
        }
        _ => Ok(Proxied::Balancer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Proxied, &'static str> {
        let (fixed, rest) = bytes.split_first_chunk().unwrap();
        let (command, family, length) = parse_fixed(fixed)?;
        parse_rest(command, family, &rest[..length])
    }

    fn header(version: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([version, family]);
        bytes.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn headers() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0, 80];
        let peer = Proxied::Peer("192.0.2.7:12345".parse().unwrap());
        assert_eq!(parse(&header(0x21, 0x11, &v4)), Ok(peer));
        let mut with_more = v4.to_vec();
        with_more.extend([3, 0, 4, 1, 2, 3, 4]);
        assert_eq!(parse(&header(0x21, 0x11, &with_more)), Ok(peer));
        let mut v6 = [0; 36];
        v6[15] = 1;
        v6[33] = 9;
        assert_eq!(
            parse(&header(0x21, 0x21, &v6)),
            Ok(Proxied::Peer("[::1]:9".parse().unwrap()))
        );
        assert_eq!(parse(&header(0x20, 0, &[])), Ok(Proxied::Balancer));
        assert_eq!(parse(&header(0x21, 0, &[])), Ok(Proxied::Balancer));
        for wrong in [
            header(0x21, 0x11, &v4[..11]),
            header(0x21, 0x21, &v4),
            header(0x11, 0x11, &v4),
            header(0x22, 0x11, &v4),
            header(0x21, 0x11, &[0; 5000]),
            b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n".to_vec(),
            b"REQUEST:a.b:1.0.0:1\n".to_vec(),
        ] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }
}
