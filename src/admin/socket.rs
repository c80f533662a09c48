//! What the kernel knows of a connection's socket, as `ss -i` shows it: asked
//! for over netlink, see sock_diag(7).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
    sockopt,
};
use serde_json::{Value, json};

/// `SOCK_DIAG_BY_FAMILY`, `NLM_F_REQUEST | NLM_F_DUMP`, and the end of a dump.
const BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// `AF_INET`, `AF_INET6`, `IPPROTO_TCP`, and all states that have a peer.
const FAMILIES: [u8; 2] = [2, 10];
const TCP: u8 = 6;
const CONNECTED: u32 = 0xfff & !(1 << 10 | 1 << 7);
/// `INET_DIAG_INFO`, as an attribute and as a bit of a request.
const INFO: u16 = 2;
/// Parts of an answer that are read at most: an answer has the sockets of two
/// ports, which are few.
const MAX_PARTS: usize = 64;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_millis(500);

/// A socket's own end, and the other one.
type Ends = (SocketAddr, SocketAddr);

/// Queues, retransmissions and round trip of the socket with these ends; null
/// where the system does not tell.
pub(super) fn of(ends: Ends) -> Value {
    FAMILIES
        .iter()
        .find_map(|family| ask(*family, ends).ok().flatten())
        .unwrap_or(Value::Null)
}

fn ask(family: u8, ends: Ends) -> io::Result<Option<Value>> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    send(&socket, &request(family, ends), SendFlags::empty())?;
    let mut part = vec![0; 32 * 1024];
    for _ in 0..MAX_PARTS {
        let (count, _) = recv(&socket, &mut part[..], RecvFlags::empty())?;
        let mut rest = &part[..count];
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                DONE | ERROR => return Ok(None),
                BY_FAMILY if ends_of(body).is_some_and(|found| are_same(found, ends)) => {
                    return Ok(facts(body));
                }
                _ => rest = next,
            }
        }
    }
    Ok(None)
}

/// `nlmsghdr` and `inet_diag_req_v2`: all sockets with these two ports.
fn request(family: u8, (own, other): Ends) -> Vec<u8> {
    const SIZE: u32 = 16 + 56;
    let mut bytes = Vec::with_capacity(SIZE as usize);
    bytes.extend(SIZE.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, TCP, 1 << (INFO - 1), 0]);
    bytes.extend(CONNECTED.to_ne_bytes());
    bytes.extend(own.port().to_be_bytes());
    bytes.extend(other.port().to_be_bytes());
    bytes.resize(SIZE as usize, 0);
    bytes
}

/// The next message: its kind, its body, and what comes after it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    let body = bytes.get(16..length)?;
    Some((
        u16_at(bytes, 4)?,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

/// Of an `inet_diag_msg`: both ends.
fn ends_of(body: &[u8]) -> Option<Ends> {
    let family = *body.first()?;
    let end = |port: usize, address: usize| {
        let port = u16::from_be_bytes(body.get(port..port + 2)?.try_into().ok()?);
        let bytes: [u8; 16] = body.get(address..address + 16)?.try_into().ok()?;
        let ip = match family {
            2 => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
            _ => IpAddr::from(bytes),
        };
        Some(SocketAddr::new(ip, port))
    };
    Some((end(4, 8)?, end(6, 24)?))
}

fn are_same(found: Ends, wanted: Ends) -> bool {
    let plain = |end: SocketAddr| (end.ip().to_canonical(), end.port());
    (plain(found.0), plain(found.1)) == (plain(wanted.0), plain(wanted.1))
}

/// Of an `inet_diag_msg` and its `tcp_info`.
fn facts(body: &[u8]) -> Option<Value> {
    const ATTRIBUTES: usize = 72;
    let (receiving, sending) = (u32_at(body, 56)?, u32_at(body, 60)?);
    let mut known = json!({"sendQueueBytes": sending, "receiveQueueBytes": receiving});
    let mut rest = body.get(ATTRIBUTES..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(info) = rest.get(4..length as usize) else {
            break;
        };
        if kind == INFO {
            known["roundTripMs"] = json!(f64::from(u32_at(info, 68)?) / 1000.0);
            known["retransmits"] = json!(u32_at(info, 100)?);
        }
        rest = rest
            .get(usize::from(length).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(known)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
    };

    use proptest::prelude::*;

    #[test]
    fn a_socket_is_found_with_what_waits_in_it() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else {
                continue;
            };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_server, peer) = listener.accept().unwrap();
            client.write_all(b"12345").unwrap();
            let found = of((listener.local_addr().unwrap(), peer));
            assert_eq!(found["retransmits"], 0, "{found}");
            assert_eq!(found["receiveQueueBytes"], 5, "{found}");
            assert!(
                found["roundTripMs"]
                    .as_f64()
                    .is_some_and(|rtt| rtt > 0.0 && rtt < 1000.0),
                "{found}"
            );
        }
        let nobody = "192.0.2.1:9".parse().unwrap();
        assert_eq!(of((nobody, nobody)), Value::Null);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = message(&bytes).map(|(_, body, _)| (ends_of(body), facts(body)));
            let _ = (ends_of(&bytes), facts(&bytes));
        }
    }
}
