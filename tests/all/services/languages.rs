//! Services in other languages, in the real server: each answers, fails with
//! its own code, logs, reads its configuration, keeps values, and is refused
//! where it is not granted what it imports.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    BINARY,
    support::{self, Setup, absent, component, frame},
};

const GRANTS: &str = r#"
log = "info,mb_server::service=trace"
[services.slug.grants]
keyvalue = true
config = { longest = "12" }
[services.stats.grants]
keyvalue = true
config = { parts = "2" }
[services.checksum.grants]
keyvalue = true
config = { remember = "true" }
"#;

/// A component that is built, not committed: `services/build --heavy
/// services/heavy` makes it. None where it is not there, and need not be.
fn heavy(file: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("services/heavy")
        .join(file);
    match fs::metadata(&path) {
        Ok(_) => Some(path),
        Err(error) => {
            absent(&path.display().to_string(), &error);
            None
        }
    }
}

fn deploy(setup: Setup, file: PathBuf, name: &str) -> Setup {
    fs::copy(file, setup.services().join(name)).unwrap();
    setup
}

/// What the operator reads of a service that gets nothing.
fn denied(file: PathBuf, name: &str) {
    let server = deploy(Setup::empty(BINARY), file, &format!("{name}.wasm")).start();
    let failed = server.json("/readyz")["failedServices"][0].clone();
    let error = failed["error"].as_str().unwrap();
    // Of several, the first import in the order of the component's tools.
    let is_way_out = ["config = { … } or secrets = { … }", "keyvalue = true"]
        .map(|grant| {
            format!(
                "which is not granted; if you trust it, set {grant} under [services.{name}.grants]"
            )
        })
        .iter()
        .any(|way_out| error.contains(way_out));
    assert!(is_way_out, "{error}");
}

#[test]
fn c() {
    let file = component("services", "granted/checksum.wasm");
    denied(file.clone(), "checksum");
    let server = deploy(Setup::empty(BINARY), file, "checksum.wasm")
        .set(GRANTS)
        .start();
    let mut client = server.connect();
    let mut ask = |bytes: &[u8]| -> Value {
        let body = [b"REQUEST:checksum.of:1.0.0:7\n", bytes].concat();
        client.send(&frame(support::BINARY, &body));
        client.message().json()
    };
    let sum = "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225";
    assert_eq!(
        ask(b"123456789"),
        json!({"bytes": 9, "crc32": "cbf43926", "sha256": sum, "seen": false})
    );
    assert_eq!(ask(b"123456789")["seen"], true);
    assert_eq!(ask(b"")["crc32"], "00000000");
    assert_eq!(client.ask("checksum.of", "{}").code(), "NOT_BINARY");
    assert!(
        server
            .wait_for_log("9 bytes, seen before")
            .contains("service=\"checksum\"")
    );
}

#[test]
fn javascript() {
    let Some(file) = heavy("slug.wasm") else {
        return;
    };
    denied(file.clone(), "slug");
    let server = deploy(Setup::empty(BINARY), file, "slug.wasm")
        .set(GRANTS)
        .start();
    let mut client = server.connect();
    assert_eq!(
        client
            .ask("slug.make", r#"{"text":"Crème Brûlée, twice"}"#)
            .json(),
        json!({"slug": "creme-brulee"})
    );
    assert_eq!(
        client.ask("slug.unique", r#"{"text":"A b"}"#).json(),
        json!({"slug": "a-b"})
    );
    assert_eq!(
        client.ask("slug.unique", r#"{"text":"A b"}"#).json(),
        json!({"slug": "a-b-2"})
    );
    assert_eq!(
        client.ask("slug.make", r#"{"text":"…"}"#).code(),
        "NOTHING_LEFT"
    );
    assert_eq!(client.ask("slug.make", "1").code(), "INVALID_ARGUMENTS");
    assert!(
        server
            .wait_for_log("gave out a-b-2")
            .contains("service=\"slug\"")
    );
}

#[test]
fn python() {
    let Some(file) = heavy("stats.wasm") else {
        return;
    };
    denied(file.clone(), "stats");
    let server = deploy(Setup::empty(BINARY), file, "stats.wasm")
        .set(GRANTS)
        .start();
    let mut client = server.connect();
    let of = |values: Value| json!({ "values": values }).to_string();
    let expected =
        json!({"count": 4, "mean": 2.5, "median": 2.5, "quantiles": [2.5], "least": 1, "most": 4});
    assert_eq!(
        client.ask("stats.of", &of(json!([4, 1, 3, 2]))).json(),
        expected
    );
    let add = |values: Value| json!({"series": "a", "values": values}).to_string();
    assert_eq!(
        client.ask("stats.add", &add(json!([1, 2]))).json()["count"],
        2
    );
    assert_eq!(
        client.ask("stats.add", &add(json!([3]))).json()["mean"],
        2.0
    );
    assert_eq!(client.ask("stats.of", &of(json!([]))).code(), "EMPTY");
    assert_eq!(client.ask("stats.of", "{}").code(), "INVALID_ARGUMENTS");
    assert!(
        server
            .wait_for_log("a has 3 values")
            .contains("service=\"stats\"")
    );
}
