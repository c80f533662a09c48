//! What the kernel knows of a connection's socket, as `ss -i` shows it: asked
//! for over netlink, see sock_diag(7).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
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
/// Parts of an answer that are read at most: an answer has the sockets of one
/// remote port, which are few.
const MAX_PARTS: usize = 64;
/// How often it is asked for one that it does not name.
const TRIES: usize = 3;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_millis(500);

/// Queues, retransmissions and round trip of the socket whose other end this
/// is; null where the system does not tell.
pub(super) fn of(peer: &str) -> Value {
    let Ok(peer) = peer.parse::<SocketAddr>() else { return Value::Null };
    // While its table changes, the kernel may leave one out.
    let tries = FAMILIES.iter().cycle().take(TRIES * FAMILIES.len());
    tries.into_iter().find_map(|family| ask(*family, peer).ok().flatten()).unwrap_or(Value::Null)
}

fn ask(family: u8, peer: SocketAddr) -> io::Result<Option<Value>> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    send(&socket, &request(family, peer.port()), SendFlags::empty())?;
    let mut part = vec![0; 32 * 1024];
    for _ in 0..MAX_PARTS {
        let (count, _) = recv(&socket, &mut part[..], RecvFlags::empty())?;
        let mut rest = &part[..count];
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                DONE | ERROR => return Ok(None),
                BY_FAMILY if remote(body).is_some_and(|remote| is_same(remote, peer)) => return Ok(facts(body)),
                _ => rest = next,
            }
        }
    }
    Ok(None)
}

/// `nlmsghdr` and `inet_diag_req_v2`: all sockets with this remote port.
fn request(family: u8, port: u16) -> Vec<u8> {
    const SIZE: u32 = 16 + 56;
    let mut bytes = Vec::with_capacity(SIZE as usize);
    bytes.extend(SIZE.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, TCP, 1 << (INFO - 1), 0]);
    bytes.extend(CONNECTED.to_ne_bytes());
    bytes.extend([0; 2]);
    bytes.extend(port.to_be_bytes());
    bytes.resize(SIZE as usize, 0);
    bytes
}

/// The next message: its kind, its body, and what comes after it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    let body = bytes.get(16..length)?;
    Some((u16_at(bytes, 4)?, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Of an `inet_diag_msg`: the other end.
fn remote(body: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(body.get(6..8)?.try_into().ok()?);
    let bytes: [u8; 16] = body.get(24..40)?.try_into().ok()?;
    let ip = match body.first()? {
        2 => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
        _ => IpAddr::from(bytes),
    };
    Some(SocketAddr::new(ip, port))
}

fn is_same(found: SocketAddr, wanted: SocketAddr) -> bool {
    (found.ip().to_canonical(), found.port()) == (wanted.ip().to_canonical(), wanted.port())
}

/// Of an `inet_diag_msg` and its `tcp_info`.
fn facts(body: &[u8]) -> Option<Value> {
    const ATTRIBUTES: usize = 72;
    let (receiving, sending) = (u32_at(body, 56)?, u32_at(body, 60)?);
    let mut known = json!({"sendQueueBytes": sending, "receiveQueueBytes": receiving});
    let mut rest = body.get(ATTRIBUTES..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(info) = rest.get(4..length as usize) else { break };
        if kind == INFO {
            known["roundTripMs"] = json!(f64::from(u32_at(info, 68)?) / 1000.0);
            known["retransmits"] = json!(u32_at(info, 100)?);
        }
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
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
            let Ok(listener) = TcpListener::bind(bind) else { continue };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_server, peer) = listener.accept().unwrap();
            client.write_all(b"12345").unwrap();
            // The kernel may leave out a socket while its table changes.
            let begun = std::time::Instant::now();
            let found = loop {
                let found = of(&peer.to_string());
                if found["receiveQueueBytes"] == 5 || begun.elapsed().as_secs() > 30 {
                    break found;
                }
            };
            assert_eq!(found["retransmits"], 0, "{found}");
            assert_eq!(found["receiveQueueBytes"], 5, "{found}");
            assert!(found["roundTripMs"].as_f64().is_some_and(|rtt| rtt > 0.0 && rtt < 1000.0), "{found}");
        }
        assert_eq!(of("192.0.2.1:9"), Value::Null);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = message(&bytes).map(|(_, body, _)| (remote(body), facts(body)));
            let _ = (remote(&bytes), facts(&bytes));
        }
    }
}
