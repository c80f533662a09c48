//! The admin endpoint: HTTP over `tiny_http`, on a thread of its own. It
//! sees copies and holds no lock of the wire side.
//!
//! `tiny_http` ends its accept loop on any error, and silently where it
//! panics. A front (`front`) stands before it and lets in only what is whole
//! and in time; a supervisor starts it again when it has ended, or when
//! something that the front has handed over does not arrive.

mod assets;
mod change;
mod events;
mod front;
mod metrics_text;
mod pages;
mod routes;
mod socket;
pub mod token;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixListener,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

pub use change::{Attempt, Commands};
pub use front::Door;
use front::{Front, MARK};
use pages::Query;
pub use routes::{ROUTES, Route};
use serde_json::{Value, json};
use tiny_http::{Header, Method, Request, Response, Server};

use crate::{
    log::Limiter,
    metrics::{Metrics, snapshot::Snapshot},
};

/// Pause before a server that ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// Changes at the same time; they wait for each other anyway.
const MAX_CHANGES: usize = 4;

/// How long the end of the process waits for answers on their way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// How often it is looked at whether anything does not arrive.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Lines about what goes wrong here: it may go wrong ten times a second.
static LINES: Limiter = Limiter::new();

/// Describes a service in each of its versions; none if there is none.
pub type Describe = dyn Fn(&str) -> Vec<Value> + Send + Sync;

/// What the endpoint needs.
pub struct Admin {
    /// Takes a snapshot.
    pub snapshot: Box<dyn Fn() -> Snapshot + Send + Sync>,
    /// Describes a service in each of its versions; none if there is none.
    pub services: Box<Describe>,
    /// The settings, as they may be shown.
    pub settings: Box<dyn Fn() -> Value + Send + Sync>,
    /// Has the calls that failed or were slow.
    pub metrics: Arc<Metrics>,
    /// Changes things.
    pub commands: Box<dyn Commands>,
    /// What a request that changes something must carry; none if nobody may.
    pub token: Option<String>,
    /// Host headers that are answered besides loopback ones.
    pub allowed_hosts: Vec<String>,
    /// Changes that are being made, and listeners to events; nobody yet.
    pub busy: Busy,
}

/// What the endpoint counts of its own work.
#[derive(Debug, Default)]
pub struct Busy {
    changes: AtomicUsize,
    listeners: AtomicUsize,
}

/// The endpoint while it runs.
pub struct Running(Arc<Front>);

impl Running {
    /// Before the process ends: waits for answers that are on their way, for
    /// a second at most.
    pub fn finish(&self) {
        self.0.finish(LAST_ANSWERS);
    }
}

/// Status, content type, body.
type Page = (u16, &'static str, String);

const JSON_UTF8: &str = "application/json; charset=utf-8";

/// The page loads what comes from here, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

impl Admin {
    /// Serves from threads of its own until the process ends.
    ///
    /// # Errors
    /// If a thread can't be started.
    pub fn start(self, doors: Vec<Door>) -> io::Result<Running> {
        let front = Front::new(self.token.clone());
        // Who comes at once shall find somebody behind the front.
        let first = front.listen_behind()?;
        doors.into_iter().try_for_each(|door| front.open(door))?;
        let (admin, running) = (Arc::new(self), Running(Arc::clone(&front)));
        thread::Builder::new()
            .name("mb-admin".into())
            .spawn(move || admin.supervise(&front, first))?;
        Ok(running)
    }

    fn supervise(self: &Arc<Self>, front: &Front, first: UnixListener) {
        let mut first = Some(first);
        loop {
            let listener = first.take().map_or_else(|| front.listen_behind(), Ok);
            // It panics where no thread can be started.
            let open = || {
                listener
                    .map_err(Into::into)
                    .and_then(|listener| Server::from_listener(listener, None))
            };
            let why = match catch_unwind(AssertUnwindSafe(open)) {
                Ok(Ok(server)) => {
                    let why = self.serve(&server, front);
                    // It panics there, once it has told its thread to end: it
                    // takes our address for that of a file.
                    let _ = catch_unwind(AssertUnwindSafe(|| drop(server)));
                    why
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it panicked".into(),
            };
            if LINES.allows("admin endpoint") {
                tracing::warn!("admin endpoint ended, it is started again: {why}");
            }
            thread::sleep(RESTART_PAUSE);
        }
    }

    /// Answers until `tiny_http` ends or hears nothing any more; says why.
    fn serve(self: &Arc<Self>, server: &Server, front: &Front) -> String {
        loop {
            match server.recv_timeout(LOOK_EVERY) {
                Ok(Some(request)) => {
                    let mark = request
                        .headers()
                        .iter()
                        .find(|header| header.field.equiv(MARK));
                    if !mark.is_some_and(|mark| front.arrived(mark.value.as_str())) {
                        // Not from the front: a stranger has found the way in.
                        continue;
                    }
                    let looks = matches!(request.method(), Method::Get | Method::Head);
                    // With a query it is a page, which refuses that.
                    if looks
                        && request.url().trim_end_matches('?') == "/events"
                        && self.is_addressed(&request)
                    {
                        self.listen(request);
                    } else if looks {
                        self.answer(request);
                    } else {
                        self.answer_apart(request);
                    }
                }
                // Only where nothing waits to be answered: it may be behind
                // others.
                Ok(None) if front.has_lost_one(Instant::now()) => {
                    return "a request did not arrive".into();
                }
                Ok(None) => {}
                Err(error) => return error.to_string(),
            }
        }
    }

    /// Changing something may take as long as compiling a component does;
    /// who looks meanwhile shall not wait.
    fn answer_apart(self: &Arc<Self>, request: Request) {
        let admin = Arc::clone(self);
        let change = move || {
            if admin.busy.changes.fetch_add(1, SeqCst) < MAX_CHANGES {
                admin.answer(request);
            } else {
                let busy = json!({"error": "other changes are being made; try again"}).to_string();
                let _ = request.respond(Response::from_string(busy).with_status_code(503));
            }
            admin.busy.changes.fetch_sub(1, SeqCst);
        };
        // Without a thread the request is dropped, which answers 500.
        if let Err(error) = thread::Builder::new()
            .name("mb-change".into())
            .spawn(change)
            && LINES.allows("admin endpoint")
        {
            tracing::warn!("admin endpoint: {error}");
        }
    }

    fn answer(&self, request: Request) {
        // A panic is logged by its hook; the peer gets a 500.
        let _ = catch_unwind(AssertUnwindSafe(|| self.respond(request)));
    }

    fn respond(&self, mut request: Request) {
        let (status, kind, body) = self.route(&mut request);
        let allow = (status == 405)
            .then(|| routes::methods(request.url().split('?').next().unwrap_or_default()));
        // One piece with its length, however large: simple for simple clients.
        let mut response = Response::from_string(body)
            .with_status_code(status)
            .with_chunked_threshold(usize::MAX);
        for (name, value) in allow
            .as_deref()
            .map(|methods| ("Allow", methods))
            .into_iter()
            .chain([
                ("Content-Type", kind),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
                ("Referrer-Policy", "no-referrer"),
                ("Content-Security-Policy", POLICY),
            ])
        {
            if let Ok(header) = Header::from_bytes(name, value) {
                response.add_header(header);
            }
        }
        // A peer that is gone does not want the answer.
        let _ = request.respond(response);
    }

    fn route(&self, request: &mut Request) -> Page {
        let refuse =
            |status: u16, error: &str| (status, JSON_UTF8, json!({"error": error}).to_string());
        if !self.is_addressed(request) {
            if LINES.allows("admin endpoint under a foreign name") {
                tracing::warn!(
                    security = "admin-host",
                    path = shown(request.url()),
                    "asked under a name that is not answered"
                );
            }
            return refuse(
                403,
                "this Host is not answered; use a loopback name or add it to admin.allowed_hosts",
            );
        }
        let url = request.url().to_owned();
        let (path, query) = url.split_once('?').unwrap_or((&url, ""));
        let method = if *request.method() == Method::Head {
            "GET"
        } else {
            request.method().as_str()
        };
        let method = method.to_owned();
        match routes::find(&method, path) {
            Ok((route, values)) if method == "GET" => {
                let page = Query::parse(query, route.query)
                    .and_then(|query| self.page(route.path, &values, &query));
                page.unwrap_or_else(|error| refuse(400, &error))
            }
            Ok((route, values)) => self.change(request, route, &values),
            Err(true) => refuse(
                405,
                "another method is answered here; / lists what there is",
            ),
            Err(false) => {
                let accepts = request
                    .headers()
                    .iter()
                    .find(|header| header.field.equiv("Accept"));
                let wants_html =
                    accepts.is_some_and(|header| header.value.as_str().contains("text/html"));
                let front = (method == "GET")
                    .then(|| Self::front(path, wants_html))
                    .flatten();
                front.unwrap_or_else(|| refuse(404, "no such page; / lists them"))
            }
        }
    }

    fn is_addressed(&self, request: &Request) -> bool {
        let host = request
            .headers()
            .iter()
            .find(|header| header.field.equiv("Host"));
        host.is_some_and(|host| self.is_allowed(host.value.as_str()))
    }

    /// A page of somebody else, in the operator's browser, can make requests
    /// to loopback under a name of its own; those carry that name here.
    fn is_allowed(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        let loopback = name.eq_ignore_ascii_case("localhost")
            || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let listed = |allowed: &String| {
            allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host)
        };
        loopback || self.allowed_hosts.iter().any(listed)
    }
}

/// A path for the log, in which a stranger's may be long.
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

    struct Nothing;

    impl Commands for Nothing {
        fn reload(&self) -> Result<Vec<String>, String> {
            Ok(Vec::new())
        }

        fn reload_tls(&self) -> Result<(), String> {
            Err("nothing".into())
        }

        fn reconfigure(&self) -> Result<Value, String> {
            Err("nothing".into())
        }

        fn rollback(&self, _: &str, _: Option<&str>) -> Result<String, String> {
            Err("nothing".into())
        }

        fn switch(&self, _: &str, _: Option<&str>, _: bool) -> Result<String, String> {
            Err("nothing".into())
        }

        fn kill(&self, _: u64) -> bool {
            false
        }

        fn close(&self, _: u64) -> bool {
            false
        }

        fn drain(&self) {}

        fn try_action(&self, _: &Attempt<'_>) -> Result<Value, String> {
            Err("nothing".into())
        }
    }

    fn admin() -> Admin {
        let empty = || Snapshot {
            accepting: true,
            totals: Totals::default(),
            connections: vec![],
            calls: vec![],
            services: vec![],
        };
        Admin {
            snapshot: Box::new(empty),
            services: Box::new(|_| Vec::new()),
            settings: Box::new(|| Value::Null),
            metrics: Arc::default(),
            commands: Box::new(Nothing),
            token: None,
            allowed_hosts: vec!["Ops.example".into()],
            busy: Busy::default(),
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
            snapshot: Box::new(|| panic!("a defect")),
            ..admin()
        }
        .start(vec![Door::Tcp(listener)])
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
}
