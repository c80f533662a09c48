//! Peers that ask over HTTP: the bytes of their requests, and what they read.

use crate::machine::{MAX_MESSAGE, Random};

/// What a peer sends as one request.
pub struct Sent {
    pub bytes: Vec<u8>,
    /// The status that it must get; none where its guest decides.
    pub status: Option<u16>,
    /// The peer asks for nothing behind it.
    pub is_last: bool,
}

/// A request that calls a guest with a payload, or now and then one that calls
/// nobody.
pub fn request(random: &mut Random, id: &str, payload: &str) -> Sent {
    let head = |line: &str, fields: &str| {
        format!("{line} HTTP/1.1\r\nHost: localhost\r\nRequest-Id: {id}\r\n{fields}")
    };
    let sent = |text: String, status, is_last| Sent {
        bytes: text.into_bytes(),
        status,
        is_last,
    };
    match random.of(0..30) {
        0 => return sent(head("GET /healthz", "\r\n"), Some(200), false),
        1 => return sent(head("GET /nothing", "\r\n"), Some(404), false),
        2 => {
            let fields = "Content-Type: text/plain\r\nContent-Length: 5\r\n\r\nquick";
            return sent(head("POST /call/a.b", fields), Some(415), true);
        }
        3 => {
            let fields = format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                MAX_MESSAGE + 1
            );
            return sent(head("POST /call/a.b", &fields), Some(413), true);
        }
        _ => {}
    }
    let is_last = random.happens(5);
    let mut fields = "Content-Type: application/json\r\n".to_owned();
    if is_last {
        fields += "Connection: close\r\n";
    }
    if random.happens(10) {
        fields += "Expect: 100-continue\r\n";
    }
    if random.happens(50) {
        fields += &format!("Content-Length: {}\r\n\r\n{payload}", payload.len());
    } else {
        fields += "Transfer-Encoding: chunked\r\n\r\n";
        let size = random.of(1..payload.len() + 2);
        for chunk in payload.as_bytes().chunks(size) {
            let chunk = std::str::from_utf8(chunk).expect("ASCII");
            fields += &format!("{:x}\r\n{chunk}\r\n", chunk.len());
        }
        fields += "0\r\n\r\n";
    }
    sent(head("POST /call/a.b", &fields), None, is_last)
}

/// What is no HTTP, although it begins like it.
pub const BROKEN: &[u8] = b"BROKEN\0 /\r\n\r\n";

/// One response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub id: Option<String>,
    pub closes: bool,
}

/// Takes the next response out of what was read, once it is whole.
pub fn take(unread: &mut Vec<u8>) -> Option<Response> {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(size) = head.parse(unread).expect("a response") else {
        return None;
    };
    let field = |name: &str| {
        let found = head.headers.iter().find(|field| field.name == name);
        found.map(|field| String::from_utf8_lossy(field.value).into_owned())
    };
    let length = field("Content-Length").map_or(0, |length| length.parse().expect("a length"));
    if unread.len() < size + length {
        return None;
    }
    let response = Response {
        status: head.code.expect("a status"),
        id: field("Request-Id"),
        closes: field("Connection").as_deref() == Some("close"),
    };
    unread.drain(..size + length);
    Some(response)
}
