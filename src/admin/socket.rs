//! What the kernel knows of a connection's socket, from `/proc/net/tcp`.

use std::{fs, net::SocketAddr};

use serde_json::{Value, json};

/// Largest table that is read, in bytes: about ten thousand sockets.
const MAX_TABLE: usize = 4 * 1024 * 1024;

/// Queues and retransmissions of the socket whose other end this is; null
/// where the system does not tell. Round trips are not in that table.
pub(super) fn of(peer: &str) -> Value {
    let Ok(peer) = peer.parse::<SocketAddr>() else { return Value::Null };
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    tables
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|table| find(&table, peer))
        .unwrap_or(Value::Null)
}

/// A line is `sl local_address rem_address st tx_queue:rx_queue tr:when
/// retrnsmt …`, all in hexadecimal but for the first; see proc(5).
fn find(table: &str, peer: SocketAddr) -> Option<Value> {
    let wanted = [
        address(peer),
        address(match peer {
            SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            v6 @ SocketAddr::V6(_) => v6,
        }),
    ];
    let table = &table[..table.floor_char_boundary(MAX_TABLE)];
    let fields = table.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let line = fields
        .into_iter()
        .find(|fields| fields.get(2).is_some_and(|remote| wanted.iter().any(|wanted| wanted == remote)))?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (sending, receiving) = line.get(4)?.split_once(':')?;
    Some(json!({
        "sendQueueBytes": hex(sending)?,
        "receiveQueueBytes": hex(receiving)?,
        "retransmits": hex(line.get(6)?)?,
    }))
}

/// As the table writes it: the address in words of the machine's order.
fn address(address: SocketAddr) -> String {
    let words = |octets: &[u8]| -> String {
        octets
            .chunks_exact(4)
            .map(|word| format!("{:08X}", u32::from_ne_bytes([word[0], word[1], word[2], word[3]])))
            .collect()
    };
    let ip = match address.ip() {
        std::net::IpAddr::V4(v4) => words(&v4.octets()),
        std::net::IpAddr::V6(v6) => words(&v6.octets()),
    };
    format!("{ip}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn a_socket_is_found_with_what_waits_in_it() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else { continue };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_server, peer) = listener.accept().unwrap();
            client.write_all(b"12345").unwrap();
            let found = of(&peer.to_string());
            assert_eq!(found["retransmits"], 0, "{found}");
            assert_eq!(found["receiveQueueBytes"], 5, "{found}");
        }
        assert_eq!(of("192.0.2.1:9"), Value::Null);
    }
}
