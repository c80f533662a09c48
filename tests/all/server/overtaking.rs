//! A slow call holds up nothing but itself.

use std::net::Shutdown;

use crate::{
    setup,
    support::admin::{change, stop_calls},
    support::{HOUR, KEEPALIVE, RawClient, Received, Setup, TestServer, frame},
};

/// With a service whose `wasi-sleep` sleeps until its time is over.
fn with_sleeper() -> Setup {
    let grants =
        "services.greedy.grants = { keyvalue = true, log = \"info\", calls = [\"echo.*\"] }";
    setup().with("guests", "greedy.wasm").set(grants)
}

/// Asks for a sleep of so many milliseconds, which ends with TIMEOUT.
fn sleep(client: &mut RawClient, id: &str, ms: u64) {
    client.request_within("greedy.wasi-sleep", id, ms, "");
}

fn until_calling(server: &TestServer, in_flight: u64) {
    server.until("they are calling", |server| {
        server.json("/connections")["connections"][0]["inFlight"].as_u64() == Some(in_flight)
    });
}

/// Stops whatever is listed until the client has an answer.
fn until_answered(server: &TestServer, client: &RawClient) {
    client.stream.set_nonblocking(true).unwrap();
    server.until("it is answered", |server| {
        stop_calls(server);
        client.stream.peek(&mut [0]).is_ok()
    });
    client.stream.set_nonblocking(false).unwrap();
}

/// Whether they have begun by now or not.
fn all_are_stopped(server: &TestServer, clients: Vec<RawClient>) {
    for mut client in clients {
        until_answered(server, &client);
        let code = client.message().code();
        assert!(
            ["SERVICE_FAILED", "SERVICE_UNAVAILABLE"].contains(&&*code),
            "{code}"
        );
    }
}

fn ended(client: &mut RawClient, id: &str) {
    let answer = client.message();
    assert_eq!(
        (&*answer.line, &*answer.code()),
        (&*format!("ERROR:greedy.wasi-sleep:1.0.0:{id}"), "TIMEOUT")
    );
}

#[test]
fn what_comes_after_a_slow_call_overtakes_it() {
    let server = with_sleeper().start();
    let mut client = server.connect();
    // In one write with the sleep, and while it sleeps.
    let asked = |id: &str| frame(0, format!("REQUEST:echo.say:1.0.0:{id}\n1").as_bytes());
    let slow = frame(0, b"REQUEST:greedy.wasi-sleep:1.0.0:slow::3600000\n");
    client.send(&[asked("a"), slow, asked("b"), KEEPALIVE.to_vec(), asked("c")].concat());
    // In any order: one that the machine makes slow is overtaken.
    let mut received: Vec<_> = (0..4)
        .map(|_| match client.receive() {
            Received::Message(message) => message.line,
            other => format!("{other:?}"),
        })
        .collect();
    received.sort();
    let expected = ["a", "b", "c"].map(|id| format!("RESPONSE:echo.say:1.0.0:{id}"));
    assert_eq!(received[0], "KeepAlive");
    assert_eq!(received[1..], expected);
    for _ in 0..100 {
        assert_eq!(
            client.ask("echo.say", "1").line,
            "RESPONSE:echo.say:1.0.0:ask"
        );
    }
    let row = server.json("/connections")["connections"][0].clone();
    assert_eq!(
        (row["state"].as_str(), row["inFlight"].as_u64()),
        (Some("calling"), Some(1))
    );
    // It runs for an instant each time that it is looked after.
    let waits = |_: &usize| server.json("/calls")["calls"][0]["state"] == "waiting";
    assert!((0..300).filter(waits).count() >= 200);
    stop_calls(&server);
    let stopped = client.message();
    assert_eq!(
        (&*stopped.line, &*stopped.code()),
        ("ERROR:greedy.wasi-sleep:1.0.0:slow", "SERVICE_FAILED")
    );
}

#[test]
fn a_call_that_computes_is_overtaken_too() {
    let server = setup().start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "slow", HOUR, "");
    client.request("echo.say", "quick", "1");
    assert_eq!(client.message().line, "RESPONSE:echo.say:1.0.0:quick");
    stop_calls(&server);
    assert_eq!(client.message().code(), "SERVICE_FAILED");
}

#[test]
fn calls_side_by_side_are_bounded_and_nothing_is_lost() {
    let more = "services.greedy.concurrency = 100";
    let server = with_sleeper().set(more).start();
    let mut client = server.connect();
    // One more than run side by side; of the ids, none is the end of another.
    let ids: Vec<_> = (1000..1065).map(|id| id.to_string()).collect();
    for id in &ids {
        sleep(&mut client, id, HOUR);
    }
    client.request("echo.say", "last", "1");
    until_calling(&server, 64);
    let listed = server.json("/calls").to_string();
    assert!(!listed.contains("\"requestId\":\"1064\""), "{listed}");
    let mut answers = Vec::new();
    while answers.len() < 66 {
        until_answered(&server, &client);
        answers.push(client.message().line);
    }
    answers.sort();
    assert_eq!(answers[65], "RESPONSE:echo.say:1.0.0:last");
    assert!(
        answers
            .iter()
            .zip(&ids)
            .all(|(line, id)| line.ends_with(&format!(":{id}"))),
        "{answers:?}"
    );
}

#[test]
fn whatever_ends_the_connection_comes_after_the_answers() {
    let server = with_sleeper().start();
    let mut broken = server.connect();
    sleep(&mut broken, "1", 1000);
    broken.send(&[0, 0, 0, 1, 0xff, 0, 0, 0]);
    ended(&mut broken, "1");
    assert_eq!(broken.message().code(), "INVALID_FRAME");
    broken.expect_end();

    let mut closing = server.connect();
    sleep(&mut closing, "2", 1000);
    sleep(&mut closing, "3", 1000);
    closing.stream.shutdown(Shutdown::Write).unwrap();
    let mut lines = [closing.message().line, closing.message().line];
    lines.sort();
    assert_eq!(
        lines,
        [
            "ERROR:greedy.wasi-sleep:1.0.0:2",
            "ERROR:greedy.wasi-sleep:1.0.0:3"
        ]
    );
    closing.expect_end();

    let mut gone = server.connect();
    sleep(&mut gone, "4", 300);
    drop(gone);
    server.until("all have gone", |server| {
        server.json("/connections")["connections"]
            .as_array()
            .unwrap()
            .is_empty()
    });
}

#[test]
fn a_slow_call_is_no_silence() {
    let server = with_sleeper().set("idle_timeout = 3000").start();
    let mut client = server.connect();
    sleep(&mut client, "slow", 4000);
    ended(&mut client, "slow");
    assert_eq!(
        client.ask("echo.say", "1").text(),
        "1",
        "its time begins with the answer"
    );
    assert_eq!(client.message().code(), "IDLE_TIMEOUT");
}

#[test]
fn the_drain_waits_for_those_left_behind() {
    let mut server = with_sleeper().start();
    let mut client = server.connect();
    sleep(&mut client, "1", 4000);
    sleep(&mut client, "2", 1500);
    assert_eq!(client.ask("echo.say", "1").text(), "1");
    server.signal("TERM");
    ended(&mut client, "2");
    ended(&mut client, "1");
    assert_eq!(client.message().code(), "SHUTTING_DOWN");
    client.expect_end();
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
}

/// Calls that wait until they may begin hold half of the threads at most;
/// the others are read later, and others' calls go on.
#[test]
fn calls_that_wait_leave_threads_for_others() {
    const WAITING: usize = 12;
    let server = with_sleeper()
        .set("max_threads = 8")
        .set("services.greedy.concurrency = 1")
        .start();
    let mut clients: Vec<_> = (0..WAITING).map(|_| server.connect()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        sleep(client, &at.to_string(), HOUR);
    }
    server.until("half of the threads wait", |server| {
        let calls = server.json("/calls");
        let waits = |call: &&serde_json::Value| call["state"] == "waiting";
        let calls = calls["calls"].as_array().unwrap();
        calls.iter().filter(waits).count() >= 4
    });
    let mut other = server.connect();
    for _ in 0..100 {
        let answer = other.ask("echo.say", "1");
        assert_eq!(answer.line, "RESPONSE:echo.say:1.0.0:ask");
    }
    assert!(server.json("/calls")["calls"].as_array().unwrap().len() <= 6);
    all_are_stopped(&server, clients);
    assert_eq!(other.ask("echo.say", "1").text(), "1");
}

/// Where all threads are in calls, connections are still read and ended.
#[test]
fn somebody_polls_when_all_threads_are_in_calls() {
    let server = with_sleeper().set("max_threads = 8").start();
    let mut clients: Vec<_> = (0..12).map(|_| server.connect()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        sleep(client, &at.to_string(), HOUR);
    }
    server.until("all threads are in calls", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() >= 7
    });
    let mut late = server.connect();
    late.send(&KEEPALIVE);
    assert_eq!(late.receive(), Received::KeepAlive);
    late.stream.shutdown(Shutdown::Write).unwrap();
    late.expect_end();
    all_are_stopped(&server, clients);
}

/// One that can't begin for want of threads gets an error at its own deadline,
/// however long those take that it waits for.
#[test]
fn a_call_that_was_put_off_ends_at_its_deadline() {
    let server = with_sleeper()
        .set("max_threads = 8")
        .set("services.greedy.concurrency = 1")
        .start();
    let mut clients: Vec<_> = (0..6).map(|_| server.connect()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        sleep(client, &at.to_string(), HOUR);
    }
    let calls = |server: &TestServer| server.json("/calls")["calls"].as_array().unwrap().len();
    server.until("one runs and half of the threads wait", |server| {
        calls(server) >= 5
    });
    let mut short = server.connect();
    sleep(&mut short, "short", 300);
    let answer = short.message();
    assert_eq!(answer.code(), "SERVICE_UNAVAILABLE", "{}", answer.text());
    assert!(calls(&server) >= 5, "the others still wait");
    assert_eq!(short.ask("echo.say", "1").text(), "1");
}

/// A request that was put off before anybody counted it is counted later.
#[test]
fn what_was_put_off_counts_for_the_rate() {
    let server = with_sleeper()
        .set("max_threads = 8")
        .set("services.echo.rate = 1")
        .start();
    let mut clients: Vec<_> = (0..12).map(|_| server.connect()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        sleep(client, &at.to_string(), HOUR);
    }
    server.until("all threads are in calls", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() >= 7
    });
    let mut client = server.connect();
    let asked = frame(0, b"REQUEST:echo.say:1.0.0:1::3600000\n1");
    client.send(&asked.repeat(5));
    server.until("the first of them is put off", |server| {
        let rows = server.json("/connections");
        let row = rows["connections"].as_array().unwrap().last().unwrap();
        row["messagesIn"] == 1 && row["messagesOut"] == 0
    });
    stop_calls(&server);
    let first = client.message();
    assert_eq!(first.line, "RESPONSE:echo.say:1.0.0:1", "{}", first.text());
    let begun = std::time::Instant::now();
    let rest: Vec<_> = (0..4).map(|_| client.message()).collect();
    let served = rest
        .iter()
        .filter(|answer| !answer.line.starts_with("ERROR"));
    let refilled = begun.elapsed().as_secs() as usize + 1;
    assert!(served.count() < refilled, "one a second");
}

/// The operator stops a call that waits to begin, whatever it waits for.
#[test]
fn a_call_that_waits_to_begin_can_be_stopped() {
    for limit in [
        "services.greedy.concurrency = 1",
        "principals.anonymous = { concurrency = 1, rights = [\"*\"] }",
    ] {
        let server = with_sleeper().set(limit).start();
        let mut first = server.connect();
        sleep(&mut first, "first", HOUR);
        server.until("the first one runs", |server| {
            server.json("/calls")["calls"].as_array().unwrap().len() == 1
        });
        let mut second = server.connect();
        sleep(&mut second, "second", HOUR);
        let waiting = |server: &TestServer| {
            let calls = server.json("/calls");
            let calls = calls["calls"].as_array().unwrap();
            let second = calls.iter().find(|call| call["requestId"] == "second");
            second.map(|call| call["id"].clone())
        };
        server.until("the second one waits", |server| waiting(server).is_some());
        let path = format!("/calls/{}", waiting(&server).unwrap());
        assert_eq!(change(&server, "DELETE", &path, "").0, 200);
        let answer = second.message();
        assert_eq!(
            answer.code(),
            "SERVICE_FAILED",
            "{limit}: {}",
            answer.text()
        );
        assert_eq!(answer.json()["details"]["reason"], "killed");
        stop_calls(&server);
        assert_eq!(first.message().code(), "SERVICE_FAILED");
    }
}
