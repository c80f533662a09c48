//! One call: a fresh instance, a deadline, and an account of how it ended.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use wasmtime::{PoolConcurrencyLimitError, Store, Trap, UpdateDeadline};

use super::{component::Component, limits::Limits};
use crate::{
    host::{
        Context,
        bindings::exports::mb::service::handler::{PayloadParam, PayloadResult},
    },
    wire::{Payload, Reason},
};

/// Looks after a call that takes longer than a tick. It is asked on the
/// thread of the call, and must not block.
pub trait Watch: Send + Sync {
    /// Whether the call shall end before its deadline.
    fn tick(&self) -> Option<Stop>;
}

/// Nobody looks.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn tick(&self) -> Option<Stop> {
        None
    }
}

/// Why a running call was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its deadline passed.
    Deadline,
    /// The server ends, and its time for that is over.
    Shutdown,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deadline => "stopped at its deadline",
            Self::Shutdown => "stopped because the server shuts down",
        })
    }
}

impl std::error::Error for Stop {}

/// One request to a component.
pub struct Call<'a> {
    /// The action, without the service's name.
    pub action: &'a str,
    /// Handed over as it is.
    pub payload: Payload<'a>,
    /// What the component may ask; holds the deadline too.
    pub context: Context,
    /// Asked at every tick.
    pub watch: Arc<dyn Watch>,
}

/// What a component said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// One JSON text, not checked yet.
    Json(String),
    /// Opaque bytes.
    Binary(Vec<u8>),
    /// The service's own refusal, not checked yet.
    Failure {
        /// Its code.
        code: String,
        /// For a person.
        message: String,
        /// One JSON text.
        details: Option<String>,
    },
}

/// What a deadline covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The instance was being made.
    Start,
    /// The service was running.
    Call,
}

impl Phase {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Call => "call",
        }
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The deadline had passed before anything ran.
    Late,
    /// All instances are taken; nothing ran.
    Full,
    /// Begun and stopped.
    Stopped {
        /// Why.
        stop: Stop,
        /// Where it was.
        phase: Phase,
    },
    /// The service trapped or broke a limit.
    Failed {
        /// Which.
        reason: Reason,
        /// The fact and the limit.
        message: String,
    },
}

/// How a call went.
#[derive(Debug, Clone)]
pub struct CallReport {
    /// The answer, or why there is none.
    pub result: Result<Answer, CallError>,
    /// Most linear memory that the instance held, in bytes.
    pub peak_memory: usize,
    /// From before the instance was made until after it was asked.
    pub elapsed: Duration,
}

/// What belongs to one store.
pub struct Guest {
    context: Context,
    limits: Limits,
    watch: Arc<dyn Watch>,
}

impl Guest {
    pub(super) fn context(&mut self) -> &mut Context {
        &mut self.context
    }
}

impl Component {
    /// Serves one request in an instance of its own.
    #[must_use]
    pub fn call(&self, call: Call<'_>) -> CallReport {
        let begun = Instant::now();
        if begun >= call.context.deadline {
            return CallReport { result: Err(CallError::Late), peak_memory: 0, elapsed: Duration::ZERO };
        }
        let mut store = self.store(call.context, call.watch);
        let result = self.run(&mut store, call.action, call.payload);
        CallReport { result, peak_memory: store.data().limits.memory(), elapsed: begun.elapsed() }
    }

    fn run(&self, store: &mut Store<Guest>, action: &str, payload: Payload<'_>) -> Result<Answer, CallError> {
        let service = self.pre.instantiate(&mut *store).map_err(|error| self.explain(store, Phase::Start, &error))?;
        let payload = match payload {
            Payload::Json(text) => PayloadParam::Json(text),
            Payload::Binary(bytes) => PayloadParam::Binary(bytes),
        };
        let answer = service
            .mb_service_handler()
            .call_handle(&mut *store, action, payload)
            .map_err(|error| self.explain(store, Phase::Call, &error))?;
        Ok(match answer {
            Ok(PayloadResult::Json(text)) => Answer::Json(text),
            Ok(PayloadResult::Binary(bytes)) => Answer::Binary(bytes),
            Err(failure) => Answer::Failure { code: failure.code, message: failure.message, details: failure.details },
        })
    }

    /// What the component says of itself, in an instance of its own.
    pub(super) fn describe(&self, context: Context) -> Result<String, CallError> {
        let mut store = self.store(context, Arc::new(Unwatched));
        let service = self.pre.instantiate(&mut store).map_err(|error| self.explain(&store, Phase::Start, &error))?;
        let text = service.mb_service_handler().call_describe(&mut store);
        text.map_err(|error| self.explain(&store, Phase::Call, &error))
    }

    fn store(&self, context: Context, watch: Arc<dyn Watch>) -> Store<Guest> {
        self.sandbox.pulse.beat();
        let config = &self.sandbox.config;
        let guest = Guest { context, limits: Limits::new(config.memory), watch };
        let mut store = Store::new(&self.sandbox.engine, guest);
        store.limiter(|guest| &mut guest.limits);
        store.set_hostcall_fuel(config.host_data);
        store.set_epoch_deadline(1);
        let pulse = self.sandbox.pulse.clone();
        store.epoch_deadline_callback(move |store| {
            pulse.beat();
            let guest = store.data();
            let late = (Instant::now() >= guest.context.deadline).then_some(Stop::Deadline);
            match late.or_else(|| guest.watch.tick()) {
                None => Ok(UpdateDeadline::Continue(1)),
                Some(stop) => Err(stop.into()),
            }
        });
        store
    }

    /// From wasmtime's error to what the caller is told.
    fn explain(&self, store: &Store<Guest>, phase: Phase, error: &wasmtime::Error) -> CallError {
        if let Some(stop) = error.downcast_ref::<Stop>() {
            return CallError::Stopped { stop: *stop, phase };
        }
        if error.is::<PoolConcurrencyLimitError>() {
            return CallError::Full;
        }
        let config = &self.sandbox.config;
        let failed = |reason, message| CallError::Failed { reason, message };
        let trap = error.downcast_ref::<Trap>();
        if trap == Some(&Trap::StackOverflow) {
            return failed(Reason::Stack, format!("call stack exceeds the limit of {} bytes", config.stack));
        }
        if store.data().limits.refused() {
            return failed(Reason::Memory, format!("needs more memory than the limit of {} bytes", config.memory));
        }
        let root = error.root_cause().to_string();
        match (trap, phase) {
            (Some(trap), _) => failed(Reason::Trap, trap.to_string()),
            // wasmtime keeps the type of this error to itself.
            (None, Phase::Call) if root.contains("fuel allocated for hostcalls") => {
                failed(Reason::AnswerSize, format!("answer exceeds the limit of {} bytes", config.host_data))
            }
            (None, Phase::Call) => failed(Reason::InvalidAnswer, root),
            (None, Phase::Start) => failed(Reason::Start, root),
        }
    }
}
