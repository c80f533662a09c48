//! What someone who writes a service does first, wrong turns included.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::json;

use crate::{
    BINARY,
    support::{Setup, component, wat},
};

/// Exit code, standard output and standard error.
fn run(arguments: &[&str], dir: &Path) -> (Option<i32>, String, String) {
    run_with(Command::new(BINARY).args(arguments).current_dir(dir))
}

fn run_with(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    (
        status.code(),
        String::from_utf8_lossy(&stdout).into(),
        String::from_utf8_lossy(&stderr).into(),
    )
}

#[test]
fn new_projects() {
    let dir = tempfile::tempdir().unwrap();
    for (language, file) in [
        ("rust", "src/lib.rs"),
        ("js", "service.js"),
        ("ts", "service.ts"),
        ("python", "app.py"),
    ] {
        let (code, said, error) = run(
            &["new", "my-service", "--lang", language, "--dir", language],
            dir.path(),
        );
        assert_eq!(code, Some(0), "{error}");
        assert!(
            said.contains(&format!("mb-server dev {language}"))
                && said.contains("my-service.greet"),
            "{said}"
        );
        assert!(dir.path().join(language).join(file).is_file());
        let (code, _, error) = run(
            &["new", "my-service", "--lang", language, "--dir", language],
            dir.path(),
        );
        assert_eq!(code, Some(2));
        assert!(
            error.contains("exists already; nothing was written"),
            "{error}"
        );
    }
    let wrong = |arguments: &[&str], part: &str| {
        let (code, _, error) = run(arguments, dir.path());
        assert_eq!(code, Some(2), "{arguments:?}: {error}");
        assert!(error.contains(part), "{arguments:?}: {error}");
    };
    wrong(&["new", "Hello", "--lang", "rust"], "lower-case letter");
    wrong(&["new", "system", "--lang", "rust"], "keeps for itself");
    wrong(&["new", "../up", "--lang", "rust"], "lower-case letter");
    wrong(
        &["new", "hello", "--lang", "cobol"],
        "[possible values: rust, js, ts, python]",
    );
    wrong(&["new", "hello"], "--lang <LANG>");
    wrong(
        &["build", "."],
        "mb-server new NAME --lang rust|js|ts|python",
    );
    wrong(
        &["dev", "nowhere"],
        "none of Cargo.toml, package.json, pyproject.toml is there",
    );
    wrong(&["wit", "--dir", "rust"], "exists already");
    assert!(!dir.path().join("Hello").exists());
}

#[test]
fn a_tool_that_is_missing_is_named_with_how_to_get_it() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    for (language, part) in [
        ("js", "install Node.js 20 or newer with npm"),
        ("python", "install Python 3.10 or newer"),
    ] {
        assert_eq!(
            run(
                &["new", "hello", "--lang", language, "--dir", language],
                dir.path()
            )
            .0,
            Some(0)
        );
        let mut command = Command::new(BINARY);
        let (code, _, error) = run_with(
            command
                .args(["build", language])
                .current_dir(dir.path())
                .env("PATH", &empty),
        );
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn the_contract_is_printed_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let (code, said, _) = run(&["wit"], dir.path());
    assert_eq!(
        (code, said.contains("package mb:service@1.1.0;")),
        (Some(0), true)
    );
    assert_eq!(run(&["wit", "--dir", "wit"], dir.path()).0, Some(0));
    let written = fs::read_to_string(dir.path().join("wit/service.wit")).unwrap();
    assert_eq!(written.trim(), said.trim());
    assert!(dir.path().join("wit/deps/keyvalue/keyvalue.wit").is_file());
}

#[test]
fn inspect_prints_what_a_component_takes_and_needs() {
    let (code, said, error) = run(
        &[
            "inspect",
            &component("services", "granted/order.wasm")
                .display()
                .to_string(),
        ],
        Path::new("."),
    );
    assert_eq!(code, Some(0), "{error}");
    for part in [
        "name         order",
        "mb:service/calls@1.1.0  needs the grant calls = [\"service.action\"]",
        "wasi:config/store@0.2.0-rc.1  needs the grant config = { … }",
        "KiB when an instance begins",
        " code, ",
        "compiled     to ",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Compiled once, and kept.
    let cache = tempfile::tempdir().unwrap();
    for part in [" ms; cached for the next start", ", taken from the cache"] {
        let (_, said, _) = run_with(
            Command::new(BINARY)
                .arg("inspect")
                .arg(component("services", "calc.wasm"))
                .env("XDG_CACHE_HOME", cache.path()),
        );
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(
        !said.contains("logging/logging@0.1.0-draft  needs"),
        "{said}"
    );
    let (_, said, _) = run(
        &[
            "inspect",
            &component("services", "calc.wasm").display().to_string(),
        ],
        Path::new("."),
    );
    assert!(
        said.contains("takes {") && said.contains("\"required\":[\"a\",\"b\"]"),
        "{said}"
    );
}

#[test]
fn inspect_prints_what_would_break_callers() {
    let versions = |version: &str| {
        component("guests", &format!("versions@{version}.wasm"))
            .display()
            .to_string()
    };
    let against = |new: &str, old: &str| run(&["inspect", new, "--against", old], Path::new("."));
    let (code, said, _) = against(&versions("1.2.0"), &versions("1.0.0"));
    assert_eq!(
        (code, said.contains("nothing breaks its callers")),
        (Some(0), true),
        "{said}"
    );
    // The name is another one, and every action with it.
    let other = component("guests", "marker-a.wasm").display().to_string();
    let (code, said, error) = against(&other, &versions("1.0.0"));
    assert_eq!(code, Some(1));
    assert!(
        said.contains("the action which is gone") && error.contains("call it 2.0.0"),
        "{said} {error}"
    );
    let (code, said, _) = against(&versions("2.0.0"), &other);
    assert_eq!(
        (code, said.contains("its version says so")),
        (Some(0), true),
        "{said}"
    );
}

/// What the log, `/readyz` and `inspect` say of a file that can't be served.
#[test]
fn a_file_that_is_no_service_is_explained_alike_everywhere() {
    let described = |document: &str| wat::guest_that_says(document, "", "");
    let parsed = |text: &str| ::wat::parse_str(text).unwrap();
    let cases: [(&str, Vec<u8>, &str); 12] = [
        (
            "empty",
            Vec::new(),
            "the file is empty; was it copied to its end?",
        ),
        ("text", b"hello".to_vec(), "not WebAssembly"),
        (
            "plain",
            parsed(r#"(module (import "env" "f" (func)))"#),
            "a core module that can't be turned into a component",
        ),
        (
            "preview1",
            parsed(
                r#"(module (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32))))"#,
            ),
            "a core module that can't be turned into a component",
        ),
        (
            "bare",
            parsed("(component)"),
            "does not export mb:service/handler@1.0.0",
        ),
        (
            "http",
            parsed(r#"(component (import "wasi:http/types@0.2.0" (instance)))"#),
            "wasi:http/types@0.2.0, which this server does not offer",
        ),
        (
            "Capital",
            described(r#"{"name":"capital","version":"1.0.0","actions":[{"name":"x"}]}"#),
            "call the file capital.wasm",
        ),
        (
            "short",
            described(r#"{"name":"short","version":"1.0","actions":[{"name":"x"}]}"#),
            "MAJOR.MINOR.PATCH",
        ),
        (
            "none",
            described(r#"{"name":"none","version":"1.0.0","actions":[]}"#),
            "0 actions, allowed is 1 to 256",
        ),
        (
            "dots",
            described(r#"{"name":"a.b","version":"1.0.0","actions":[{"name":"x"}]}"#),
            "must be a letter, then letters",
        ),
        (
            "nojson",
            described("{name: nojson}"),
            "what describe returns does not follow its schema",
        ),
        (
            "typo",
            described(r#"{"name":"typo","version":"1.0.0","action":[{"name":"x"}]}"#),
            "missing field `actions`",
        ),
    ];
    let mut setup = Setup::empty(BINARY);
    for (name, bytes, _) in &cases {
        setup = setup.with_bytes(&format!("{name}.wasm"), bytes);
    }
    let services = setup.services();
    let server = setup.start();
    let failed = server.json("/readyz")["failedServices"].clone();
    for (name, _, part) in cases {
        let row = failed
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name);
        let error = row.unwrap_or_else(|| panic!("{name}: {failed}"))["error"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(error.contains(part), "{name}: {error}");
        assert!(server.said.contains(part), "{name}: {}", server.said);
        let file = services.join(format!("{name}.wasm")).display().to_string();
        let (code, _, error) = run(&["inspect", &file], Path::new("."));
        assert_eq!(code, Some(1), "{name}");
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn payloads_are_held_against_schemas_where_the_operator_says_so() {
    let server = Setup::new(BINARY)
        .set("[services.calc]\nvalidate = true")
        .start();
    let mut client = server.connect();
    assert_eq!(
        client.ask("calc.add", r#"{"a":2,"b":40}"#).json(),
        json!({"sum": 42})
    );
    let refused = client.ask("calc.add", r#"{"a":2,"b":"secret"}"#).json();
    assert_eq!(
        (&refused["code"], &refused["details"]["path"]),
        (&json!("INVALID_PAYLOAD"), &json!("/b")),
        "{refused}"
    );
    let message = refused["message"].as_str().unwrap();
    assert!(
        message.contains("payload at /b") && !message.contains("secret"),
        "{message}"
    );
    assert_eq!(client.ask("calc.add", "[]").code(), "INVALID_PAYLOAD");
    assert_eq!(
        client.ask("echo.say", "[]").text(),
        "[]",
        "it has no schema"
    );
}
