//! The header that a load balancer puts in front of a connection to say for
//! whom it speaks: PROXY protocol, version 1, a line of text, or version 2,
//! binary (haproxy.org, proxy-protocol.txt).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use super::Socket;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_SIZE: usize = 16;
/// What a header of version 1 begins with.
const V1_START: &[u8] = b"PROXY ";
/// Longest header of version 1, with CR and LF; both versions are longer than
/// the signature of version 2.
const V1_SIZE: usize = 107;
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
    let (signature, rest) = fixed.split_at_mut(SIGNATURE.len());
    read_exact(socket, signature, deadline)?;
    if signature.starts_with(V1_START) {
        let line = read_line(socket, signature, deadline)?;
        return parse_line(&line).map_err(invalid);
    }
    read_exact(socket, rest, deadline)?;
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

/// The header of version 1 to its end. Nothing says how long it is, and what
/// follows is not ours: two bytes at once, since it ends with two.
fn read_line(socket: &Socket, start: &[u8], deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = start.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() >= V1_SIZE {
            return Err(invalid("the PROXY header is longer than 107 bytes"));
        }
        let begun = line.len();
        let more = if line.ends_with(b"\r") { 1 } else { 2 };
        line.resize(begun + more, 0);
        read_exact(socket, &mut line[begun..], deadline)?;
    }
    Ok(line)
}

/// `PROXY TCP4 192.0.2.7 10.0.0.1 12345 80`: source, destination, their ports.
fn parse_line(line: &[u8]) -> Result<Proxied, &'static str> {
    let wrong = "the PROXY header of version 1 is not PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT or PROXY UNKNOWN";
    let line = line.strip_suffix(b"\r\n").ok_or(wrong)?;
    let line = std::str::from_utf8(line).map_err(|_| wrong)?;
    let fields: Vec<_> = line.split(' ').collect();
    let port = |text: &str| {
        let digits = (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    match fields[..] {
        // Whatever follows says nothing.
        ["PROXY", "UNKNOWN", ..] => Ok(Proxied::Balancer),
        [
            "PROXY",
            family @ ("TCP4" | "TCP6"),
            source,
            destination,
            from,
            to,
        ] => {
            let address = |text: &str| {
                let address: IpAddr = text.parse().ok()?;
                (address.is_ipv4() == (family == "TCP4")).then_some(address)
            };
            let (source, _) = address(source).zip(address(destination)).ok_or(wrong)?;
            let (port, _) = port(from).zip(port(to)).ok_or(wrong)?;
            Ok(Proxied::Peer(SocketAddr::new(source, port)))
        }
        _ => Err(wrong),
    }
}

/// Command, address family and the length of what follows.
fn parse_fixed(fixed: &[u8; FIXED_SIZE]) -> Result<(u8, u8, usize), &'static str> {
    if fixed[..12] != SIGNATURE {
        return Err("no PROXY header where one is expected");
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    match (fixed[12] >> 4, fixed[12] & 0xf) {
        (2, command @ (0 | 1)) if length <= MAX_REST => Ok((command, fixed[13], length)),
        (2, 0 | 1) => Err("the PROXY header is longer than 4112 bytes"),
        (2, _) => Err("the PROXY header has an unknown command"),
        _ => Err("the PROXY header has another version than 1 and 2"),
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
            b"REQUEST:a.b:1.0.0:1\n".to_vec(),
        ] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn lines_of_version_1() {
        let peer = |text: &str| Ok(Proxied::Peer(text.parse().unwrap()));
        for (line, expected) in [
            (
                "PROXY TCP4 192.0.2.7 10.0.0.1 12345 80",
                peer("192.0.2.7:12345"),
            ),
            (
                "PROXY TCP6 2001:db8::7 ::1 9 65535",
                peer("[2001:db8::7]:9"),
            ),
            ("PROXY UNKNOWN", Ok(Proxied::Balancer)),
            ("PROXY UNKNOWN what ever 1", Ok(Proxied::Balancer)),
        ] {
            assert_eq!(parse_line(format!("{line}\r\n").as_bytes()), expected);
        }
        for wrong in [
            "PROXY TCP4 192.0.2.7 10.0.0.1 1",
            "PROXY TCP4 192.0.2.7 10.0.0.1 1 2 3",
            "PROXY TCP4 192.0.2.7  10.0.0.1 1 2",
            "PROXY TCP4 ::1 ::1 1 2",
            "PROXY TCP6 192.0.2.7 10.0.0.1 1 2",
            "PROXY TCP4 192.0.2.7 10.0.0.1 +1 2",
            "PROXY TCP4 192.0.2.7 10.0.0.1 65536 2",
            "PROXY TCP4 192.0.2.7 nowhere 1 2",
            "PROXY tcp4 192.0.2.7 10.0.0.1 1 2",
            "PROXY UDP4 192.0.2.7 10.0.0.1 1 2",
        ] {
            assert!(
                parse_line(format!("{wrong}\r\n").as_bytes()).is_err(),
                "{wrong}"
            );
        }
        assert!(parse_line(b"PROXY UNKNOWN\n").is_err());
    }

    /// Reads from a socket to which the bytes were sent, and what is left.
    fn read(bytes: &[u8]) -> (io::Result<Proxied>, Vec<u8>) {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.write_all(bytes).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let socket = Socket::new(listener.accept().unwrap().0);
        let deadline = Instant::now() + std::time::Duration::from_secs(30);
        let proxied = read_proxy_header(&socket, deadline);
        let mut left = Vec::new();
        socket.stream().read_to_end(&mut left).unwrap();
        (proxied, left)
    }

    #[test]
    fn not_a_byte_more_than_the_header_is_read() {
        let peer = Proxied::Peer("192.0.2.7:1".parse().unwrap());
        let v2 = header(0x21, 0x11, &[192, 0, 2, 7, 10, 0, 0, 1, 0, 1, 0, 2]);
        for (start, expected) in [
            (&b"PROXY UNKNOWN\r\n"[..], Proxied::Balancer),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n", peer),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 1 22\r\n", peer),
            (&v2, peer),
        ] {
            let (proxied, left) = read(&[start, b"\r\nrest"].concat());
            assert_eq!((proxied.unwrap(), &*left), (expected, &b"\r\nrest"[..]));
        }
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        assert_eq!(
            read(long.as_bytes()).0.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            read(b"PROXY TCP4 192.0.2.7").0.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
