//! The admin endpoint: HTTP on threads of its own (`gateway`). It sees copies
//! and holds no lock of the wire side.

mod assets;
mod change;
mod events;
mod gateway;
mod metrics_text;
mod pages;
mod routes;
pub mod token;

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

pub use change::{Body, Operations, Refused, Upload};
pub use gateway::{AdminListener, MAX_ANSWER};
use gateway::{Gateway, Request};
use pages::Query;
pub use routes::{ROUTES, Route};
use serde_json::{Value, json};

use crate::{
    log::{AUDIT, Limiter},
    metrics::Metrics,
};

/// Time that the end of the process waits for answers.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Limits lines about errors of the endpoint.
static LINES: Limiter = Limiter::new();

/// What the endpoint needs.
pub struct Admin {
    /// What it shows and changes.
    pub operations: Box<dyn Operations>,
    /// Where the services are reached.
    pub listeners: Value,
    /// Has the calls that failed or were slow.
    pub metrics: Arc<Metrics>,
    /// The token that a change needs; none if no change is allowed.
    pub token: Option<String>,
    /// The token that deploying takes; none if nothing can be deployed.
    pub deploy_token: Option<String>,
    /// Largest component that is deployed, in bytes.
    pub max_upload: usize,
    /// Host headers that are answered besides loopback ones.
    pub allowed_hosts: Vec<String>,
    /// Bytes of bodies and answers together, except small ones.
    pub memory: usize,
}

/// The endpoint while it runs.
pub struct Running(Arc<Gateway>);

impl Running {
    /// Waits for answers before the process ends, for a second at most.
    pub fn finish(&self) {
        self.0.finish(LAST_ANSWERS);
    }
}

/// Status, content type, body.
type Page = (u16, &'static str, String);

const JSON_UTF8: &str = "application/json; charset=utf-8";

fn page(status: u16, value: &Value) -> Page {
    (status, JSON_UTF8, value.to_string())
}

fn refuse(status: u16, error: &str) -> Page {
    page(status, &json!({"error": error}))
}

impl Admin {
    /// Serves from threads of its own until the process ends.
    ///
    /// # Errors
    /// If a thread can't be started.
    pub fn start(self, listeners: Vec<AdminListener>) -> io::Result<Running> {
        let gateway = Gateway::new(self);
        listeners
            .into_iter()
            .try_for_each(|listener| gateway.open(listener))?;
        Ok(Running(gateway))
    }

    fn route(&self, request: &Request, upload: &mut dyn Read) -> Page {
        if !request.may_look || !self.is_addressed(request) {
            static FOREIGN: Limiter = Limiter::audit();
            if FOREIGN.allows("admin endpoint under a foreign name") {
                tracing::warn!(
                    target: AUDIT,
                    security = "admin-host",
                    peer = request.peer,
                    path = shown(&request.url),
                    "requested under a Host that is not answered"
                );
            }
            return refuse(
                403,
                "this Host is not answered; use a loopback name or add it to admin.allowed_hosts",
            );
        }
        let url = &request.url;
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        let method = match &*request.method {
            "HEAD" => "GET",
            method => method,
        };
        match routes::find(method, path) {
            Ok((route, values)) if method == "GET" => {
                let page = Query::parse(query, route.query)
                    .and_then(|query| self.page(route.path, &values, &query));
                page.unwrap_or_else(|error| refuse(400, &error))
            }
            Ok((route, values)) => self.change(request, route, &values, upload),
            Err(true) => refuse(
                405,
                "another method is answered here; / lists what there is",
            ),
            Err(false) => {
                let wants_html = request
                    .header("Accept")
                    .is_some_and(|accepted| accepted.contains("text/html"));
                let index = (method == "GET")
                    .then(|| Self::index(path, wants_html))
                    .flatten();
                index.unwrap_or_else(|| refuse(404, "no such page; / lists them"))
            }
        }
    }

    /// Answers a probe of a load balancer or of Kubernetes, from any address
    /// and under any Host, with the status alone. None for a request that gets
    /// a whole page, or is no probe.
    fn probe(&self, request: &Request) -> Option<Page> {
        if !request.is_probe() || request.may_look && self.is_addressed(request) {
            return None;
        }
        let (status, word) = match request.path() {
            "/healthz" => (200, "ok"),
            _ => pages::readiness_word(self.operations.accepting()),
        };
        Some(page(status, &json!({"status": word})))
    }

    fn is_addressed(&self, request: &Request) -> bool {
        request
            .header("Host")
            .map_or(request.is_old, |host| self.is_allowed(host))
    }

    /// A page of somebody else, in the operator's browser, can make requests
    /// to loopback under a name of its own; those carry that name here.
    fn is_allowed(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        let loopback = name.eq_ignore_ascii_case("localhost")
            || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let listed = |allowed: &String| {
            allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host)
        };
        loopback || self.allowed_hosts.iter().any(listed)
    }
}

/// A path for the log, which a peer can make long.
fn shown(url: &str) -> &str {
    const MAX_SHOWN: usize = 200;
    &url[..url.floor_char_boundary(MAX_SHOWN)]
}

/// What runs here.
#[must_use]
pub fn version() -> serde_json::Value {
    json!({
        "name": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": crate::wire::PROTOCOL_VERSION,
        "contract": "mb:service@1.1.0",
    })
}

/// Whether an address is reached from this machine alone.
#[must_use]
pub fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().is_loopback()
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;
    use crate::metrics::snapshot::{Snapshot, Totals};

    /// A server without anything.
    #[derive(Default)]
    struct Nothing {
        /// A snapshot of it panics.
        broken: bool,
        /// Bytes of its settings.
        size: Arc<AtomicUsize>,
    }

    impl Operations for Nothing {
        fn snapshot(&self) -> Snapshot {
            assert!(!self.broken, "a defect");
            Snapshot {
                accepting: true,
                totals: Totals::default(),
                connections: vec![],
                calls: vec![],
                principals: vec![],
                services: vec![],
                invalid_certificates: vec![],
                stale_files: vec![],
                services_folder: None,
                store: None,
            }
        }

        fn accepting(&self) -> bool {
            true
        }

        fn describe(&self, _: &str) -> Vec<Value> {
            Vec::new()
        }

        fn settings(&self) -> Value {
            Value::from("x".repeat(self.size.load(SeqCst)))
        }

        fn change(&self, _: (&str, &str), _: &str, _: &Body) -> Result<Value, Refused> {
            Err("nothing".into())
        }

        fn hold(&self, _: Upload<'_>) -> Result<Value, Value> {
            Err("nothing".into())
        }

        fn export(&self, _: &mut dyn io::Write) -> Result<u64, String> {
            Err("nothing".into())
        }
    }

    pub(in crate::admin) fn admin() -> Admin {
        Admin {
            operations: Box::new(Nothing::default()),
            listeners: Value::Null,
            metrics: Arc::default(),
            token: None,
            deploy_token: None,
            max_upload: 1024,
            allowed_hosts: vec!["Ops.example".into()],
            memory: 64 * 1024 * 1024,
        }
    }

    #[test]
    fn hosts() {
        let admin = admin();
        for good in [
            "localhost",
            "LOCALHOST:9090",
            "127.0.0.1:9090",
            "127.8.9.1",
            "localhost.",
            "localhost.:9090",
            "[::1]:9090",
            "ops.example:9090",
        ] {
            assert!(admin.is_allowed(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:9090",
            "[::2]",
            ".",
            "localhost..",
            "10.0.0.1",
        ] {
            assert!(!admin.is_allowed(bad), "{bad}");
        }
    }

    #[test]
    fn a_panic_ends_one_request() {
        use std::{
            io::{Read as _, Write as _},
            net::{TcpListener, TcpStream},
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        Admin {
            operations: Box::new(Nothing {
                broken: true,
                ..Nothing::default()
            }),
            ..admin()
        }
        .start(vec![AdminListener::Tcp(listener)])
        .unwrap();
        for (path, status) in [("/metrics", "500"), ("/healthz", "200")] {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{path}: {answer}"
            );
        }
    }

    #[test]
    fn answers_that_nobody_takes_are_bounded() {
        use std::{
            io::{Read as _, Write as _},
            os::unix::net::{UnixListener, UnixStream},
        };
        const MIB: usize = 1024 * 1024;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let size = Arc::new(AtomicUsize::new(20 * MIB));
        Admin {
            operations: Box::new(Nothing {
                size: Arc::clone(&size),
                ..Nothing::default()
            }),
            ..admin()
        }
        .start(vec![AdminListener::Unix(
            UnixListener::bind(&path).unwrap(),
        )])
        .unwrap();
        let ask = || {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream
                .write_all(b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n")
                .unwrap();
            let mut status = [0; 12];
            stream.read_exact(&mut status).unwrap();
            (String::from_utf8_lossy(&status).into_owned(), stream)
        };
        let mut readers: Vec<_> = (0..3).map(|_| ask()).collect();
        assert!(readers.iter().all(|(status, _)| status == "HTTP/1.1 200"));
        assert_eq!(ask().0, "HTTP/1.1 503");
        // One that leaves frees its slot for the next.
        let (_, mut stream) = readers.remove(0);
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.len() > 20 * MIB);
        let begun = std::time::Instant::now();
        while ask().0 != "HTTP/1.1 200" {
            assert!(begun.elapsed().as_secs() < 30);
        }
        size.store(40 * MIB, SeqCst);
        assert_eq!(ask().0, "HTTP/1.1 400");
    }
}
