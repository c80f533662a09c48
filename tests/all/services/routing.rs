//! Which file serves what, and what becomes of a bad one.

use serde_json::json;

use crate::{
    BINARY,
    support::{RawClient, Setup, frame},
};

fn ask_version(client: &mut RawClient, version: &str) -> String {
    client.send(&frame(
        0,
        format!("REQUEST:versions.which:{version}:1\n").as_bytes(),
    ));
    let answer = client.message();
    match answer.line.starts_with("RESPONSE") {
        true => answer.json()["version"].as_str().unwrap().to_owned(),
        false => answer.code(),
    }
}

#[test]
fn the_highest_compatible_version_serves() {
    let versions = [
        "versions@1.0.0.wasm",
        "versions@1.2.0.wasm",
        "versions@2.0.0.wasm",
    ];
    let server = versions
        .iter()
        .fold(Setup::empty(BINARY), |setup, file| {
            setup.with("guests", file)
        })
        .start();
    let mut client = server.connect();
    for (asked, expected) in [
        ("1.0.0", "1.2.0"),
        ("1.1.5", "1.2.0"),
        ("1.2.0", "1.2.0"),
        ("1.2.1", "VERSION_NOT_SUPPORTED"),
        ("2.0.0", "2.0.0"),
        ("3.0.0", "VERSION_NOT_SUPPORTED"),
        ("0.9.0", "VERSION_NOT_SUPPORTED"),
    ] {
        assert_eq!(ask_version(&mut client, asked), expected, "{asked}");
    }
    client.send(&frame(0, b"REQUEST:versions.which:3.0.0:1\n"));
    assert_eq!(
        client.message().json()["details"],
        json!({"available": ["2.0.0", "1.2.0", "1.0.0"]})
    );
}

#[test]
fn a_bad_file_keeps_only_itself_from_being_served() {
    let module_without_wit = b"\0asm\x01\0\0\0";
    let server = Setup::empty(BINARY)
        .with("services", "echo.wasm")
        .with_as("services", "calc.wasm", "calculator.wasm")
        .with_as("guests", "versions@1.0.0.wasm", "versions@1.0.1.wasm")
        .with("guests", "liar.wasm")
        .with("guests", "mute.wasm")
        .with("guests", "loop.wasm")
        .with("guests", "badversion.wasm")
        .with("guests", "garbage.wasm")
        .with("guests", "wants.wasm")
        .with_bytes("empty.wasm", b"")
        .with_bytes("text.wasm", b"hello")
        .with_bytes("module.wasm", module_without_wit)
        .with_bytes("component.wasm", b"\0asm\x0d\0\x01\0")
        .with_bytes("broken.wasm", b"\0asm\x0d\0\x01\0\x07")
        .with_bytes("not a name.wasm", b"")
        .with_bytes(".hidden.wasm", b"")
        .with_bytes("README.md", b"")
        .set("[services.loop]\ntimeout = 200")
        .start();
    let rows = server.json("/services");
    let rows = rows["services"].as_array().unwrap();
    let mut client = server.connect();
    for (name, problem) in [
        (
            "calculator",
            "says that it is calc 1.0.0, its file that it is calculator",
        ),
        (
            "versions",
            "says that it is versions 1.0.0, its file that it is versions 1.0.1",
        ),
        ("liar", "says that it is honest 1.0.0"),
        ("mute", "describe failed (trap)"),
        ("loop", "describe did not return within 200 ms"),
        ("badversion", "MAJOR.MINOR.PATCH"),
        ("garbage", "not JSON"),
        (
            "wants",
            "imports acme:secrets/vault@1.0.0, which this server does not offer",
        ),
        ("empty", "the file is empty"),
        ("text", "not WebAssembly"),
        ("module", "does not export mb:service/handler@1.0.0"),
        ("component", "does not export mb:service/handler@1.0.0"),
        ("broken", "the file is cut short"),
        ("not a name", "called NAME.wasm or NAME@VERSION.wasm"),
    ] {
        let row = rows
            .iter()
            .find(|row| row["name"] == name)
            .unwrap_or_else(|| panic!("{name} is not in {rows:?}"));
        assert_eq!(row["state"], "failed");
        let error = row["error"].as_str().unwrap();
        assert!(error.contains(problem), "{name}: {error}");
        assert!(
            server.said.contains(problem),
            "{name} is not in {}",
            server.said
        );
        if !name.contains(' ') {
            let answer = client.ask(&format!("{name}.x"), "");
            assert_eq!(answer.code(), "SERVICE_UNAVAILABLE", "{name}");
            assert!(answer.json()["details"]["retryAfterMs"].as_u64().is_some());
        }
    }
    assert_eq!(rows.len(), 15, "{rows:?}");
    assert_eq!(client.ask("echo.say", "1").text(), "1");
    // The name that somebody pretended to have is nobody's.
    assert_eq!(client.ask("honest.x", "").code(), "NO_ROUTE_FOUND");
    assert_eq!(client.ask("calc.add", "").code(), "NO_ROUTE_FOUND");
    let ready = server.json("/readyz");
    assert_eq!(ready["status"], "ready");
    assert_eq!(ready["failedServices"].as_array().unwrap().len(), 14);
}

#[test]
fn two_files_for_one_version_serve_neither_and_name_both() {
    let server = Setup::empty(BINARY)
        .with("services", "echo.wasm")
        .with_as("services", "echo.wasm", "echo@1.0.0.wasm")
        .with("services", "calc.wasm")
        .start();
    let rows = server.json("/services");
    let errors: Vec<_> = rows["services"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|row| row["error"].as_str())
        .collect();
    assert_eq!(errors.len(), 2, "{rows}");
    for error in errors {
        assert!(
            error.contains("echo.wasm") && error.contains("echo@1.0.0.wasm"),
            "{error}"
        );
    }
    let mut client = server.connect();
    assert_eq!(client.ask("echo.say", "1").code(), "SERVICE_UNAVAILABLE");
    assert_eq!(
        client.ask("calc.add", "{\"a\":2,\"b\":40}").text(),
        "{\"sum\":42}"
    );
}

#[test]
fn a_failed_version_does_not_hide_the_others() {
    let server = Setup::empty(BINARY)
        .with("guests", "versions@1.0.0.wasm")
        .with_bytes("versions@1.2.0.wasm", b"cut off")
        .with_bytes("versions@3.0.0.wasm", b"cut off")
        .start();
    let mut client = server.connect();
    assert_eq!(ask_version(&mut client, "1.0.0"), "1.0.0");
    assert_eq!(
        ask_version(&mut client, "1.1.0"),
        "SERVICE_UNAVAILABLE",
        "1.2.0 would have served it"
    );
    assert_eq!(ask_version(&mut client, "3.0.0"), "SERVICE_UNAVAILABLE");
    assert_eq!(ask_version(&mut client, "2.0.0"), "VERSION_NOT_SUPPORTED");
}

#[test]
fn an_empty_folder_is_said() {
    let server = Setup::empty(BINARY).start();
    assert!(
        server.said.contains("put a component into that folder"),
        "{}",
        server.said
    );
    assert_eq!(
        server.connect().ask("system.services", "").text(),
        "{\"services\":[]}"
    );
}
