//! From a message to its answer: parse, authorise, route, call, and turn
//! whatever comes of it into a code of the protocol.

mod system;

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{json, value::RawValue};

use crate::{
    catalog::{Catalog, Found, SYSTEM, Service},
    host::{Context, context::Caller},
    log::Limiter,
    metrics::Metrics,
    sandbox::{Answer, Call, CallError, Phase, Stop, Watch},
    wire::{Code, ErrorBody, Header, Kind, Origin, Payload, Reason, codes::is_service_code, json as wire_json},
};

/// What a caller is told to wait before it tries again, when there was no
/// room: in milliseconds, about the time of a slow call.
const RETRY_WHEN_FULL_MS: u64 = 100;
/// The same when a service did not load: someone has to mend it first.
const RETRY_WHEN_FAILED_MS: u64 = 10_000;

/// Longest message of a service's failure, in bytes.
const MAX_FAILURE_MESSAGE: usize = 4096;
/// Levels that an ERROR puts around its details.
const DETAILS_DEPTH: usize = 1;
/// Of a peer's own text, an error repeats at most this many characters.
const MAX_REPEATED: usize = 200;

/// A whole message, and who sent it.
pub struct Request<'a> {
    /// Header line and payload.
    pub body: &'a [u8],
    /// The payload is opaque bytes.
    pub binary: bool,
    /// When its last byte was read; its timeout counts from here.
    pub arrived: Instant,
    /// Who asks.
    pub caller: &'a Arc<Caller>,
    /// Looks after a slow call.
    pub watch: Arc<dyn Watch>,
}

/// What goes back.
#[derive(Debug)]
pub struct Reply<'a> {
    /// The header of what is answered; none where no request can be named.
    pub header: Option<Header<'a>>,
    /// The answer.
    pub outcome: Outcome,
}

/// The answer itself.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing is sent: a PUBLISH without an id.
    Silence,
    /// RESPONSE with JSON.
    Json(String),
    /// RESPONSE with bytes.
    Binary(Vec<u8>),
    /// ERROR; the code is the server's, or none if it is the service's.
    Error(Option<Code>, ErrorBody<'static>),
}

/// Answers messages. The seam between the connection's side and the rest.
pub trait Handle: Send + Sync {
    /// Answers one.
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a>;
}

/// What clients are told about the server's bounds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a message, and of an answer's payload.
    pub max_message_size: usize,
    /// Answers that may wait to leave together.
    pub max_in_flight: usize,
    /// Silence after which a client sends a keep-alive.
    pub keep_alive_interval: Duration,
    /// Silence after which a connection is closed.
    pub idle_timeout: Duration,
    /// For a request that names none.
    pub default_timeout: Duration,
}

/// Serves requests from a catalog.
pub struct Dispatcher {
    catalog: Arc<Catalog>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

/// A refusal, before it is joined with the header that it answers.
struct Refusal {
    code: Option<Code>,
    body: ErrorBody<'static>,
}

impl Refusal {
    fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code: Some(code), body: ErrorBody::server(code, message) }
    }

    fn with(mut self, details: &serde_json::Value) -> Self {
        self.body = self.body.with_details(details);
        self
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
        let (header, payload) = match Header::parse(request.body) {
            Ok(parsed) => parsed,
            Err(error) => {
                let refusal = Refusal::new(Code::MalformedMessage, error.to_string());
                return Reply { header: None, outcome: Outcome::Error(refusal.code, refusal.body) };
            }
        };
        if header.kind == Kind::Request && header.request_id.is_none() {
            // Without an id there is no request that could be named.
            let message = format!("REQUEST to {} has no request id, the fourth field", header.topic.as_str());
            let refusal = Refusal::new(Code::InvalidRequestId, message);
            return Reply { header: None, outcome: Outcome::Error(refusal.code, refusal.body) };
        }
        let outcome = self.serve(&header, payload, &request);
        let outcome = if header.kind == Kind::Publish { self.published(&header, outcome) } else { outcome };
        Reply { header: Some(header), outcome }
    }
}

impl Dispatcher {
    /// A dispatcher over a catalog.
    #[must_use]
    pub fn new(catalog: Arc<Catalog>, limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self { catalog, limits, metrics }
    }

    fn serve(&self, header: &Header<'_>, payload: &[u8], request: &Request<'_>) -> Outcome {
        match self.route(header, payload, request) {
            Ok(outcome) => outcome,
            Err(Refusal { code, body }) => Outcome::Error(code, body),
        }
    }

    /// The checks in the order that the protocol gives them.
    fn route(&self, header: &Header<'_>, payload: &[u8], request: &Request<'_>) -> Result<Outcome, Refusal> {
        if matches!(header.kind, Kind::Response | Kind::Error) {
            let message = format!("a client sends REQUEST or PUBLISH, not {}", header.kind.as_str());
            return Err(Refusal::new(Code::InvalidRequest, message));
        }
        let payload = if request.binary { Payload::Binary(payload) } else { Payload::Json(check_json(payload)?) };
        if header.topic.service() == SYSTEM {
            return self.system(header, payload, request.caller).map(Outcome::Json);
        }
        let service = self.find(header)?;
        let action = header.topic.action();
        if !service.description.has_action(action) {
            let message = format!("service {} has no action {action}", service.description.name);
            return Err(Refusal::new(Code::TopicNotSupported, message));
        }
        self.call(service, header, payload, request)
    }

    fn find(&self, header: &Header<'_>) -> Result<&Arc<Service>, Refusal> {
        let name = header.topic.service();
        match self.catalog.find(name, header.version) {
            Found::Service(service) => Ok(service),
            Found::Failed(_) => {
                Err(Refusal::unavailable(format!("service {name} failed to load"), RETRY_WHEN_FAILED_MS))
            }
            Found::OtherVersions(available) => {
                let message = format!("no loaded version of {name} is compatible with {}", header.version);
                let available: Vec<_> = available.iter().map(ToString::to_string).collect();
                Err(Refusal::new(Code::VersionNotSupported, message).with(&json!({"available": available})))
            }
            Found::Nobody => Err(Refusal::new(Code::NoRouteFound, format!("no service {name}"))),
        }
    }

    fn call(
        &self,
        service: &Service,
        header: &Header<'_>,
        payload: Payload<'_>,
        request: &Request<'_>,
    ) -> Result<Outcome, Refusal> {
        let timeout = header.timeout.unwrap_or(self.limits.default_timeout);
        let context = Context {
            request_id: header.request_id.map(Into::into),
            parent_request_id: header.parent_request_id.map(Into::into),
            requested_version: Some(header.version),
            caller: Arc::clone(request.caller),
            deadline: request.arrived + timeout,
        };
        let call = Call { action: header.topic.action(), payload, context, watch: Arc::clone(&request.watch) };
        let report = service.component.call(call);
        let result = report.result.map_err(|error| refuse(error, timeout)).and_then(|answer| self.check(answer));
        let stats = &service.stats;
        let begun = !matches!(&result, Err(Refusal { code: Some(Code::ServiceUnavailable), .. }));
        if begun {
            stats.calls.add(1);
            stats.latency.record(report.elapsed);
        }
        match &result {
            Ok(_) => {}
            Err(Refusal { code: None, .. }) => stats.failures.add(1),
            Err(Refusal { code: Some(code), body }) => {
                if begun {
                    stats.errors.add(1);
                }
                if service.failed_lines.allows("call failed") {
                    tracing::warn!(
                        service = service.description.name,
                        version = %service.description.version,
                        action = header.topic.action(),
                        request_id = header.request_id.unwrap_or("-"),
                        connection = request.caller.connection_id,
                        code = code.as_str(),
                        details = body.details.as_deref().map_or("", RawValue::get),
                        peak_memory = report.peak_memory,
                        elapsed_us = report.elapsed.as_micros(),
                        "call failed: {}",
                        body.message
                    );
                }
            }
        }
        result
    }

    /// A service's answer is a stranger's: checked before anyone relies on it.
    fn check(&self, answer: Answer) -> Result<Outcome, Refusal> {
        let limit = self.limits.max_message_size;
        let sized = |size: usize| {
            let message = || format!("answer of {size} bytes exceeds the limit of {limit}");
            if size > limit { Err(Refusal::failed(Reason::AnswerSize, message())) } else { Ok(()) }
        };
        let checked_json = |what: &str, text: &str| {
            wire_json::check_text(text)
                .map_err(|error| Refusal::failed(Reason::InvalidAnswer, format!("{what} is {error}")))
        };
        match answer {
            Answer::Json(text) => {
                sized(text.len())?;
                checked_json("answer", &text)?;
                Ok(Outcome::Json(text))
            }
            Answer::Binary(bytes) => {
                sized(bytes.len())?;
                Ok(Outcome::Binary(bytes))
            }
            Answer::Failure { code, message, details } => {
                // Escaped, a text may take six times as much.
                if message.len() > MAX_FAILURE_MESSAGE {
                    let size = message.len();
                    let message = format!("failure message of {size} bytes exceeds the limit of {MAX_FAILURE_MESSAGE}");
                    return Err(Refusal::failed(Reason::AnswerSize, message));
                }
                sized(code.len() + message.len() + details.as_ref().map_or(0, String::len))?;
                if !is_service_code(&code) {
                    let message = "failure code breaks its grammar [A-Z][A-Z0-9_]{0,63}";
                    return Err(Refusal::failed(Reason::InvalidAnswer, message));
                }
                if let Some(details) = &details {
                    checked_json("failure details", details)?;
                    let limit = wire_json::MAX_DEPTH - DETAILS_DEPTH;
                    wire_json::check_depth(details, limit).map_err(|error| {
                        Refusal::failed(Reason::InvalidAnswer, format!("failure details is {error}"))
                    })?;
                }
                let details = details.and_then(|text| RawValue::from_string(text).ok());
                let body = ErrorBody { code: code.into(), message: message.into(), origin: Origin::Service, details };
                Err(Refusal { code: None, body })
            }
        }
    }

    /// What comes back of a PUBLISH: without an id nothing, whatever happened.
    fn published(&self, header: &Header<'_>, outcome: Outcome) -> Outcome {
        match (header.request_id, outcome) {
            (Some(_), Outcome::Error(code, body)) => Outcome::Error(code, body),
            (Some(_), _) => Outcome::Json(r#"{"delivered":1}"#.into()),
            (None, Outcome::Error(_, body)) => {
                self.metrics.publish_failures.add(1);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("publish failed") {
                    tracing::info!(topic = header.topic.as_str(), code = %body.code, "publish failed: {}", body.message);
                }
                Outcome::Silence
            }
            (None, _) => Outcome::Silence,
        }
    }
}

/// A payload that is not BINARY is JSON, and an empty one is `null`.
fn check_json(payload: &[u8]) -> Result<&str, Refusal> {
    if payload.is_empty() {
        return Ok(wire_json::NULL);
    }
    wire_json::check(payload).map_err(|error| Refusal::new(Code::InvalidPayload, format!("payload is {error}")))
}

/// From the sandbox's reasons to the protocol's codes.
fn refuse(error: CallError, timeout: Duration) -> Refusal {
    match error {
        CallError::Late => {
            let message = format!("not begun within the timeout of {} ms", timeout.as_millis());
            Refusal::unavailable(message, RETRY_WHEN_FULL_MS)
        }
        CallError::Full => Refusal::unavailable("all instances are taken", RETRY_WHEN_FULL_MS),
        CallError::Stopped { stop: Stop::Deadline, phase } => timed_out(timeout, phase),
        CallError::Stopped { stop: Stop::Shutdown, phase: _ } => {
            Refusal::new(Code::ShuttingDown, "stopped, because the server shuts down and its time for that is over")
        }
        CallError::Failed { reason, message } => Refusal::failed(reason, message),
    }
}

fn timed_out(timeout: Duration, phase: Phase) -> Refusal {
    let message = format!("stopped at the timeout of {} ms", timeout.as_millis());
    Refusal::new(Code::Timeout, message).with(&json!({"phase": phase.as_str()}))
}

/// The answer to a request whose handling panicked: a defect of the server.
/// The log line carries the same id.
#[must_use]
pub fn internal_error<'a>(body: &'a [u8], error_id: &str) -> Reply<'a> {
    let header = Header::parse(body).ok().map(|(header, _)| header);
    if header.is_some_and(|header| header.kind == Kind::Publish && header.request_id.is_none()) {
        return Reply { header, outcome: Outcome::Silence };
    }
    let message = format!("defect of the server, error id {error_id}");
    let body = ErrorBody::server(Code::InternalError, message).with_details(&json!({"errorId": error_id}));
    Reply { header, outcome: Outcome::Error(Some(Code::InternalError), body) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Unwatched;

    fn dispatcher() -> Dispatcher {
        let limits = Limits {
            max_message_size: 1000,
            max_in_flight: 64,
            keep_alive_interval: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(60),
            default_timeout: Duration::from_secs(5),
        };
        Dispatcher::new(Arc::default(), limits, Arc::default())
    }

    /// `CODE` or the payload, and the request id that it goes to.
    fn ask(body: &[u8], binary: bool) -> (String, Option<String>) {
        let caller = Arc::new(Caller { connection_id: "7".into(), ..Caller::default() });
        let request = Request { body, binary, arrived: Instant::now(), caller: &caller, watch: Arc::new(Unwatched) };
        let Reply { header, outcome } = dispatcher().handle(request);
        let id = header.and_then(|header| header.request_id).map(str::to_owned);
        let text = match outcome {
            Outcome::Silence => "silence".into(),
            Outcome::Json(text) => text,
            Outcome::Binary(_) => "bytes".into(),
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
            assert_eq!((&*code, answered.as_deref()), (expected, id), "{:?}", String::from_utf8_lossy(body));
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
        check(b"REQUEST:system.nothing:1.0.0:1\n", "TOPIC_NOT_SUPPORTED", Some("1"));
        check(b"REQUEST:system.ping:2.0.0:1\n", "VERSION_NOT_SUPPORTED", Some("1"));
        check(b"REQUEST:system.hello:1.0.0:1\n[]", "INVALID_REQUEST", Some("1"));
        check(b"REQUEST:system.hello:1.0.0:1\n{\"client\":1}", "INVALID_REQUEST", Some("1"));
        check(b"REQUEST:system.hello:1.0.0:1\n{\"protocol\":\"2.0\"}", "VERSION_NOT_SUPPORTED", Some("1"));
        check(b"REQUEST:system.services:1.0.0:1\n", "{\"services\":[]}", Some("1"));
        check(b"PUBLISH:system.ping:1.0.0:1\n", "{\"delivered\":1}", Some("1"));
        assert_eq!(ask(b"REQUEST:system.ping:1.0.0:1\nx", true).0, "INVALID_REQUEST");
        assert_eq!(ask(b"REQUEST:a.b:1.0.0:1\n\xff", true).0, "NO_ROUTE_FOUND");
    }

    #[test]
    fn system_answers() {
        let value = |body: &[u8]| serde_json::from_str::<serde_json::Value>(&ask(body, false).0).unwrap();
        let ping = value(b"REQUEST:system.ping:1.0.0:1\n{\"a\":[1,2]}");
        assert_eq!(ping["echo"], json!({"a": [1, 2]}));
        let nested = |depth: usize| format!("REQUEST:system.ping:1.0.0:1\n{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(value(nested(126).as_bytes())["echo"].is_array(), "and the answer can be read");
        assert_eq!(ask(nested(127).as_bytes(), false).0, "INVALID_REQUEST");
        assert!(ping["now"].as_str().is_some_and(|now| now.ends_with('Z')), "{ping}");
        let hello = value(b"REQUEST:system.hello:1.0.0:1\n{\"client\":\"t/1\",\"protocol\":\"1.9\",\"more\":[]}");
        assert_eq!(hello["connectionId"], "7");
        assert_eq!(hello["protocol"], "1.0");
        assert_eq!(hello["principal"], serde_json::Value::Null);
        assert_eq!(hello["limits"]["maxMessageSize"], 1000);
        assert_eq!(hello["limits"]["maxHeaderSize"], 1024);
        assert_eq!(hello["limits"]["idleTimeoutMs"], 60_000);
        assert!(hello["server"].as_str().unwrap().starts_with("mb-server/"), "{hello}");
    }

    #[test]
    fn answers_are_checked() {
        let dispatcher = dispatcher();
        let reason = |answer: Answer| match dispatcher.check(answer) {
            Ok(_) => "fine".to_owned(),
            Err(Refusal { code: None, body }) => body.code.into_owned(),
            Err(Refusal { code: Some(code), body }) => {
                assert_eq!(code, Code::ServiceFailed);
                let details: serde_json::Value = serde_json::from_str(body.details.unwrap().get()).unwrap();
                details["reason"].as_str().unwrap().to_owned()
            }
        };
        let failure = |code: &str, details: Option<&str>| Answer::Failure {
            code: code.into(),
            message: "m".into(),
            details: details.map(str::to_owned),
        };
        assert_eq!(reason(Answer::Json("[]".into())), "fine");
        assert_eq!(reason(Answer::Json(String::new())), "invalid-answer");
        assert_eq!(reason(Answer::Json("{".into())), "invalid-answer");
        assert_eq!(reason(Answer::Binary(vec![0; 1000])), "fine");
        assert_eq!(reason(Answer::Binary(vec![0; 1001])), "answer-size");
        assert_eq!(reason(failure("NOT_FOUND", Some("{}"))), "NOT_FOUND");
        assert_eq!(reason(failure("not ok", None)), "invalid-answer");
        assert_eq!(reason(failure("NOT_FOUND", Some("{"))), "invalid-answer");
        assert_eq!(reason(failure("NOT_FOUND", Some(&"1".repeat(1000)))), "answer-size");
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(reason(Answer::Json(nested(127))), "fine");
        assert_eq!(reason(failure("NOT_FOUND", Some(&nested(126)))), "NOT_FOUND");
        assert_eq!(reason(failure("NOT_FOUND", Some(&nested(127)))), "invalid-answer", "the ERROR nests one deeper");
    }
}
