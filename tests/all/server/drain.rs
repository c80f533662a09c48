//! How the server ends.

use std::{
    io::ErrorKind,
    net::{Shutdown, TcpStream},
    os::unix::net::UnixDatagram,
};

use crate::{
    setup, start,
    support::admin::stop_calls,
    support::{HOUR, PATIENCE, Received},
};

#[test]
fn every_connection_is_notified_and_what_was_begun_is_answered() {
    let mut server = setup().set("drain_timeout = \"60s\"").start();
    let mut idle = server.connect();
    idle.ask("echo.say", "1");
    let mut silent = server.connect();
    let mut midway = server.connect();
    midway.send(&[0, 0, 0, 50, 0, 0, 0, 0, b'R']);
    let mut busy = server.connect();
    busy.request_within("hostile.sleep-spin", "begun", HOUR, "{\"ms\":4000}");
    server.until("all are there, and one is calling", |server| {
        let rows = server.json("/connections");
        let rows = rows["connections"].as_array().unwrap();
        rows.len() == 4
            && rows.iter().any(|row| row["state"] == "calling")
            && rows.iter().any(|row| row["state"] == "reading")
    });
    server.signal("TERM");
    for client in [&mut idle, &mut silent, &mut midway] {
        let notified = client.message();
        assert_eq!(
            (&*notified.line, &*notified.code()),
            ("ERROR:system.error:1.0.0", "SHUTTING_DOWN")
        );
        client.expect_end();
    }
    busy.request("echo.say", "not-begun", "1");
    assert_eq!(
        busy.message().line,
        "RESPONSE:hostile.sleep-spin:1.0.0:begun"
    );
    let notified = busy.message();
    assert_eq!(
        (&*notified.line, &*notified.code()),
        ("ERROR:system.error:1.0.0", "SHUTTING_DOWN")
    );
    busy.expect_end();
    for client in [idle, silent, midway, busy] {
        client.stream.shutdown(Shutdown::Write).unwrap();
    }
    assert_eq!(server.wait().code(), Some(0));
    assert!(TcpStream::connect(server.wire).is_err());
}

#[test]
fn a_call_that_does_not_end_is_stopped_and_says_so() {
    let mut server = setup().set("drain_timeout = 1500").start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "mine", HOUR, "");
    server.until("it is calling", |server| {
        server.json("/connections")["connections"][0]["state"] == "calling"
    });
    server.signal("INT");
    let answer = client.message();
    assert_eq!(
        (&*answer.line, &*answer.code()),
        ("ERROR:hostile.spin:1.0.0:mine", "SHUTTING_DOWN")
    );
    let notified = client.message();
    assert_eq!(
        (&*notified.line, &*notified.code()),
        ("ERROR:system.error:1.0.0", "SHUTTING_DOWN")
    );
    client.expect_end();
    // The peer does not close; the server ends in time all the same.
    let line = server.wait_for_log("drained in ");
    let millis = line
        .split("drained in ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap();
    assert!(
        // Two seconds more would be those of a peer that may close itself.
        (1000..3000).contains(&millis.parse::<u64>().unwrap()),
        "{line}"
    );
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn while_it_drains_it_is_not_ready() {
    let mut server = setup().set("drain_timeout = \"60s\"").start();
    assert_eq!(server.get("/readyz").0, 200);
    let mut idle = server.connect();
    idle.ask("echo.say", "1");
    let mut client = server.connect();
    client.request_within("hostile.spin", "begun", HOUR, "");
    server.until("it is calling", |server| {
        server.json("/calls")["calls"][0]["requestId"] == "begun"
    });
    server.signal("TERM");
    assert_eq!(idle.message().code(), "SHUTTING_DOWN");
    server.until("it is counted", |server| {
        server.metric("mb_errors_total{code=\"SHUTTING_DOWN\"}") == 1
    });
    server.until("it says so", |server| server.get("/readyz").0 == 503);
    assert_eq!(server.get("/healthz").0, 200);
    stop_calls(&server);
    assert!(matches!(client.receive(), Received::Message(_)));
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "1", HOUR, "");
    server.until("it is calling", |server| {
        server.json("/connections")["connections"][0]["state"] == "calling"
    });
    server.signal("TERM");
    server.wait_for_log("draining");
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(130));
}

#[test]
fn systemd_is_notified_where_it_asks_for_it() {
    let setup = setup();
    let socket = setup.dir.path().join("notify");
    let listener = UnixDatagram::bind(&socket).unwrap();
    listener.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = setup.command();
    command
        .env("NOTIFY_SOCKET", &socket)
        .env("WATCHDOG_USEC", "400000");
    let mut server = setup.start_with(&mut command);
    let received = || {
        let mut text = [0; 64];
        let length = loop {
            // A machine that stops and goes on interrupts what has a timeout.
            match listener.recv(&mut text) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                received => break received.unwrap(),
            }
        };
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    assert_eq!(received(), "READY=1");
    assert_eq!([received(), received()], ["WATCHDOG=1", "WATCHDOG=1"]);
    server.signal("TERM");
    while received() != "STOPPING=1" {}
    assert_eq!(server.wait().code(), Some(0));
}
