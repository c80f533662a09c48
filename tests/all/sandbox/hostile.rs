//! Guests that take what they can: each has its stated outcome, and none
//! harms another. `hostile` of `sandbox.rs` is for the plain ones.

use std::time::Instant;

use serde_json::{Value, json};

use crate::{
    BINARY,
    support::{HOUR, Setup, TestServer, component, wat},
};

/// What the operator grants to `greedy`, whatever it does with it.
const GRANTS: &str = r#"
[services.greedy.grants]
keyvalue = true
quota = "1MiB"
log = "info"
calls = ["greedy.call", "echo.*", "relay.*", "hostile.spin"]

[services.relay.grants]
calls = ["greedy.call", "relay.forward"]
"#;

fn start() -> TestServer {
    Setup::new(BINARY)
        .with("guests", "greedy.wasm")
        .set(GRANTS)
        .start()
}

/// Short where it has to pass, and else longer than any machine takes.
fn timeout(code: &str) -> u64 {
    if code == "TIMEOUT" { 1500 } else { HOUR }
}

/// Code and reason or phase of an ERROR.
fn reported(body: &Value) -> (String, String) {
    let details = &body["details"];
    let word = details["reason"]
        .as_str()
        .or(details["phase"].as_str())
        .unwrap_or_default();
    (body["code"].as_str().unwrap().to_owned(), word.to_owned())
}

#[test]
fn whatever_a_guest_does_to_the_host_has_its_outcome() {
    let server = start();
    let mut client = server.connect();
    for (action, code, word) in [
        ("host-loop", "TIMEOUT", "call"),
        ("wasi-sleep", "TIMEOUT", "host-call"),
        ("wasi-poll", "TIMEOUT", "host-call"),
        ("random-bomb", "SERVICE_FAILED", "trap"),
        ("exit", "SERVICE_FAILED", "trap"),
        ("log-string", "SERVICE_FAILED", "host-data"),
        ("kv-list", "SERVICE_FAILED", "host-data"),
        ("handles", "SERVICE_FAILED", "host-data"),
    ] {
        let begun = Instant::now();
        let timeout = timeout(code);
        client.request_within(&format!("greedy.{action}"), "1", timeout, "");
        let body = client.message().json();
        assert_eq!(
            reported(&body),
            (code.to_owned(), word.to_owned()),
            "{action}: {body}"
        );
        assert!(
            code != "TIMEOUT" || begun.elapsed().as_secs() < 30,
            "{action} took {:?}",
            begun.elapsed()
        );
        assert_eq!(client.ask("echo.say", "1").text(), "1", "after {action}");
    }
}

#[test]
fn guests_that_no_compiler_makes() {
    let fifty = "(memory 1) ".repeat(49);
    let grow_all: String = (0..50)
        .map(|i| format!("(drop (memory.grow {i} (i32.const 16)))"))
        .collect();
    let guests = [
        (
            "copy",
            "",
            "(loop (memory.copy (i32.const 0) (i32.const 65536) (i32.const 4000000)) (br 0))",
            "TIMEOUT",
            "call",
        ),
        (
            "table",
            "(table $t 1 funcref)",
            "(loop (br_if 0 (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1)))) unreachable",
            "SERVICE_FAILED",
            "memory",
        ),
        (
            "fifty",
            &fifty,
            &format!(
                "(loop {grow_all} (br_if 0 (i32.ne (memory.grow 49 (i32.const 1)) (i32.const -1)))) unreachable"
            ),
            "SERVICE_FAILED",
            "memory",
        ),
        (
            "float",
            "",
            "(drop (i32.trunc_f32_s (f32.const nan)))",
            "SERVICE_FAILED",
            "trap",
        ),
        ("unreached", "", "unreachable", "SERVICE_FAILED", "trap"),
        (
            "zero",
            "",
            "(drop (i32.div_s (i32.const 1) (i32.const 0)))",
            "SERVICE_FAILED",
            "trap",
        ),
        (
            "outside",
            "",
            "(drop (i32.load (i32.const -8)))",
            "SERVICE_FAILED",
            "trap",
        ),
    ];
    let mut setup = Setup::new(BINARY);
    for (name, more, body, _, _) in &guests {
        setup = setup.with_bytes(&format!("{name}.wasm"), &wat::guest(name, more, body));
    }
    let server = setup.start();
    assert_eq!(server.json("/readyz")["failedServices"], json!([]));
    let mut client = server.connect();
    for (name, _, _, code, word) in guests {
        client.request_within(&format!("{name}.run"), "1", timeout(code), "");
        let body = client.message().json();
        assert_eq!(
            reported(&body),
            (code.to_owned(), word.to_owned()),
            "{name}: {body}"
        );
        assert_eq!(client.ask("echo.say", "1").text(), "1", "after {name}");
    }
}

#[test]
fn those_that_say_wrong_things_of_themselves_are_not_served() {
    let say = |name: &str, version: &str| {
        format!(
            r#"{{"name":"{name}","version":"{version}","description":"d","actions":[{{"name":"run","description":"d"}}]}}"#
        )
    };
    let server = Setup::new(BINARY)
        .with_bytes(
            "caps.wasm",
            &wat::guest_that_says(&say("Ca ps", "1.0.0"), "", ""),
        )
        .with_bytes(
            "prerelease.wasm",
            &wat::guest_that_says(&say("prerelease", "1.0.0-rc.1"), "", ""),
        )
        .with_bytes("other.wasm", &wat::guest("another", "", ""))
        .with_bytes(
            "start.wasm",
            &wat::guest("start", "(func $s unreachable) (start $s)", ""),
        )
        .set("services.loop.timeout = 1000")
        .with("guests", "loop.wasm")
        .start();
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
    for (name, part) in [
        ("caps", "name"),
        ("prerelease", "version"),
        ("other", "another"),
        ("start", "unreachable"),
        ("loop", "did not return within 1000 ms"),
    ] {
        assert!(error(name).contains(part), "{name}: {}", error(name));
    }
    assert_eq!(
        server.connect().ask("calc.add", "{\"a\":1,\"b\":1}").text(),
        "{\"sum\":2}"
    );
}

#[test]
fn the_store_refuses_what_is_out_of_bounds() {
    let server = start();
    let mut client = server.connect();
    let full = client.ask("greedy.kv-quota", "").json();
    assert_eq!(full["count"], 10, "{full}");
    assert!(
        full["error"].as_str().unwrap().contains("quota of 1048576"),
        "{full}"
    );
    let wrong = client.ask("greedy.kv-keys", "").json();
    for (index, part) in [
        "key of 0 bytes",
        "key of 1048576 bytes",
        "a bucket is named",
    ]
    .iter()
    .enumerate()
    {
        assert!(wrong[index].as_str().unwrap().contains(part), "{wrong}");
    }
}

#[test]
fn calls_that_lead_nowhere_are_forbidden() {
    let server = start();
    let mut client = server.connect();
    let mut call = |topic: &str| {
        let timeout = if topic == "hostile.spin" { 1000 } else { HOUR };
        client.request_within(
            "greedy.call",
            "1",
            HOUR,
            &json!({"topic": topic, "payload": {}, "timeout": timeout}).to_string(),
        );
        client.message().json()
    };
    assert_eq!(call("echo.say"), json!({"answer": {}}));
    for (topic, code, part) in [
        ("greedy.call", "FORBIDDEN", "close a circle"),
        ("calc.add", "FORBIDDEN", "services.greedy.grants.calls"),
        ("hostile.ok", "FORBIDDEN", "may not call hostile.ok"),
        ("nonsense", "MALFORMED_MESSAGE", "topic"),
        ("relay.forward", "NO_ROUTE_FOUND", "no service relay"),
        ("echo.sing", "TOPIC_NOT_SUPPORTED", "no action sing"),
        ("hostile.spin", "TIMEOUT", "stopped at the timeout of"),
    ] {
        let answer = call(topic);
        assert_eq!(answer["code"], code, "{answer}");
        assert!(
            answer["message"].as_str().unwrap().contains(part),
            "{answer}"
        );
    }
}

#[test]
fn a_circle_through_another_service_is_found() {
    let there = |topic: &str| {
        let inner = json!({"topic": topic, "payload": {"topic": "relay.forward"}});
        json!({"topic": "relay.forward", "payload": inner}).to_string()
    };
    let open = Setup::new(BINARY)
        .with("guests", "greedy.wasm")
        .with("guests", "relay.wasm")
        .set("[services.greedy.grants]\nkeyvalue = true\ncalls = [\"relay.*\"]")
        .set("[services.relay.grants]\ncalls = [\"greedy.*\", \"echo.*\"]")
        .start();
    let answer = open
        .connect()
        .ask("greedy.call", &there("greedy.call"))
        .json();
    assert_eq!(answer["answer"]["code"], "FORBIDDEN", "{answer}");
    assert!(
        answer["answer"]["message"]
            .as_str()
            .unwrap()
            .contains("close a circle"),
        "{answer}"
    );
    assert_eq!(
        open.connect().ask("greedy.call", &there("echo.say")).json()["answer"]["topic"],
        "relay.forward"
    );
}

#[test]
fn services_call_each_other_to_a_depth_of_four() {
    // The same service under names as long as its own.
    let relay = std::fs::read(component("guests", "relay.wasm")).unwrap();
    let named = |name: &[u8; 5]| {
        let mut bytes = relay.clone();
        for at in 0..bytes.len() - 5 {
            if &bytes[at..at + 5] == b"relay" {
                bytes[at..at + 5].copy_from_slice(name);
            }
        }
        bytes
    };
    let names = ["rela1", "rela2", "rela3", "rela4", "rela5"];
    let setup = names.iter().fold(Setup::new(BINARY), |setup, name| {
        let bytes = named(name.as_bytes().try_into().unwrap());
        let calls = "calls = [\"rela2.*\", \"rela3.*\", \"rela4.*\", \"rela5.*\", \"echo.*\"]";
        setup
            .with_bytes(&format!("{name}.wasm"), &bytes)
            .set(&format!("[services.{name}.grants]\n{calls}"))
    });
    let server = setup.start();
    // Each passes the call on to the next one, and the last one to `echo`.
    let through = |names: &[&str]| {
        let last = json!({"topic": "echo.say", "payload": "there"});
        let payload = names[1..].iter().rev().fold(
            last,
            |payload, name| json!({"topic": format!("{name}.forward"), "payload": payload}),
        );
        let first = format!("{}.forward", names[0]);
        server.connect().ask(&first, &payload.to_string()).json()
    };
    assert_eq!(through(&names[1..]), "there");
    let answer = through(&names);
    assert_eq!(answer["code"], "FORBIDDEN", "{answer}");
    assert_eq!(answer["message"], "nested deeper than the limit of 4");
}

#[test]
fn the_log_stays_bounded_and_readable() {
    let server = start();
    let mut client = server.connect();
    client.request("greedy.log-control", "control", "");
    client.message();
    let line = server.wait_for_log("request_id=\"control\"");
    assert!(
        line.contains("one\\nFAKE two\\r\\u{1b}[2J\\u{202e}three\\u{0}"),
        "{line:?}"
    );
    client.request("greedy.log-long", "long", "");
    client.message();
    let line = server.wait_for_log("request_id=\"long\"");
    assert!(
        line.len() < 5000 && line.contains("1044480 bytes more"),
        "{} bytes",
        line.len()
    );
    client.request_within("greedy.log-flood", "flood", 60_000, "");
    assert_eq!(client.message().text(), "\"flooded\"");
    let line = server.wait_for_log("lines dropped");
    let dropped: u64 = line
        .split(" lines dropped")
        .next()
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(dropped, (1 << 20) - 64, "64 KiB are 64 lines");
}

/// They may be as large as an answer, and the newest calls that took more than
/// 10 ms are kept in the history.
#[test]
fn large_details_of_failures_are_not_kept() {
    // A failure with details of 900,001 bytes, `[[],[],...,[]]`, after a while.
    let words = |at: u32, numbers: &[u32]| -> String {
        let store = |(index, number): (u32, &u32)| {
            format!(
                "(i32.store (i32.const {}) (i32.const {number}))",
                at + 4 * index
            )
        };
        (0..).zip(numbers).map(store).collect()
    };
    let failure = words(32, &[1, 600, 4, 600, 4, 1, 1_048_576, 900_001]);
    let body = format!(
        r#"(local $at i32)
        (i32.store (i32.const 600) (i32.const 0x4c494146))
        (local.set $at (i32.const 100000000))
        (loop (br_if 0 (local.tee $at (i32.sub (local.get $at) (i32.const 1)))))
        (local.set $at (i32.const 1048577))
        (loop
            (i32.store (local.get $at) (i32.const 0x2c5d5b))
            (br_if 0 (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 3))) (i32.const 1948572))))
        (i32.store8 (i32.const 1048576) (i32.const 91))
        (i32.store (local.get $at) (i32.const 0x5d5d5b))
        {failure}"#
    );
    let server = Setup::new(BINARY)
        .with_bytes("verbose.wasm", &wat::guest("verbose", "", &body))
        .set("memory = \"64MiB\"\ndefault_timeout = \"1m\"")
        .start();
    let mut client = server.connect();
    assert_eq!(client.ask("verbose.run", "1").code(), "FAIL");
    let before = server.resident();
    for _ in 0..60 {
        let said = client.ask("verbose.run", "1");
        assert_eq!(said.json()["details"].as_array().unwrap().len(), 300_000);
    }
    let grown = server.resident().saturating_sub(before) >> 20;
    assert!(grown < 64, "{grown} MiB more");
    let past = server.json("/calls/past?limit=1000");
    let kept = past["calls"].as_array().unwrap();
    assert!(kept.len() > 60, "{}", kept.len());
    let details = kept[0]["details"].as_str().unwrap();
    assert!(
        details.starts_with("[[],[]") && details.len() < 2100,
        "{details}"
    );
}
