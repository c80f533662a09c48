//! `mb:service/calls`: one service calls another, on the same thread, within
//! the same deadline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::{
    Context, Host, Watch,
    bindings::mb::service::{
        calls::{self, CallError, Origin},
        types::PayloadResult as Payload,
    },
};
use crate::{
    config::services::covers,
    scheduler::Account,
    store::Unflushed,
    wire::{Code, Topic, Version},
};

/// Depth to which services may call each other on a server: each level costs
/// every thread one more call stack.
pub const CALL_DEPTH: usize = 4;

/// Numbers the calls between services of this process.
static NEXT_CALL: AtomicU64 = AtomicU64::new(1);

/// A service on the way of a call.
#[derive(Debug)]
pub struct CallChain {
    service: Box<str>,
    depth: usize,
    up: Option<Arc<CallChain>>,
    account: Option<Arc<Account>>,
}

impl CallChain {
    /// The service that was called first.
    pub(super) fn first(&self) -> &Self {
        self.up.as_ref().map_or(self, |up| up.first())
    }

    pub(super) fn account(&self) -> Option<&Arc<Account>> {
        self.account.as_ref()
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    fn holds(&self, service: &str) -> bool {
        &*self.service == service || self.up.as_ref().is_some_and(|up| up.holds(service))
    }
}

/// A call that a service makes.
pub struct Nested<'a> {
    /// What is called.
    pub topic: Topic<'a>,
    /// The version that the caller was written against.
    pub version: Version,
    /// Handed over as it is.
    pub payload: Payload,
    /// Its ids, its deadline and who asked first.
    pub context: Context,
    /// Looks after the whole call.
    pub watch: Arc<dyn Watch>,
    /// What its answer rests on is added to it.
    pub unflushed: &'a mut Option<Unflushed>,
}

/// Who serves calls between services.
pub trait Calls: Send + Sync {
    /// Serves one.
    ///
    /// # Errors
    /// The refusal that the calling service gets.
    fn call(&self, call: Nested<'_>) -> Result<Payload, CallError>;
}

impl Host {
    /// Checks a call that the component wants to make, and makes it.
    fn nested(
        &mut self,
        topic: &str,
        version: &str,
        payload: Payload,
        timeout_ms: Option<u64>,
    ) -> Result<Payload, CallError> {
        let refuse = |code: Code, message: String| CallError {
            code: code.as_str().into(),
            message,
            origin: Origin::Server,
            details: None,
        };
        let malformed = |what: &str, text: &str| {
            let text: String = text.chars().take(100).collect();
            refuse(
                Code::MalformedMessage,
                format!("{what} {text:?} breaks its grammar"),
            )
        };
        let topic = Topic::parse(topic).map_err(|_| malformed("topic", topic))?;
        let version = version.parse().map_err(|_| malformed("version", version))?;
        let service = &*self.granted.service;
        if !self
            .granted
            .calls
            .iter()
            .any(|pattern| covers(pattern, topic.as_str()))
        {
            let topic = topic.as_str();
            let message = format!(
                "{service} may not call {topic}; the setting services.{service}.grants.calls would allow it"
            );
            return Err(refuse(Code::Forbidden, message));
        }
        let Some(calls) = self.context.calls.clone() else {
            return Err(refuse(
                Code::Forbidden,
                "no calls while a component is loaded".into(),
            ));
        };
        let chain = &self.context.chain;
        if topic.service() == service
            || chain
                .as_ref()
                .is_some_and(|link| link.holds(topic.service()))
        {
            let message = format!(
                "{} is being served already: the call would close a circle",
                topic.service()
            );
            return Err(refuse(Code::Forbidden, message));
        }
        let depth = chain.as_ref().map_or(0, |link| link.depth) + 1;
        if depth > CALL_DEPTH {
            let message = format!("nested deeper than the limit of {CALL_DEPTH}");
            return Err(refuse(Code::Forbidden, message));
        }
        let link = CallChain {
            service: service.into(),
            depth,
            up: chain.clone(),
            account: self.granted.account.clone(),
        };
        let longest =
            timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms.min(3_600_000)));
        let context = Context {
            request_id: Some(format!("call-{:x}", NEXT_CALL.fetch_add(1, Relaxed)).into()),
            parent_request_id: self.context.request_id.clone(),
            requested_version: Some(version),
            caller: Arc::clone(&self.context.caller),
            deadline: longest.map_or(self.context.deadline, |longest| {
                longest.min(self.context.deadline)
            }),
            began: self.context.began,
            calls: Some(Arc::clone(&calls)),
            chain: Some(Arc::new(link)),
        };
        calls.call(Nested {
            topic,
            version,
            payload,
            context,
            watch: Arc::clone(&self.watch),
            unflushed: &mut self.unflushed,
        })
    }
}

impl calls::Host for Host {
    fn call(
        &mut self,
        topic: String,
        version: String,
        payload: Payload,
        timeout_ms: Option<u64>,
    ) -> wasmtime::Result<Result<Payload, CallError>> {
        self.waiting = true;
        let answer = self.nested(&topic, &version, payload, timeout_ms);
        // A call that took all the time leaves none for its caller.
        if let Some(stop) = self.tick().or_else(|| self.end_wait()) {
            return Err(stop.into());
        }
        self.waiting = false;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_remembers_everyone() {
        let first = Arc::new(CallChain {
            service: "a".into(),
            depth: 1,
            up: None,
            account: None,
        });
        let second = CallChain {
            service: "b".into(),
            depth: 2,
            up: Some(first),
            account: None,
        };
        assert!(second.holds("a") && second.holds("b") && !second.holds("c"));
    }
}
