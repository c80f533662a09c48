//! WebSocket on the port of the services: who may open one, and that messages,
//! late answers, deadlines and the drain are those of frames.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    process::Command,
    sync::Arc,
};

use mb_server::transport::{ClientTls, client_config};
use serde_json::{Value, json};

use crate::{
    BINARY, setup, start,
    support::{HOUR, PATIENCE, TestServer, pki::Pki},
};

/// The example of RFC 6455.
const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const ACCEPT: &str = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
const UPGRADE: &str = "Upgrade: websocket\r\nConnection: Upgrade\r\n";
const VERSION: &str = "Sec-WebSocket-Version: 13\r\n";

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

fn handshake(fields: &str) -> String {
    format!("GET /ws HTTP/1.1\r\nHost: localhost\r\n{UPGRADE}{KEY}{VERSION}{fields}\r\n")
}

/// A masked frame: first byte and payload.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ ..126 => frame.push(0x80 | length as u8),
        length @ ..0x1_0000 => {
            frame.push(0xfe);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(0xff);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(a, b)| a ^ b));
    frame
}

fn text(message: &str) -> Vec<u8> {
    frame(0x81, message.as_bytes())
}

/// What the server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Received {
    Text(String),
    Binary(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16, String),
    End,
}

/// A connection that speaks WebSocket, over TCP or TLS.
struct Socket<S> {
    stream: S,
}

fn connect(address: SocketAddr) -> Socket<TcpStream> {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    Socket { stream }
}

/// One that is open.
fn open(server: &TestServer) -> Socket<TcpStream> {
    let mut socket = connect(server.wire);
    assert_eq!(socket.opens(&handshake("")).0, 101);
    socket
}

impl<S: Read + Write> Socket<S> {
    fn send(&mut self, bytes: &[u8]) -> &mut Self {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
        self
    }

    /// Sends a head. Returns the status and the head of the response.
    fn opens(&mut self, head: &str) -> (u16, String) {
        self.send(head.as_bytes());
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let answer = String::from_utf8(answer).unwrap();
        (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
    }

    fn next(&mut self) -> Received {
        let mut head = [0; 2];
        match self.stream.read(&mut head[..1]) {
            Ok(0) => return Received::End,
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
        self.stream.read_exact(&mut head[1..]).unwrap();
        assert_eq!(head[1] & 0x80, 0, "a server masks nothing");
        let more = [0, 2, 8][usize::from(head[1] >= 126) + usize::from(head[1] == 127)];
        let mut extended = [0; 8];
        self.stream.read_exact(&mut extended[8 - more..]).unwrap();
        let length = match more {
            0 => u64::from(head[1]),
            _ => u64::from_be_bytes(extended),
        };
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).unwrap();
        match head[0] {
            0x81 => Received::Text(String::from_utf8(payload).unwrap()),
            0x82 => Received::Binary(payload),
            0x8a => Received::Pong(payload),
            0x88 => {
                let code = u16::from_be_bytes([payload[0], payload[1]]);
                Received::Close(code, String::from_utf8(payload[2..].to_vec()).unwrap())
            }
            first => panic!("{first:#x}"),
        }
    }

    /// The next thing must be a text: header line and payload.
    fn text(&mut self) -> (String, String) {
        match self.next() {
            Received::Text(text) => {
                let (line, payload) = text.split_once('\n').expect("a header line");
                (line.to_owned(), payload.to_owned())
            }
            other => panic!("{other:?}"),
        }
    }

    fn request(&mut self, topic: &str, id: &str, payload: &str) -> &mut Self {
        self.send(&text(&format!(
            "REQUEST:{topic}:1.0.0:{id}::{HOUR}\n{payload}"
        )))
    }

    /// The code of an ERROR that answers no request, and the close frame.
    fn closing(&mut self) -> (String, u16) {
        let (line, payload) = self.text();
        assert_eq!(line, "ERROR:system.error:1.0.0");
        let code = code(&payload);
        let close = self.closed();
        assert!(close.1.starts_with(&code), "{close:?}");
        (code, close.0)
    }

    fn closed(&mut self) -> (u16, String) {
        match self.next() {
            Received::Close(code, reason) => {
                assert_eq!(self.next(), Received::End);
                (code, reason)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn code(payload: &str) -> String {
    let error: Value = serde_json::from_str(payload).unwrap();
    error["code"].as_str().unwrap().to_owned()
}

const SUM: &str = "{\"a\":2,\"b\":40}";

#[test]
fn the_handshake() {
    let server = start();
    let get = |fields: &[&str]| {
        format!(
            "GET /ws HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
            fields.concat()
        )
    };
    let short = "Sec-WebSocket-Key: c2hvcnQ=\r\n";
    let other_version = "Sec-WebSocket-Version: 8\r\n";
    for (request, expected) in [
        (get(&[UPGRADE, KEY, VERSION]), 101),
        (
            get(&[
                "upgrade: h2c, WebSocket\r\nconnection: keep-alive, UPGRADE\r\n",
                KEY,
                VERSION,
            ]),
            101,
        ),
        (
            get(&[
                UPGRADE,
                KEY,
                VERSION,
                "Sec-WebSocket-Extensions: permessage-deflate\r\n",
            ]),
            101,
        ),
        (get(&[KEY, VERSION]), 426),
        (get(&["Connection: Upgrade\r\n", KEY, VERSION]), 426),
        (get(&["Upgrade: websocket\r\n", KEY, VERSION]), 426),
        (
            get(&["Upgrade: h2c\r\nConnection: Upgrade\r\n", KEY, VERSION]),
            426,
        ),
        (get(&[UPGRADE, KEY]), 426),
        (get(&[UPGRADE, KEY, other_version]), 426),
        (get(&[UPGRADE, KEY, VERSION, VERSION]), 400),
        (get(&[UPGRADE, VERSION]), 400),
        (get(&[UPGRADE, short, VERSION]), 400),
        (get(&[UPGRADE, "Sec-WebSocket-Key: ????\r\n", VERSION]), 400),
        (get(&[UPGRADE, KEY, KEY, VERSION]), 400),
        (get(&[UPGRADE, KEY, VERSION, "Content-Length: 1\r\n"]), 400),
        (handshake("").replace("GET", "HEAD"), 405),
        (handshake("").replace("GET", "POST"), 405),
        (handshake("").replace("/ws", "/ws/"), 404),
        (handshake("").replace("HTTP/1.1", "HTTP/1.0"), 426),
    ] {
        let (status, head) = connect(server.wire).opens(&request);
        assert_eq!(status, expected, "{request}{head}");
        match status {
            101 => assert!(head.contains(ACCEPT) && head.contains(UPGRADE), "{head}"),
            405 => assert!(head.contains("Allow: GET\r\n"), "{head}"),
            426 => assert!(head.contains(UPGRADE) && head.contains(VERSION), "{head}"),
            _ => {}
        }
        assert!(!head.contains("Extensions"), "none is negotiated: {head}");
    }
    for (offered, named) in [
        ("mb.v1", true),
        ("chat, mb.v1", true),
        ("chat", false),
        ("MB.V1", false),
    ] {
        let fields = format!("Sec-WebSocket-Protocol: {offered}\r\n");
        let (status, head) = connect(server.wire).opens(&handshake(&fields));
        let is_named = head.contains("Sec-WebSocket-Protocol: mb.v1\r\n");
        assert_eq!((status, is_named), (101, named), "{offered}");
    }
    // A refused one closes nothing.
    let mut socket = connect(server.wire);
    assert_eq!(socket.opens(&get(&[])).0, 426);
    let mut body = [0; 512];
    assert!(socket.stream.read(&mut body).unwrap() > 0);
    assert_eq!(socket.opens(&handshake("")).0, 101);
}

#[test]
fn pages_of_others_open_none() {
    let server = setup()
        .set("[http]\norigins = [\"https://app.example\"]\nhosts = [\"mb.example\"]")
        .start();
    let opens = |head: &str| connect(server.wire).opens(head).0;
    for (fields, expected) in [
        ("Origin: https://app.example\r\n", 101),
        (
            "Origin: https://app.example\r\nSec-Fetch-Site: cross-site\r\n",
            101,
        ),
        ("Sec-Fetch-Site: same-origin\r\n", 101),
        ("Origin: https://evil.example\r\n", 403),
        ("Origin: http://app.example\r\n", 403),
        ("Origin: null\r\n", 403),
        ("Sec-Fetch-Site: cross-site\r\n", 403),
    ] {
        assert_eq!(opens(&handshake(fields)), expected, "{fields}");
    }
    for (host, expected) in [
        ("127.0.0.1:1", 101),
        ("mb.example", 101),
        ("evil.example", 421),
    ] {
        let head = handshake("").replace("localhost", host);
        assert_eq!(opens(&head), expected, "{host}");
    }
}

#[test]
fn messages_are_those_of_frames() {
    let server = start();
    let mut socket = open(&server);
    // The first ones come with the handshake.
    let first = format!("REQUEST:calc.add:1.0.0:1\n{SUM}");
    let both = [
        handshake("").as_bytes(),
        &text(&first),
        &frame(0x89, b"alive"),
    ]
    .concat();
    let mut together = connect(server.wire);
    together.send(&both);
    assert_eq!(together.opens("").0, 101);
    assert_eq!(
        together.text(),
        ("RESPONSE:calc.add:1.0.0:1".into(), "{\"sum\":42}".into())
    );
    assert_eq!(together.next(), Received::Pong(b"alive".to_vec()));
    // Actions in any case of letters, as clients of other servers write them.
    for (request, line, payload) in [
        (
            "request:calc.add:1.0.0:a b",
            "ERROR:system.error:1.0.0",
            "MALFORMED_MESSAGE",
        ),
        ("request:calc.add:1.0.0:2", "RESPONSE:calc.add:1.0.0:2", ""),
        (
            "Request:system.heartbeat:1.0.0:3",
            "RESPONSE:system.heartbeat:1.0.0:3",
            "",
        ),
        ("publish:calc.add:1.0.0:4", "RESPONSE:calc.add:1.0.0:4", ""),
        (
            "request:no.where:1.0.0:5",
            "ERROR:no.where:1.0.0:5",
            "NO_ROUTE_FOUND",
        ),
        (
            "response:calc.add:1.0.0:6",
            "ERROR:calc.add:1.0.0:6",
            "INVALID_REQUEST",
        ),
        (
            "request:calc.divide:1.0.0:7",
            "ERROR:calc.divide:1.0.0:7",
            "",
        ),
    ] {
        socket.send(&text(&format!("{request}\n{{\"a\":2,\"b\":0}}")));
        let answer = socket.text();
        assert_eq!(answer.0, line, "{request}: {answer:?}");
        if !payload.is_empty() {
            assert_eq!(code(&answer.1), payload, "{request}");
        }
    }
    // Without an empty line, and with nothing at all.
    for message in ["", "no line"] {
        socket.send(&text(message));
        assert_eq!(code(&socket.text().1), "MALFORMED_MESSAGE");
    }
    // Bytes are bytes.
    let bytes = [&b"REQUEST:echo.say:1.0.0:8\n"[..], b"\xff\0\xfe"].concat();
    socket.send(&frame(0x82, &bytes));
    let expected = [&b"RESPONSE:echo.say:1.0.0:8\n"[..], b"\xff\0\xfe"].concat();
    assert_eq!(socket.next(), Received::Binary(expected));
    // An answer of any size is one message.
    for size in [10, 120, 126, 4_000, 65_500, 900_000] {
        let payload = format!("\"{}\"", "x".repeat(size));
        socket.request("echo.say", "9", &payload);
        assert_eq!(
            socket.text(),
            ("RESPONSE:echo.say:1.0.0:9".into(), payload),
            "{size}"
        );
    }
    let rows = server.json("/connections");
    let row = &rows["connections"][0];
    assert_eq!(
        (&row["protocol"], &row["state"]),
        (&json!("websocket"), &json!("idle"))
    );
    // The handshake and nineteen messages.
    assert_eq!(row["messagesIn"], row["messagesOut"], "{row}");
}

#[test]
fn pieces_a_byte_at_a_time() {
    let server = start();
    let mut socket = open(&server);
    let message = format!("REQUEST:echo.say:1.0.0:\u{31}\n\"{}\"", "\u{e9}".repeat(40));
    let mut bytes = Vec::new();
    let mut first = 0x01;
    for piece in message.as_bytes().chunks(7) {
        bytes.extend(frame(first, piece));
        bytes.extend(frame(0x89, piece));
        bytes.extend(frame(0x8a, b""));
        first = 0x00;
    }
    bytes.extend(frame(0x80, b""));
    for byte in bytes {
        socket.send(&[byte]);
    }
    for piece in message.as_bytes().chunks(7) {
        assert_eq!(socket.next(), Received::Pong(piece.to_vec()));
    }
    let (line, payload) = socket.text();
    assert_eq!(line, "RESPONSE:echo.say:1.0.0:1");
    assert!(message.ends_with(&payload), "{payload}");
    // Pings and pongs count as keep-alives.
    assert!(server.metric("mb_keep_alives_total") >= 20);
}

#[test]
fn what_closes_and_with_which_code() {
    let server = start();
    let close = |code: u16, reason: &[u8]| frame(0x88, &[&code.to_be_bytes(), reason].concat());
    let large = [&b"\x81\xff\0\0\0\0\x7f\xff\xff\xff"[..], &MASK].concat();
    let mut unmasked = text("REQUEST:echo.say:1.0.0:1\n1");
    unmasked[1] &= 0x7f;
    for (what, bytes, expected) in [
        ("unmasked", unmasked, 1002),
        ("a reserved bit", frame(0xc1, b"x"), 1002),
        ("another one", frame(0x91, b"x"), 1002),
        ("a reserved opcode", frame(0x83, b"x"), 1002),
        ("a reserved opcode of control", frame(0x8b, b""), 1002),
        ("a ping in pieces", frame(0x09, b""), 1002),
        ("a large ping", frame(0x89, &[0; 126]), 1002),
        ("nothing goes on", frame(0x80, b"x"), 1002),
        (
            "a text in a text",
            [frame(0x01, b"x"), frame(0x81, b"x")].concat(),
            1002,
        ),
        (
            "a long length",
            [&b"\x81\xfe\0\x01"[..], &MASK, b"x"].concat(),
            1002,
        ),
        ("no UTF-8", frame(0x81, b"REQUEST\xff"), 1007),
        ("half a character", frame(0x81, b"\xc3"), 1007),
        (
            "no UTF-8 in the second piece",
            [frame(0x01, b"\xe4\xb8"), frame(0x00, b"\xff")].concat(),
            1007,
        ),
        ("a promise", large, 1009),
        ("bytes over the limit", frame(0x82, &[0; 1_048_577]), 1009),
        ("a close", close(1000, b""), 1000),
        (
            "a close with a reason",
            close(1001, "\u{e9}".as_bytes()),
            1001,
        ),
        ("a close of the client's own", close(4999, b"x"), 4999),
        ("a close without a code", frame(0x88, b""), 1000),
        ("a close of one byte", frame(0x88, b"\x03"), 1002),
        ("no such close", close(1005, b""), 1002),
        ("no close at all", close(999, b""), 1002),
        ("a close that is not UTF-8", close(1000, b"\xff"), 1007),
    ] {
        let mut socket = open(&server);
        // What came before is answered.
        socket.send(&text("REQUEST:echo.say:1.0.0:before\n1"));
        let _ = socket.stream.write_all(&bytes);
        assert_eq!(socket.text().0, "RESPONSE:echo.say:1.0.0:before", "{what}");
        assert_eq!(socket.closed().0, expected, "{what}");
    }
    let mut socket = open(&server);
    let _ = socket.stream.write_all(&frame(0x82, &[0; 1_048_577]));
    assert_eq!(
        socket.closed().1,
        "MESSAGE_TOO_LARGE: message of 1048577 bytes exceeds the limit of 1048576"
    );
    assert!(server.metric("mb_errors_total{code=\"INVALID_FRAME\"}") >= 10);
    // The end of the stream inside a message is a message that was cut off.
    let mut cut = open(&server);
    cut.send(&text("REQUEST:echo.say:1.0.0:1\n1")[..9]);
    cut.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(cut.next(), Received::End);
    assert_eq!(server.metric("mb_truncated_messages_total"), 1);
}

#[test]
fn a_slow_call_holds_up_nothing_and_a_close_waits_for_it() {
    let server = start();
    let mut socket = open(&server);
    let slow = |id: &str| text(&format!("REQUEST:hostile.spin:1.0.0:{id}::{HOUR}\n1"));
    let stop = || {
        server.until("the call is stopped", |server| {
            crate::support::admin::stop_calls(server);
            server.json("/calls")["calls"]
                .as_array()
                .unwrap()
                .is_empty()
        });
    };
    let runs = || {
        server.until("the call runs", |server| {
            !server.json("/calls")["calls"]
                .as_array()
                .unwrap()
                .is_empty()
        });
    };
    let quick = text("REQUEST:echo.say:1.0.0:quick\n1");
    socket.send(&[slow("slow"), quick, frame(0x89, b"")].concat());
    let both = [socket.next(), socket.next()];
    assert!(both.contains(&Received::Pong(Vec::new())), "{both:?}");
    let answer = Received::Text("RESPONSE:echo.say:1.0.0:quick\n1".into());
    assert!(both.contains(&answer), "{both:?}");
    runs();
    stop();
    let (line, payload) = socket.text();
    assert_eq!(
        (&*line, &*code(&payload)),
        ("ERROR:hostile.spin:1.0.0:slow", "SERVICE_FAILED")
    );
    // What was begun is answered, then the close.
    socket.send(&[slow("last"), frame(0x88, b"\x03\xe8")].concat());
    runs();
    stop();
    assert_eq!(socket.text().0, "ERROR:hostile.spin:1.0.0:last");
    assert_eq!(socket.closed().0, 1000);
}

#[test]
fn a_drain_closes_with_1001() {
    let mut server = setup().set("drain_timeout = 1000").start();
    let (mut quiet, mut busy) = (open(&server), open(&server));
    quiet.request("echo.say", "1", "1").text();
    busy.request("hostile.spin", "slow", "1");
    server.until("the call runs", |server| {
        !server.json("/calls")["calls"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    server.signal("TERM");
    assert_eq!(quiet.closing(), ("SHUTTING_DOWN".into(), 1001));
    let (line, payload) = busy.text();
    assert_eq!(
        (&*line, &*code(&payload)),
        ("ERROR:hostile.spin:1.0.0:slow", "SHUTTING_DOWN")
    );
    assert_eq!(busy.closing(), ("SHUTTING_DOWN".into(), 1001));
    assert!(server.wait().success());
}

#[test]
fn silence_and_halves_have_their_time() {
    let server = setup()
        .set("read_timeout = 300\nidle_timeout = 500")
        .start();
    assert_eq!(open(&server).closing(), ("IDLE_TIMEOUT".into(), 1008));
    for half in [
        text("REQUEST:echo.say:1.0.0:1\n1")[..9].to_vec(),
        frame(0x01, b"REQUEST"),
        vec![0x81],
    ] {
        let mut socket = open(&server);
        socket.send(&half);
        // A ping between two pieces gives no more time.
        if half[0] == 0x01 {
            socket.send(&frame(0x89, b""));
            assert_eq!(socket.next(), Received::Pong(Vec::new()));
        }
        assert_eq!(socket.closing(), ("READ_TIMEOUT".into(), 1008));
    }
}

#[test]
fn who_may_send_what() {
    let setup = setup();
    let file = setup.dir.path().join("tokens.json");
    let mut command = Command::new(BINARY);
    command.args(["token", "new", "ann", "--file"]).arg(&file);
    let output = command.output().unwrap();
    let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let server = setup
        .set(&format!(
            "tokens = {:?}\nauth = \"required\"\nhandshake_timeout = 1000\n[principals.ann]\nrights = [\"calc.*\"]",
            file.display().to_string()
        ))
        .start();
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let hello = format!("REQUEST:system.hello:1.0.0:h\n{{\"token\":\"{token}\"}}");
    let add = format!("REQUEST:calc.add:1.0.0:1\n{SUM}");
    // By the header, under any name.
    let mut socket = connect(server.wire);
    let head = handshake(&bearer).replace("localhost", "any.example");
    assert_eq!(socket.opens(&head).0, 101);
    socket.send(&text(&add));
    assert_eq!(socket.text().0, "RESPONSE:calc.add:1.0.0:1");
    socket.request("echo.say", "2", "1");
    assert_eq!(code(&socket.text().1), "FORBIDDEN");
    let row = server.json("/connections")["connections"][0].clone();
    assert_eq!(row["principal"], json!("ann"));
    // By a hello.
    let mut socket = open(&server);
    socket.send(&text(&hello));
    let (line, payload) = socket.text();
    assert_eq!(line, "RESPONSE:system.hello:1.0.0:h");
    assert!(payload.contains("\"principal\":\"ann\""), "{payload}");
    socket.send(&text(&add));
    assert_eq!(socket.text().0, "RESPONSE:calc.add:1.0.0:1");
    // By neither.
    let mut socket = open(&server);
    socket.send(&text(&add));
    let (line, payload) = socket.text();
    assert_eq!(
        (&*line, &*code(&payload)),
        ("ERROR:calc.add:1.0.0:1", "UNAUTHORIZED")
    );
    assert_eq!(socket.closed().0, 1008);
    // What a token authenticated before is not the WebSocket's.
    let mut socket = connect(server.wire);
    let services = format!("GET /services HTTP/1.1\r\nHost: localhost\r\n{bearer}\r\n");
    let (status, head) = socket.opens(&services);
    assert_eq!(status, 200);
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.unwrap().parse().unwrap()];
    socket.stream.read_exact(&mut body).unwrap();
    assert_eq!(socket.opens(&handshake("")).0, 101);
    // Until it authenticates, its time and its messages are short.
    let mut large = open(&server);
    large.send(&frame(0x81, &[b'x'; 17_000]));
    assert_eq!(large.closed().0, 1009);
    assert_eq!(socket.closing(), ("READ_TIMEOUT".into(), 1008));
    assert_eq!(open(&server).closing(), ("READ_TIMEOUT".into(), 1008));
    let wrong = "Authorization: Bearer mbt_wrong\r\n";
    assert_eq!(connect(server.wire).opens(&handshake(wrong)).0, 401);
}

#[test]
fn over_tls_and_with_a_certificate() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let more = format!(
        "{}\n[principals.ann]\nrights = [\"calc.*\"]",
        pki.ca_setting()
    );
    let mut server = setup().set(&pki.settings(&more)).start();
    let config = client_config(&ClientTls {
        ca: Some(pki.path("ca.crt")),
        identity: Some(crate::support::pki::pair(
            pki.path("client.crt").parent().unwrap(),
            "client",
        )),
        ..ClientTls::default()
    })
    .unwrap();
    let mut config = Arc::unwrap_or_clone(config);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = "localhost".try_into().unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(server.listeners[1]).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut socket = Socket {
        stream: rustls::StreamOwned::new(session, stream),
    };
    let head = handshake("").replace("localhost", "any.example");
    assert_eq!(socket.opens(&head).0, 101);
    let payload = format!("{{\"a\":2,\"b\":40,\"c\":\"{}\"}}", "x".repeat(100_000));
    socket.request("calc.add", "1", &payload);
    assert_eq!(
        socket.text(),
        ("RESPONSE:calc.add:1.0.0:1".into(), "{\"sum\":42}".into())
    );
    socket.request("echo.say", "2", "1");
    assert_eq!(code(&socket.text().1), "FORBIDDEN");
    server.signal("TERM");
    assert_eq!(socket.closing(), ("SHUTTING_DOWN".into(), 1001));
    assert!(server.wait().success());
}
