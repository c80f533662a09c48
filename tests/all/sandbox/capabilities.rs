//! What services may use, once it is granted by name.

use std::{fs, io::Write as _, thread, time::Instant};

use serde_json::json;

use crate::{
    BINARY,
    support::{HOUR, PATIENCE, RawClient, Setup, TestServer, frame, wat},
};

fn granted() -> Setup {
    Setup::new(BINARY)
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .with_as("services", "granted/order.wasm", "order.wasm")
        .with("guests", "greedy.wasm")
}

const GRANTS: &str = r#"
[services.counter.grants]
keyvalue = true

[services.greedy.grants]
keyvalue = true
calls = ["order.create", "hostile.sleep-spin"]
"#;

const ORDER_GRANTS: &str = "[services.order.grants]\ncalls = [\"calc.*\", \"counter.add\"]\n";

const ORDER: &str = r#"{"customer":"Ada","items":[{"name":"tea","price":250,"quantity":3},{"name":"cup","price":100,"quantity":2}]}"#;

#[test]
fn what_is_not_granted_is_not_loaded_and_the_way_out_is_said() {
    let server = granted().start();
    let failed = server.json("/readyz")["failedServices"].clone();
    let error = |name: &str| {
        let row = failed
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
            .unwrap();
        row["error"].as_str().unwrap().to_owned()
    };
    for (name, import, setting) in [
        (
            "counter",
            "wasi:keyvalue/store@0.2.0-draft2",
            "set keyvalue = true under [services.counter.grants]",
        ),
        ("order", "wasi:config/store@0.2.0-rc.1", "set config = "),
    ] {
        assert!(
            error(name).contains(import) && error(name).contains(setting),
            "{}",
            error(name)
        );
    }
    assert_eq!(
        server
            .connect()
            .ask("counter.add", "{\"name\":\"x\"}")
            .code(),
        "SERVICE_UNAVAILABLE"
    );
}

#[test]
fn an_order_uses_all_of_them() {
    let setup = granted();
    let secret = setup.dir.path().join("currency");
    fs::write(&secret, "CHF\n").unwrap();
    let server = setup
        .set(GRANTS)
        .set(&format!(
            "{ORDER_GRANTS}secrets = {{ currency = {secret:?} }}"
        ))
        .start();
    let mut client = server.connect();
    client.request("order.create", "the-order", ORDER);
    assert_eq!(
        client.message().json(),
        json!({"number": 1, "total": 950, "currency": "CHF"})
    );
    let line = server.wait_for_log("order 1 of Ada");
    assert!(
        line.contains("service=\"order\"") && line.contains("request_id=\"the-order\""),
        "{line}"
    );
    assert_eq!(client.ask("order.create", ORDER).json()["number"], 2);
    assert_eq!(
        client
            .ask("order.create", "{\"customer\":\"Ada\",\"items\":[]}")
            .code(),
        "EMPTY_ORDER"
    );
    let tour = client.ask("greedy.kv-tour", "").json();
    assert_eq!(
        tour,
        json!({"keys": ["a", "c", "n"], "value": "1!", "number": 83, "left": false})
    );
    let newer = client.ask("greedy.kv-newer", "").json();
    let never = newer["never"].as_str().unwrap_or_default();
    assert!(
        never.contains("a time to live is 1 ms to ten years"),
        "{newer}"
    );
    assert_eq!(newer["keys"], json!(["b/1"]), "{newer}");
    assert_eq!(newer["refused"], json!({"Err": "NO"}), "{newer}");
    assert_eq!(
        (&newer["value"], &newer["went"]),
        (&json!("3"), &json!(true))
    );
    assert_eq!(
        client.ask("counter.get", "{\"name\":\"orders\"}").text(),
        "{\"value\":2}",
        "each has its own"
    );
}

#[test]
fn calls_between_services_are_one_chain_and_end_together() {
    let server = granted()
        .set("log = \"debug\"")
        .set(GRANTS)
        .set(&format!("{ORDER_GRANTS}config = {{ currency = \"EUR\" }}"))
        .start();
    let mut client = server.connect();
    for round in 0..100 {
        client.request("order.create", &format!("order-{round}"), ORDER);
        assert!(client.message().line.starts_with("RESPONSE"));
    }
    for round in 0..100 {
        // Three calls, each with an id of its own, all under the order's.
        let parent = format!("parent_request_id=\"order-{round}\"");
        let ids: std::collections::BTreeSet<_> = (0..3)
            .map(|_| {
                let line = server.wait_for_log(&parent);
                assert!(line.contains("call ended"), "{line}");
                line.split("request_id=\"")
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        assert_eq!(ids.len(), 3, "{ids:?}");
        // The order's own line, and its end.
        let own = format!(" request_id=\"order-{round}\" parent_request_id=\"-\"");
        assert!(server.wait_for_log(&own).contains("of Ada"));
        assert!(server.wait_for_log(&own).contains("call ended"));
    }
    let begun = Instant::now();
    let slow = json!({"topic": "hostile.sleep-spin", "payload": {"ms": 60_000}});
    client.request_within("greedy.call", "slow", 2000, &slow.to_string());
    let body = client.message().json();
    assert_eq!(
        (&body["code"], &body["details"]["phase"]),
        (&json!("TIMEOUT"), &json!("host-call")),
        "{body}"
    );
    assert!(begun.elapsed().as_secs() < 30);
    server.wait_for_log("parent_request_id=\"slow\"");
}

#[test]
fn clocks_and_random_numbers_and_output_need_no_grant_but_those_of_the_rest() {
    let server = granted().set(GRANTS).start();
    let mut client = server.connect();
    let nap = client.ask("greedy.nap", "{\"ms\":30}").json();
    assert!(
        nap["ms"].as_u64().unwrap() >= 30 && nap["year"].as_u64().unwrap() >= 2026,
        "{nap}"
    );
    assert_eq!(
        client.ask("greedy.random", "").text(),
        "{\"different\":true}"
    );
    client.request(
        "greedy.stdout",
        "printed",
        "\"half a line, \\nand \\u001b[1mmore\"",
    );
    assert_eq!(client.message().text(), "null");
    let line = server.wait_for_log("half a line, ");
    assert!(
        line.contains("source=\"stdout\"") && line.contains("request_id=\"printed\""),
        "{line}"
    );
    assert!(server.wait_for_log("more").contains("and \\u{1b}[1mmore"));
}

#[test]
fn a_pinned_digest_lets_only_that_file_have_its_grants() {
    let digest = "sha256:".to_owned() + &"0".repeat(64);
    let pinned = format!("[services.counter.grants]\nkeyvalue = true\ndigest = \"{digest}\"");
    let server = granted().set(&pinned).start();
    let failed = server.json("/readyz").to_string();
    assert!(
        failed.contains("its grants are for a file with digest sha256:0000"),
        "{failed}"
    );
}

#[test]
fn no_byte_of_one_service_is_seen_by_another() {
    for isolation in ["request", "shared"] {
        let server = Setup::new(BINARY)
            .with("guests", "marker-a.wasm")
            .with("guests", "marker-b.wasm")
            .set(&format!("[services.default]\nisolation = \"{isolation}\""))
            .start();
        thread::scope(|scope| {
            for start in 0..2 {
                let mut client = server.connect();
                scope.spawn(move || {
                    for round in 0..5000 {
                        let name = if (start + round) % 2 == 0 {
                            "marker-a"
                        } else {
                            "marker-b"
                        };
                        assert_eq!(
                            client.ask(&format!("{name}.look"), "").text(),
                            "{\"others\":0}",
                            "{isolation}"
                        );
                    }
                });
            }
        });
    }
}

#[test]
fn shared_instances_are_used_again_but_not_after_a_failure() {
    let shared = "[services.hostile]\nisolation = \"shared\"";
    let server = Setup::new(BINARY).set(shared).start();
    let mut client = server.connect();
    let mut count = || {
        client.ask("hostile.remember", "").json()["count"]
            .as_u64()
            .unwrap()
    };
    for expected in (1..=10_000).chain([1, 2]) {
        assert_eq!(count(), expected);
    }
    for (action, timeout) in [
        ("trap", HOUR),
        ("spin", 1000),
        ("allocate", HOUR),
        ("invalid-json", HOUR),
        ("empty-json", HOUR),
        ("bad-code", HOUR),
    ] {
        client.ask("hostile.remember", "");
        client.request_within(&format!("hostile.{action}"), "1", timeout, "");
        client.message().code();
        assert_eq!(
            client.ask("hostile.remember", "").text(),
            "{\"count\":1}",
            "after {action}"
        );
    }
    // A failure of the service's own is an answer like another.
    client.ask("hostile.details", "");
    assert_eq!(client.ask("hostile.remember", "").text(), "{\"count\":2}");
}

#[test]
fn over_its_concurrency_a_call_waits_within_its_deadline() {
    let server = Setup::new(BINARY)
        .set("[services.hostile]\nconcurrency = 1")
        .start();
    let mut busy = server.connect();
    let mut waiting = server.connect();
    busy.request_within("hostile.spin", "1", HOUR, "");
    server.until("the first one runs", |server| {
        server.json("/connections")["connections"]
            .as_array()
            .unwrap()
            .iter()
            .any(|row| row["inFlight"] == 1)
    });
    waiting.request_within("hostile.ok", "late", 100, "");
    let refused = waiting.message();
    assert_eq!(refused.code(), "SERVICE_UNAVAILABLE");
    assert!(
        refused.json()["details"]["retryAfterMs"].is_u64()
            && refused.text().contains("concurrency"),
        "{refused:?}"
    );
    assert_eq!(
        waiting.ask("echo.say", "1").text(),
        "1",
        "others are served"
    );
    waiting.request_within("hostile.ok", "patient", HOUR, "");
    let row = |server: &TestServer, state: &str| {
        let calls = server.json("/calls");
        let mut rows = calls["calls"].as_array().unwrap().iter();
        rows.find(|call| call["state"] == state).cloned()
    };
    server.until("it waits", |server| {
        row(server, "waiting").is_some_and(|call| call["requestId"] == "patient")
    });
    let path = format!("/calls/{}", row(&server, "running").unwrap()["id"]);
    assert_eq!(
        crate::support::admin::change(&server, "DELETE", &path, "").0,
        200
    );
    assert_eq!(waiting.message().text(), "{\"ok\":true}");
    assert_eq!(busy.message().json()["details"]["reason"], "killed");
}

#[test]
fn a_call_ends_at_the_limit_of_its_service() {
    let server = Setup::new(BINARY)
        .set("[services.hostile]\ntimeout = 1000")
        .start();
    let mut client: RawClient = server.connect();
    client.request_within("hostile.spin", "1", 60_000, "");
    let body = client.message().json();
    assert_eq!(body["code"], "TIMEOUT");
    assert!(
        body["message"].as_str().unwrap().contains("1000 ms"),
        "{body}"
    );
}

#[test]
fn traps_are_explained_where_that_is_allowed() {
    let server = Setup::new(BINARY)
        .set("[services.hostile]\nexpose_traps = true")
        .start();
    let body = server.connect().ask("hostile.recurse", "").json();
    assert!(
        !body["details"]["backtrace"].as_array().unwrap().is_empty(),
        "{body}"
    );
    assert!(server.wait_for_log("call failed").contains("backtrace="));
    let deep = wat::guest(
        "deep",
        "(func $in_the_depth unreachable) (func $above (call $in_the_depth))",
        "(call $above)",
    );
    let setup = Setup::new(BINARY)
        .with_bytes("deep.wasm", &deep)
        .set("[services.deep]\nexpose_traps = true");
    let body = setup.start().connect().ask("deep.run", "").json();
    assert_eq!(body["details"]["backtrace"][0], "in_the_depth", "{body}");
    assert_eq!(body["details"]["backtrace"][1], "above", "{body}");
    let body = crate::start().connect().ask("hostile.recurse", "").json();
    assert_eq!(body["details"]["backtrace"], json!(null), "{body}");
}

/// A line of `/proc/PID/status`, in bytes.
fn status(server: &TestServer, field: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
    kib.unwrap().trim().parse::<usize>().unwrap() * 1024
}

/// The first bytes of a message that promises 1 MiB.
fn begun_message() -> Vec<u8> {
    let body = [
        b"REQUEST:echo.say:1.0.0:large\n\"".as_slice(),
        &vec![b'x'; 900_000],
    ]
    .concat();
    let mut part = frame(0, &body);
    part[..4].copy_from_slice(&1_000_000_u32.to_be_bytes());
    part
}

/// Where the server reads no more, the rest leaves when it has refused it.
fn begin_message(client: &mut RawClient, part: &[u8]) {
    client.stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let _ = client.stream.write_all(part);
}

#[test]
fn unfinished_messages_take_no_more_than_the_memory_of_the_server() {
    const MEMORY: usize = 32 << 20;
    // What is measured is what the server counts, not what glibc keeps between
    // large blocks: so all of those come from the system, and go back.
    let server = Setup::new(BINARY)
        .set(&format!("memory = {MEMORY}\nread_timeout = 1500"))
        .after("export MALLOC_MMAP_THRESHOLD_=131072")
        .start();
    // The peak until now is of loading components.
    std::fs::write(format!("/proc/{}/clear_refs", server.child.id()), "5").unwrap();
    let before = status(&server, "VmRSS:");
    let part = begun_message();
    thread::scope(|scope| {
        for _ in 0..40 {
            let (mut client, part) = (server.connect(), &part);
            scope.spawn(move || {
                begin_message(&mut client, part);
                // Some get memory and do not finish, others wait for it in vain.
                let code = client.message().code();
                assert!(
                    ["READ_TIMEOUT", "SERVICE_UNAVAILABLE"].contains(&&*code),
                    "{code}"
                );
            });
        }
    });
    let grown = status(&server, "VmHWM:").saturating_sub(before);
    assert!(grown <= MEMORY, "{grown} bytes more");
    assert_eq!(server.connect().ask("echo.say", "1").text(), "1");
}

#[test]
fn a_message_for_which_there_is_no_memory_waits_and_is_then_refused() {
    let server = granted()
        .set("memory = \"32MiB\"\nread_timeout = 3000")
        .set(GRANTS)
        .start();
    let in_flight = || {
        let rows = server.json("/connections")["connections"].clone();
        let rows = rows.as_array().unwrap().iter();
        rows.filter(|row| row["inFlight"] == 1).count()
    };
    // Requests that are being served hold what they need, until there is no
    // more for the next one.
    let nap = json!({"ms": HOUR, "filler": "x".repeat(900_000)}).to_string();
    let nap = format!("REQUEST:greedy.nap:1.0.0:nap::{HOUR}\n{nap}");
    let mut served = Vec::new();
    let mut refused = loop {
        let mut client = server.connect();
        begin_message(&mut client, &frame(0, nap.as_bytes()));
        client.stream.set_nonblocking(true).unwrap();
        let answered = || client.stream.peek(&mut [0]).is_ok();
        server.until("it is served or refused", |_| {
            in_flight() > served.len() || answered()
        });
        let answered = answered();
        client.stream.set_nonblocking(false).unwrap();
        if answered {
            break client;
        }
        served.push(client);
    };
    let message = refused.message();
    assert!(!served.is_empty(), "{message:?}");
    assert_eq!(
        (&*message.line, &*message.code()),
        ("ERROR:greedy.nap:1.0.0:nap", "SERVICE_UNAVAILABLE")
    );
    assert_eq!(refused.message().code(), "SERVER_BUSY");
    refused.expect_end();
    let pong = server.connect().ask("system.ping", "1").json();
    assert_eq!(pong["echo"], 1, "others are answered");
}

#[test]
fn memory_of_a_large_message_goes_back_while_its_connection_stays() {
    let server = Setup::new(BINARY).start();
    let mut client = server.connect();
    let before = server.count("mb_memory_bytes");
    let text = format!("{:?}", "x".repeat(900_000));
    assert_eq!(client.ask("echo.say", &text).text(), text);
    server.until("released", |server| {
        server.count("mb_memory_bytes") == before
    });
    assert!(server.count("mb_memory_max_bytes") > before);
    assert_eq!(client.ask("echo.say", "1").text(), "1");
}

#[test]
fn many_calls_that_call_others_do_not_wait_for_each_other() {
    // Ten places for them, and one each for what they call.
    let server = granted()
        .set("memory = \"32MiB\"")
        .set(GRANTS)
        .set(&format!("{ORDER_GRANTS}config = {{ currency = \"EUR\" }}"))
        .start();
    thread::scope(|scope| {
        for peer in 0..40 {
            let mut client = server.connect();
            scope.spawn(move || {
                for round in 0..5 {
                    client.request_within("order.create", &format!("{peer}-{round}"), HOUR, ORDER);
                    assert_eq!(client.message().json()["total"], 950);
                }
            });
        }
    });
    assert_eq!(
        server
            .connect()
            .ask("counter.get", "{\"name\":\"orders\"}")
            .text(),
        "{\"value\":200}"
    );
}
