//! The OpenAPI document of the services. What validators and fuzzers make of
//! it, `tests/clients/openapi.py` shows.

use serde_json::{Value, json};

use crate::{
    protocols::http::{Http, post},
    setup, start,
    support::{TestServer, wat},
};

const GET: &str = "GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn document(server: &TestServer) -> Value {
    let answer = Http::connect(server.wire).ask(GET);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.field("Content-Type"), Some("application/json"));
    answer.json()
}

fn paths(document: &Value) -> Vec<&str> {
    let paths = document["paths"].as_object().unwrap();
    paths.keys().map(String::as_str).collect()
}

#[test]
fn each_action_has_a_path_with_its_schemas() {
    let server = start();
    let open = document(&server);
    let paths = paths(&open);
    assert!(paths.contains(&"/call/calc.add") && paths.contains(&"/call/echo.say"));
    let own = server.json("/services/calc")["versions"][0]["actions"].clone();
    let add = own
        .as_array()
        .unwrap()
        .iter()
        .find(|action| action["name"] == "add");
    let schemas = &open["components"]["schemas"];
    assert_eq!(schemas["calc.add.input"], add.unwrap()["input"]);
    assert_eq!(schemas["calc.add.output"], add.unwrap()["output"]);
    assert_eq!(open["security"][0], json!({}));
    let head = GET.replace("GET", "HEAD");
    let head = Http::connect(server.wire).send(head.as_bytes()).head();
    let whole = Http::connect(server.wire).ask(GET);
    assert_eq!(head.field("Content-Length"), whole.field("Content-Length"));
    let answer = Http::connect(server.wire).ask(&post("/openapi.json", "", "1"));
    assert_eq!(
        (answer.status, answer.field("Allow")),
        (405, Some("GET, HEAD"))
    );
    let answer = Http::connect(server.wire).ask(&post("/call/system.openapi", "", "1"));
    assert_eq!(
        (answer.status, &*answer.code()),
        (404, "TOPIC_NOT_SUPPORTED")
    );
}

#[test]
fn it_has_what_the_caller_may_call_in_the_way_that_it_may() {
    let versions = [
        "versions@1.0.0.wasm",
        "versions@1.2.0.wasm",
        "versions@2.0.0.wasm",
    ];
    let rights = "[\"calc.add\", \"calc.divide@0\", \"versions.which@1\"]";
    let server = versions
        .into_iter()
        .fold(setup(), |setup, file| setup.with("guests", file))
        .set("auth = \"optional\"")
        .set(&format!("[principals.anonymous]\nrights = {rights}"))
        .start();
    let open = document(&server);
    assert_eq!(
        paths(&open),
        ["/call/calc.add", "/call/versions.which@1.2.0"]
    );
    for (path, status) in [
        ("/call/calc.add", 422),
        ("/call/versions.which@1.2.0", 200),
        ("/call/versions.which", 403),
        ("/call/echo.say", 403),
        // A right to 0.x is none to whatever is the highest.
        ("/call/calc.divide", 403),
    ] {
        let answer = Http::connect(server.wire).ask(&post(path, "", "null"));
        assert_eq!(answer.status, status, "{path}: {answer:?}");
    }
}

#[test]
fn references_of_schemas_lead_somewhere() {
    let describe = r##"{"name":"shop","version":"1.0.0","actions":[
        {"name":"order","input":{"$ref":"#/$defs/Order","$defs":{
            "Order":{"type":"object","properties":{"items":{"items":{"$ref":"#/$defs/Item"}}}},
            "Item":{"type":"string"}}}},
        {"name":"broken","input":{"$ref":"#/$defs/none"}}]}"##;
    let guest = wat::guest_that_says(describe, "", "");
    let server = setup().with_bytes("shop.wasm", &guest).start();
    let open = document(&server);
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str));
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    references(&open, &mut found);
    assert!(found.contains(&"#/components/schemas/shop.order.input/$defs/Item"));
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(open.pointer(pointer).is_some(), "{reference}");
    }
    assert_eq!(open["components"]["schemas"].get("shop.broken.input"), None);
}
