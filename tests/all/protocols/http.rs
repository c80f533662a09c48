//! HTTP on the port of the services: what is answered, what is refused, and
//! that no request is read in two ways.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    BINARY, setup, start,
    support::{HOUR, PATIENCE, TestServer, absent, pki::Pki},
};

/// One response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    head: String,
    pub body: Vec<u8>,
}

impl Response {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(": ")?;
            field.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or("-").to_owned()
    }
}

/// A connection that asks over HTTP.
pub struct Http {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Http {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            unread: Vec::new(),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> &mut Self {
        self.stream.write_all(bytes).unwrap();
        self
    }

    /// More bytes; false at the end of the stream.
    fn fill(&mut self) -> bool {
        let mut piece = [0; 65536];
        let count = self.stream.read(&mut piece).unwrap();
        self.unread.extend_from_slice(&piece[..count]);
        count > 0
    }

    /// The next response, or none at the end of the stream.
    fn next(&mut self, has_body: bool) -> Option<Response> {
        let end = loop {
            let end = self.unread.windows(4).position(|four| four == b"\r\n\r\n");
            match end {
                Some(end) => break end,
                None if self.fill() => {}
                None => {
                    assert_eq!(self.unread, b"", "the stream ends inside a response");
                    return None;
                }
            }
        };
        let head = String::from_utf8(self.unread[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut response = Response {
            status,
            head,
            body: Vec::new(),
        };
        let length = response.field("Content-Length").map_or(0, |length| {
            if has_body { length.parse().unwrap() } else { 0 }
        });
        while self.unread.len() < end + 4 + length {
            assert!(self.fill(), "the stream ends inside a body");
        }
        response.body = self.unread[end + 4..end + 4 + length].to_vec();
        self.unread.drain(..end + 4 + length);
        Some(response)
    }

    pub fn response(&mut self) -> Response {
        self.next(true).expect("the stream ended")
    }

    /// The next response to a HEAD.
    pub fn head(&mut self) -> Response {
        self.next(false).expect("the stream ended")
    }

    pub fn ask(&mut self, request: &str) -> Response {
        self.send(request.as_bytes()).response()
    }
}

/// A POST of JSON with further fields, each with its line end.
pub fn post(path: &str, fields: &str, payload: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{fields}Content-Length: {}\r\n\r\n{payload}",
        payload.len()
    )
}

/// All responses to some bytes, until the server closes.
fn responses(server: &TestServer, bytes: &[u8]) -> Vec<Response> {
    let mut peer = Http::connect(server.wire);
    // It may close before it has read everything.
    let _ = peer.stream.write_all(bytes);
    let _ = peer.stream.shutdown(Shutdown::Write);
    std::iter::from_fn(|| peer.next(true)).collect()
}

const SUM: &str = "{\"a\":2,\"b\":40}";

#[test]
fn a_call_is_answered_and_the_connection_stays() {
    let server = start();
    let mut peer = Http::connect(server.wire);
    let answer = peer.ask(&post("/call/calc.add", "Request-Id: mine\r\n", SUM));
    assert_eq!((answer.status, answer.json()), (200, json!({"sum": 42})));
    assert_eq!(answer.field("Request-Id"), Some("mine"));
    assert_eq!(answer.field("Service-Version"), Some("1.0.0"));
    assert_eq!(answer.field("Content-Type"), Some("application/json"));
    assert_eq!(answer.field("Connection"), None);
    // Without an id, and by the caret rule.
    let answer = peer.ask(&post("/call/calc.add@1.0.0?x=1", "", SUM));
    assert_eq!((answer.status, answer.json()), (200, json!({"sum": 42})));
    assert!(answer.field("Request-Id").is_some());
    // An empty body is null.
    let answer = peer.ask("POST /call/echo.say HTTP/1.1\r\nHost: [::1]:80\r\n\r\n");
    assert_eq!((answer.status, answer.body), (200, b"null".to_vec()));
    // Opaque bytes stay what they are.
    let bytes = "POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: 2\r\n\r\n";
    let answer = peer.send(bytes.as_bytes()).send(b"\xff\0").response();
    assert_eq!((answer.status, &*answer.body), (200, &b"\xff\0"[..]));
    assert_eq!(
        answer.field("Content-Type"),
        Some("application/octet-stream")
    );
    let row = server.json("/connections")["connections"][0].clone();
    assert_eq!(
        (&row["protocol"], &row["messagesIn"]),
        (&json!("http"), &json!(4))
    );
    // A message without an answer.
    let answer = peer.ask(&post("/publish/echo.say", "", "1"));
    assert_eq!(answer.status, 202);
    // The client says that this is the last one.
    let answer = peer.ask(&post("/call/calc.add", "Connection: x, Close\r\n", SUM));
    assert_eq!(
        (answer.status, answer.field("Connection")),
        (200, Some("close"))
    );
    assert_eq!(peer.next(true), None);
}

#[test]
fn failures_have_their_status() {
    let server = setup().set("default_timeout = 100").start();
    let mut peer = Http::connect(server.wire);
    for (path, payload, status, code) in [
        ("/call/calc.add", "{", 400, "INVALID_PAYLOAD"),
        ("/call/calc.divide", "{\"a\":1,\"b\":0}", 422, ""),
        ("/call/nobody.there", "1", 404, "NO_ROUTE_FOUND"),
        ("/call/calc.nothing", "1", 404, "TOPIC_NOT_SUPPORTED"),
        ("/call/calc.add@7.0.0", SUM, 404, "VERSION_NOT_SUPPORTED"),
        ("/call/calc.add@7", SUM, 400, "MALFORMED_MESSAGE"),
        ("/call/calc", "1", 400, "MALFORMED_MESSAGE"),
        ("/call/../services", "1", 400, "MALFORMED_MESSAGE"),
        ("/call/calc%2Eadd", SUM, 400, "MALFORMED_MESSAGE"),
        ("/services/", "1", 404, "NO_ROUTE_FOUND"),
        ("/services", "1", 405, "INVALID_REQUEST"),
        ("/call/system.ping", "1", 200, ""),
        ("/call/system.heartbeat", "1", 200, ""),
        ("/call/hostile.trap", "1", 502, "SERVICE_FAILED"),
        ("/call/hostile.spin", "1", 504, "TIMEOUT"),
    ] {
        let mut peer = Http::connect(server.wire);
        let answer = peer.ask(&post(path, "", payload));
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        if !code.is_empty() {
            assert_eq!(answer.code(), code, "{path}");
        }
    }
    for (fields, status) in [
        ("Request-Id: a b\r\n", 400),
        ("Request-Timeout: 0\r\n", 400),
        ("Request-Timeout: 3600001\r\n", 400),
        ("Parent-Request-Id: ü\r\n", 400),
        ("Expect: something\r\n", 417),
    ] {
        let answer = Http::connect(server.wire).ask(&post("/call/calc.add", fields, SUM));
        assert_eq!(answer.status, status, "{fields:?}: {answer:?}");
    }
    let get = "GET /call/calc.add HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let answer = peer.ask(get);
    assert_eq!((answer.status, answer.field("Allow")), (405, Some("POST")));
    // HEAD where GET is, on the same connection: a length, and no body.
    peer.send(b"HEAD /services HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let head = peer.next(false).unwrap();
    let answer = peer.ask("GET /services HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(head.field("Content-Length"), answer.field("Content-Length"));
    assert!(answer.json()["services"].as_array().unwrap().len() >= 2);
    // Larger than it may be: refused before the body is read.
    let large = "POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n";
    let answer = peer.ask(large);
    assert_eq!(
        (answer.status, answer.field("Connection")),
        (413, Some("close"))
    );
    assert_eq!(peer.next(true), None);
}

/// Requests that others in between may read otherwise, of RFC 9112 sections 5
/// to 7; each is followed by another request. Which statuses come: where the
/// first request is refused for its form, nothing behind it is read.
#[test]
fn nothing_is_read_in_two_ways() {
    const JSON: &str = "Content-Type: application/json\r\n";
    let h = |line: &str, fields: &str, body: &str| {
        format!("{line}\r\nHost: localhost\r\n{JSON}{fields}\r\n{body}")
    };
    let call = "POST /call/echo.say HTTP/1.1";
    let p = |fields: &str, body: &str| h(call, fields, body);
    let get = |fields: &str, body: &str| h("GET /healthz HTTP/1.1", fields, body);
    let both = "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    let many: String = (0..62).map(|n| format!("X-{n}: 1\r\n")).collect();
    let more: String = (0..63).map(|n| format!("X-{n}: 1\r\n")).collect();
    let long = format!("X: {}\r\n", "x".repeat(16 * 1024));
    let rows: Vec<(String, &[u16])> = vec![
        // Bodies whose length is plain.
        (p("Content-Length: 1\r\n", "1"), &[200, 200]),
        (p("content-length:1\r\n", "1"), &[200, 200]),
        (p("Content-Length: \t 1 \r\n", "1"), &[200, 200]),
        (p("Content-Length: 001\r\n", "1"), &[200, 200]),
        (p("Content-Length: 0\r\n", ""), &[200, 200]),
        (p(chunked, "1\r\n1\r\n0\r\n\r\n"), &[200, 200]),
        (
            p("transfer-encoding: CHUNKED\r\n", "1\r\n1\r\n0\r\n\r\n"),
            &[200, 200],
        ),
        (p(chunked, "1;a=b\r\n1\r\n0;c\r\n\r\n"), &[200, 200]),
        (p(chunked, "0001\r\n1\r\n000\r\n\r\n"), &[200, 200]),
        (p(chunked, "1\r\n1\r\n1\r\n2\r\n0\r\n\r\n"), &[200, 200]),
        (p(chunked, "1\r\n1\r\n0\r\nTrailer: x\r\n\r\n"), &[200, 200]),
        (
            p(chunked, "1\r\n1\r\n0\r\nContent-Length: 9\r\n\r\n"),
            &[200, 200],
        ),
        (p(chunked, "A\r\n1234567890\r\n0\r\n\r\n"), &[200, 200]),
        // Lengths that can be read otherwise.
        (p("Content-Length: 1\r\nContent-Length: 1\r\n", "1"), &[400]),
        (
            p("Content-Length: 1\r\nContent-Length: 2\r\n", "12"),
            &[400],
        ),
        (p("Content-Length: 1, 1\r\n", "1"), &[400]),
        (p("Content-Length: +1\r\n", "1"), &[400]),
        (p("Content-Length: -1\r\n", "1"), &[400]),
        (p("Content-Length: 0x1\r\n", "1"), &[400]),
        (p("Content-Length: 1 1\r\n", "1"), &[400]),
        (p("Content-Length: 1.0\r\n", "1"), &[400]),
        (p("Content-Length: \r\n", "1"), &[400]),
        (p("Content-Length: 99999999999999999999\r\n", "1"), &[400]),
        (p("Content-Length: ١\r\n", "1"), &[400]),
        (p("Content-Length : 1\r\n", "1"), &[400]),
        (p("Content-Length\r\n", "1"), &[400]),
        (p("Content-Length\0: 1\r\n", "1"), &[400]),
        (p(" Content-Length: 1\r\n", "1"), &[400]),
        (p("X: y\r\n Content-Length: 1\r\n", "1"), &[400]),
        (p("X: y\r\n\tz\r\nContent-Length: 1\r\n", "1"), &[400]),
        (p(both, "1\r\n1\r\n0\r\n\r\n"), &[400]),
        (
            p(
                "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
                "0\r\n\r\n",
            ),
            &[400],
        ),
        (
            p(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
            &[400],
        ),
        (
            p("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"),
            &[400],
        ),
        (
            p("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
            &[400],
        ),
        (
            p("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"),
            &[400],
        ),
        (p("Transfer-Encoding: identity\r\n", ""), &[400]),
        (p("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding:\x0bchunked\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding:\r\n", "0\r\n\r\n"), &[400]),
        // Chunks that can be read otherwise.
        (p(chunked, "1\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1\r\n1\n0\r\n\r\n"), &[400]),
        (p(chunked, "1\r1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "0x1\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "+1\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "-1\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, " 1\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1 \r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, ";a\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1;\x01\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1;a\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "2\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1\r\n12\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1\r\n1\r\n0\r\nX: y\n\r\n"), &[400]),
        (p(chunked, "fffffffffffffffff\r\n1\r\n0\r\n\r\n"), &[413]),
        (p(chunked, "ffffffff\r\n1\r\n0\r\n\r\n"), &[413]),
        (p(chunked, "00000000000000001\r\n1\r\n0\r\n\r\n"), &[400]),
        // Lines and fields.
        (format!("{call}\nHost: localhost\n\n"), &[400]),
        (format!("{call}\r\nHost: localhost\n\r\n"), &[400]),
        (format!("{call}\r\nHost: localhost\r\n\n"), &[400]),
        (format!("{call}\r\nHost: a\rb\r\n\r\n"), &[400]),
        (format!("{call}\r\nHost: a\0b\r\n\r\n"), &[400]),
        (format!("{}\r\n", get("", "")), &[200, 400]),
        (format!("{call}\r\n{JSON}\r\n"), &[400]),
        (get("Host: other\r\n", ""), &[400]),
        (get("hOST: localhost\r\n", ""), &[400]),
        (format!("{call}\r\nHost: a b\r\n\r\n"), &[400]),
        (format!("{call}\r\nHost: user@localhost\r\n\r\n"), &[400]),
        (format!("{call}\r\nHost:\r\n\r\n"), &[400]),
        (
            p(
                "Content-Type: application/json\r\nContent-Length: 1\r\n",
                "1",
            ),
            &[400],
        ),
        (
            get("Authorization: Bearer a\r\nAuthorization: Bearer b\r\n", ""),
            &[400],
        ),
        (get("Request-Id: a\r\nRequest-Id: a\r\n", ""), &[400]),
        (
            get("Request-Timeout: 1\r\nRequest-Timeout: 2\r\n", ""),
            &[400],
        ),
        (get(&many, ""), &[200, 200]),
        (get(&more, ""), &[431]),
        (get(&long, ""), &[431]),
        (get("(X): y\r\n", ""), &[400]),
        (get(": y\r\n", ""), &[400]),
        // Request lines.
        (h("GET  /healthz HTTP/1.1", "", ""), &[400]),
        (h("GET /healthz  HTTP/1.1", "", ""), &[505]),
        (h("GET /healthz HTTP/1.1 ", "", ""), &[400]),
        (h("GET\t/healthz HTTP/1.1", "", ""), &[400]),
        (h("GET /healthz", "", ""), &[400]),
        (h("GET /healthz HTTP/1.2", "", ""), &[505]),
        (h("GET /healthz HTTP/2.0", "", ""), &[505]),
        (h("GET /healthz http/1.1", "", ""), &[505]),
        (h("GET healthz HTTP/1.1", "", ""), &[400]),
        (
            h("GET http://localhost/healthz HTTP/1.1", "", ""),
            &[200, 200],
        ),
        (h("GET http://a@localhost/healthz HTTP/1.1", "", ""), &[400]),
        (h("GET //healthz HTTP/1.1", "", ""), &[404, 200]),
        (h("OPTIONS * HTTP/1.1", "", ""), &[404, 200]),
        (h("CONNECT localhost:1 HTTP/1.1", "", ""), &[400]),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), &[505]),
        ("SSH-2.0-OpenSSH\r\n\r\n".into(), &[400]),
        // Bodies where none is.
        (get("Content-Length: 1\r\n", "1"), &[400]),
        (get("Content-Length: 0\r\n", ""), &[200, 200]),
        (get(chunked, "0\r\n\r\n"), &[400]),
        (
            h(
                "DELETE /call/echo.say HTTP/1.1",
                "Content-Length: 1\r\n",
                "1",
            ),
            // The method is what is wrong; what follows is not read either.
            &[405],
        ),
        // HTTP/1.0 closes.
        (
            h("POST /call/echo.say HTTP/1.0", "Content-Length: 1\r\n", "1"),
            &[200],
        ),
        (
            h(
                "POST /call/echo.say HTTP/1.0",
                "Connection: keep-alive\r\nContent-Length: 1\r\n",
                "1",
            ),
            &[200, 200],
        ),
        (
            h("POST /call/echo.say HTTP/1.0", chunked, "0\r\n\r\n"),
            &[400],
        ),
        ("GET /healthz HTTP/1.0\r\n\r\n".into(), &[200]),
        // Found by a second table, on which the first parser panicked.
        (h("POST /call/\u{e9} HTTP/1.1", "", ""), &[400]),
        (h("POST \u{e9}\u{e9}\u{e9}\u{e9} HTTP/1.1", "", ""), &[400]),
        (p(chunked, "1\r\n1\r\n0\r\n a: b\r\n\r\n"), &[400]),
        (p(chunked, "1\r\n1\r\n0\r\nA: b\r\n\tc\r\n\r\n"), &[400]),
        (p(chunked, "1 \r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1;a\nb\r\n1\r\n0\r\n\r\n"), &[400]),
        (p(chunked, "1;\0\r\n1\r\n0\r\n\r\n"), &[400]),
        (p("Content-Length: 1;a\r\n", "1"), &[400]),
        (p("Content-Length: 1e0\r\n", "1"), &[400]),
        (p("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), &[400]),
        (p("Transfer-Encoding: chunked;a=b\r\n", "0\r\n\r\n"), &[400]),
        (
            p("Authorization: Bearer a\r\nAuthorization: Bearer a\r\n", ""),
            &[400],
        ),
        (
            p("Request-Timeout: 5\r\nRequest-Timeout: 5\r\n", ""),
            &[400],
        ),
        (p("Host: a,b\r\n", ""), &[400]),
        (p("X\u{e9}: a\r\n", ""), &[400]),
        // A body that is refused is not read as a request.
        (
            p("Origin: http://evil.example\r\nContent-Length: 1\r\n", "1"),
            &[403],
        ),
        (
            h("POST /nowhere HTTP/1.1", "Content-Length: 1\r\n", "1"),
            &[404],
        ),
    ];
    assert!(rows.len() >= 60, "{}", rows.len());
    let server = start();
    for (request, expected) in &rows {
        let bytes = format!("{request}GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let got = responses(&server, bytes.as_bytes());
        let statuses: Vec<_> = got.iter().map(|response| response.status).collect();
        assert_eq!(statuses, *expected, "{request:?}: {got:?}");
        if expected.last() != Some(&200) || expected.len() == 1 {
            let last = got.last().unwrap();
            assert_eq!(last.field("Connection"), Some("close"), "{request:?}");
        }
    }
    // The same, a byte at a time.
    for (request, expected) in rows.iter().filter(|(request, _)| request.len() < 300) {
        let mut peer = Http::connect(server.wire);
        peer.stream.set_nodelay(true).unwrap();
        let bytes = format!("{request}GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        for byte in bytes.as_bytes() {
            if peer.stream.write_all(&[*byte]).is_err() {
                break;
            }
        }
        let _ = peer.stream.shutdown(Shutdown::Write);
        let statuses: Vec<_> = std::iter::from_fn(|| peer.next(true))
            .map(|response| response.status)
            .collect();
        assert_eq!(statuses, *expected, "{request:?}");
    }
}

/// What a page of another site can have a browser send, on all routes.
#[test]
fn pages_of_others_get_nothing() {
    let server = setup()
        .set("[http]\nmcp = true\norigins = [\"https://app.example\"]\nhosts = [\"mb.example\"]")
        .start();
    let routes = [
        ("POST", "/call/calc.add"),
        ("POST", "/call/calc.add@1.0.0"),
        ("POST", "/publish/calc.add"),
        ("GET", "/services"),
        ("GET", "/openapi.json"),
        ("POST", "/mcp"),
    ];
    for (method, path) in routes {
        let ask = |host: &str, fields: &str| {
            let body = match (method, path) {
                ("POST", "/mcp") => r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#,
                ("POST", _) => SUM,
                _ => "",
            };
            let typed = if fields.contains("Content-Type") || body.is_empty() {
                ""
            } else {
                "Content-Type: application/json\r\n"
            };
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{typed}{fields}Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            Http::connect(server.wire).ask(&request)
        };
        let fine = if path.starts_with("/publish") {
            202
        } else {
            200
        };
        for host in [
            "localhost",
            "localhost.",
            "LOCALHOST:8081",
            "127.0.0.1:1",
            "[::1]:1",
            "10.1.2.3",
            "mb.example:80",
        ] {
            assert_eq!(ask(host, "").status, fine, "{path} {host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            assert_eq!(ask(host, "").status, 421, "{path} {host}");
        }
        for fields in [
            "Origin: https://evil.example\r\n",
            "Origin: null\r\n",
            "Origin: https://app.example.evil\r\n",
            "Origin: http://app.example\r\n",
            "Sec-Fetch-Site: cross-site\r\n",
            "Sec-Fetch-Site: same-site\r\n",
        ] {
            assert_eq!(ask("localhost", fields).status, 403, "{path} {fields}");
        }
        assert_eq!(
            ask("localhost", "Sec-Fetch-Site: same-origin\r\n").status,
            fine
        );
        assert_eq!(ask("localhost", "Sec-Fetch-Site: none\r\n").status, fine);
        if method == "POST" {
            for kind in [
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data",
                "application/json; charset=utf-16",
                "text/plain; application/json",
            ] {
                let answer = ask("localhost", &format!("Content-Type: {kind}\r\n"));
                assert_eq!(answer.status, 415, "{path} {kind}");
            }
            let answer = ask(
                "localhost",
                "Content-Type: application/json; charset=\"UTF-8\"\r\n",
            );
            assert_eq!(answer.status, fine, "{path}");
        }
        // The page that is listed.
        let listed = "Origin: https://app.example\r\nSec-Fetch-Site: cross-site\r\n";
        let answer = ask("localhost", listed);
        assert_eq!(answer.status, fine, "{path}");
        let allowed = answer.field("Access-Control-Allow-Origin");
        assert_eq!(allowed, Some("https://app.example"));
        let preflight = |origin: &str| {
            Http::connect(server.wire).ask(&format!(
                "OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: {method}\r\n\r\n"
            ))
        };
        let answer = preflight("https://app.example");
        assert_eq!(answer.status, 204);
        assert!(
            answer
                .field("Access-Control-Allow-Methods")
                .unwrap()
                .contains(method)
        );
        assert_eq!(preflight("https://evil.example").status, 403);
    }
    for fields in ["", "Origin: https://app.example\r\n"] {
        let answer = Http::connect(server.wire).ask(&format!(
            "GET /readyz HTTP/1.1\r\nHost: evil.example\r\n{fields}\r\n"
        ));
        assert_eq!(answer.status, 200, "a balancer's check names any host");
        for (name, value) in [
            ("Vary", "Origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ] {
            assert_eq!(answer.field(name), Some(value));
        }
    }
}

#[test]
fn a_token_authenticates_one_request() {
    let setup = setup();
    let file = setup.dir.path().join("tokens.json");
    let token = |arguments: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(["token", "new"]).args(arguments).arg("--file");
        let output = command.arg(&file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let (ann, bob) = (token(&["ann"]), token(&["bob"]));
    let server = setup
        .set(&format!(
            "tokens = {:?}\nauth = \"required\"\n[principals.ann]\nrights = [\"calc.*\"]\n[principals.bob]\nrights = [\"echo.*@1\"]",
            file.display().to_string()
        ))
        .start();
    let bearer = |token: &str| format!("Authorization: bearer {token}\r\n");
    let mut peer = Http::connect(server.wire);
    for _ in 0..3 {
        let answer = peer.ask(&post("/call/calc.add", &bearer(&ann), SUM));
        assert_eq!((answer.status, answer.json()), (200, json!({"sum": 42})));
    }
    // Of another name it may be, since the peer has authenticated.
    let named = post("/call/calc.add", &bearer(&ann), SUM).replace("localhost", "any.example");
    assert_eq!(peer.ask(&named).status, 200);
    assert_eq!(
        peer.ask(&post("/call/echo.say", &bearer(&ann), "1")).status,
        403
    );
    // The next request of the same connection is somebody else's.
    let versioned = post("/call/echo.say@1.0.0", &bearer(&bob), "1");
    assert_eq!(peer.ask(&versioned).status, 200);
    // A right that names versions needs one.
    assert_eq!(
        peer.ask(&post("/call/echo.say", &bearer(&bob), "1")).status,
        403
    );
    assert_eq!(
        peer.ask(&post("/call/calc.add", &bearer(&bob), SUM)).status,
        403
    );
    // Without one nothing is left of the last one, and the body is not read.
    let answer = peer.ask(&post("/call/calc.add", "", SUM));
    assert_eq!((answer.status, answer.code()), (401, "UNAUTHORIZED".into()));
    assert_eq!(answer.field("WWW-Authenticate"), Some("Bearer"));
    assert_eq!(peer.next(true), None);
    for wrong in [
        "Authorization: Bearer mbt_wrong\r\n",
        "Authorization: Basic YTpi\r\n",
    ] {
        let head = format!(
            "POST /call/calc.add HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{wrong}Content-Length: 1000\r\n\r\n"
        );
        let answer = Http::connect(server.wire).ask(&head);
        assert_eq!(answer.status, 401, "the body has not even been sent");
    }
    // Whoever looks whether the server is there needs no token.
    let answer = Http::connect(server.wire).ask("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(answer.status, 200);
}

#[test]
fn slow_calls_answer_in_order_and_a_drain_waits_for_them() {
    let mut server = start();
    let mut slow = Http::connect(server.wire);
    let long = "Request-Timeout: 300\r\nRequest-Id: long\r\n";
    let pipelined = post("/call/hostile.spin", long, "1") + &post("/call/calc.add", "", SUM);
    slow.send(pipelined.as_bytes());
    let (first, second) = (slow.response(), slow.response());
    assert_eq!(
        (first.status, first.field("Request-Id")),
        (504, Some("long"))
    );
    assert_eq!((second.status, second.json()), (200, json!({"sum": 42})));
    // One that is quiet is closed by the drain, one that waits is answered.
    let mut quiet = Http::connect(server.wire);
    assert_eq!(quiet.ask(&post("/call/calc.add", "", SUM)).status, 200);
    let fields = format!("Request-Timeout: {HOUR}\r\n");
    slow.send(post("/call/hostile.spin", &fields, "1").as_bytes());
    server.until("the call runs", |server| {
        !server.json("/calls")["calls"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    server.signal("TERM");
    assert_eq!(quiet.next(true), None);
    let answer = slow.response();
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(slow.next(true), None);
    assert!(server.wait().success());
}

#[test]
fn a_listener_speaks_what_it_is_set_to() {
    let server = setup()
        .set("protocols = [\"frames\"]\n[[listeners]]\nport = 0\nprotocols = [\"http\"]")
        .start();
    let mut frames = server.connect();
    assert_eq!(frames.ask("echo.say", "1").text(), "1");
    let mut peer = Http::connect(server.listeners[0]);
    peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut answer = Vec::new();
    peer.stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("ERROR:system.error"), "{text}");
    let mut peer = Http::connect(server.listeners[1]);
    let answer = peer.ask(&post("/call/echo.say", "", "1"));
    assert_eq!((answer.status, &*answer.body), (200, &b"1"[..]));
    let mut peer = Http::connect(server.listeners[1]);
    let answer = peer
        .send(&crate::support::frame(0, b"REQUEST:echo.say:1.0.0:1\n1"))
        .response();
    assert_eq!(answer.status, 400);
}

#[test]
fn timeouts_and_large_bodies() {
    let server = setup()
        .set("read_timeout = 300\nidle_timeout = 700")
        .start();
    // A head that never ends, and a body that does not: 408.
    for part in [
        "POST /call/echo.say HTTP/1.1\r\nHo",
        &*post("/call/echo.say", "", "12")
            .replace("12", "1")
            .replace("Length: 1", "Length: 9"),
    ] {
        let mut peer = Http::connect(server.wire);
        let answer = peer.ask(part);
        assert_eq!((answer.status, answer.code()), (408, "READ_TIMEOUT".into()));
        assert_eq!(peer.next(true), None);
    }
    // A quiet one is closed without a word.
    let mut quiet = Http::connect(server.wire);
    assert_eq!(quiet.ask(&post("/call/echo.say", "", "1")).status, 200);
    assert_eq!(quiet.next(true), None);
    // A large body in one piece and in chunks, behind 100 Continue.
    let text = format!("\"{}\"", "x".repeat(900_000));
    let mut peer = Http::connect(server.wire);
    let answer = peer.ask(&post("/call/echo.say", "", &text));
    assert!(answer.status == 200 && answer.body == text.as_bytes());
    let head = "POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n";
    let answer = peer.ask(head);
    assert_eq!(answer.status, 100);
    let mut chunks = String::new();
    for piece in text.as_bytes().chunks(7777) {
        let piece = std::str::from_utf8(piece).unwrap();
        chunks += &format!("{:x}\r\n{piece}\r\n", piece.len());
    }
    let answer = peer.ask(&(chunks + "0\r\n\r\n"));
    assert!(answer.status == 200 && answer.body == text.as_bytes());
}

/// curl, over TLS and with a client's certificate.
#[test]
fn curl_calls_over_tls() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let more = format!(
        "{}\n[principals.ann]\nrights = [\"calc.*\"]",
        pki.ca_setting()
    );
    let server = setup().set(&pki.settings(&more)).start();
    let port = server.listeners[1].port();
    let file = |name: &str| pki.path(name).display().to_string();
    let mut command = Command::new("curl");
    command.args(["-s", "--http1.1", "--cacert", &file("ca.crt")]);
    command.args(["--cert", &file("client.crt"), "--key", &file("client.key")]);
    command.args(["-H", "Content-Type: application/json", "-d", SUM]);
    command.arg(format!("https://localhost:{port}/call/calc.add"));
    match command.output() {
        Ok(output) => assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "{\"sum\":42}",
            "{output:?}"
        ),
        Err(error) => absent("curl", &error),
    }
}

/// Failures count for whom a trusted proxy names, not for the proxy.
#[test]
fn a_proxy_names_its_clients() {
    let setup = setup();
    let file = setup.dir.path().join("tokens.json");
    let server = setup
        .set(&format!(
            "tokens = {:?}\nauth = \"required\"\n[http]\nforwarded_from = [\"127.0.0.1/32\", \"10.0.0.0/8\"]",
            file.display().to_string()
        ))
        .start();
    let guess = |from: &str| {
        let fields = format!("{from}Authorization: Bearer mbt_wrong\r\n");
        let answer = Http::connect(server.wire).ask(&post("/call/echo.say", &fields, "1"));
        assert_eq!(answer.status, 401);
        answer.json()["message"].as_str().unwrap().to_owned()
    };
    let throttled = "too many failures from this address";
    for from in [
        "X-Forwarded-For: 1.2.3.4\r\n",
        "Forwarded: for=2.2.2.2, for=10.1.1.1\r\n",
    ] {
        // A failure is forgotten after six seconds, so a slow machine takes more.
        let answers: Vec<_> = (0..100).map(|_| guess(from)).collect();
        let first = answers.iter().position(|answer| answer == throttled);
        assert!(first.is_some_and(|first| first >= 10), "{from}: {first:?}");
    }
    // What a client writes in front of what the proxy adds is nothing to it.
    assert_eq!(guess("X-Forwarded-For: 7.7.7.7, 1.2.3.4\r\n"), throttled);
    assert_ne!(guess("X-Forwarded-For: 1.2.3.4, 7.7.7.7\r\n"), throttled);
    assert_ne!(guess(""), throttled);
    // Of two fields, one may be the client's.
    let fields = "X-Forwarded-For: 1.2.3.4\r\nForwarded: for=5.5.5.5\r\n";
    let answer = Http::connect(server.wire).ask(&post("/call/echo.say", fields, "1"));
    assert_eq!(answer.status, 400);
}

/// A token counts for one request also where the connection has a certificate.
#[test]
fn a_token_leaves_nothing_to_a_certificate() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let setup = setup();
    let tokens = setup.dir.path().join("tokens.json");
    let mut command = Command::new(BINARY);
    command.args(["token", "new", "bob", "--file"]).arg(&tokens);
    let token = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let tls = pki.settings(&pki.ca_setting());
    let server = setup
        .set(&format!(
            "tokens = {:?}\n{tls}\n[principals.ann]\nrights = [\"calc.*\"]\n[principals.bob]\nrights = [\"echo.*\"]",
            tokens.display().to_string()
        ))
        .start();
    let url = format!(
        "https://localhost:{}/call/echo.say",
        server.listeners[1].port()
    );
    let file = |name: &str| pki.path(name).display().to_string();
    let mut command = Command::new("curl");
    let bearer = format!("Authorization: Bearer {}", token.trim());
    for (index, fields) in [&[][..], &["-H", &bearer], &[]].iter().enumerate() {
        if index > 0 {
            command.arg("--next");
        }
        command.args(["-s", "--http1.1", "--cacert", &file("ca.crt"), "-d", "1"]);
        command.args(["--cert", &file("client.crt"), "--key", &file("client.key")]);
        command.args(["-H", "Content-Type: application/json", "-o", "/dev/null"]);
        command
            .args(*fields)
            .args(["-w", "%{http_code} %{num_connects} ", &url]);
    }
    match command.output() {
        Ok(output) => assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "403 1 200 0 403 0 ",
            "{output:?}"
        ),
        Err(error) => absent("curl", &error),
    }
}
