//! What the operator sees.

use crate::{start, support::http};

#[test]
fn pages() {
    let server = start();
    assert_eq!(server.json("/healthz")["status"], "ok");
    assert_eq!(server.json("/readyz")["status"], "ready");
    assert_eq!(server.json("/version")["version"], env!("CARGO_PKG_VERSION"));
    for route in server.json("/")["routes"].as_object().unwrap().keys() {
        assert_eq!(server.get(route).0, 200, "{route}");
    }
    assert_eq!(server.get("/services?x=1").0, 200);
    assert_eq!(server.get("/nothing").0, 404);
    assert_eq!(server.get("/services/../healthz").0, 404);
    let services = server.json("/services");
    let calc = &services["services"][0];
    assert_eq!((calc["name"].as_str(), calc["version"].as_str()), (Some("calc"), Some("1.0.0")));
    assert_eq!(calc["size"], std::fs::metadata(crate::support::component("services", "calc.wasm")).unwrap().len());
}

#[test]
fn a_foreign_host_header_and_other_methods_are_refused() {
    let server = start();
    let port = server.admin.port();
    for (request, expected) in [
        (format!("GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"), 200),
        (format!("HEAD /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"), 200),
        ("GET /healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".into(), 403),
        ("GET /healthz HTTP/1.0\r\n\r\n".into(), 403),
        ("GET /nothing HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".into(), 403),
        ("POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into(), 405),
        ("DELETE /connections HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".into(), 405),
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
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(name.starts_with("mb_") && (typed.contains(name) || typed.contains(base)), "{line}");
        }
    }
    assert_eq!(server.metric("mb_calls_total{service=\"calc\",version=\"1.0.0\"}"), 2);
    assert_eq!(server.metric("mb_call_failures_total{service=\"calc\",version=\"1.0.0\"}"), 1);
    assert_eq!(server.metric("mb_call_errors_total{service=\"hostile\",version=\"1.0.0\"}"), 1);
    assert_eq!(server.metric("mb_errors_total{code=\"SERVICE\"}"), 1);
    assert_eq!(server.metric("mb_errors_total{code=\"SERVICE_FAILED\"}"), 1);
    let count = "mb_call_duration_seconds_count{service=\"calc\",version=\"1.0.0\"}";
    let all = "mb_call_duration_seconds_bucket{service=\"calc\",version=\"1.0.0\",le=\"+Inf\"}";
    assert_eq!((server.metric(count), server.metric(all)), (2, 2));
    assert_eq!(server.metric("mb_connections"), 1);
}
