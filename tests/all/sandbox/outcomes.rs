//! Guests that misbehave, each with the code that it must give.

use serde_json::{Value, json};

use crate::{
    BINARY, setup, start,
    support::{HOUR, RawClient, Setup, TestServer, frame},
};

#[test]
fn a_guest_that_fails_gives_its_reason_and_harms_nobody() {
    let server = start();
    let mut client = server.connect();
    let failed = |reason: &str| ("SERVICE_FAILED", json!({"reason": reason}));
    for (action, payload, (code, details)) in [
        ("spin", "", ("TIMEOUT", json!({"phase": "call"}))),
        ("allocate", "", failed("memory")),
        ("trap", "", failed("trap")),
        ("panic", "", failed("trap")),
        ("recurse", "", failed("stack")),
        ("answer-too-large", "", failed("answer-size")),
        (
            "answer-too-large",
            "{\"bytes\":1048577}",
            failed("answer-size"),
        ),
        ("invalid-json", "", failed("invalid-answer")),
        ("empty-json", "", failed("invalid-answer")),
        ("bad-code", "", failed("invalid-answer")),
        ("details", "", ("CUSTOM", json!({"reason": "test"}))),
        ("sleep-spin", "{}", ("INVALID_ARGUMENTS", Value::Null)),
    ] {
        let timeout = if code == "TIMEOUT" { 1000 } else { HOUR };
        client.request_within(&format!("hostile.{action}"), "1", timeout, payload);
        let answer = client.message();
        assert_eq!(answer.line, format!("ERROR:hostile.{action}:1.0.0:1"));
        let body = answer.json();
        let mut reported = body["details"].clone();
        if code == "TIMEOUT" {
            let reported = reported.as_object_mut().unwrap();
            assert!(reported.remove("ranMs").unwrap().is_u64(), "{body}");
            assert!(reported.remove("waitedMs").unwrap().is_u64(), "{body}");
        }
        if code == "SERVICE_FAILED" {
            let reported = reported.as_object_mut().unwrap();
            assert!(reported.remove("elapsedMs").unwrap().is_u64(), "{body}");
            assert!(
                reported.remove("peakMemory").unwrap().as_u64() >= Some(65_536),
                "{body}"
            );
        }
        assert_eq!(
            (body["code"].as_str().unwrap(), reported),
            (code, details),
            "{action}: {body}"
        );
        let origin = if ["CUSTOM", "INVALID_ARGUMENTS"].contains(&code) {
            "service"
        } else {
            "server"
        };
        assert_eq!(body["origin"], origin);
        // The same connection, and the same service, go on.
        assert_eq!(
            client.ask("hostile.ok", "").text(),
            "{\"ok\":true}",
            "after {action}"
        );
    }
    client.request("hostile.answer-too-large", "1", "{\"bytes\":1048576}");
    assert_eq!(
        client.message().payload.len(),
        1_048_576,
        "the limit itself is fine"
    );
    let services = server.json("/services");
    let hostile = services["services"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == "hostile")
        .unwrap();
    assert_eq!(
        (&hostile["errors"], &hostile["failures"]),
        (&json!(10), &json!(2))
    );
    assert_eq!(hostile["calls"], 25);
    assert!(hostile["latency"]["p50Ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn every_request_gets_a_fresh_instance() {
    let server = start();
    let mut client = server.connect();
    for _ in 0..5 {
        assert_eq!(client.ask("hostile.remember", "").text(), "{\"count\":1}");
        client.ask("hostile.trap", "");
    }
}

/// What a component remembers, as it sees it itself: all of its memory.
#[test]
fn an_instance_that_is_reset_is_as_a_fresh_one() {
    let digest = |client: &mut RawClient| client.ask("hostile.digest", "").text();
    let fresh = setup()
        .set("[services.hostile]\nisolation = \"fresh\"")
        .start();
    let new = digest(&mut fresh.connect());
    assert!(new.ends_with("\"pages\":4}"), "{new}");
    let server = start();
    let mut client = server.connect();
    let instances = || row(&server, "hostile")["instances"].as_u64().unwrap();
    for (action, payload, made) in [
        ("ok", "", 1),
        ("leave", "{\"bytes\":10}", 1),
        ("leave", "{\"bytes\":50000}", 1),
        // More than it begins with, which it has to ask for.
        ("leave", "{\"bytes\":200000}", 1),
        // More than is there to be given, so its memory grows for good.
        ("leave", "{\"bytes\":3000000}", 2),
        ("remember", "", 2),
        ("details", "", 2),
        ("answer-too-large", "{\"bytes\":70000}", 2),
        ("panic", "", 3),
    ] {
        assert_eq!(digest(&mut client), new, "before {action} {payload}");
        client.request(&format!("hostile.{action}"), "1", payload);
        client.message();
        assert_eq!(digest(&mut client), new, "after {action} {payload}");
        assert_eq!(instances(), made, "after {action} {payload}");
    }
    assert_eq!(row(&server, "hostile")["freshReason"], Value::Null);
    let reason = row(&fresh, "hostile")["freshReason"].clone();
    assert_eq!(reason, "the settings say so");
}

#[test]
fn an_instance_that_had_several_handles_or_kept_one_is_not_used_again() {
    let grants = "[services.greedy.grants]\nkeyvalue = true\ncalls = [\"echo.*\"]";
    let server = Setup::new(BINARY)
        .with("guests", "greedy.wasm")
        .set(grants)
        .start();
    let mut client = server.connect();
    let mut numbers = |count: usize, keep: bool| {
        let payload = json!({"count": count, "keep": keep}).to_string();
        client.ask("greedy.numbers", &payload).text()
    };
    let mut made = 0;
    for (count, keep, one_more) in [
        (1, false, 1),
        (1, false, 0),
        (1, true, 0),
        (3, false, 1),
        (2, true, 1),
        (0, false, 1),
    ] {
        let expected: Vec<_> = (1..=count).collect();
        assert_eq!(
            numbers(count, keep),
            json!(expected).to_string(),
            "{count} {keep}"
        );
        made += one_more;
        assert_eq!(row(&server, "greedy")["instances"], made, "{count} {keep}");
    }
    // Dropped in reverse order they are as good as new: a bucket, and a
    // handle to replace a value in it.
    for _ in 0..3 {
        let tour = client.ask("greedy.kv-tour", "").json();
        assert_eq!(tour["value"], "1!", "{tour}");
    }
    assert_eq!(row(&server, "greedy")["instances"], made);
}

/// A row of `/services`.
fn row(server: &TestServer, name: &str) -> Value {
    let services = server.json("/services");
    services["services"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == name)
        .unwrap()
        .clone()
}

#[test]
fn work_whose_deadline_has_passed_is_not_begun() {
    // As many as run side by side, so that one more waits for one of them.
    let server = setup()
        .with("guests", "greedy.wasm")
        .set("services.greedy.grants = { keyvalue = true, calls = [\"echo.*\"] }")
        .start();
    let mut client = server.connect();
    let slow = frame(0, b"REQUEST:greedy.wasi-sleep:1.0.0:slow::300\n").repeat(64);
    let late = frame(0, b"REQUEST:hostile.ok:1.0.0:late::50\n");
    client.send(&[slow, late].concat());
    // All of them end at once, and the late one at any place among them.
    let mut answers: Vec<_> = (0..65).map(|_| client.message()).collect();
    answers.retain(|answer| answer.line != "ERROR:greedy.wasi-sleep:1.0.0:slow");
    let [answer] = &*answers else {
        panic!("{answers:?}");
    };
    assert_eq!(
        (&*answer.line, &*answer.code()),
        ("ERROR:hostile.ok:1.0.0:late", "SERVICE_UNAVAILABLE")
    );
    assert!(answer.json()["details"]["retryAfterMs"].as_u64().is_some());
}

#[test]
fn a_service_learns_about_its_call_by_asking() {
    let server = setup().set("default_timeout = 7000").start();
    let mut client = server.connect();
    client.send(&frame(
        0,
        b"REQUEST:hostile.context:1.0.0:child:parent:60000\n",
    ));
    let seen = client.message().json();
    let connection = server.json("/connections")["connections"][0]["id"].clone();
    let remaining = seen["remainingMs"].as_u64().unwrap();
    assert!((50_000..=60_000).contains(&remaining), "{remaining}");
    let expected = json!({
        "requestId": "child", "parentRequestId": "parent", "requestedVersion": "1.0.0",
        "principal": null, "connectionId": connection, "encrypted": false, "remainingMs": remaining,
    });
    assert_eq!(seen, expected);
    client.send(&frame(0, b"REQUEST:hostile.context:1.0.0:ask\n"));
    let seen = client.message().json();
    assert_eq!(seen["parentRequestId"], Value::Null);
    assert!(
        (1..=7000).contains(&seen["remainingMs"].as_u64().unwrap()),
        "the default: {seen}"
    );
}

#[test]
fn an_ordinary_call_does_not_grow_its_memory() {
    let server = start();
    assert_eq!(
        server.connect().ask("hostile.pages", "").text(),
        "{\"pages\":4}"
    );
}

#[test]
fn where_the_host_refuses_the_reservation_instances_come_on_demand() {
    let server = setup().after("ulimit -v 2000000").start();
    server.wait_for_log("allocated on demand");
    let mut client = server.connect();
    // Growing moves the memory here, so `allocate` takes its time.
    for (action, timeout, code) in [
        ("allocate", HOUR, "SERVICE_FAILED"),
        ("recurse", HOUR, "SERVICE_FAILED"),
        ("spin", 1000, "TIMEOUT"),
    ] {
        client.request_within(&format!("hostile.{action}"), "1", timeout, "");
        assert_eq!(client.message().code(), code, "{action}");
        assert_eq!(
            client.ask("calc.add", "{\"a\":2,\"b\":40}").text(),
            "{\"sum\":42}"
        );
    }
}

#[test]
fn compiled_code_is_kept_in_a_private_folder_without_a_home() {
    use std::os::unix::fs::PermissionsExt as _;
    let setup = Setup::empty(BINARY).with("services", "echo.wasm");
    let temporary = setup.dir.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let mut command = setup.command();
    command.env_clear().env("TMPDIR", &temporary);
    let server = setup.start_with(&mut command);
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
    let cache = std::fs::read_dir(&temporary)
        .unwrap()
        .next()
        .expect("a folder")
        .unwrap();
    assert!(
        cache
            .file_name()
            .to_string_lossy()
            .starts_with("mb-server-")
    );
    assert_eq!(
        cache.metadata().unwrap().permissions().mode() & 0o777,
        0o700
    );
    let files = std::fs::read_dir(cache.path()).unwrap().count();
    assert!(files > 0, "nothing was kept");
}
