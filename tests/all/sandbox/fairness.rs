//! Calls that compute take turns, say what they cost, and end when nobody waits
//! for them. How fair and how quick that is, `tests/load/fairness.py` measures.

use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::{
    setup,
    support::{RawClient, Setup, TestServer, frame},
};

fn with_loops() -> Setup {
    setup().with("guests", "hostile.wasm")
}

fn until_running(server: &TestServer, calls: usize) {
    server.until("so many calls run or wait for a processor", |server| {
        server.json("/calls")["calls"].as_array().unwrap().len() == calls
    });
}

/// More loops than there are processors, each on a connection of its own.
fn loops(server: &TestServer, ids: &str, count: usize) -> Vec<RawClient> {
    let begin = |number: usize| {
        let mut client = server.connect();
        client.request_within("hostile.spin", &format!("{ids}{number}"), 20_000, "");
        client
    };
    let clients = (0..count).map(begin).collect();
    until_running(server, count);
    clients
}

fn reset(client: RawClient) {
    SockRef::from(&client.stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

#[test]
fn a_timeout_says_how_long_the_call_ran_and_waited() {
    let server = with_loops().start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "alone", 300, "");
    let details = client.message().json()["details"].clone();
    let millis = |key: &str| details[key].as_u64().unwrap();
    assert!(
        details["phase"] == "call" && millis("ranMs") > 50 && millis("waitedMs") < 250,
        "{details}"
    );
    let _others = loops(&server, "other", 16);
    client.request_within("hostile.spin", "crowded", 300, "");
    let details = client.message().json()["details"].clone();
    let millis = |key: &str| details[key].as_u64().unwrap();
    assert!(millis("waitedMs") > millis("ranMs"), "{details}");
    let past = server.json("/calls/past?requestId=crowded")["calls"][0].clone();
    assert!(past["cpuWaitedMs"].as_f64().unwrap() > 100.0, "{past}");
    let counted = |server: &TestServer| {
        server.json("/services")["services"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == "hostile")
            .unwrap()["cpuSeconds"]
            .as_f64()
            .unwrap()
    };
    assert!(counted(&server) > 0.05, "{}", counted(&server));
    let (_, metrics) = server.get("/metrics");
    assert!(
        metrics.contains("\nmb_cpu_seconds_total{service=\"hostile\"} "),
        "{metrics}"
    );
    assert!(
        metrics.contains("\nmb_principal_cpu_seconds_total{principal=\"-\"} "),
        "{metrics}"
    );
}

#[test]
fn what_a_service_has_used_is_counted() {
    let grants = "services.counter.grants = { keyvalue = true }";
    let server = setup()
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .set(grants)
        .start();
    let mut client = server.connect();
    assert_eq!(client.ask("echo.say", "[1,2,3]").text(), "[1,2,3]");
    let answer = client.ask("counter.add", "{\"name\":\"n\"}");
    assert!(answer.line.starts_with("RESPONSE"), "{}", answer.text());
    let (size, answered) = ("{\"name\":\"n\"}".len(), answer.text().len());
    let services = server.json("/services")["services"].clone();
    let row = |name: &str| {
        let mut rows = services.as_array().unwrap().iter();
        rows.find(|row| row["name"] == name).unwrap().clone()
    };
    let number = |row: &serde_json::Value, key: &str| row[key].as_u64().unwrap();
    let (echo, counter) = (row("echo"), row("counter"));
    assert_eq!(
        (&echo["bytesIn"], &echo["bytesOut"], &echo["hostCalls"]),
        (&7.into(), &7.into(), &0.into())
    );
    assert_eq!(number(&counter, "bytesIn"), size as u64);
    assert_eq!(number(&counter, "bytesOut"), answered as u64);
    assert!(number(&counter, "hostCalls") >= 2, "{counter}");
    assert!(number(&counter, "peakMemory") >= 64 * 1024, "{counter}");
    let labels = "service=\"counter\",version=\"1.0.0\"";
    let bytes = format!("mb_service_bytes_total{{{labels},direction=\"in\"}}");
    assert_eq!(server.count(&bytes), size as u64);
    let calls = server.count(&format!("mb_host_calls_total{{{labels}}}"));
    assert_eq!(calls, number(&counter, "hostCalls"));
}

#[test]
fn a_call_that_waits_for_a_processor_is_killed_at_once() {
    let server = with_loops().start();
    let mut others = loops(&server, "loop", 16);
    server.until("somebody waits", |server| {
        server.metric("mb_calls_waiting_to_run") > 8
    });
    let calls = server.json("/calls")["calls"].clone();
    for call in calls.as_array().unwrap() {
        let token = server.token();
        let request = format!(
            "DELETE /calls/{} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
             Connection: close\r\nContent-Length: 0\r\n\r\n",
            call["id"]
        );
        let (status, body) = crate::support::http(server.admin, &request);
        assert_eq!(status, 200, "{body}");
    }
    for client in &mut others {
        let answer = client.message();
        assert_eq!(
            answer.json()["details"]["reason"],
            "killed",
            "{}",
            answer.text()
        );
    }
    server.until("permits are back", |server| {
        server.metric("mb_calls_waiting_to_run") + server.metric("mb_calls_running") == 0
    });
}

#[test]
fn what_a_client_has_reset_is_stopped() {
    let server = with_loops().start();
    let begun = Instant::now();
    loops(&server, "reset", 8).into_iter().for_each(reset);
    until_running(&server, 0);
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "not at their deadlines"
    );
    assert_eq!(server.metric("mb_calls_reset_total"), 8);
    let past = server.json("/calls/past?requestId=reset3")["calls"][0].clone();
    assert_eq!(past["details"]["reason"], "reset", "{past}");
}

#[test]
fn a_publish_outlives_a_reset() {
    let grants = "services.greedy.grants = { keyvalue = true, calls = [\"echo.*\"] }";
    let server = with_loops()
        .with("guests", "greedy.wasm")
        .set(grants)
        .start();
    let mut client = server.connect();
    // Of two calls of one connection, only the last one ends with it.
    client.send(&frame(0, b"PUBLISH:greedy.host-loop:1.0.0\n"));
    client.request_within("greedy.wasi-sleep", "stopped", 20_000, "");
    until_running(&server, 2);
    reset(client);
    server.until("a call is stopped", |server| {
        server.metric("mb_calls_reset_total") == 1
    });
    let past = server.json("/calls/past?requestId=stopped")["calls"][0].clone();
    assert_eq!(past["details"]["reason"], "reset", "{past}");
    server.until("the other one goes on", |server| {
        let calls = server.json("/calls")["calls"].clone();
        let [call] = calls.as_array().unwrap().as_slice() else {
            return false;
        };
        call["topic"] == "greedy.host-loop"
    });
}

#[test]
fn a_share_of_a_processor_is_not_exceeded() {
    let server = with_loops().set("services.hostile.cpu = 0.1").start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "bounded", 1000, "");
    let details = client.message().json()["details"].clone();
    let ran = details["ranMs"].as_u64().unwrap();
    // A tenth of a second may be saved up by then, and a slice is owed.
    assert!(
        ran < 250 && details["waitedMs"].as_u64().unwrap() > 500,
        "{details}"
    );
}

/// Calls of a service that is over its share wait for a run permit before they
/// begin. They hold half of the threads at most, as all that wait to begin.
#[test]
fn calls_that_wait_to_begin_leave_threads_for_others() {
    let server = with_loops()
        .set("max_threads = 8")
        .set("services.hostile.cpu = 0.001")
        .start();
    let mut first = server.connect();
    first.request_within("hostile.spin", "first", 600_000, "");
    server.until("its service is over its share", |server| {
        server.metric("mb_calls_waiting_to_run") == 1
    });
    let begin = |number: usize| {
        let mut client = server.connect();
        client.request_within("hostile.spin", &format!("later{number}"), 600_000, "");
        client
    };
    let _later: Vec<_> = (0..12).map(begin).collect();
    server.until("half of the threads wait", |server| {
        server.metric("mb_calls_waiting_to_run") >= 5
    });
    let mut other = server.connect();
    for _ in 0..100 {
        let answer = other.ask("echo.say", "1");
        assert_eq!(answer.line, "RESPONSE:echo.say:1.0.0:ask");
    }
    let calls = server.json("/calls")["calls"].clone();
    assert!(calls.as_array().unwrap().len() <= 6, "{calls}");
}

/// A service keeps the slot of its last instance, though each call gets a fresh
/// one while others would take every slot.
#[test]
fn a_service_keeps_a_slot_beside_loops_of_others() {
    let server = with_loops()
        .set("memory = \"32MiB\"")
        .set("services.echo.isolation = \"fresh\"")
        .start();
    let mut client = server.connect();
    assert_eq!(client.ask("echo.say", "1").text(), "1");
    let begin = |number: usize| {
        let mut client = server.connect();
        client.request_within("hostile.spin", &format!("loop{number}"), 600_000, "");
        client
    };
    // More than there are slots: 14, of which 10 are for calls from outside.
    let _loops: Vec<_> = (0..20).map(begin).collect();
    server.until("loops hold all other slots", |server| {
        server.metric("mb_calls_waiting_to_run") >= 5
    });
    until_running(&server, 20);
    for _ in 0..20 {
        let answer = client.ask("echo.say", "1");
        assert_eq!(answer.line, "RESPONSE:echo.say:1.0.0:ask");
    }
}
