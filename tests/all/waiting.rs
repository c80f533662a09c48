//! Where connections wait for their next request, and that nobody there waits
//! for another.

use std::{io::Write as _, thread, time::Duration};

use crate::{
    admin::change,
    setup,
    support::{RawClient, TestServer, frame},
};

/// More than there are threads on duty at the poller.
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
    server.until("they are all calling", |server| server.json("/calls")["calls"].as_array().unwrap().len() == count);
}

/// Each of them more often than there are threads on duty.
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
    let grants = "services.greedy.grants = { keyvalue = true, log = \"info\", calls = [\"echo.*\"] }";
    let server = setup().with("guests", "greedy.wasm").set("waiting = \"poller\"").set(grants).start();
    let waiting = two_waiting(&server);
    let mut slow: Vec<_> = (0..2 * many()).map(|_| server.connect()).collect();
    for (number, client) in slow.iter_mut().enumerate() {
        let topic = if number % 2 == 0 { "greedy.wasi-sleep" } else { "hostile.spin" };
        client.request_within(topic, "slow", 20_000, "");
    }
    until_so_many_calls(&server, slow.len());
    all_are_answered(&server, waiting);
    until_so_many_calls(&server, slow.len());
    for call in server.json("/calls")["calls"].as_array().unwrap() {
        assert_eq!(change(&server, "DELETE", &format!("/calls/{}", call["id"]), "").0, 200);
    }
    for mut client in slow {
        assert_eq!(client.message().json()["details"]["reason"], "killed");
        assert_eq!(client.ask("echo.say", "3").text(), "3");
    }
}

#[test]
fn peers_that_take_nothing_do_not_keep_the_poller_waiting() {
    let server = setup().set("waiting = \"poller\"").start();
    let waiting = two_waiting(&server);
    // Small enough for the first size of the buffer, so that none of them is
    // given a thread for being large.
    let body = [b"REQUEST:echo.say:1.0.0:1\n\"".as_slice(), &vec![b'x'; 4000], b"\""].concat();
    let request = frame(0, &body);
    let mut stuck: Vec<_> = (0..many()).map(|_| server.connect()).collect();
    thread::scope(|scope| {
        for client in &mut stuck {
            client.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            scope.spawn(|| while client.stream.write_all(&request).is_ok() {});
        }
    });
    all_are_answered(&server, waiting);
    assert_eq!((server.metric("mb_write_timeouts_total"), server.metric("mb_connections")), (0, stuck.len() as u64));
}

#[test]
fn connections_take_threads_only_where_they_are_to() {
    for (waiting, takes) in [("poller", false), ("threads", true)] {
        let server = setup().set(&format!("waiting = \"{waiting}\"")).start();
        let mut clients: Vec<_> = (0..100).map(|_| server.connect()).collect();
        for round in 0..3 {
            for client in &mut clients {
                assert_eq!(client.ask("echo.say", &round.to_string()).text(), round.to_string());
            }
        }
        let threads = server.metric("mb_threads");
        assert_eq!(threads >= 100, takes, "{waiting}: {threads} threads");
    }
}
