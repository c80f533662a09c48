//! From a topic to an answer: finds the service, runs it, counts and
//! logs. For calls of clients and of services alike.

use std::{
    fmt, mem,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Map, Value, json, value::RawValue};

use super::{Answered, Core, Counted, Deferred, HandOver, Outcome, Postponed, Refusal, check_json};
use crate::{
    budget::Reservation,
    catalog::{Catalog, Found, Service, ValidationError},
    host::{
        Context, Stop, StoreError, Unflushed, WaitError, Waiter, Watch,
        bindings::mb::service::{calls, types::PayloadResult},
        calls::{Calls, Nested},
    },
    metrics::{self, History, PastCall, Used},
    sandbox::{Call, CallError, CallReport, Phase, ServiceAnswer, Wanted},
    scheduler::{Cost, Ticket},
    wire::{Code, ErrorBody, Origin, Payload, Reason, Topic, Version, codes::COMPILING},
};

/// Time that a caller should wait before it tries again, when there was no
/// room: in milliseconds, about the time of a slow call.
pub(super) const RETRY_WHEN_FULL_MS: u64 = 100;
/// The same while a component is compiled, which may take seconds.
const RETRY_WHEN_COMPILING_MS: u64 = 500;
/// The same when a service did not load: someone has to mend it first.
const RETRY_WHEN_FAILED_MS: u64 = 10_000;

/// The code of a service whose writes did not become durable; its SDK's.
const STORE_FAILED: &str = "STORE_FAILED";

/// Only calls of clients are handed back; nobody sees this of another one.
const POSTPONED: &str = "the call could not begin";

/// A call on its way to a service.
pub(super) struct Task<'a> {
    pub(super) topic: Topic<'a>,
    pub(super) version: Version,
    pub(super) payload: Payload<'a>,
    pub(super) context: Context,
    pub(super) watch: &'a Arc<dyn Watch>,
    /// As the caller gave it; the deadline is in the context.
    pub(super) timeout: Duration,
    /// It goes on when the client resets its connection, and its answer says only
    /// that it was delivered.
    pub(super) is_publish: bool,
    /// The rate of its service has yet to count it: a client asks, not a
    /// service, and for the first time.
    pub(super) counts: bool,
}

impl Core {
    /// Runs a call to its end. Returns also what the answer for a service rests
    /// on; that for a client is deferred.
    pub(super) fn run(self: &Arc<Self>, task: Task<'_>) -> (Answered, Option<Unflushed>) {
        let Task {
            topic,
            version,
            payload,
            mut context,
            watch,
            timeout,
            is_publish,
            counts,
        } = task;
        let postponed = Outcome::Postponed(Postponed {
            until: context.deadline,
            counted: Counted::ByService,
        });
        // Held until the call is over: counting the holders of the service
        // would have all processors write to one place.
        let catalog = self.catalog.load();
        let found = find(&catalog, &topic, version);
        let found = found.map_err(|refusal| (None, Unbegun::Refused(refusal)));
        let ready = found.and_then(|service| {
            let taken = takes(service, &topic, counts)
                .and_then(|()| self.fits(service, &topic, payload, Waiter::of(&**watch, &context)));
            taken.map_err(|refusal| (Some(service), refusal))?;
            Ok(service)
        });
        let service = match ready {
            Ok(service) => service,
            Err((_, Unbegun::Postponed)) => return (postponed.into(), None),
            Err((service, Unbegun::Refused(refusal))) => {
                self.keep_refused(
                    &topic,
                    service.map(|service| &**service),
                    &context,
                    &refusal,
                );
                return (Outcome::from(refusal).into(), None);
            }
        };
        let action = topic.action();
        if service.component.policy().granted.may_call() {
            context.calls = Some(Arc::new(Arc::clone(self)));
        }
        let client = context.depth() == 0;
        if is_publish {
            watch.outlives_reset();
        }
        let about = context.clone();
        // Nested calls count for the one that caused them.
        let ticket = Finishes(client.then(|| watch.ticket()).flatten());
        let mut report = service.component.call(Call {
            action,
            payload,
            context,
            watch: Arc::clone(watch),
        });
        if matches!(&report.result, Err(CallError::Postponed)) {
            return (postponed.into(), None);
        }
        let unflushed = report.unflushed.take();
        let unflushed = unflushed.filter(|unflushed| !unflushed.is_flushed());
        let ended = EndedCall {
            cost: ticket.finish(),
            context: about,
            bytes_in: payload.as_bytes().len() as u64,
            timeout,
            report,
        };
        match unflushed {
            Some(unflushed) if client => {
                let unfinished = Unfinished {
                    core: Arc::clone(self),
                    service: Arc::clone(service),
                    action: action.to_owned(),
                    is_publish,
                    since: Instant::now(),
                    ended,
                    unflushed,
                };
                (Outcome::Deferred(Box::new(unfinished)).into(), None)
            }
            unflushed => (self.finish(service, action, ended, Ok(())), unflushed),
        }
    }

    /// What a call came to, once what its answer rests on is on the disk or is
    /// not. Counts and logs it.
    fn finish(
        &self,
        service: &Service,
        action: &str,
        mut ended: EndedCall,
        flushed: Result<(), StoreError>,
    ) -> Answered {
        let result = mem::replace(&mut ended.report.result, Err(CallError::Postponed));
        let begun = !matches!(&result, Err(CallError::NotBegun(_)));
        let is_reset =
            matches!(&result, Err(CallError::Stopped { stop, .. }) if *stop == Stop::Reset);
        let reset = is_reset && ended.context.depth() == 0;
        let timeout = ended
            .timeout
            .min(service.component.policy().settings.timeout.0);
        let result = result
            .map_err(|error| refuse(error, timeout, ended.cost))
            .and_then(|answer| {
                flushed.map_err(|error| store_failed(&error))?;
                answered(answer)
            })
            .map_err(|refusal| ended.explain(service, refusal));
        let CallReport {
            peak_memory,
            host_calls,
            created,
            waited,
            elapsed,
            ..
        } = ended.report;
        let used = Used {
            bytes_in: ended.bytes_in,
            bytes_out: result.as_ref().map_or(0, Outcome::size) as u64,
            host_calls,
            peak_memory: peak_memory as u64,
        };
        let refusal = result.as_ref().err();
        if created {
            service.stats.own().instances.add(1);
        }
        ended.log(service, action, refusal);
        if History::wants(refusal.is_some(), elapsed) {
            let past = ended.past(service, action, refusal);
            self.metrics.history.keep(refusal.is_some(), past);
        }
        // Counted last: whoever sees it counted finds its log line and record.
        if begun {
            let outcome = match refusal {
                None => metrics::CallOutcome::Answered,
                Some(Refusal { code: None, .. }) => metrics::CallOutcome::Failed,
                Some(Refusal { code: Some(_), .. }) => metrics::CallOutcome::Ended,
            };
            service.stats.own().record(outcome, waited, elapsed, used);
        }
        if reset {
            self.metrics.calls_reset.add(1);
        }
        Answered {
            outcome: result.unwrap_or_else(Outcome::from),
            held: ended.report.held,
            used,
            served: Some(service.description.version),
        }
    }

    /// Whether a payload fits its schema, where that is asked for; within the
    /// server's memory, for which it waits until the deadline.
    fn fits(
        &self,
        service: &Service,
        topic: &Topic<'_>,
        payload: Payload<'_>,
        waiter: Waiter<'_>,
    ) -> Result<(), Unbegun> {
        let Some(inputs) = &service.inputs else {
            return Ok(());
        };
        let validation_error = |ValidationError { path, problem }| {
            Refusal::new(Code::InvalidPayload, problem).with(&json!({"path": path}))
        };
        let needed = inputs
            .memory(topic.action(), payload)
            .map_err(validation_error)?;
        let _held = self.hold(needed, waiter)?;
        Ok(inputs
            .check(topic.action(), payload)
            .map_err(validation_error)?)
    }

    /// Memory to check a payload with.
    fn hold(&self, bytes: usize, waiter: Waiter<'_>) -> Result<Reservation, Unbegun> {
        let limit = self.memory.limit();
        if bytes > limit {
            let message = format!(
                "payload: as values it takes up to {bytes} bytes of memory, and the server has {limit} for all"
            );
            let refusal = Refusal::new(Code::InvalidPayload, message).with(&json!({"path": ""}));
            return Err(refusal.into());
        }
        let mut held = Reservation::empty(&self.memory);
        if held.try_raise(bytes) {
            return Ok(held);
        }
        match waiter.take(|until| held.raise_until(bytes, until)) {
            Ok(()) => Ok(held),
            Err(WaitError::Postponed) => Err(Unbegun::Postponed),
            Err(WaitError::Stopped(stop)) => Err(stopped(stop).into()),
            Err(WaitError::Late) => {
                let message = "not begun within its timeout: no memory to check its payload with";
                Err(Refusal::unavailable(message, RETRY_WHEN_FULL_MS).into())
            }
        }
    }

    /// Keeps a call that was refused before an instance was wanted.
    pub(super) fn keep_refused(
        &self,
        topic: &Topic<'_>,
        service: Option<&Service>,
        context: &Context,
        refusal: &Refusal,
    ) {
        self.metrics.history.keep(
            true,
            PastCall {
                service: topic.service().to_owned(),
                version: service.map(|service| service.description.version.to_string()),
                action: topic.action().to_owned(),
                ..base_of_past_call(context, Some(refusal))
            },
        );
    }
}

/// Why a call does not come as far as an instance.
enum Unbegun {
    Refused(Refusal),
    /// It is to be run again.
    Postponed,
}

impl From<Refusal> for Unbegun {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Whether a service takes a call, before an instance is wanted.
fn takes(service: &Service, topic: &Topic<'_>, counts: bool) -> Result<(), Unbegun> {
    let name = &service.description.name;
    if let Some(rate) = service.rate.as_ref().filter(|_| counts) {
        rate.take()
            .map_err(|wait| Refusal::too_often(name, rate.limit(), wait))?;
    }
    let action = topic.action();
    if !service.description.has_action(action) {
        let message = format!("service {name} has no action {action}");
        return Err(Refusal::new(Code::TopicNotSupported, message).into());
    }
    Ok(())
}

fn find<'a>(
    catalog: &'a Catalog,
    topic: &Topic<'_>,
    version: Version,
) -> Result<&'a Arc<Service>, Refusal> {
    let name = topic.service();
    let found = catalog.find(name, version);
    if !matches!(found, Found::Service(_) | Found::Disabled) && catalog.is_loading(name, version) {
        let message = format!("service {name} is being compiled");
        let details = json!({"retryAfterMs": RETRY_WHEN_COMPILING_MS, "state": COMPILING});
        return Err(Refusal::new(Code::ServiceUnavailable, message).with(&details));
    }
    match found {
        Found::Service(service) => Ok(service),
        Found::Failed(_) => Err(Refusal::unavailable(
            format!("service {name} failed to load"),
            RETRY_WHEN_FAILED_MS,
        )),
        Found::Disabled => {
            let message = format!("service {name} is disabled by the operator");
            Err(Refusal::unavailable(message, RETRY_WHEN_FAILED_MS))
        }
        Found::OtherVersions(available) => {
            let message = format!("no loaded version of {name} is compatible with {version}");
            let available: Vec<_> = available.iter().map(ToString::to_string).collect();
            Err(Refusal::new(Code::VersionNotSupported, message)
                .with(&json!({"available": available})))
        }
        Found::NoService => Err(Refusal::new(
            Code::NoRouteFound,
            format!("no service {name}"),
        )),
    }
}

/// Calls that services make.
impl Calls for Arc<Core> {
    fn call(&self, call: Nested<'_>) -> Result<PayloadResult, calls::CallError> {
        let Nested {
            topic,
            version,
            payload,
            context,
            watch,
            unflushed,
        } = call;
        let refuse = |Refusal { code, body }: Refusal| calls::CallError {
            code: body.code.into_owned(),
            message: body.message.into_owned(),
            origin: match code {
                None => calls::Origin::Service,
                Some(_) => calls::Origin::Server,
            },
            details: body.details.map(|details| details.get().to_owned()),
        };
        let payload = match &payload {
            PayloadResult::Json(text) => {
                Payload::Json(check_json(text.as_bytes()).map_err(refuse)?)
            }
            PayloadResult::Binary(bytes) => Payload::Binary(bytes),
        };
        let size = payload.as_bytes().len();
        if size > self.config.max_message_size.0 {
            let limit = self.config.max_message_size.0;
            let message = format!("message of {size} bytes exceeds the limit of {limit}");
            return Err(refuse(Refusal::new(Code::MessageTooLarge, message)));
        }
        let timeout = context.deadline.saturating_duration_since(Instant::now());
        let task = Task {
            topic,
            version,
            payload,
            context,
            watch: &watch,
            timeout,
            is_publish: false,
            counts: false,
        };
        // The answer is copied to the calling service at once.
        let (answered, rests_on) = Core::run(self, task);
        if let Some(one) = rests_on {
            Unflushed::join(unflushed, one);
        }
        match answered.outcome {
            Outcome::Json(text) => Ok(PayloadResult::Json(text)),
            Outcome::Binary(bytes) => Ok(PayloadResult::Binary(bytes)),
            Outcome::Error(code, body) => Err(refuse(Refusal { code, body })),
            _ => Err(refuse(Refusal::unavailable(POSTPONED, RETRY_WHEN_FULL_MS))),
        }
    }
}

/// From what a service said, which the sandbox has checked, to the caller's
/// answer.
fn answered(answer: ServiceAnswer) -> Result<Outcome, Refusal> {
    match answer {
        ServiceAnswer::Json(text) => Ok(Outcome::Json(text)),
        ServiceAnswer::Binary(bytes) => Ok(Outcome::Binary(bytes)),
        ServiceAnswer::Failure {
            code,
            message,
            details,
        } => {
            let details = details.and_then(|text| RawValue::from_string(text).ok());
            let body = ErrorBody {
                code: code.into(),
                message: message.into(),
                origin: Origin::Service,
                details,
            };
            Err(Refusal { code: None, body })
        }
    }
}

/// From the sandbox's reasons to the protocol's codes.
fn refuse(error: CallError, timeout: Duration, cost: Option<Cost>) -> Refusal {
    let millis = timeout.as_millis();
    match error {
        CallError::NotBegun(wanted) => {
            let waited = match wanted {
                Wanted::Time => "the call came too late",
                Wanted::Permit => "its concurrency was used up",
                Wanted::Instance => "all instances were taken",
                Wanted::Memory => "the server's memory was used up",
            };
            let message = format!("not begun within the timeout of {millis} ms: {waited}");
            Refusal::unavailable(message, RETRY_WHEN_FULL_MS)
        }
        CallError::Postponed => Refusal::unavailable(POSTPONED, RETRY_WHEN_FULL_MS),
        CallError::Stopped {
            stop: Stop::Deadline,
            phase,
        } => timed_out(millis, phase, cost),
        CallError::Stopped { stop, phase: _ } => stopped(stop),
        CallError::Failed { reason, message } => Refusal::failed(reason, message),
    }
}

/// A call that was stopped before its deadline.
pub(super) fn stopped(stop: Stop) -> Refusal {
    match stop {
        Stop::Killed => Refusal::failed(Reason::Killed, stop.to_string()),
        Stop::Reset => Refusal::failed(Reason::Reset, stop.to_string()),
        Stop::Shutdown => Refusal::new(
            Code::ShuttingDown,
            "stopped, because the server shuts down and drain_timeout has passed",
        ),
        Stop::Deadline => Refusal::new(Code::Timeout, stop.to_string()),
    }
}

/// With what is known of where the time went, for a call that saw a tick.
fn timed_out(millis: u128, phase: Phase, cost: Option<Cost>) -> Refusal {
    let message = format!("stopped at the timeout of {millis} ms");
    let mut details = json!({"phase": phase.as_str()});
    if let Some(Cost { ran, waited }) = cost {
        details["ranMs"] = json!(ran.as_millis() as u64);
        details["waitedMs"] = json!(waited.as_millis() as u64);
    }
    Refusal::new(Code::Timeout, message).with(&details)
}

/// Reports the end of a call to the scheduler, on every way out.
struct Finishes<'a>(Option<&'a Ticket>);

impl Finishes<'_> {
    fn finish(&self) -> Option<Cost> {
        self.0.and_then(Ticket::finish)
    }
}

impl Drop for Finishes<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A call of a client that has ended, and whose answer rests on what is not on
/// the disk yet.
struct Unfinished {
    core: Arc<Core>,
    service: Arc<Service>,
    action: String,
    is_publish: bool,
    /// When it ended.
    since: Instant,
    ended: EndedCall,
    unflushed: Unflushed,
}

impl Unfinished {
    /// What it came to.
    fn finish(mut self, flushed: Result<(), StoreError>) -> Answered {
        self.ended.report.elapsed += self.since.elapsed();
        let has_id = self.ended.context.request_id.is_some();
        let (service, action) = (&self.service, &self.action);
        let mut answered = self.core.finish(service, action, self.ended, flushed);
        if self.is_publish {
            let topic = format!("{}.{action}", service.description.name);
            answered.outcome = self.core.published(&topic, has_id, answered.outcome);
        }
        answered
    }
}

impl Deferred for Unfinished {
    fn wait(self: Box<Self>) -> Answered {
        let flushed = self.unflushed.wait(self.ended.context.deadline);
        self.finish(flushed)
    }

    fn then(self: Box<Self>, hand_over: HandOver) {
        let unflushed = self.unflushed.clone();
        unflushed.then(self.ended.context.deadline, move |flushed, more| {
            hand_over(Box::new(move || self.finish(flushed)), more);
        });
    }
}

impl fmt::Debug for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unfinished").finish_non_exhaustive()
    }
}

/// What the SDK makes of an error of the store, for a service that has not seen
/// it.
fn store_failed(error: &StoreError) -> Refusal {
    let body = ErrorBody {
        code: STORE_FAILED.into(),
        message: error.for_service().into(),
        origin: Origin::Service,
        details: None,
    };
    Refusal { code: None, body }
}

/// A call that has ended, for its caller, the history and the log.
struct EndedCall {
    context: Context,
    /// None for one that saw no tick.
    cost: Option<Cost>,
    bytes_in: u64,
    timeout: Duration,
    report: CallReport,
}

impl EndedCall {
    /// Adds to a failure of the sandbox what is known about it.
    fn explain(&self, service: &Service, mut refusal: Refusal) -> Refusal {
        if refusal.code != Some(Code::ServiceFailed) {
            return refusal;
        }
        let CallReport {
            peak_memory,
            elapsed,
            backtrace,
            stderr,
            ..
        } = &self.report;
        let known = refusal.body.details.take();
        let known = known.and_then(|details| serde_json::from_str(details.get()).ok());
        let mut known: Map<String, Value> = known.unwrap_or_default();
        known.insert("peakMemory".into(), json!(peak_memory));
        known.insert("elapsedMs".into(), json!(elapsed.as_millis() as u64));
        let exposes = service.component.policy().settings.expose_traps;
        for (name, lines) in [("backtrace", backtrace), ("stderr", stderr)] {
            if exposes && !lines.is_empty() {
                known.insert(name.into(), json!(lines));
            }
        }
        refusal.with(&Value::Object(known))
    }

    /// For the history.
    fn past(&self, service: &Service, action: &str, refusal: Option<&Refusal>) -> PastCall {
        let millis = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        let description = &service.description;
        PastCall {
            service: description.name.clone(),
            version: Some(description.version.to_string()),
            action: action.to_owned(),
            elapsed_ms: millis(self.report.elapsed),
            waited_ms: millis(self.report.waited),
            ran_ms: self.cost.map(|cost| millis(cost.ran)),
            cpu_waited_ms: self.cost.map(|cost| millis(cost.waited)),
            peak_memory: self.report.peak_memory,
            backtrace: self.report.backtrace.clone(),
            stderr: self.report.stderr.clone(),
            ..base_of_past_call(&self.context, refusal)
        }
    }

    /// One line at debug for every call, and one at warn for each that the
    /// server ended.
    fn log(&self, service: &Service, action: &str, refusal: Option<&Refusal>) {
        let CallReport {
            peak_memory,
            elapsed,
            backtrace,
            ..
        } = &self.report;
        let context = &self.context;
        let description = &service.description;
        let request_id = context.request_id.as_deref().unwrap_or("-");
        let parent_request_id = context.parent_request_id.as_deref().unwrap_or("-");
        let connection = &*context.caller.connection_id;
        let elapsed_us = elapsed.as_micros() as u64;
        match refusal {
            Some(Refusal { code: Some(_), .. }) if !service.failed_lines.allows("call failed") => {}
            Some(Refusal {
                code: Some(code),
                body,
            }) => tracing::warn!(
                service = description.name,
                version = %description.version,
                action,
                request_id,
                parent_request_id,
                connection,
                code = code.as_str(),
                details = body.details.as_deref().map_or("", RawValue::get),
                peak_memory,
                elapsed_us,
                backtrace = backtrace.join(" < "),
                "call failed: {}",
                body.message
            ),
            None | Some(Refusal { code: None, .. }) => tracing::debug!(
                service = description.name,
                version = %description.version,
                action,
                request_id,
                parent_request_id,
                connection,
                code = refusal.map_or("-", |refusal| &*refusal.body.code),
                elapsed_us,
                "call ended"
            ),
        }
    }
}

/// What is kept of any call; the rest is empty.
fn base_of_past_call(context: &Context, refusal: Option<&Refusal>) -> PastCall {
    PastCall {
        request_id: context.request_id.as_deref().unwrap_or("-").to_owned(),
        parent_request_id: context.parent_request_id.as_deref().map(str::to_owned),
        connection: context.caller.connection_id.clone(),
        principal: context.caller.principal.clone(),
        ended: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        outcome: refusal
            .map_or("OK", |refusal| &*refusal.body.code)
            .to_owned(),
        message: refusal.map(|refusal| refusal.body.message.to_string()),
        details: refusal.and_then(|refusal| metrics::brief(refusal.body.details.as_ref()?)),
        ..PastCall::default()
    }
}
