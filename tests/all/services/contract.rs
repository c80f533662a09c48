//! The promise to those who compiled a service long ago: what was built
//! against an earlier contract goes on to load and to answer. The components
//! in `tests/fixtures/VERSION` are never built again.

use std::{fs, path::Path};

use serde_json::json;

use crate::{
    BINARY,
    support::{self, Setup, frame},
};

const GRANTS: &str = r#"
[services.counter.grants]
keyvalue = true
[services.checksum.grants]
keyvalue = true
config = { remember = "true" }
[services.order.grants]
calls = ["calc.add", "counter.add"]
config = { currency = "EUR" }
"#;

#[test]
fn services_of_contract_1_0_0_are_served() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/1.0.0");
    let setup = Setup::empty(BINARY).set(GRANTS);
    for service in ["calc", "counter", "order", "checksum"] {
        let file = format!("{service}.wasm");
        fs::copy(fixtures.join(&file), setup.services().join(&file)).unwrap();
    }
    let server = setup.start();
    assert_eq!(server.json("/readyz")["failedServices"], json!([]));
    let mut client = server.connect();
    let order = r#"{"customer":"Ada","items":[{"name":"tea","price":250,"quantity":3}]}"#;
    assert_eq!(
        client.ask("order.create", order).json(),
        json!({"number": 1, "total": 750, "currency": "EUR"})
    );
    server.wait_for_log("order 1 of Ada");
    assert_eq!(
        client.ask("counter.get", "{\"name\":\"orders\"}").json(),
        json!({"value": 1})
    );
    assert_eq!(
        client.ask("calc.divide", "{\"a\":1,\"b\":0}").code(),
        "DIVISION_BY_ZERO"
    );
    client.send(&frame(support::BINARY, b"REQUEST:checksum.of:1.0.0:7\nabc"));
    assert_eq!(client.message().json()["crc32"], "352441c2");
}
