//! What the operator sees.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    BINARY, setup, start,
    support::{
        HOUR, PATIENCE, TestServer,
        admin::{change, request, stop_calls},
        http,
        pki::Pki,
    },
};

/// The routes, as the server itself lists them: method and path.
fn routes(server: &TestServer) -> Vec<(String, String)> {
    let document = server.json("/openapi.json");
    let paths = document["paths"].as_object().unwrap();
    let methods = |(path, methods): (&String, &Value)| -> Vec<_> {
        methods
            .as_object()
            .unwrap()
            .keys()
            .map(|method| (method.to_uppercase(), path.clone()))
            .collect()
    };
    paths.iter().flat_map(methods).collect()
}

#[test]
fn no_route_is_open_without_the_token() {
    let server = setup().set("[admin]\ndeploy = true").start();
    let all = routes(&server);
    assert!(all.len() > 20, "{all:?}");
    for (method, path) in &all {
        let path = path.replace("{id}", "1").replace("{name}", "calc");
        let probe = ["/healthz", "/readyz"].contains(&&*path);
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:9090",
        ] {
            let text = format!(
                "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            );
            assert_eq!(
                http(server.admin, &text).0,
                if probe { 200 } else { 403 },
                "{method} {path} for {host}"
            );
        }
        if method != "GET" {
            // As a page of somebody else would send it, and with wrong tokens.
            for headers in [
                "Origin: http://evil.example\r\nContent-Type: text/plain\r\n",
                "Authorization: Bearer wrong\r\n",
                "Authorization: Basic eDp5\r\n",
                "Cookie: token=x\r\n",
            ] {
                assert_eq!(
                    request(&server, method, &path, headers, "").0,
                    401,
                    "{method} {path} {headers}"
                );
            }
        }
        assert!(
            !server
                .get(&format!("{path}?no=1"))
                .1
                .contains("Access-Control"),
            "{path}"
        );
    }
}

#[test]
fn a_running_call_is_seen_and_stopped() {
    let server = start();
    let mut client = server.connect();
    client.request_within("hostile.spin", "the-call", HOUR, "");
    server.until("the call is listed", |server| {
        server.json("/calls")["calls"][0]["requestId"] == "the-call"
    });
    let call = server.json("/calls")["calls"][0].clone();
    assert_eq!(
        (&call["topic"], &call["state"], &call["killed"]),
        (&json!("hostile.spin"), &json!("running"), &json!(false))
    );
    let id = call["connection"].as_str().unwrap();
    let connection = server.json(&format!("/connections/{id}"));
    assert_eq!(
        (
            &connection["connection"]["inFlight"],
            &connection["calls"][0]["id"]
        ),
        (&json!(1), &call["id"])
    );
    assert_eq!(
        change(&server, "DELETE", &format!("/calls/{}", call["id"]), "").0,
        200
    );
    let refused = client.message().json();
    assert_eq!(
        (&refused["code"], &refused["details"]["reason"]),
        (&json!("SERVICE_FAILED"), &json!("killed")),
        "{refused}"
    );
    assert_eq!(
        change(&server, "DELETE", &format!("/calls/{}", call["id"]), "").0,
        404
    );
    assert_eq!(server.json("/calls")["calls"], json!([]));
    let past = server.json("/calls/past?requestId=the-call")["calls"][0].clone();
    assert_eq!(
        (&past["outcome"], &past["details"]["reason"]),
        (&json!("SERVICE_FAILED"), &json!("killed")),
        "{past}"
    );
    let found = server.json("/log?contains=the-call");
    assert_eq!(
        found["lines"][0]["fields"]["request_id"], "the-call",
        "{found}"
    );

    let why = Command::new(BINARY)
        .args(["why", "the-call", "--admin", &server.admin.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&why.stdout);
    assert!(
        why.status.success()
            && said.contains("SERVICE_FAILED")
            && said.contains("killed")
            && said.contains("hostile"),
        "{said}"
    );
    let none = Command::new(BINARY)
        .args(["why", "nothing", "--admin", &server.admin.to_string()])
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(1));
    let status = Command::new(BINARY)
        .args(["status", "--admin", &server.admin.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&status.stdout);
    assert!(
        status.status.success() && said.contains("ready") && said.contains("calc 1.0.0"),
        "{said}"
    );
}

#[test]
fn refusals_hide_no_change_in_the_audit_trail() {
    let server = setup().set("log = \"error\"").start();
    // Ten within a second are logged, and this takes as long as it takes.
    const REFUSALS: usize = 150;
    for _ in 0..REFUSALS {
        let headers = "Authorization: Bearer wrong\r\n";
        let (status, _) = request(&server, "POST", "/services/reload", headers, "");
        assert_eq!(status, 401);
    }
    let (status, _) = change(&server, "POST", "/services/calc/disable", "");
    assert_eq!(status, 200);
    let (status, _) = change(&server, "POST", "/services/nobody/enable", "");
    assert_eq!(status, 409);
    let (status, _) = change(
        &server,
        "POST",
        "/services/echo/try",
        "{\"action\":\"say\",\"payload\":\"secret\"}",
    );
    assert_eq!(status, 200);
    let lines = server.json("/log?target=audit");
    let lines = lines["lines"].as_array().unwrap();
    let of = |kind: &str| -> Vec<_> {
        let fits = |line: &&Value| line["fields"]["security"] == kind;
        lines.iter().filter(fits).collect()
    };
    let changes = of("change");
    let shown: Vec<_> = changes
        .iter()
        .map(|line| {
            let fields = &line["fields"];
            let peer = fields["peer"].as_str().unwrap();
            assert!(peer.starts_with("127.0.0.1:"), "{line}");
            (
                fields["path"].as_str().unwrap(),
                fields["status"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("/services/calc/disable", "200"),
            ("/services/nobody/enable", "409"),
            ("/services/echo/try", "200")
        ]
    );
    let said = changes[0]["message"].as_str().unwrap();
    assert!(said.contains("calc is disabled"), "{said}");
    assert!(!changes[2].to_string().contains("secret"), "{}", changes[2]);
    let refused = of("admin-token").len();
    assert!((10..REFUSALS).contains(&refused), "{refused}");
    // On standard error too, whatever the level.
    let line = server.wait_for_log("security=\"change\"");
    assert!(line.contains("audit: by the operator"), "{line}");
}

#[test]
fn quick_failures_are_kept_and_quick_answers_are_not() {
    let server = start();
    let mut client = server.connect();
    let mut ask = |topic: &str, id: &str, payload: &str| {
        client.request(topic, id, payload);
        client.message();
    };
    ask("calc.divide", "divided", "{\"a\":1,\"b\":0}");
    ask("nobody.here", "no-route", "1");
    ask("calc.nothing", "no-action", "1");
    ask("calc.add", "no-json", "{");
    // Many failures of one kind displace none of another.
    for index in 0..100 {
        ask("nobody.here", &format!("again-{index}"), "1");
    }
    // The machine may make a slow one of some of them.
    let went_well: Vec<_> = (0..100).map(|index| format!("went-well-{index}")).collect();
    for id in &went_well {
        ask("calc.add", id, "{\"a\":1,\"b\":2}");
    }
    let kept = |id: &str| {
        let mut past = server.json(&format!("/calls/past?requestId={id}"));
        past["calls"].as_array_mut().unwrap().pop()
    };
    for (id, outcome, version) in [
        ("divided", "DIVISION_BY_ZERO", json!("1.0.0")),
        ("no-action", "TOPIC_NOT_SUPPORTED", json!("1.0.0")),
        ("no-json", "INVALID_PAYLOAD", Value::Null),
        ("again-99", "NO_ROUTE_FOUND", Value::Null),
    ] {
        let call = kept(id).unwrap_or_else(|| panic!("{id} is kept"));
        assert_eq!(
            (&call["outcome"], &call["version"]),
            (&json!(outcome), &version)
        );
    }
    assert!(kept("no-route").is_none());
    let quick = went_well.iter().find(|id| kept(id).is_none()).unwrap();
    let why = |id: &str| {
        let admin = server.admin.to_string();
        let done = Command::new(BINARY)
            .args(["why", id, "--admin", &admin])
            .output()
            .unwrap();
        let said = [done.stdout, done.stderr].concat();
        (
            done.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    let (status, said) = why("divided");
    assert!(
        status == Some(0) && said.contains("DIVISION_BY_ZERO") && said.contains("calc 1.0.0"),
        "{said}"
    );
    let (status, said) = why("again-99");
    assert!(
        status == Some(0) && said.contains("NO_ROUTE_FOUND") && !said.contains("served by"),
        "{said}"
    );
    let (status, said) = why(quick);
    assert!(
        status == Some(1) && said.contains("answered within 10 ms"),
        "{said}"
    );
}

#[test]
fn a_connection_is_closed_in_order() {
    let server = start();
    let (mut idle, mut busy) = (server.connect(), server.connect());
    assert_eq!(idle.ask("echo.say", "1").text(), "1");
    busy.request_within("hostile.spin", "long", HOUR, "");
    server.until("both are there", |server| {
        server.json("/calls")["calls"][0]["requestId"] == "long"
    });
    let rows = server.json("/connections?sort=inFlight&limit=2")["connections"].clone();
    let id = |index: usize| rows[index]["id"].as_str().unwrap().to_owned();
    for id in [id(1), id(0)] {
        assert_eq!(
            change(&server, "DELETE", &format!("/connections/{id}"), "").0,
            200
        );
    }
    assert_eq!(idle.message().code(), "SHUTTING_DOWN");
    idle.expect_end();
    stop_calls(&server);
    assert_eq!(
        busy.message().code(),
        "SERVICE_FAILED",
        "what was begun is answered"
    );
    assert_eq!(busy.message().code(), "SHUTTING_DOWN");
    busy.expect_end();
    assert_eq!(change(&server, "DELETE", "/connections/999", "").0, 404);
}

#[test]
fn an_action_is_tried() {
    let server = start();
    let attempt = |body: Value| change(&server, "POST", "/services/calc/try", &body.to_string());
    let (status, answer) = attempt(json!({"action": "add", "payload": {"a": 2, "b": 40}}));
    assert_eq!(
        (status, &answer["outcome"], &answer["payload"]),
        (200, &json!("OK"), &json!({"sum": 42})),
        "{answer}"
    );
    let (_, answer) = attempt(json!({"action": "divide", "payload": {"a": 1, "b": 0}}));
    assert_eq!(answer["outcome"], "DIVISION_BY_ZERO");
    assert_eq!(
        attempt(json!({"action": "none"})).1["outcome"],
        "TOPIC_NOT_SUPPORTED"
    );
    assert_eq!(attempt(json!({"action": "a b"})).0, 409);
    assert_eq!(attempt(json!({"payload": 1})).0, 400);
    assert_eq!(attempt(json!({"action": "add", "wrong": 1})).0, 400);
    let page = server.json("/services/calc");
    assert_eq!(page["versions"][0]["actions"][0]["name"], "add");
    assert_eq!(page["versions"][0]["isolation"], "request");
    assert_eq!(server.get("/services/nobody").0, 404);
}

#[test]
fn the_log_is_shown_and_its_filter_changed() {
    let server = start();
    let mut client = server.connect();
    client.request("hostile.trap", "trapped", "");
    client.message();
    let lines = server.json("/log?requestId=trapped")["lines"].clone();
    assert_eq!(
        (&lines[0]["level"], &lines[0]["fields"]["service"]),
        (&json!("warn"), &json!("hostile")),
        "{lines}"
    );
    assert_eq!(server.json("/log?level=error")["lines"], json!([]));
    assert_eq!(server.get("/log?level=loud").0, 400);
    client.request("echo.say", "quiet", "1");
    client.message();
    assert_eq!(server.json("/log?requestId=quiet")["lines"], json!([]));
    assert_eq!(
        change(&server, "POST", "/log/filter", r#"{"filter":"debug"}"#).0,
        200
    );
    client.request("echo.say", "loud", "1");
    client.message();
    server.until("the line is there", |server| {
        server.json("/log?requestId=loud")["lines"][0]["message"] == "call ended"
    });
    assert_eq!(
        change(&server, "POST", "/log/filter", r#"{"filter":"a=b=c"}"#).0,
        400
    );
}

#[test]
fn events_come_every_second_and_listeners_are_few() {
    let server = start();
    let listen = || {
        let mut stream = TcpStream::connect(server.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
            .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
        let status = lines.next().unwrap();
        (status, lines)
    };
    let mut listeners: Vec<_> = (0..8).map(|_| listen()).collect();
    for (status, lines) in &mut listeners {
        assert!(status.contains("200"), "{status}");
        let data = lines
            .find_map(|line| line.strip_prefix("data: ").map(str::to_owned))
            .unwrap();
        let event: Value = serde_json::from_str(&data).unwrap();
        assert_eq!(
            (&event["accepting"], &event["calls"]),
            (&json!(true), &json!([]))
        );
    }
    assert!(listen().0.contains("503"));
    assert_eq!(
        server.get("/healthz").0,
        200,
        "the others are answered meanwhile"
    );
    drop(listeners);
    server.until("there is room again", |_| listen().0.contains("200"));
}

#[test]
fn settings_are_shown_without_secrets_and_a_post_drains() {
    let mut server = setup()
        .set("[services.calc.grants]\nconfig = { key = \"very-secret\" }")
        .start();
    let settings = server.get("/config").1;
    assert!(
        settings.contains("services_dir") && !settings.contains("very-secret"),
        "{settings}"
    );
    assert_eq!(change(&server, "POST", "/drain", "").0, 200);
    assert_eq!(server.wait().code(), Some(0));
}

/// Words that begin with a prefix, as names of metrics do.
fn names(text: &str) -> std::collections::BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let metrics = words.filter(|word| word.starts_with("mb_") || word.starts_with("process_"));
    metrics
        .map(|name| name.trim_end_matches("_bucket").to_owned())
        .collect()
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_there_are() {
    let server = start();
    let there = names(&server.get("/metrics").1);
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let (dashboard, alerts, runbook) = (
        read("admin/deploy/grafana.json"),
        read("admin/deploy/alerts.yml"),
        read("admin/RUNBOOK.md"),
    );
    for name in names(&dashboard).union(&names(&alerts)) {
        assert!(there.contains(name), "{name} is no metric");
    }
    assert!(
        serde_json::from_str::<Value>(&dashboard).unwrap()["panels"]
            .as_array()
            .unwrap()
            .len()
            >= 8
    );
    for alert in alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        assert!(
            runbook.contains(&format!("### {alert}\n")),
            "{alert} is not explained"
        );
    }
}

#[test]
fn the_page_is_one_of_its_own() {
    let server = start();
    let html =
        "GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\nConnection: close\r\n\r\n";
    let (status, page) = http(server.admin, html);
    assert!(
        status == 200 && page.starts_with("<!doctype html>"),
        "{page}"
    );
    for file in [
        "/page.css",
        "/page.mjs",
        "/draw.mjs",
        "/service.mjs",
        "/examples.mjs",
        "/icon.svg",
    ] {
        let (status, text) = server.get(file);
        assert!(
            status == 200 && !text.contains("http://") | text.contains("w3.org"),
            "{file}"
        );
        assert!(
            !text.contains("innerHTML") && !text.contains("https://"),
            "{file}"
        );
    }
}

#[test]
fn pages() {
    let server = start();
    assert_eq!(server.json("/healthz")["status"], "ok");
    assert_eq!(server.json("/readyz")["status"], "ready");
    assert_eq!(
        server.json("/version")["version"],
        env!("CARGO_PKG_VERSION")
    );
    let open = server.connect();
    server.until("the connection is known", |server| {
        server.get("/connections/1").0 == 200
    });
    for route in server.json("/")["routes"]
        .as_object()
        .unwrap()
        .keys()
        .filter(|route| *route != "/events")
    {
        let path = route.replace("{id}", "1").replace("{name}", "calc");
        assert_eq!(server.get(&path).0, 200, "{route}");
    }
    drop(open);
    assert_eq!(server.get("/services?x=1").0, 400);
    assert_eq!(server.get("/nothing").0, 404);
    assert_eq!(server.get("/services/../healthz").0, 404);
    let services = server.json("/services");
    let calc = &services["services"][0];
    assert_eq!(
        (calc["name"].as_str(), calc["version"].as_str()),
        (Some("calc"), Some("1.0.0"))
    );
    assert_eq!(
        calc["size"],
        std::fs::metadata(crate::support::component("services", "calc.wasm"))
            .unwrap()
            .len()
    );
}

#[test]
fn a_foreign_host_header_and_other_methods_are_refused() {
    let server = start();
    let port = server.admin.port();
    for (request, expected) in [
        (format!("GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"), 200),
        (format!("HEAD /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"), 200),
        ("GET /healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".into(), 200),
        ("GET /readyz HTTP/1.0\r\n\r\n".into(), 200),
        ("GET /services HTTP/1.0\r\n\r\n".into(), 200),
        ("GET /services HTTP/1.1\r\n\r\n".into(), 403),
        ("GET /services HTTP/1.1\r\nHost: localhost.\r\n\r\n".into(), 200),
        ("GET http://localhost/services HTTP/1.1\r\nHost: localhost\r\n\r\n".into(), 200),
        ("GET http://evil.example/services HTTP/1.1\r\nHost: localhost\r\n\r\n".into(), 403),
        ("GET /services HTTP/1.1\r\nHost: localhost\r\nX-Name: \u{fc}ber\r\n\r\n".into(), 200),
        ("GET /nothing HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".into(), 403),
        ("POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into(), 405),
        ("PUT /connections HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".into(), 405),
    ] {
        assert_eq!(http(server.admin, &request).0, expected, "{request}");
    }
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let server = start();
    let mut client = server.connect();
    client.ask("calc.add", "{\"a\":1,\"b\":2}");
    client.ask("calc.divide", "{\"a\":1,\"b\":0}");
    client.ask("hostile.trap", "");
    let (_, text) = server.get("/metrics");
    let mut typed = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            typed.insert(rest.split(' ').next().unwrap().to_owned());
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = series.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap_or(name);
            assert!(
                (name.starts_with("mb_") || name.starts_with("process_"))
                    && (typed.contains(name) || typed.contains(base)),
                "{line}"
            );
        }
    }
    assert_eq!(
        server.metric("mb_calls_total{service=\"calc\",version=\"1.0.0\"}"),
        2
    );
    assert_eq!(
        server.metric("mb_call_failures_total{service=\"calc\",version=\"1.0.0\"}"),
        1
    );
    assert_eq!(
        server.metric("mb_call_errors_total{service=\"hostile\",version=\"1.0.0\"}"),
        1
    );
    assert_eq!(server.metric("mb_errors_total{code=\"SERVICE\"}"), 1);
    assert_eq!(server.metric("mb_errors_total{code=\"SERVICE_FAILED\"}"), 1);
    for (service, answered, failed, ended) in [("calc", 1, 1, 0), ("hostile", 0, 0, 1)] {
        for (outcome, count) in [("answered", answered), ("failed", failed), ("ended", ended)] {
            let labels = format!("service=\"{service}\",version=\"1.0.0\",outcome=\"{outcome}\"");
            let seen = |name: &str, more: &str| {
                server.metric(&format!(
                    "mb_call_duration_seconds_{name}{{{labels}{more}}}"
                ))
            };
            assert_eq!(
                (seen("count", ""), seen("bucket", ",le=\"+Inf\"")),
                (count, count),
                "{labels}"
            );
        }
        let waits =
            format!("mb_call_wait_seconds_count{{service=\"{service}\",version=\"1.0.0\"}}");
        assert_eq!(server.metric(&waits), answered + failed + ended);
    }
    assert_eq!(server.metric("mb_connections"), 1);
}

#[test]
fn connections_and_requests_are_counted_by_protocol() {
    let server = start();
    let row = |protocol: &str| {
        ["connections", "connections_total", "requests_total"]
            .map(|name| server.metric(&format!("mb_protocol_{name}{{protocol=\"{protocol}\"}}")))
    };
    assert_eq!((row("frames"), row("http")), ([0; 3], [0; 3]));
    // What has sent nothing speaks nothing yet.
    let silent = server.connect();
    let mut client = server.connect();
    for _ in 0..3 {
        client.ask("calc.add", "{\"a\":1,\"b\":2}");
    }
    server.connect().ask("nobody.there", "1");
    server.until("one of two is left", |_| row("frames") == [1, 2, 4]);
    let call = "POST /call/echo.say HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut open = TcpStream::connect(server.wire).unwrap();
    open.write_all(call.repeat(5).as_bytes()).unwrap();
    for (request, status) in [
        ("GET /healthz HTTP/1.0\r\n\r\n".to_owned(), 200),
        ("GET /nothing HTTP/1.0\r\n\r\n".to_owned(), 404),
        (
            call.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"),
            200,
        ),
    ] {
        assert_eq!(http(server.wire, &request).0, status, "{request}");
    }
    server.until("all are counted", |_| row("http") == [1, 4, 8]);
    // One of WebSocket was one of HTTP.
    let upgrade = "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let ping = [0x89, 0x80, 0, 0, 0, 0];
    open.write_all(upgrade.as_bytes()).unwrap();
    open.write_all(&ping).unwrap();
    server.until("it was upgraded", |_| row("websocket") == [1, 1, 0]);
    assert_eq!(row("http"), [0, 4, 9]);
    drop((client, open, silent));
    server.until("all have ended", |server| {
        server.metric("mb_connections") == 0
    });
    assert_eq!((row("frames"), row("http")), ([0, 2, 4], [0, 4, 9]));
    assert_eq!(row("websocket"), [0, 1, 0]);
}

#[test]
fn listeners_are_shown_as_they_listen() {
    let pki = Pki::new();
    let protocols = "[[listeners]]\nhost = \"127.0.0.1\"\nport = 0\nprotocols = [\"frames\"]";
    let settings = format!("auth = \"optional\"\n{}\n{protocols}", pki.settings(""));
    let server = setup().set(&settings).start();
    let row = |index: usize, tls: bool, protocols: &[&str]| {
        json!({
            "address": server.listeners[index].to_string(),
            "auth": "optional",
            "protocols": protocols,
            "tls": tls,
        })
    };
    let expected = [
        row(0, false, &["frames", "http"]),
        row(1, true, &["frames", "http"]),
        row(2, false, &["frames"]),
    ];
    assert_eq!(server.json("/listeners")["listeners"], json!(expected));
}
