//! Where connections wait for their next request, and that nobody there waits
//! for another.

use std::{net::Shutdown, thread, time::Duration};

use crate::{
    setup,
    support::admin::{change, stop_calls},
    support::{HOUR, RawClient, TestServer, frame, wat},
};

/// More than there are polling workers.
pub fn many() -> usize {
    thread::available_parallelism().map_or(1, usize::from) + 4
}

/// Two connections that wait at the poller by now.
fn two_waiting(server: &TestServer) -> [RawClient; 2] {
    let mut clients = [server.connect(), server.connect()];
    for client in &mut clients {
        assert_eq!(client.ask("echo.say", "1").text(), "1");
    }
    clients
}

fn until_so_many_calls(server: &TestServer, count: usize) {
    server.until("they are all calling", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() == count
    });
}

/// Each of them more often than there are polling workers.
fn all_are_answered(server: &TestServer, waiting: [RawClient; 2]) {
    let new = [server.connect(), server.connect()];
    for mut client in waiting.into_iter().chain(new) {
        for _ in 0..many() {
            assert_eq!(client.ask("echo.say", "2").text(), "2");
        }
    }
}

#[test]
fn slow_calls_do_not_keep_the_poller_waiting() {
    let grants =
        "services.greedy.grants = { keyvalue = true, log = \"info\", calls = [\"echo.*\"] }";
    let server = setup().with("guests", "greedy.wasm").set(grants).start();
    let waiting = two_waiting(&server);
    let mut slow: Vec<_> = (0..2 * many()).map(|_| server.connect()).collect();
    for (number, client) in slow.iter_mut().enumerate() {
        let topic = if number % 2 == 0 {
            "greedy.wasi-sleep"
        } else {
            "hostile.spin"
        };
        client.request_within(topic, "slow", HOUR, "");
    }
    until_so_many_calls(&server, slow.len());
    all_are_answered(&server, waiting);
    until_so_many_calls(&server, slow.len());
    for call in server.json("/calls")["calls"].as_array().unwrap() {
        assert_eq!(
            change(&server, "DELETE", &format!("/calls/{}", call["id"]), "").0,
            200
        );
    }
    for mut client in slow {
        assert_eq!(client.message().json()["details"]["reason"], "killed");
        assert_eq!(client.ask("echo.say", "3").text(), "3");
    }
}

#[test]
fn peers_that_take_nothing_do_not_keep_the_poller_waiting() {
    // A megabyte for a request of a few bytes: a one, and much blank space.
    let body = "(memory.fill (i32.const 1048576) (i32.const 32) (i32.const 1000000))
        (i32.store8 (i32.const 1048576) (i32.const 49))
        (i32.store (i32.const 40) (i32.const 1048576))
        (i32.store (i32.const 44) (i32.const 1000000))";
    let server = setup()
        .set("write_timeout = \"10m\"")
        .with_bytes("much.wasm", &wat::guest("much", "", body))
        .start();
    let waiting = two_waiting(&server);
    let mut stuck: Vec<_> = (0..many()).map(|_| server.connect()).collect();
    for client in &mut stuck {
        client.send(&frame(0, b"REQUEST:much.run:1.0.0:1\n1").repeat(40));
    }
    let busy = |server: &TestServer| {
        let connections = server.json("/connections")["connections"]
            .as_array()
            .unwrap()
            .clone();
        connections
            .iter()
            .filter(|row| row["state"] == "calling" && row["bytesOut"].as_u64() > Some(1_000_000))
            .count()
    };
    server.until("nobody takes their answers", |server| {
        busy(server) == stuck.len()
    });
    all_are_answered(&server, waiting);
    assert_eq!(
        (server.metric("mb_write_timeouts_total"), busy(&server)),
        (0, stuck.len())
    );
    for client in &mut stuck {
        for _ in 0..40 {
            assert_eq!(client.message().payload.len(), 1_000_000);
        }
    }
}

/// The poller tells what arrives once.
#[test]
fn what_comes_while_a_connection_is_served_is_read_too() {
    let server = setup().start();
    let request = frame(0, b"REQUEST:echo.say:1.0.0:1\n1");
    for _ in 0..50 {
        // One arrival: a request, and the end.
        let mut client = server.connect();
        assert_eq!(client.ask("echo.say", "0").text(), "0");
        client.send(&request);
        client.stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.message().text(), "1");
        client.expect_end();
    }
    let mut client = server.connect();
    for _ in 0..20 {
        // More than is read at once.
        client.send(&request.repeat(5000));
        for _ in 0..5000 {
            assert_eq!(client.message().text(), "1");
        }
        // In pieces, of which each may come while the last one is served.
        for piece in request.repeat(20).chunks(17) {
            client.send(piece);
        }
        for _ in 0..20 {
            assert_eq!(client.message().text(), "1");
        }
    }
}

/// Where calls are quick, a polling worker takes several connections at once.
#[test]
fn those_that_were_taken_together_do_not_wait_for_a_slow_call() {
    let grants =
        "services.greedy.grants = { keyvalue = true, log = \"info\", calls = [\"echo.*\"] }";
    let server = setup().with("guests", "greedy.wasm").set(grants).start();
    let mut clients: Vec<_> = (0..2 * many()).map(|_| server.connect()).collect();
    let mut slow = Vec::new();
    for _ in 0..30 {
        // So many that every thread has seen enough of them.
        let quick = frame(0, b"REQUEST:echo.say:1.0.0:1\n1");
        for _ in 0..300 {
            clients.iter_mut().for_each(|client| client.send(&quick));
            clients
                .iter_mut()
                .for_each(|client| assert_eq!(client.message().text(), "1"));
        }
        let mut client = server.connect();
        assert_eq!(client.ask("echo.say", "0").text(), "0");
        client.request_within("greedy.wasi-sleep", "slow", HOUR, "");
        clients.iter_mut().for_each(|client| client.send(&quick));
        clients
            .iter_mut()
            .for_each(|client| assert_eq!(client.message().text(), "1"));
        slow.push(client);
    }
    until_so_many_calls(&server, slow.len());
}

#[test]
fn connections_that_wait_take_no_threads() {
    let server = setup().start();
    let before = server.metric("mb_threads");
    let mut clients: Vec<_> = (0..200).map(|_| server.connect()).collect();
    for _ in 0..2 {
        for client in &mut clients {
            assert_eq!(client.ask("echo.say", "0").text(), "0");
        }
    }
    // Calls that the machine made slow took some, of which 16 are kept.
    let threads = server.metric("mb_threads");
    assert!(threads < before + 50, "{before} threads, then {threads}");
}

/// A call after each way that a connection leaves its thread: its peer is silent
/// for a while, its call takes long, it sends in parts, it ends.
#[test]
fn a_connection_keeps_its_thread_while_its_peer_is_busy() {
    let settings = "waiting = \"threads\"\nmax_threads = 16";
    let mut server = setup().set(settings).start();
    // More than there are threads: the others wait at the poller.
    let mut clients: Vec<_> = (0..32).map(|_| server.connect()).collect();
    for round in 0..50 {
        for client in &mut clients {
            assert_eq!(
                client.ask("echo.say", &round.to_string()).text(),
                round.to_string()
            );
        }
    }
    // Longer than a thread waits for its peer: then all are at the poller.
    thread::sleep(Duration::from_millis(50));
    for client in &mut clients {
        assert_eq!(client.ask("echo.say", "1").text(), "1");
    }
    for client in &mut clients[..4] {
        client.request_within("hostile.spin", "slow", HOUR, "");
    }
    until_so_many_calls(&server, 4);
    stop_calls(&server);
    for client in &mut clients[..4] {
        assert_eq!(client.message().json()["details"]["reason"], "killed");
        assert_eq!(client.ask("echo.say", "3").text(), "3");
    }
    drop(clients);
    let mut client = server.connect();
    for byte in frame(0, b"REQUEST:echo.say:1.0.0:parts\n2") {
        client.send(&[byte]);
    }
    assert_eq!(client.message().text(), "2");
    server.signal("TERM");
    assert_eq!(client.message().code(), "SHUTTING_DOWN");
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn many_that_are_silent_for_too_long_are_notified_without_a_thread_for_each() {
    let server = setup().set("idle_timeout = 1000").start();
    let mut clients: Vec<_> = (0..100).map(|_| server.connect()).collect();
    server.until("they are all there", |server| {
        server.metric("mb_connections_accepted_total") == 100
    });
    let before = server.metric("mb_threads");
    for client in &mut clients {
        let notified = client.message();
        assert_eq!(
            (&*notified.line, &*notified.code()),
            ("ERROR:system.error:1.0.0", "IDLE_TIMEOUT")
        );
        client.expect_end();
    }
    let threads = server.metric("mb_threads");
    assert!(threads < before + 50, "{before} threads, then {threads}");
}
