//! From a message to its answer: parse, authorise, route, call, and map the
//! result to a code of the protocol.

mod mcp;
mod openapi;
mod reply;
mod run;
mod system;

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
pub use reply::{
    Answered, Counted, Deferred, Finish, HandOver, Outcome, Postponed, Redirect, Reply,
};
use run::{RETRY_WHEN_FULL_MS, Task, stopped};
use serde_json::json;

use crate::{
    access::{Access, Identity, NO_VERSION, Principal, log_refusal},
    budget::{Budget, Reservation},
    catalog::{Catalog, SYSTEM},
    config::Config,
    host::{Context, WaitError, Waiter, Watch},
    http::Asks,
    log::Limiter,
    metrics::Metrics,
    sandbox::SMALL_ANSWER,
    wire::{
        Code, ErrorBody, Header, Kind, Payload, Reason, SYSTEM_VERSION, Version, json as wire_json,
    },
};

/// The one topic that unauthenticated peers may use where authentication is
/// required.
const HELLO: &str = "system.hello";

/// The message for peers whose credentials are no longer valid.
pub const EXPIRED: &str =
    "the token or the certificate of this connection has expired or was revoked";

/// Characters of a peer's own text that an error repeats at most.
const MAX_REPEATED: usize = 200;

/// A whole message, and its sender.
pub struct Request<'a> {
    /// Header line and payload.
    pub body: &'a [u8],
    /// The payload is opaque bytes.
    pub binary: bool,
    /// Any version serves it: the highest, whatever the header line says.
    pub any_version: bool,
    /// What it asks for, if not for its topic.
    pub asks: &'a Asks,
    /// What is known of its call, if that was postponed before.
    pub postponed: Option<Postponed>,
    /// When its last byte was read, from which its timeout counts.
    pub arrived: Instant,
    /// The identity of the peer.
    pub identity: &'a Arc<Identity>,
    /// Watches its call.
    pub watch: Arc<dyn Watch>,
}

/// Returns the deadline for the call of a message to begin; none if the message
/// needs no call, or its peer must authenticate first.
#[must_use]
pub fn must_begin(
    body: &[u8],
    identity: &Identity,
    arrived: Instant,
    default_timeout: Duration,
) -> Option<Instant> {
    let (header, _) = Header::parse(body).ok()?;
    let calls = matches!(header.kind, Kind::Request | Kind::Publish)
        && header.topic.service() != SYSTEM
        && !identity.must_authenticate();
    calls.then(|| arrived + header.timeout.unwrap_or(default_timeout))
}

impl Request<'_> {
    fn counted(&self) -> Counted {
        self.postponed
            .map_or(Counted::Nowhere, |postponed| postponed.counted)
    }

    /// Its call was postponed until it was too late.
    fn is_overdue(&self) -> bool {
        self.postponed
            .is_some_and(|postponed| postponed.until <= Instant::now())
    }
}

/// Answers messages. The seam between the connection's side and the rest.
pub trait Handle: Send + Sync {
    /// Answers one.
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a>;
}

/// Serves requests from a catalog.
#[derive(Clone)]
pub struct Dispatcher(Arc<Core>);

struct Core {
    catalog: Arc<ArcSwap<Catalog>>,
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    access: Arc<Access>,
    memory: Arc<Budget>,
}

/// A refusal, before it is joined with the header that it answers.
struct Refusal {
    code: Option<Code>,
    body: ErrorBody<'static>,
}

impl Refusal {
    fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code: Some(code),
            body: ErrorBody::server(code, message),
        }
    }

    fn with(mut self, details: &serde_json::Value) -> Self {
        self.body = self.body.with_details(details);
        self
    }

    /// Refuses a request beyond a rate.
    fn too_often(whose: &str, per_second: u32, wait: Duration) -> Self {
        let message = format!("more than the {per_second} requests a second of {whose}");
        // Rounded up: a millisecond too early would be refused again.
        let millis = u64::try_from(wait.as_millis())
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        Self::new(Code::RateLimited, message).with(&json!({"retryAfterMs": millis}))
    }

    fn unavailable(message: impl Into<Cow<'static, str>>, retry_after_ms: u64) -> Self {
        Self::new(Code::ServiceUnavailable, message).with(&json!({"retryAfterMs": retry_after_ms}))
    }

    fn failed(reason: Reason, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::ServiceFailed, message).with(&json!({"reason": reason.as_str()}))
    }
}

impl Handle for Dispatcher {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let core = &self.0;
        let (mut header, payload) = match Header::parse(request.body) {
            Ok(parsed) => parsed,
            Err(error) => {
                let refusal = Refusal::new(Code::MalformedMessage, error.to_string());
                return Reply::new(None, refusal.into());
            }
        };
        if request.any_version {
            let service = header.topic.service();
            let highest = if service == SYSTEM {
                Some(SYSTEM_VERSION)
            } else {
                core.catalog.load().highest(service)
            };
            header.version = highest.unwrap_or(header.version);
        }
        if let Err(refusal) = core.admits(&header, request.identity) {
            core.keep_unrouted(&header, request.identity, &refusal);
            return Reply::new(header.request_id.map(|_| header), refusal.into());
        }
        if header.kind == Kind::Request && header.request_id.is_none() {
            // Without an id there is no request that could be named.
            let message = format!(
                "REQUEST to {} has no request id, the fourth field",
                header.topic.as_str()
            );
            let refusal = Refusal::new(Code::InvalidRequestId, message);
            return Reply::new(None, refusal.into());
        }
        let mut identity = None;
        let answered = core.route(&header, payload, &request, &mut identity);
        let mut answered = answered.unwrap_or_else(|refusal| {
            core.keep_unrouted(&header, request.identity, &refusal);
            Outcome::from(refusal).into()
        });
        if header.kind == Kind::Publish {
            let has_id = header.request_id.is_some();
            answered.outcome = core.published(header.topic.as_str(), has_id, answered.outcome);
        }
        Reply {
            header: Some(header),
            identity,
            answered,
        }
    }
}

impl Dispatcher {
    /// Creates a dispatcher over a catalog. What is built for one request,
    /// except what its service holds, is reserved from `memory`.
    #[must_use]
    pub fn new(
        catalog: Arc<ArcSwap<Catalog>>,
        config: Arc<Config>,
        metrics: Arc<Metrics>,
        access: Arc<Access>,
        memory: Arc<Budget>,
    ) -> Self {
        Self(Arc::new(Core {
            catalog,
            config,
            metrics,
            access,
            memory,
        }))
    }
}

impl Core {
    /// Checks that the peer is authenticated, where it must be.
    fn admits(&self, header: &Header<'_>, identity: &Identity) -> Result<(), Refusal> {
        let says = header.kind == Kind::Request && header.topic.as_str() == HELLO;
        let (reason, message) = if matches!(header.kind, Kind::Response | Kind::Error) {
            return Ok(());
        } else if identity.is_invalid() {
            ("expired", EXPIRED)
        } else if identity.must_authenticate() && !says {
            (
                "missing",
                "authenticate first: send system.hello with a token",
            )
        } else {
            return Ok(());
        };
        self.metrics.auth_failures.add(reason);
        log_refusal(identity, message);
        Err(Refusal::new(Code::Unauthorized, message))
    }

    /// Records a request in the history that was refused before it was routed.
    fn keep_unrouted(&self, header: &Header<'_>, identity: &Identity, refusal: &Refusal) {
        let context = context(header, identity, Instant::now());
        self.keep_refused(&header.topic, None, &context, refusal);
    }

    /// Makes the checks in the order of the protocol.
    fn route(
        self: &Arc<Self>,
        header: &Header<'_>,
        payload: &[u8],
        request: &Request<'_>,
        identity: &mut Option<Identity>,
    ) -> Result<Answered, Refusal> {
        if matches!(header.kind, Kind::Response | Kind::Error) {
            let message = format!(
                "a client sends REQUEST or PUBLISH, not {}",
                header.kind.as_str()
            );
            return Err(Refusal::new(Code::InvalidRequest, message));
        }
        match request.asks {
            Asks::Topic | Asks::Tool(_) => {}
            Asks::Services => {
                take_rate(&request.identity.principal)?;
                return self.reserved(Outcome::Json(self.openapi(request.identity)?));
            }
            Asks::Mcp(fields) => return self.mcp((header, payload), fields, request),
        }
        let payload = if request.binary {
            Payload::Binary(payload)
        } else {
            Payload::Json(check_json(payload)?)
        };
        if header.topic.service() == SYSTEM {
            let text = self.system(header, payload, request.identity, identity)?;
            return self.reserved(Outcome::Json(text));
        }
        let timeout = header.timeout.unwrap_or(self.config.default_timeout.0);
        let deadline = request.arrived + timeout;
        let Some(_permit) = self.permit(header, request, deadline)? else {
            let counted = Counted::ByPrincipal;
            let until = deadline;
            return Ok(Outcome::Postponed(Postponed { until, counted }).into());
        };
        let (mut answered, _) = self.run(Task {
            topic: header.topic,
            version: header.version,
            payload,
            context: context(header, request.identity, deadline),
            watch: &request.watch,
            timeout,
            is_publish: header.kind == Kind::Publish,
            counts: request.counted() < Counted::ByService,
        });
        if let Asks::Tool(reply) = request.asks {
            if let Outcome::Deferred(_) = answered.outcome {
                // What follows may wait for memory itself.
                request.watch.waits();
                answered = answered.settled();
            }
            let waiter = Waiter::of_client(&*request.watch, deadline);
            if let Err(refusal) = self.tool_response(reply, &mut answered, waiter) {
                self.keep_unrouted(header, request.identity, &refusal);
                answered.outcome = refusal.into();
            }
        }
        Ok(answered)
    }

    /// Checks rights, rate and concurrency of a principal, in this order.
    /// Returns the permit of the call, where its principal has a limit; none if
    /// it is postponed.
    fn permit(
        &self,
        header: &Header<'_>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Option<Option<Reservation>>, Refusal> {
        let Request {
            identity, watch, ..
        } = request;
        let Version {
            major,
            minor,
            patch,
        } = header.version;
        let asked = match request.any_version {
            true => NO_VERSION,
            false => [major, minor, patch],
        };
        let principal = &identity.principal;
        if !identity.may_call(header.topic.as_str(), asked) {
            let message = format!(
                "{} may not call {} {}",
                principal.name,
                header.topic.as_str(),
                header.version
            );
            return Err(Refusal::new(Code::Forbidden, message));
        }
        if request.counted() < Counted::ByPrincipal {
            take_rate(principal)?;
        }
        if request.is_overdue() {
            let message = "not begun within its timeout: too many calls waited";
            return Err(Refusal::unavailable(message, RETRY_WHEN_FULL_MS));
        }
        let Some(calls) = &principal.calls else {
            return Ok(Some(None));
        };
        let mut permit = Reservation::empty(calls);
        if permit.raise_until(1, Instant::now()) {
            return Ok(Some(Some(permit)));
        }
        let waiter = Waiter::of_client(&**watch, deadline);
        match waiter.take(|until| permit.raise_until(1, until)) {
            Ok(()) => Ok(Some(Some(permit))),
            Err(WaitError::Postponed) => Ok(None),
            Err(WaitError::Stopped(stop)) => Err(stopped(stop)),
            Err(WaitError::Late) => {
                let message = format!(
                    "not begun within its timeout: {} has {} calls already",
                    principal.name,
                    calls.limit()
                );
                Err(Refusal::unavailable(message, RETRY_WHEN_FULL_MS))
            }
        }
    }

    /// Reserves memory for an answer of the server itself, if it is available:
    /// such answers do not wait.
    fn reserved(&self, outcome: Outcome) -> Result<Answered, Refusal> {
        let bytes = outcome.size();
        let mut answered = Answered::from(outcome);
        if bytes > SMALL_ANSWER {
            let mut held = Reservation::empty(&self.memory);
            if !held.try_raise(bytes) {
                let message =
                    format!("the server's memory is used up: no {bytes} bytes for the answer");
                return Err(Refusal::unavailable(message, RETRY_WHEN_FULL_MS));
            }
            answered.held = Some(held);
        }
        Ok(answered)
    }

    /// Returns the answer to a PUBLISH: nothing without an id, whatever
    /// happened. One that is deferred comes here again when it may leave.
    fn published(&self, topic: &str, has_id: bool, outcome: Outcome) -> Outcome {
        match outcome {
            later @ (Outcome::Postponed(_) | Outcome::Redirect(_) | Outcome::Deferred(_)) => later,
            Outcome::Error(code, body) if has_id => Outcome::Error(code, body),
            Outcome::Error(_, body) => {
                self.metrics.publish_failures.add(1);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("publish failed") {
                    tracing::info!(topic, code = %body.code, "publish failed: {}", body.message);
                }
                Outcome::Silence
            }
            _ if has_id => Outcome::Json(r#"{"delivered":1}"#.into()),
            _ => Outcome::Silence,
        }
    }
}

/// Counts a request against the rate of its principal.
fn take_rate(principal: &Principal) -> Result<(), Refusal> {
    let Some(rate) = &principal.rate else {
        return Ok(());
    };
    rate.take()
        .map_err(|wait| Refusal::too_often(&principal.name, rate.limit(), wait))
}

fn context(header: &Header<'_>, identity: &Identity, deadline: Instant) -> Context {
    Context {
        request_id: header.request_id.map(Into::into),
        parent_request_id: header.parent_request_id.map(Into::into),
        requested_version: Some(header.version),
        caller: Arc::clone(&identity.caller),
        deadline,
        began: deadline,
        calls: None,
        chain: None,
    }
}

/// A payload that is not BINARY is JSON, and an empty one is `null`.
fn check_json(payload: &[u8]) -> Result<&str, Refusal> {
    if payload.is_empty() {
        return Ok(wire_json::NULL);
    }
    wire_json::check(payload)
        .map_err(|error| Refusal::new(Code::InvalidPayload, format!("payload is {error}")))
}

/// Returns the answer to a request whose handling panicked, a defect of the
/// server. The log line has the same id.
#[must_use]
pub fn internal_error<'a>(body: &'a [u8], error_id: &str) -> Reply<'a> {
    let header = Header::parse(body).ok().map(|(header, _)| header);
    if header.is_some_and(|header| header.kind == Kind::Publish && header.request_id.is_none()) {
        return Reply::new(header, Outcome::Silence);
    }
    let message = format!("defect of the server, error id {error_id}");
    let body =
        ErrorBody::server(Code::InternalError, message).with_details(&json!({"errorId": error_id}));
    Reply::new(header, Outcome::Error(Some(Code::InternalError), body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::ListenerPolicy,
        config::{Auth, Bytes, Principals},
        host::Unwatched,
        http::{McpFields, McpStep},
    };

    fn dispatcher(memory: usize) -> Dispatcher {
        let config = Config {
            max_message_size: Bytes(1000),
            ..Config::default()
        };
        let access = Access::new(Principals::new(), "/nowhere/tokens.json".into(), 1).unwrap();
        let memory = Budget::new(memory);
        Dispatcher::new(
            Arc::default(),
            Arc::new(config),
            Arc::default(),
            access,
            memory,
        )
    }

    /// `CODE` or the payload, and the request id that it goes to.
    fn ask(body: &[u8], binary: bool) -> (String, Option<String>) {
        ask_within(1 << 20, body, binary)
    }

    /// The same of a server that has so much memory.
    fn ask_within(memory: usize, body: &[u8], binary: bool) -> (String, Option<String>) {
        let dispatcher = dispatcher(memory);
        let policy = Arc::new(ListenerPolicy {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        });
        let identity =
            dispatcher
                .0
                .access
                .unauthenticated("7".into(), [127, 0, 0, 1].into(), false, &policy);
        let identity = &Arc::new(identity);
        let request = Request {
            body,
            binary,
            any_version: false,
            asks: &Asks::Topic,
            postponed: None,
            arrived: Instant::now(),
            identity,
            watch: Arc::new(Unwatched),
        };
        let Reply {
            header, answered, ..
        } = dispatcher.handle(request);
        let id = header
            .and_then(|header| header.request_id)
            .map(str::to_owned);
        let text = match answered.outcome {
            Outcome::Silence => "silence".into(),
            Outcome::Postponed(_) => "postponed".into(),
            Outcome::Json(text) => text,
            Outcome::Binary(_) => "bytes".into(),
            Outcome::Response(..) | Outcome::Redirect(_) => "of HTTP".into(),
            Outcome::Deferred(_) => "deferred".into(),
            Outcome::Error(code, body) => {
                assert_eq!(code.map(Code::as_str), Some(&*body.code));
                body.code.into_owned()
            }
        };
        (text, id)
    }

    #[test]
    fn the_first_check_that_fails_is_answered() {
        let check = |body: &[u8], expected: &str, id: Option<&str>| {
            let (code, answered) = ask(body, false);
            assert_eq!(
                (&*code, answered.as_deref()),
                (expected, id),
                "{:?}",
                String::from_utf8_lossy(body)
            );
        };
        check(b"", "MALFORMED_MESSAGE", None);
        check(b"REQUEST:a.b:1.0.0:1", "MALFORMED_MESSAGE", None);
        check(b"RESPONSE:a.b:1.0.0:1\n{", "INVALID_REQUEST", Some("1"));
        check(b"ERROR:a.b:1.0.0\n{", "INVALID_REQUEST", None);
        check(b"REQUEST:a.b:1.0.0\n{", "INVALID_REQUEST_ID", None);
        check(b"REQUEST:a.b:1.0.0::p\n{", "INVALID_REQUEST_ID", None);
        check(b"REQUEST:a.b:1.0.0:1\n{", "INVALID_PAYLOAD", Some("1"));
        check(b"REQUEST:a.b:1.0.0:1\n\xff", "INVALID_PAYLOAD", Some("1"));
        check(b"REQUEST:a.b:1.0.0:1\n{}", "NO_ROUTE_FOUND", Some("1"));
        check(b"REQUEST:a.b:1.0.0:1\n", "NO_ROUTE_FOUND", Some("1"));
        check(b"PUBLISH:a.b:1.0.0\n{}", "silence", None);
        check(b"PUBLISH:a.b:1.0.0:1\n{}", "NO_ROUTE_FOUND", Some("1"));
        check(b"PUBLISH:a.b:1.0.0:1\n{", "INVALID_PAYLOAD", Some("1"));
        check(b"PUBLISH:a.b:1.0.0:1::5\n{", "MALFORMED_MESSAGE", None);
        check(
            b"REQUEST:system.nothing:1.0.0:1\n",
            "TOPIC_NOT_SUPPORTED",
            Some("1"),
        );
        check(
            b"REQUEST:system.ping:2.0.0:1\n",
            "VERSION_NOT_SUPPORTED",
            Some("1"),
        );
        check(
            b"REQUEST:system.hello:1.0.0:1\n[]",
            "INVALID_REQUEST",
            Some("1"),
        );
        check(
            b"REQUEST:system.hello:1.0.0:1\n{\"client\":1}",
            "INVALID_REQUEST",
            Some("1"),
        );
        check(
            b"REQUEST:system.hello:1.0.0:1\n{\"protocol\":\"2.0\"}",
            "VERSION_NOT_SUPPORTED",
            Some("1"),
        );
        check(
            b"REQUEST:system.services:1.0.0:1\n",
            "{\"services\":[]}",
            Some("1"),
        );
        check(
            b"PUBLISH:system.ping:1.0.0:1\n",
            "{\"delivered\":1}",
            Some("1"),
        );
        assert_eq!(
            ask(b"REQUEST:system.ping:1.0.0:1\nx", true).0,
            "INVALID_REQUEST"
        );
        assert_eq!(ask(b"REQUEST:a.b:1.0.0:1\n\xff", true).0, "NO_ROUTE_FOUND");
    }

    #[test]
    fn of_a_hello_only_what_is_known_is_read() {
        let hello = |payload: &str| {
            ask(
                format!("REQUEST:system.hello:1.0.0:1\n{payload}").as_bytes(),
                false,
            )
            .0
        };
        for good in [
            "",
            "null",
            "{}",
            r#"{"more":[1e999,{"":{}}],"protocol":null}"#,
            r#"{"protocol":"2.0","protoc\u006fl":"1.0"}"#,
        ] {
            assert!(hello(good).contains("connectionId"), "{good}");
        }
        for bad in ["1", "[null]", r#"{"token":["x"]}"#, r#"{"client":{}}"#] {
            assert_eq!(hello(bad), "INVALID_REQUEST", "{bad}");
        }
    }

    #[test]
    fn large_answers_of_system_topics_take_memory() {
        let ping = |size: usize| {
            let body = format!("REQUEST:system.ping:1.0.0:1\n\"{}\"", "x".repeat(size));
            ask_within(3000, body.as_bytes(), false).0
        };
        assert!(ping(2000).contains("echo"));
        assert_eq!(ping(4000), "SERVICE_UNAVAILABLE");
    }

    #[test]
    fn responses_of_tools_take_memory() {
        let core = dispatcher(3000).0;
        let call = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}"#;
        let McpStep::CallTool(reply, ..) = McpStep::of(call.as_bytes(), &McpFields::default())
        else {
            panic!("{call} calls nothing");
        };
        let respond = |size: usize| {
            let waiter = Waiter::of_client(&Unwatched, Instant::now());
            let outcome = Outcome::Json(format!("{:?}", "x".repeat(size - 2)));
            let mut answered = Answered::from(outcome);
            let response = core.tool_response(&reply, &mut answered, waiter);
            response.map_err(|refusal| refusal.body.code.into_owned())?;
            Ok::<_, String>(answered)
        };
        let first = respond(250).unwrap();
        assert!(first.outcome.size() > 250);
        assert_eq!(core.memory.used(), 2000);
        assert_eq!(respond(250).unwrap_err(), "SERVICE_FAILED");
        drop(first);
        assert_eq!(core.memory.used(), 0);
        assert_eq!(respond(400).unwrap_err(), "SERVICE_FAILED");
    }

    #[test]
    fn system_answers() {
        let value =
            |body: &[u8]| serde_json::from_str::<serde_json::Value>(&ask(body, false).0).unwrap();
        let ping = value(b"REQUEST:system.ping:1.0.0:1\n{\"a\":[1,2]}");
        assert_eq!(ping["echo"], json!({"a": [1, 2]}));
        let nested = |depth: usize| {
            format!(
                "REQUEST:system.ping:1.0.0:1\n{}{}",
                "[".repeat(depth),
                "]".repeat(depth)
            )
        };
        assert!(
            value(nested(126).as_bytes())["echo"].is_array(),
            "and the answer can be read"
        );
        assert_eq!(ask(nested(127).as_bytes(), false).0, "INVALID_REQUEST");
        assert!(
            ping["now"].as_str().is_some_and(|now| now.ends_with('Z')),
            "{ping}"
        );
        let hello = value(
            b"REQUEST:system.hello:1.0.0:1\n{\"client\":\"t/1\",\"protocol\":\"1.9\",\"more\":[]}",
        );
        assert_eq!(hello["connectionId"], "7");
        assert_eq!(hello["protocol"], "1.0");
        assert_eq!(hello["principal"], serde_json::Value::Null);
        assert_eq!(hello["limits"]["maxMessageSize"], 1000);
        assert_eq!(hello["limits"]["maxHeaderSize"], 1024);
        assert_eq!(hello["limits"]["idleTimeoutMs"], 60_000);
        assert!(
            hello["server"].as_str().unwrap().starts_with("mb-server/"),
            "{hello}"
        );
    }
}
