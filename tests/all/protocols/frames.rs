//! The protocol, from outside.

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::{
    setup, start,
    support::{BINARY, KEEPALIVE, MORE, Received, frame},
};

#[test]
fn the_bytes_of_the_first_document_work() {
    let server = start();
    let mut client = server.connect();
    client.send(&KEEPALIVE);
    assert_eq!(client.receive(), Received::KeepAlive);
    let body = b"REQUEST:service.action:1.0.0:req-uuid\n{\"data\":\"test\"}";
    client.send(&[&[0, 0, 0, 53, 0, 0, 0, 0], body.as_slice()].concat());
    let answer = client.message();
    assert_eq!(answer.line, "ERROR:service.action:1.0.0:req-uuid");
    assert_eq!(answer.code(), "NO_ROUTE_FOUND");
    assert_eq!(answer.json()["origin"], "server");
    assert!(answer.json()["timestamp"].as_str().unwrap().ends_with('Z'));
    // Once: what comes next is the answer to the next thing.
    client.send(&KEEPALIVE);
    assert_eq!(client.receive(), Received::KeepAlive);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    client.expect_end();
}

#[test]
fn payloads_come_back_as_they_went() {
    let server = start();
    let mut client = server.connect();
    let check =
        |client: &mut crate::support::RawClient, flags: u32, payload: &[u8], expected: &[u8]| {
            client.send(&frame(
                flags,
                &[b"REQUEST:echo.say:1.0.0:7\n", payload].concat(),
            ));
            let answer = client.message();
            assert_eq!(
                (&*answer.line, answer.flags),
                ("RESPONSE:echo.say:1.0.0:7", flags)
            );
            assert_eq!(answer.payload, expected);
        };
    check(
        &mut client,
        0,
        br#"{"a":[1,2,"\u00e9"]}"#,
        br#"{"a":[1,2,"\u00e9"]}"#,
    );
    check(&mut client, 0, b" 1.0 ", b" 1.0 ");
    check(&mut client, 0, b"", b"null");
    check(&mut client, BINARY, b"", b"");
    check(&mut client, BINARY, &[0, 255, 10, 58], &[0, 255, 10, 58]);
    let large = vec![7; 900_000];
    check(&mut client, BINARY, &large, &large);
    let text = format!("\"{}\"", "x".repeat(900_000));
    check(&mut client, 0, text.as_bytes(), text.as_bytes());
}

#[test]
fn a_message_in_pieces_is_one_message() {
    let server = start();
    let mut client = server.connect();
    let body = b"REQUEST:echo.say:1.0.0:7\n{\"pieces\":true}";
    for split in 0..=body.len() {
        client.send(&frame(MORE, &body[..split]));
        client.send(&KEEPALIVE);
        client.send(&frame(0, &body[split..]));
        assert_eq!(client.receive(), Received::KeepAlive);
        assert_eq!(
            client.message().text(),
            "{\"pieces\":true}",
            "split at {split}"
        );
    }
}

#[test]
fn what_is_wrong_is_named_and_the_connection_stays_open() {
    let server = start();
    let mut client = server.connect();
    let system = "ERROR:system.error:1.0.0";
    for (flags, body, line, code) in [
        (0, "", system, "MALFORMED_MESSAGE"),
        (0, "no line feed", system, "MALFORMED_MESSAGE"),
        (0, "ASK:a.b:1.0.0:1\n", system, "MALFORMED_MESSAGE"),
        (0, "REQUEST:a:1.0.0:1\n", system, "MALFORMED_MESSAGE"),
        (0, "REQUEST:a.b:1:1\n", system, "MALFORMED_MESSAGE"),
        (0, "REQUEST:a.b:1.0.0:1::0\n", system, "MALFORMED_MESSAGE"),
        (0, "REQUEST:a.b:1.0.0:1\r\n", system, "MALFORMED_MESSAGE"),
        (0, "REQUEST:a.b:1.0.0\n", system, "INVALID_REQUEST_ID"),
        (
            0,
            "RESPONSE:a.b:1.0.0:1\n",
            "ERROR:a.b:1.0.0:1",
            "INVALID_REQUEST",
        ),
        (
            0,
            "REQUEST:a.b:1.0.0:1\n{",
            "ERROR:a.b:1.0.0:1",
            "INVALID_PAYLOAD",
        ),
        (
            0,
            "REQUEST:echo.say:1.0.0:1\n{} {}",
            "ERROR:echo.say:1.0.0:1",
            "INVALID_PAYLOAD",
        ),
        (
            BINARY,
            "REQUEST:system.ping:1.0.0:1\n",
            "ERROR:system.ping:1.0.0:1",
            "INVALID_REQUEST",
        ),
        (
            0,
            "REQUEST:none.x:1.0.0:1\n",
            "ERROR:none.x:1.0.0:1",
            "NO_ROUTE_FOUND",
        ),
        (
            0,
            "REQUEST:echo.say:2.0.0:1\n",
            "ERROR:echo.say:2.0.0:1",
            "VERSION_NOT_SUPPORTED",
        ),
        (
            0,
            "REQUEST:echo.nothing:1.0.0:1\n",
            "ERROR:echo.nothing:1.0.0:1",
            "TOPIC_NOT_SUPPORTED",
        ),
        (
            0,
            "request:echo.say:1.0.0:1\n{",
            "ERROR:echo.say:1.0.0:1",
            "INVALID_PAYLOAD",
        ),
    ] {
        client.send(&frame(flags, body.as_bytes()));
        let answer = client.message();
        assert_eq!((&*answer.line, &*answer.code()), (line, code), "{body:?}");
    }
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert_eq!(client.ask("echo.say", &nested(127)).text(), nested(127));
    assert_eq!(
        client.ask("echo.say", &nested(128)).code(),
        "INVALID_PAYLOAD"
    );
    assert_eq!(
        server.metric("mb_errors_total{code=\"MALFORMED_MESSAGE\"}"),
        7
    );
}

#[test]
fn what_breaks_the_stream_is_named_and_closes_it() {
    let server = start();
    for (bytes, code, message) in [
        (frame(8, b""), "INVALID_FRAME", "reserved"),
        (frame(0x8000_0000, b""), "INVALID_FRAME", "reserved"),
        (frame(3, b""), "INVALID_FRAME", "KEEPALIVE"),
        (frame(1, b"x"), "INVALID_FRAME", "1 bytes"),
        (
            [frame(MORE, b"x"), frame(BINARY, b"y")].concat(),
            "INVALID_FRAME",
            "BINARY",
        ),
        (
            vec![0, 0x90, 0, 0, 0, 0, 0, 0],
            "MESSAGE_TOO_LARGE",
            "message of 9437184 bytes exceeds the limit of 1048576",
        ),
        (
            [frame(MORE, &[b'x'; 600_000]), frame(0, &[b'x'; 600_000])].concat(),
            "MESSAGE_TOO_LARGE",
            "1200000",
        ),
    ] {
        let mut client = server.connect();
        // What stands before it is answered.
        client.request("echo.say", "before", "1");
        client.send(&bytes);
        // What stands behind it is read and dropped, so that the ERROR is not
        // lost to a reset.
        let _ = std::io::Write::write_all(&mut client.stream, &vec![0; 3_000_000]);
        assert_eq!(client.message().line, "RESPONSE:echo.say:1.0.0:before");
        let answer = client.message();
        assert_eq!(
            (&*answer.line, &*answer.code()),
            ("ERROR:system.error:1.0.0", code)
        );
        assert!(answer.text().contains(message), "{}", answer.text());
        client.expect_end();
    }
}

#[test]
fn publish_is_one_way() {
    let server = start();
    let mut client = server.connect();
    client.send(&frame(0, b"PUBLISH:calc.add:1.0.0\n{\"a\":1,\"b\":2}"));
    client.send(&frame(0, b"PUBLISH:calc.divide:1.0.0\n{\"a\":1,\"b\":0}"));
    client.send(&frame(0, b"PUBLISH:none.x:1.0.0\n"));
    client.send(&frame(0, b"PUBLISH:calc.divide:1.0.0:1\n{\"a\":1,\"b\":0}"));
    assert_eq!(
        client.message().code(),
        "DIVISION_BY_ZERO",
        "the three before were silent"
    );
    client.send(&frame(0, b"PUBLISH:calc.add:1.0.0:2\n{\"a\":1,\"b\":2}"));
    let answer = client.message();
    assert_eq!(
        (&*answer.line, &*answer.text()),
        ("RESPONSE:calc.add:1.0.0:2", "{\"delivered\":1}")
    );
    client.send(&frame(0, b"PUBLISH:calc.add:1.0.0:2::5\n{}"));
    assert_eq!(client.message().code(), "MALFORMED_MESSAGE");
    // One that the machine makes slow is overtaken by those behind it.
    server.until("the failures are counted", |server| {
        server.metric("mb_publish_failures_total") == 2
    });
    server.until("every one of them was a call", |server| {
        server.json("/services")["services"][0]["calls"] == 4
    });
}

#[test]
fn system_topics() {
    let server = start();
    let mut client = server.connect();
    let hello = client
        .ask(
            "system.hello",
            "{\"client\":\"test/1\",\"protocol\":\"1.7\"}",
        )
        .json();
    assert_eq!(hello["limits"]["maxMessageSize"], 1_048_576);
    assert_eq!(hello["principal"], serde_json::Value::Null);
    let rows = server.json("/connections");
    assert_eq!(
        rows["connections"][0]["id"], hello["connectionId"],
        "the same name inside and outside"
    );
    assert_eq!(
        client.ask("system.hello", "{\"protocol\":\"2.0\"}").code(),
        "VERSION_NOT_SUPPORTED"
    );
    assert_eq!(
        client.ask("system.ping", "[1]").json()["echo"],
        serde_json::json!([1])
    );
    let services = client.ask("system.services", "").json();
    let names: Vec<_> = services["services"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["calc", "echo", "hostile"]);
    assert_eq!(services["services"][0]["actions"][0]["name"], "add");
    assert!(
        services["services"][0]["digest"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );
}

#[test]
fn pipelined_requests_in_any_chunks_get_their_answers() {
    let server = start();
    let mut runner = TestRunner::new(Config {
        cases: 12,
        failure_persistence: None,
        ..Config::default()
    });
    let chunks = proptest::collection::vec(1..700_usize, 1..20);
    runner
        .run(&chunks, |chunks| {
            let mut client = server.connect();
            let mut stream = Vec::new();
            for id in 0..200 {
                let body = format!("REQUEST:calc.add:1.0.0:r{id}\n{{\"a\":{id},\"b\":1}}");
                stream.extend(frame(0, body.as_bytes()));
            }
            let mut rest = &stream[..];
            let mut sizes = chunks.iter().cycle();
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                client.send(now);
                rest = later;
            }
            let mut answers: Vec<_> = (0..200).map(|_| client.message()).collect();
            answers.sort_by_key(|answer| answer.json()["sum"].as_i64());
            for (id, answer) in answers.iter().enumerate() {
                prop_assert_eq!(&answer.line, &format!("RESPONSE:calc.add:1.0.0:r{}", id));
                prop_assert_eq!(answer.text(), format!("{{\"sum\":{}}}", id + 1));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn no_bytes_bring_the_server_down() {
    let server = setup().set("read_timeout = 50\nidle_timeout = 50").start();
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    });
    let mostly_low = prop_oneof![3 => Just(0_u8), 1 => 0..8_u8, 1 => any::<u8>()];
    runner
        .run(&proptest::collection::vec(mostly_low, 0..300), |bytes| {
            let mut client = server.connect();
            client.send(&bytes);
            let _ = client.stream.shutdown(std::net::Shutdown::Write);
            if bytes.first().is_some_and(u8::is_ascii_uppercase) {
                // That is HTTP, and is answered so.
                std::io::copy(&mut client.stream, &mut std::io::sink()).unwrap();
            } else {
                while client.receive() != Received::End {}
            }
            Ok(())
        })
        .unwrap();
    // It may be told that it was silent for too long before it has asked.
    server.until("it is answered", |server| {
        let sum = server.connect().ask("calc.add", "{\"a\":2,\"b\":40}");
        sum.text() == "{\"sum\":42}"
    });
    assert_eq!(server.metric("mb_errors_total{code=\"INTERNAL_ERROR\"}"), 0);
}
