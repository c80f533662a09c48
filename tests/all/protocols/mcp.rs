//! Actions as tools of the Model Context Protocol. What the official client
//! makes of it, `tests/clients/mcp.py` shows.

use serde_json::{Value, json};

use crate::{
    BINARY,
    protocols::http::{Http, Response, post},
    setup,
    support::admin::stop_calls,
    support::{HOUR, Setup, TestServer, wat},
};

const ON: &str = "[http]\nmcp = true\n";

/// A request with an id, over a connection of its own.
fn ask(server: &TestServer, fields: &str, method: &str, params: &Value) -> Response {
    let body = json!({"jsonrpc": "2.0", "id": "x", "method": method, "params": params});
    Http::connect(server.wire).ask(&post("/mcp", fields, &body.to_string()))
}

fn result(server: &TestServer, method: &str, params: &Value) -> Value {
    let response = ask(server, "", method, params);
    assert_eq!(response.status, 200, "{response:?}");
    let body = response.json();
    assert_eq!(body["id"], "x", "{body}");
    body["result"].clone()
}

fn names(server: &TestServer) -> Vec<String> {
    let tools = result(server, "tools/list", &json!({}));
    let tools = tools["tools"].as_array().unwrap().iter();
    tools
        .map(|tool| tool["name"].as_str().unwrap().to_owned())
        .collect()
}

/// What a failed tool says, the ERROR object.
fn failure(result: &Value) -> Value {
    assert_eq!(result["isError"], true, "{result}");
    let text = result["content"][0]["text"].as_str().unwrap();
    serde_json::from_str(text).unwrap()
}

/// A service whose action takes objects.
fn service(name: &str, action: &str) -> Vec<u8> {
    let input = r#"{"type":"object"}"#;
    let describe = format!(
        r#"{{"name":"{name}","version":"1.0.0","actions":[{{"name":"{action}","input":{input}}}]}}"#
    );
    wat::guest_that_says(&describe, "", "")
}

#[test]
fn tools_are_listed_and_called_over_one_connection() {
    let server = setup().set(ON).start();
    let mut peer = Http::connect(server.wire);
    let initialize = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{}}"#;
    let answer = peer.ask(&post("/mcp", "", initialize));
    let version = &answer.json()["result"]["protocolVersion"];
    assert_eq!((answer.status, version), (200, &json!("2025-11-25")));
    let notification = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    let answer = peer.ask(&post("/mcp", "", notification));
    assert_eq!((answer.status, &*answer.body), (202, &b""[..]));
    // The arguments first; further requests lie in the same buffer.
    let call = |id: u32| {
        let body = format!(
            r#"{{"params":{{"arguments":{{"a":{id},"b":1}},"name":"calc_add"}},"id":{id},"method":"tools/call","jsonrpc":"2.0"}}"#
        );
        post("/mcp", "Request-Id: mine\r\n", &body)
    };
    let many: String = (1..=20).map(call).collect();
    peer.send(many.as_bytes());
    for id in 1..=20 {
        let answer = peer.response();
        assert_eq!(answer.field("Request-Id"), Some("mine"));
        assert_eq!(answer.field("Service-Version"), Some("1.0.0"));
        let body = answer.json();
        assert_eq!(body["id"], id);
        let result = &body["result"];
        let sum = json!({"sum": id + 1});
        assert_eq!(
            (&result["isError"], &result["structuredContent"]),
            (&json!(false), &sum)
        );
        assert_eq!(result["content"][0]["text"], sum.to_string());
    }
    let row = server.json("/connections")["connections"][0].clone();
    assert_eq!(
        (&row["messagesIn"], &row["messagesOut"]),
        (&json!(22), &json!(22))
    );
    // What has no schema of objects is no tool.
    assert_eq!(names(&server), ["calc_add", "calc_divide", "hostile_spin"]);
    let call = |params: Value| result(&server, "tools/call", &params);
    let failed = failure(&call(json!({"name": "calc_add"})));
    assert_eq!(failed["origin"], "service", "{failed}");
    let zero = json!({"name": "calc_divide", "arguments": {"a": 1, "b": 0}});
    assert_eq!(failure(&call(zero))["code"], "DIVISION_BY_ZERO");
    for name in ["calc_nothing", "echo_say", "system_ping", "calc.add", ""] {
        let answer = ask(&server, "", "tools/call", &json!({"name": name}));
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (200, &json!(-32602))
        );
    }
}

#[test]
fn requests_may_stand_alone() {
    let server = setup().set(ON).start();
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let fields = |method: &str, name: &str| {
        format!("MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: {method}\r\nMcp-Name: {name}\r\n")
    };
    let params = json!({"_meta": meta, "name": "calc_add", "arguments": {"a": 2, "b": 40}});
    let call = |fields: &str| ask(&server, fields, "tools/call", &params);
    let answer = call(&fields("tools/call", "calc_add"));
    let result = &answer.json()["result"];
    assert_eq!(
        (answer.status, &result["resultType"]),
        (200, &json!("complete"))
    );
    assert_eq!(result["structuredContent"]["sum"], 42);
    let answer = call(&fields("tools/call", "calc_divide"));
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (400, &json!(-32020))
    );
    let answer = ask(&server, &fields("ping", "-"), "ping", &params);
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (404, &json!(-32601))
    );
}

#[test]
fn it_is_off_by_default_and_keeps_the_rules_of_http() {
    let server = setup().start();
    let ping = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    let get = "GET /mcp HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for request in [&*post("/mcp", "", ping), get] {
        let answer = Http::connect(server.wire).ask(request);
        assert_eq!((answer.status, &*answer.code()), (404, "NO_ROUTE_FOUND"));
    }
    drop(server);
    let server = setup().set(ON).start();
    let ask = |request: &str| Http::connect(server.wire).ask(request);
    for method in ["GET", "DELETE", "HEAD", "PUT", "OPTIONS"] {
        let request =
            format!("{method} /mcp HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut peer = Http::connect(server.wire);
        let answer = peer.send(request.as_bytes()).head();
        assert_eq!(
            (answer.status, answer.field("Allow")),
            (405, Some("POST")),
            "{method}"
        );
    }
    for (request, status) in [
        (post("/mcp", "", ping), 200),
        (
            post("/mcp", "", ping).replace("application/json", "application/octet-stream"),
            415,
        ),
        (
            post("/mcp", "", ping).replace("application/json", "text/plain"),
            415,
        ),
        (
            post("/mcp", "", ping).replace("localhost", "evil.example"),
            421,
        ),
        (post("/mcp", "Origin: https://evil.example\r\n", ping), 403),
        (
            post("/mcp", "Mcp-Method: a\r\nMcp-Method: a\r\n", ping),
            400,
        ),
        (post("/mcp", "MCP-Protocol-Version: 1\r\n", ping), 400),
        (post("/mcp", "", &"x".repeat(2 << 20)), 413),
        (post("/mcp", "", "{"), 400),
        (post("/mcp", "", ""), 400),
        (post("/mcp", "", &format!("[{ping}]")), 400),
    ] {
        let mut peer = Http::connect(server.wire);
        // The server may refuse before it has read everything.
        let sent = request.len().min(100_000);
        let answer = peer.send(&request.as_bytes()[..sent]).response();
        assert_eq!(answer.status, status, "{answer:?}");
    }
    assert_eq!(ask(&post("/mcp", "", "{")).json()["error"]["code"], -32700);
    // The topic that stands for it is nobody's else.
    let answer = ask(&post("/call/system.mcp", "", ping));
    assert_eq!(
        (answer.status, &*answer.code()),
        (404, "TOPIC_NOT_SUPPORTED")
    );
}

#[test]
fn a_tool_that_loops_ends_with_its_deadline_or_when_it_is_stopped() {
    let server = setup().set("default_timeout = 1000").set(ON).start();
    let params = json!({"name": "hostile_spin", "arguments": {}});
    let failed = failure(&result(&server, "tools/call", &params));
    assert_eq!(failed["code"], "TIMEOUT", "{failed}");
    let body = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params});
    let mut peer = Http::connect(server.wire);
    let fields = format!("Request-Timeout: {HOUR}\r\nRequest-Id: long\r\n");
    peer.send(post("/mcp", &fields, &body.to_string()).as_bytes());
    let row = |server: &TestServer| server.json("/calls")["calls"][0].clone();
    server.until("listed", |server| row(server)["requestId"] == "long");
    assert_eq!(row(&server)["topic"], "hostile.spin", "{}", row(&server));
    stop_calls(&server);
    let answer = peer.response();
    let failed = failure(&answer.json()["result"]);
    assert_eq!(
        (answer.status, &failed["code"]),
        (200, &json!("SERVICE_FAILED"))
    );
    assert_eq!(failed["details"]["reason"], "killed");
}

#[test]
fn rights_and_rates_are_the_same() {
    let server = setup()
        .set("auth = \"optional\"")
        .set(ON)
        .set("[principals.anonymous]\nrights = [\"calc.add\", \"calc.divide@1\"]\nrate = 3")
        .start();
    assert_eq!(names(&server), ["calc_add"]);
    let divide = json!({"name": "calc_divide", "arguments": {"a": 1, "b": 1}});
    let answer = ask(&server, "", "tools/call", &divide);
    assert_eq!(answer.json()["error"]["code"], -32602);
    let audit = server.json("/log?target=audit&contains=forbidden");
    let lines = audit["lines"].as_array().unwrap();
    assert_eq!(lines.len(), 1, "{audit}");
    assert!(lines[0].to_string().contains("calc.divide"), "{audit}");
    let add = json!({"name": "calc_add", "arguments": {"a": 1, "b": 1}});
    let limited = (0..100).find_map(|_| {
        let answer = ask(&server, "", "tools/call", &add).json();
        let failed = answer["result"]["isError"] == true;
        failed.then(|| failure(&answer["result"]))
    });
    assert_eq!(limited.unwrap()["code"], "RATE_LIMITED");
    let refused = (0..100).map(|_| ask(&server, "", "ping", &json!({})));
    let refused = refused
        .into_iter()
        .find(|answer| answer.status != 200)
        .unwrap();
    assert_eq!((refused.status, &*refused.code()), (429, "RATE_LIMITED"));
}

#[test]
fn names_that_would_be_equal_are_not_listed() {
    let server = Setup::empty(BINARY)
        .with("services", "calc.wasm")
        .with_bytes("a.wasm", &service("a", "b_c"))
        .with_bytes("a_b.wasm", &service("a_b", "c.d"))
        .with_bytes("a_b_c.wasm", &service("a_b_c", "d"))
        .set(ON)
        .start();
    assert_eq!(names(&server), ["a_b_c", "calc_add", "calc_divide"]);
    let line = server.wait_for_log("a_b.c.d, a_b_c.d");
    assert!(line.contains("WARN"), "{line}");
    let answer = ask(&server, "", "tools/call", &json!({"name": "a_b_c_d"}));
    assert_eq!(answer.json()["error"]["code"], -32602);
    let called = result(&server, "tools/call", &json!({"name": "a_b_c"}));
    assert_eq!(called["content"][0]["text"], "null", "{called}");
}
