//! How connections come, wait and go.

use std::{
    net::Shutdown,
    thread,
    time::{Duration, Instant},
};

use crate::{
    setup, start,
    support::{BINARY, HOUR, KEEPALIVE, MORE, RawClient, Received, frame},
};

#[test]
fn one_too_many_gets_server_busy_and_the_next_is_served() {
    let server = setup().set("max_connections = 2").start();
    let mut first = server.connect();
    let mut second = server.connect();
    for client in [&mut first, &mut second] {
        assert_eq!(client.ask("echo.say", "1").text(), "1");
    }
    let mut third = server.connect();
    let answer = third.message();
    assert_eq!(
        (&*answer.line, &*answer.code()),
        ("ERROR:system.error:1.0.0", "SERVER_BUSY")
    );
    assert!(answer.json()["details"]["retryAfterMs"].as_u64().unwrap() > 0);
    third.expect_end();
    drop(first);
    server.until("a slot is free again", |server| {
        server.metric("mb_connections") == 1
    });
    assert_eq!(server.connect().ask("echo.say", "2").text(), "2");
    assert_eq!(server.metric("mb_connections_refused_total"), 1);
}

#[test]
fn silence_ends_a_connection_and_a_keep_alive_breaks_it() {
    let server = setup().set("idle_timeout = 3000").start();
    let mut client = server.connect();
    let begun = Instant::now();
    // As long as something arrives the connection lives.
    while begun.elapsed().as_millis() < 4000 {
        client.send(&KEEPALIVE);
        assert_eq!(client.receive(), Received::KeepAlive);
        thread::sleep(Duration::from_millis(20));
    }
    let answer = client.message();
    assert_eq!(
        (&*answer.line, &*answer.code()),
        ("ERROR:system.error:1.0.0", "IDLE_TIMEOUT")
    );
    client.expect_end();
}

#[test]
fn a_slow_call_is_no_silence() {
    let server = setup().set("idle_timeout = 2000").start();
    let mut client = server.connect();
    client.request_within("hostile.sleep-spin", "slow", HOUR, "{\"ms\":3000}");
    assert!(client.message().line.starts_with("RESPONSE"));
    assert_eq!(client.message().code(), "IDLE_TIMEOUT");
}

#[test]
fn a_message_begun_must_be_finished() {
    let server = setup().set("read_timeout = 300").start();
    let half = frame(0, b"REQUEST:echo.say:1.0.0:1\n");
    for start in [
        &half[..1],
        &half[..8],
        &half[..20],
        &frame(MORE, b"REQUEST:echo.say:1.0.0:1\n"),
    ] {
        let mut client = server.connect();
        client.send(start);
        assert_eq!(client.message().code(), "READ_TIMEOUT");
        client.expect_end();
    }
}

#[test]
fn dripping_does_not_extend_the_time_for_a_message() {
    let server = setup().set("read_timeout = 2000").start();
    let mut client = server.connect();
    client.send(&frame(MORE, b"REQUEST:echo.say:1.0.0:1\n"));
    // Answered keep-alives between the pieces show that the server reads, and
    // that they do not count.
    let mut rounds = 0;
    let answer = loop {
        let _ = std::io::Write::write_all(
            &mut client.stream,
            &[&KEEPALIVE[..], &frame(MORE, b" ")].concat(),
        );
        match client.receive() {
            Received::KeepAlive => rounds += 1,
            Received::Message(answer) => break answer,
            Received::End => panic!("closed without a word after {rounds} rounds"),
        }
    };
    assert_eq!(answer.code(), "READ_TIMEOUT");
    assert!(rounds > 0);
}

#[test]
fn the_end_of_a_stream_lets_what_was_read_be_answered() {
    let server = start();
    let mut client = server.connect();
    for id in 0..20 {
        client.request("echo.say", &format!("r{id}"), "1");
    }
    client.stream.shutdown(Shutdown::Write).unwrap();
    // In any order: one that the machine makes slow is overtaken.
    let mut answers: Vec<_> = (0..20).map(|_| client.message().line).collect();
    answers.sort();
    let mut expected: Vec<_> = (0..20)
        .map(|id| format!("RESPONSE:echo.say:1.0.0:r{id}"))
        .collect();
    expected.sort();
    assert_eq!(answers, expected);
    client.expect_end();

    let mut client = server.connect();
    client.request("echo.say", "whole", "1");
    client.send(&frame(0, b"REQUEST:echo.say:1.0.0:cut\n1")[..30]);
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.message().line, "RESPONSE:echo.say:1.0.0:whole");
    client.expect_end();
    assert_eq!(server.metric("mb_truncated_messages_total"), 1);
}

#[test]
fn a_peer_that_takes_no_answers_is_let_go() {
    let server = setup().set("write_timeout = 300").start();
    let mut client = server.connect();
    client
        .stream
        .set_write_timeout(Some(crate::support::PATIENCE))
        .unwrap();
    let body = [
        b"REQUEST:echo.say:1.0.0:1\n".as_slice(),
        &vec![0; 1_000_000],
    ]
    .concat();
    let request = frame(BINARY, &body);
    // Until the server gives up, and resets what it has not read.
    while std::io::Write::write_all(&mut client.stream, &request).is_ok() {}
    server.until("the connection is gone", |server| {
        server.metric("mb_connections") == 0
    });
    assert_eq!(server.metric("mb_write_timeouts_total"), 1);
}

#[test]
fn an_answer_does_not_wait_for_the_slow_call_behind_it() {
    let server = start();
    let mut client = server.connect();
    let quick = frame(0, b"REQUEST:echo.say:1.0.0:quick\n1");
    let slow = frame(0, b"REQUEST:hostile.spin:1.0.0:slow::3600000\n");
    client.send(&[quick, slow].concat());
    assert_eq!(
        client.message().line,
        "RESPONSE:echo.say:1.0.0:quick",
        "and the slow one has an hour"
    );
}

#[test]
fn connections_are_shown_while_they_are_open() {
    let server = start();
    assert_eq!(
        server.json("/connections"),
        serde_json::json!({"connections": []})
    );
    let mut clients: Vec<RawClient> = (0..3).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.ask("echo.say", "1");
        client.ask("none.x", "1");
    }
    // What has left is counted after it has.
    server.until("the answers are counted", |server| {
        let rows = server.json("/connections");
        let rows = rows["connections"].as_array().unwrap();
        rows.iter().all(|row| row["bytesOut"].as_u64() > Some(150))
    });
    let rows = server.json("/connections");
    let rows = rows["connections"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    let peer = clients[0].stream.local_addr().unwrap().to_string();
    let row = rows.iter().find(|row| row["peer"] == peer).unwrap();
    assert_eq!(row["messagesIn"], 2);
    assert_eq!(row["messagesOut"], 2);
    assert_eq!(row["errors"], 1);
    assert_eq!(row["inFlight"], 0);
    assert!(row["bytesIn"].as_u64().unwrap() > 50, "{row}");
    drop(clients);
    server.until("none is left", |server| {
        server.metric("mb_connections") == 0
    });
    assert_eq!(
        server.metric("mb_received_messages_total"),
        6,
        "what they did is not forgotten"
    );
}

#[test]
fn a_connection_in_a_call_is_shown_as_calling() {
    let server = start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "1", HOUR, "");
    server.until("it is calling", |server| {
        let rows = server.json("/connections");
        rows["connections"][0]["state"] == "calling" && rows["connections"][0]["inFlight"] == 1
    });
    let mut midway = server.connect();
    midway.send(&[0, 0, 0, 9]);
    server.until("the other is reading", |server| {
        server.json("/connections")["connections"][1]["state"] == "reading"
    });
}

#[test]
fn an_idle_instance_does_not_keep_the_connection_of_its_last_call() {
    for isolation in ["request", "shared"] {
        let server = setup()
            .set(&format!("[services.default]\nisolation = \"{isolation}\""))
            .start();
        let mut client = server.connect();
        assert_eq!(client.ask("echo.say", "1").text(), "1");
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.expect_end();
    }
}
