//! Settings that change while the server runs.

use std::fs;

use serde_json::{Value, json};

use crate::{
    BINARY,
    support::admin::change,
    support::{Setup, TestServer},
};

fn rewrite(server: &TestServer, settings: &str) {
    fs::write(server.settings_file(), settings).unwrap();
}

fn reload(server: &TestServer) -> (u16, Value) {
    change(server, "POST", "/config/reload", "")
}

fn effective(server: &TestServer, key: &str) -> Value {
    let config = server.json("/config");
    let rows = config["settings"].as_array().unwrap();
    rows.iter()
        .find(|row| row["key"] == key)
        .map_or(Value::Null, |row| row["value"].clone())
}

#[test]
fn what_can_be_applied_is_and_what_waits_is_named() {
    let server = Setup::empty(BINARY)
        .with("services", "echo.wasm")
        .with("services", "calc.wasm")
        .set("[services.calc]\nrate = 0")
        .start();
    let mut client = server.connect();
    assert_eq!(client.ask("echo.say", "1").json(), json!(1));
    rewrite(
        &server,
        "max_threads = 70\nlog = \"debug\"\n[services.echo]\ndisabled = true\n[services.calc]\nrate = 0",
    );
    let (status, applied) = reload(&server);
    assert_eq!(
        (status, &applied["nextStart"]),
        (200, &json!(["max_threads"])),
        "{applied}"
    );
    let live = applied["applied"].to_string();
    assert!(
        live.contains("\"log\"") && live.contains("services.echo.disabled"),
        "{live}"
    );
    assert_eq!(
        client.ask("echo.say", "1").code(),
        "SERVICE_UNAVAILABLE",
        "on the connection that was open"
    );
    assert_eq!(
        client.ask("calc.add", r#"{"a":2,"b":40}"#).json(),
        json!({"sum": 42})
    );
    assert_eq!(effective(&server, "log"), "\"debug\"");
    assert_eq!(
        effective(&server, "max_threads"),
        "1280",
        "until the next start"
    );
    assert_eq!(server.json("/config")["nextStart"], json!(["max_threads"]));

    // A bad file changes nothing, not even what is right in it.
    for bad in [
        "[services.echo]\ndisabled = 3",
        "nothing = 1",
        "log = ",
        "host = \"0.0.0.0\"\nlog = \"trace\"",
    ] {
        rewrite(&server, bad);
        let (status, refused) = reload(&server);
        assert_eq!(status, 409, "{bad}: {refused}");
        assert!(
            refused["error"]
                .as_str()
                .is_some_and(|error| !error.is_empty()),
            "{refused}"
        );
        assert_eq!(effective(&server, "log"), "\"debug\"", "{bad}");
        assert_eq!(
            client.ask("echo.say", "1").code(),
            "SERVICE_UNAVAILABLE",
            "{bad}"
        );
    }

    // SIGHUP does the same.
    rewrite(&server, "");
    server.signal("HUP");
    server.until("the settings were read again", |server| {
        effective(server, "log") == "\"info\""
    });
    assert_eq!(client.ask("echo.say", "1").json(), json!(1));
    assert_eq!(server.json("/config")["nextStart"], json!([]));
    let calls = server.json("/services")["services"][1]["calls"].clone();
    assert_eq!(calls, 2, "the counts went on");
}

#[test]
fn a_grant_that_is_taken_away_is_gone_at_once() {
    let granted = "[services.counter.grants]\nkeyvalue = true\n";
    let server = Setup::empty(BINARY)
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .set("[services.counter.grants]\nkeyvalue = true")
        .start();
    let mut client = server.connect();
    let add = r#"{"name":"n"}"#;
    assert_eq!(client.ask("counter.add", add).json()["value"], 1);
    rewrite(&server, "");
    let (status, applied) = reload(&server);
    assert_eq!(status, 200, "{applied}");
    assert!(
        applied["changes"].to_string().contains("keyvalue"),
        "{applied}"
    );
    assert_eq!(client.ask("counter.add", add).code(), "SERVICE_UNAVAILABLE");
    rewrite(&server, granted);
    assert_eq!(reload(&server).0, 200);
    assert_eq!(client.ask("counter.add", add).json()["value"], 2);
    assert_eq!(
        server.json("/services")["services"][0]["calls"],
        2,
        "the counts went on, though it was gone"
    );

    // What the pool was not made for, and a store that was not opened.
    rewrite(
        &server,
        &format!("{granted}[services.counter]\nmemory = \"100MiB\""),
    );
    let (status, refused) = reload(&server);
    assert_eq!(status, 409, "{refused}");
    assert!(
        refused["error"].as_str().unwrap().contains("restart"),
        "{refused}"
    );
    assert_eq!(client.ask("counter.add", add).json()["value"], 3);
    let without = Setup::empty(BINARY).start();
    rewrite(&without, granted);
    let (status, refused) = reload(&without);
    assert_eq!(status, 409);
    assert!(
        refused["error"].as_str().unwrap().contains("restart"),
        "{refused}"
    );
}
