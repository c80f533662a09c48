//! The header that a load balancer puts in front of a connection to say for
//! whom it speaks: PROXY protocol, version 1, a line of text, or version 2,
//! binary (haproxy.org, proxy-protocol.txt).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_SIZE: usize = 16;
/// What a header of version 1 begins with.
const V1_START: &[u8] = b"PROXY ";
/// Longest header of version 1, with CR and LF.
const V1_SIZE: usize = 107;
/// Addresses and what may follow them; the header's own field allows 64 KiB.
const MAX_REST: usize = 4096;
/// Longest header, in bytes.
pub(super) const MAX_SIZE: usize = FIXED_SIZE + MAX_REST;

/// For whom a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxied {
    /// For this peer.
    Peer(SocketAddr),
    /// For the balancer itself, as its health checks do, or for somebody who
    /// has no IP address.
    Balancer,
}

/// The header that a stream begins with, and its length; none as long as it is
/// not whole.
///
/// # Errors
/// `InvalidData` if it is none.
pub(super) fn parse(bytes: &[u8]) -> io::Result<Option<(Proxied, usize)>> {
    let parsed = if bytes.starts_with(&V1_START[..bytes.len().min(V1_START.len())]) {
        parse_v1(bytes)
    } else {
        parse_v2(bytes)
    };
    parsed.map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// Nothing says how long a header of version 1 is; it ends with its line.
fn parse_v1(bytes: &[u8]) -> Result<Option<(Proxied, usize)>, &'static str> {
    let line = &bytes[..bytes.len().min(V1_SIZE)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < V1_SIZE {
            Ok(None)
        } else {
            Err("the PROXY header is longer than 107 bytes")
        };
    };
    let length = end + 2;
    parse_line(&line[..length]).map(|proxied| Some((proxied, length)))
}

fn parse_v2(bytes: &[u8]) -> Result<Option<(Proxied, usize)>, &'static str> {
    if !SIGNATURE.starts_with(&bytes[..bytes.len().min(SIGNATURE.len())]) {
        return Err("no PROXY header where one is expected");
    }
    let Some(fixed) = bytes.first_chunk() else {
        return Ok(None);
    };
    let (command, family, length) = parse_fixed(fixed)?;
    let Some(rest) = bytes.get(FIXED_SIZE..FIXED_SIZE + length) else {
        return Ok(None);
    };
    parse_rest(command, family, rest).map(|proxied| Some((proxied, FIXED_SIZE + length)))
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

    /// What all of it says, and what less of it does not say yet.
    fn whole(bytes: &[u8]) -> Option<Proxied> {
        let (proxied, length) = parse(bytes).ok()??;
        assert_eq!(length, bytes.len());
        for part in 0..length {
            assert_eq!(parse(&bytes[..part]).unwrap(), None, "{part}");
        }
        let more = parse(&[bytes, b"\r\nrest"].concat()).unwrap();
        assert_eq!(more, Some((proxied, length)));
        Some(proxied)
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
        assert_eq!(whole(&header(0x21, 0x11, &v4)), Some(peer));
        let mut with_more = v4.to_vec();
        with_more.extend([3, 0, 4, 1, 2, 3, 4]);
        assert_eq!(whole(&header(0x21, 0x11, &with_more)), Some(peer));
        let mut v6 = [0; 36];
        v6[15] = 1;
        v6[33] = 9;
        assert_eq!(
            whole(&header(0x21, 0x21, &v6)),
            Some(Proxied::Peer("[::1]:9".parse().unwrap()))
        );
        assert_eq!(whole(&header(0x20, 0, &[])), Some(Proxied::Balancer));
        assert_eq!(whole(&header(0x21, 0, &[])), Some(Proxied::Balancer));
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

    /// What balancers send, to the byte.
    #[test]
    fn headers_of_balancers() {
        let hex = |text: &str| -> Vec<u8> {
            let digits: Vec<_> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
            let pairs = digits
                .chunks(2)
                .map(|pair| std::str::from_utf8(pair).unwrap());
            pairs
                .map(|pair| u8::from_str_radix(pair, 16).unwrap())
                .collect()
        };
        let peer = |text: &str| Proxied::Peer(text.parse().unwrap());
        for (whose, bytes, expected) in [
            (
                // A checksum, the VPC endpoint, and 36 bytes of padding.
                "AWS NLB",
                hex(
                    "0d0a0d0a000d0a515549540a 21110054 ac1f0771 ac1f0a1f c8f20050 030004e8d6892d \
                     ea001701 767063652d3038643262663135666163353030316339 \
                     040024 000000000000000000000000000000000000000000000000000000000000000000000000",
                ),
                peer("172.31.7.113:51442"),
            ),
            (
                "AWS NLB, health check",
                hex("0d0a0d0a000d0a515549540a 20000007 030004 a9b87e8f"),
                Proxied::Balancer,
            ),
            (
                // Authority, unique id and the version of TLS.
                "HAProxy, proxy-v2-options authority,unique-id,ssl",
                hex(
                    "0d0a0d0a000d0a515549540a 21210041 20010db8000000000000000000000007 \
                     20010db8000000000000000000000001 3039 1f91 020003 612e62 050004 75696431 \
                     20000d 0100000000 210005 312e322e33",
                ),
                peer("[2001:db8::7]:12345"),
            ),
            (
                "HAProxy, check-send-proxy",
                hex("0d0a0d0a000d0a515549540a 20000000"),
                Proxied::Balancer,
            ),
            (
                "HAProxy, a peer on a Unix socket",
                [hex("0d0a0d0a000d0a515549540a 213100d8"), vec![0; 216]].concat(),
                Proxied::Balancer,
            ),
            (
                "HAProxy, check-send-proxy with send-proxy",
                b"PROXY UNKNOWN\r\n".to_vec(),
                Proxied::Balancer,
            ),
            (
                "nginx stream, proxy_protocol on",
                b"PROXY TCP4 203.0.113.9 10.0.0.2 40312 8081\r\n".to_vec(),
                peer("203.0.113.9:40312"),
            ),
        ] {
            assert_eq!(whole(&bytes), Some(expected), "{whose}");
        }
    }

    #[test]
    fn lines_of_version_1() {
        let peer = |text: &str| Proxied::Peer(text.parse().unwrap());
        for (line, expected) in [
            (
                "PROXY TCP4 192.0.2.7 10.0.0.1 12345 80",
                peer("192.0.2.7:12345"),
            ),
            (
                "PROXY TCP6 2001:db8::7 ::1 9 65535",
                peer("[2001:db8::7]:9"),
            ),
            ("PROXY UNKNOWN", Proxied::Balancer),
            ("PROXY UNKNOWN what ever 1", Proxied::Balancer),
        ] {
            let line = format!("{line}\r\n");
            assert_eq!(whole(line.as_bytes()), Some(expected));
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
            assert!(parse(format!("{wrong}\r\n").as_bytes()).is_err(), "{wrong}");
        }
        assert_eq!(parse(b"PROXY UNKNOWN\n").unwrap(), None);
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        assert!(parse(long.as_bytes()).is_err());
    }
}
