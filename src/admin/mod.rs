//! The admin endpoint: HTTP over `tiny_http`, on a thread of its own. It
//! sees copies and holds no lock of the wire side.
//!
//! `tiny_http` ends its accept loop on any error; a supervisor starts it
//! again on the same listener.

mod metrics_text;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::json;
use tiny_http::{Header, Method, Request, Response, Server};

use crate::metrics::snapshot::Snapshot;

/// Pause before a server that ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// What the endpoint needs.
pub struct Admin {
    /// Takes a snapshot.
    pub snapshot: Box<dyn Fn() -> Snapshot + Send + Sync>,
    /// Host headers that are answered besides loopback ones.
    pub allowed_hosts: Vec<String>,
}

/// Status, content type, body.
type Page = (u16, &'static str, String);

const JSON: &str = "application/json; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The routes, and what each is for.
pub const ROUTES: [(&str, &str); 6] = [
    ("/healthz", "200 while the process lives"),
    ("/readyz", "200 while requests are served, 503 with the reasons else"),
    ("/connections", "open connections"),
    ("/services", "services, and the files that failed to load"),
    ("/metrics", "counters, as Prometheus reads them"),
    ("/version", "what runs here"),
];

impl Admin {
    /// Serves from a thread of its own until the process ends.
    ///
    /// # Errors
    /// If the thread can't be started.
    pub fn start(self, listener: TcpListener) -> io::Result<()> {
        let admin = Arc::new(self);
        thread::Builder::new().name("mb-admin".into()).spawn(move || admin.supervise(&listener))?;
        Ok(())
    }

    fn supervise(&self, listener: &TcpListener) {
        loop {
            let server = listener.try_clone().map_err(Into::into).and_then(|l| Server::from_listener(l, None));
            match server {
                Ok(server) => server.incoming_requests().for_each(|request| self.answer(request)),
                Err(error) => tracing::error!("admin endpoint: {error}"),
            }
            tracing::warn!("admin endpoint ended, it is started again");
            thread::sleep(RESTART_PAUSE);
        }
    }

    fn answer(&self, request: Request) {
        let host = request.headers().iter().find(|header| header.field.equiv("Host"));
        let path = request.url().split('?').next().unwrap_or_default();
        let (status, kind, body) = if host.is_none_or(|host| !self.is_allowed(host.value.as_str())) {
            let error = "this Host is not answered; use a loopback name or add it to admin.allowed_hosts";
            (403, JSON, json!({"error": error}).to_string())
        } else if !matches!(request.method(), Method::Get | Method::Head) {
            (405, JSON, json!({"error": "only GET is answered"}).to_string())
        } else {
            self.page(path)
        };
        // One piece with its length, however large: simple for simple clients.
        let mut response = Response::from_string(body).with_status_code(status).with_chunked_threshold(usize::MAX);
        for (name, value) in [
            ("Content-Type", kind),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", "default-src 'none'"),
        ] {
            if let Ok(header) = Header::from_bytes(name, value) {
                response.add_header(header);
            }
        }
        // A peer that is gone does not want the answer.
        let _ = request.respond(response);
    }

    fn page(&self, path: &str) -> Page {
        let ok = |value: serde_json::Value| (200, JSON, value.to_string());
        match path {
            "/" => {
                let routes: serde_json::Map<_, _> =
                    ROUTES.iter().map(|(path, what)| ((*path).into(), json!(what))).collect();
                ok(json!({"routes": routes}))
            }
            "/healthz" => ok(json!({"status": "ok"})),
            "/version" => ok(version()),
            "/readyz" => readiness(&(self.snapshot)()),
            "/connections" => ok(json!({"connections": (self.snapshot)().connections})),
            "/services" => ok(json!({"services": (self.snapshot)().services})),
            "/metrics" => (200, TEXT, metrics_text::render(&(self.snapshot)())),
            _ => (404, JSON, json!({"error": "no such page; / lists them"}).to_string()),
        }
    }

    /// A page of somebody else, in the operator's browser, can make requests
    /// to loopback under a name of its own; those carry that name here.
    fn is_allowed(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        let loopback = name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let listed = |allowed: &String| allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host);
        loopback || self.allowed_hosts.iter().any(listed)
    }
}

/// Requests are served, although some services may not have loaded: those
/// are named, and leave the rest alone.
fn readiness(snapshot: &Snapshot) -> Page {
    let failed: Vec<_> = snapshot
        .services
        .iter()
        .filter(|service| service.error.is_some())
        .map(|service| json!({"name": service.name, "file": service.file, "error": service.error}))
        .collect();
    let (status, word) = if snapshot.accepting { (200, "ready") } else { (503, "draining") };
    (status, JSON, json!({"status": word, "failedServices": failed}).to_string())
}

/// What runs here.
#[must_use]
pub fn version() -> serde_json::Value {
    json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": crate::wire::PROTOCOL_VERSION,
        "contract": "mb:service@1.0.0",
    })
}

/// Whether an address is reached from this machine alone.
#[must_use]
pub fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::snapshot::Totals;

    fn admin() -> Admin {
        let empty = || Snapshot { accepting: true, totals: Totals::default(), connections: vec![], services: vec![] };
        Admin { snapshot: Box::new(empty), allowed_hosts: vec!["Ops.example".into()] }
    }

    #[test]
    fn hosts() {
        let admin = admin();
        for good in ["localhost", "LOCALHOST:9090", "127.0.0.1:9090", "127.8.9.1", "[::1]:9090", "ops.example:9090"] {
            assert!(admin.is_allowed(good), "{good}");
        }
        for bad in ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:9090", "[::2]", "10.0.0.1"] {
            assert!(!admin.is_allowed(bad), "{bad}");
        }
    }

    #[test]
    fn every_listed_route_is_answered() {
        for (path, _) in ROUTES {
            assert_eq!(admin().page(path).0, 200, "{path}");
        }
        assert_eq!(admin().page("/nothing").0, 404);
    }
}
