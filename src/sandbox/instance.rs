//! One call: an instance, a deadline, and an account of how it ended.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use wasmtime::{
    PoolConcurrencyLimitError, Store, Trap, UpdateDeadline, WasmBacktrace,
    component::ResourceTableError,
};

use super::{
    STACK,
    answer::{SMALL_ANSWER, ServiceAnswer},
    component::Component,
    limits::Limits,
    pool::{IdleEviction, IdleInstance},
    reset::Resetter,
    slots::{Found, Slot},
};
use crate::{
    budget::{Budget, Reservation},
    config::Isolation,
    host::{
        self, Context, HasHost, Host, MAX_HANDLES, Stop, Unflushed, Unwatched, WaitError, Waiter,
        Watch,
        bindings::{
            Full,
            exports::mb::service::handler::{PayloadParam, PayloadResult},
        },
    },
    wire::{Payload, Reason},
};

/// A call that waits for tables, memories or modules of the pool tries again
/// this soon, and then less and less often: the pool tells nobody when it gets
/// some back, and each try gives up the idle instances of all services.
const FIRST_RETRY: Duration = Duration::from_millis(2);
const RETRY_EVERY: Duration = Duration::from_millis(100);
/// Calls that an instance serves before it is replaced: what leaks slowly ends.
const MAX_CALLS: u64 = 10_000;
/// Frames of a backtrace that are kept.
const MAX_FRAMES: usize = 32;
/// Longest name of a function in a backtrace, in bytes.
const MAX_FUNCTION_NAME: usize = 200;
/// Longest account of a failure, in bytes: a component's own names can be in it.
const MAX_MESSAGE: usize = 500;

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

crate::wire::words! {
    /// What a deadline covers.
    pub enum Phase {
        /// The instance was being made.
        Start = "start",
        /// The service was running.
        Call = "call",
        /// The service waited for a host function: a sleep, another service, the
        /// store.
        HostCall = "host-call",
        /// The call waited for a processor.
        Scheduling = "scheduling",
    }
}

/// What a call that was not begun waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: its deadline had passed when it came.
    Time,
    /// A permit: the service's `concurrency` is used up.
    Permit,
    /// An instance.
    Instance,
    /// Memory of the server.
    Memory,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// Nothing ran.
    NotBegun(Wanted),
    /// Nothing ran, and the call is to be made again: [`Watch::queues`] says
    /// that too many wait.
    Postponed,
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

impl CallError {
    /// Of a call that has waited in vain for what it wanted.
    fn missed(missed: WaitError, wanted: Wanted) -> Self {
        match missed {
            WaitError::Late => Self::NotBegun(wanted),
            WaitError::Stopped(stop) => Self::Stopped {
                stop,
                phase: Phase::Scheduling,
            },
            WaitError::Postponed => Self::Postponed,
        }
    }
}

/// How a call went.
#[derive(Debug)]
pub struct CallReport {
    /// The answer, which was checked, or why there is none.
    pub result: Result<ServiceAnswer, CallError>,
    /// Most linear memory that the instance held, in bytes.
    pub peak_memory: usize,
    /// Host functions that it called, but for those that give constants.
    pub host_calls: u64,
    /// An instance was made for it.
    pub created: bool,
    /// From when it came until there was an instance for it: turn, place,
    /// memory and instantiation.
    pub waited: Duration,
    /// From when it came until after it was asked.
    pub elapsed: Duration,
    /// Functions of the component that ran when it failed, innermost first.
    pub backtrace: Vec<String>,
    /// The newest lines that it printed to standard error, if it failed.
    pub stderr: Vec<String>,
    /// Keeps the memory for the answer, unless that is small.
    pub held: Option<Reservation>,
    /// The answer may leave once that is on the disk.
    pub unflushed: Option<Unflushed>,
}

impl CallReport {
    /// Of a call that has not come to its end.
    fn new() -> Self {
        Self {
            result: Err(CallError::Postponed),
            peak_memory: 0,
            host_calls: 0,
            created: false,
            waited: Duration::ZERO,
            elapsed: Duration::ZERO,
            backtrace: Vec::new(),
            stderr: Vec::new(),
            held: None,
            unflushed: None,
        }
    }
}

/// What belongs to one store.
pub struct Guest {
    pub(super) host: Host,
    pub(super) limits: Limits,
}

impl HasHost for Guest {
    fn host(&mut self) -> &mut Host {
        &mut self.host
    }
}

/// An instance that runs or may run.
pub(super) struct Live {
    pub(super) store: Store<Guest>,
    pub(super) service: Full,
    /// Resets it after a call, if that is to be done.
    resetter: Option<Resetter>,
    /// Its size when it was new.
    size: (usize, usize),
    /// Its slot among those of the server.
    _slot: Slot,
}

impl Live {
    /// Whether it holds memory that all share.
    pub(super) fn holds_memory(&self) -> bool {
        self.store.data().limits.holds_shared()
    }

    /// Whether it is not what it was at its checkpoint.
    pub(super) fn differs(&mut self) -> wasmtime::Result<bool> {
        let Self {
            store, resetter, ..
        } = self;
        resetter
            .as_ref()
            .map_or(Ok(false), |resetter| resetter.differs(store))
    }
}

impl Component {
    /// Serves one request. Waits for a permit until the deadline; work whose
    /// deadline has passed is not begun.
    #[must_use]
    pub fn call(&self, mut call: Call<'_>) -> CallReport {
        let begun = Instant::now();
        call.context.began = begun;
        call.context.deadline = call
            .context
            .deadline
            .min(begun + self.policy.settings.timeout.0);
        let mut report = CallReport::new();
        report.result = self.admit_and_run(call, begun, &mut report);
        report.elapsed = begun.elapsed();
        report
    }

    fn admit_and_run(
        &self,
        call: Call<'_>,
        begun: Instant,
        report: &mut CallReport,
    ) -> Result<ServiceAnswer, CallError> {
        let deadline = call.context.deadline;
        if begun >= deadline {
            return Err(CallError::NotBegun(Wanted::Time));
        }
        let waiter = Waiter::of(&*call.watch, &call.context);
        let _permit = ConcurrencyPermit::take(&self.permits, waiter)
            .map_err(|missed| CallError::missed(missed, Wanted::Permit))?;
        if waiter.is_outermost && self.policy.granted.is_over_its_share() {
            self.enter(&call)?;
        }
        let idle = match self.take_idle() {
            Some(idle_instance) => Ok(idle_instance),
            None => match self.slot(call.context.depth(), waiter)? {
                Found::Idle(idle_instance) => Ok(*idle_instance),
                Found::Slot(slot) => Err(slot),
            },
        };
        let IdleInstance { mut live, calls } = match idle {
            Ok(mut idle_instance) => {
                renew(&mut idle_instance.live.store, call.context, call.watch);
                idle_instance
            }
            Err(slot) => {
                let live = self.fresh(call.context, call.watch, slot, report)?;
                report.created = true;
                IdleInstance { live, calls: 0 }
            }
        };
        report.waited = begun.elapsed();
        let asked = self.ask(&mut live, call.action, call.payload, report);
        report.host_calls = live.store.data().host.host_calls();
        report.unflushed = live.store.data_mut().host.take_unflushed();
        // One that failed is dropped here.
        let answer = asked?;
        report.peak_memory = live.store.data().limits.memory();
        answer
            .check(self.policy.answer_size)
            .inspect_err(|_| report.stderr = live.store.data().host.stderr())?;
        if answer.size() > SMALL_ANSWER {
            let mut reservation = Reservation::empty(&self.sandbox.memory);
            if !reservation.try_raise(answer.size()) {
                wait_for_memory(&mut reservation, answer.size(), live, deadline)?;
                report.held = Some(reservation);
                return Ok(answer);
            }
            report.held = Some(reservation);
        }
        if calls + 1 < MAX_CALLS && self.is_as_new(&mut live) {
            live.store.data_mut().host.rest();
            let resetter = live.resetter.as_mut();
            let verify = resetter.is_some_and(|resetter| resetter.countdown.is_due());
            let calls = calls + 1;
            let idle_instance = IdleInstance { live, calls };
            if verify {
                let Self { digest, record, .. } = self;
                let memory = &self.sandbox.memory;
                let has_memory = memory.limit().saturating_sub(memory.used())
                    >= self.first_reservation()
                    && !self.sandbox.lacks_slots();
                let verifier = &self.sandbox.verifier;
                verifier.verify(idle_instance, &self.idle, digest, record, has_memory);
            } else {
                self.idle.put(idle_instance);
            }
        }
        Ok(answer)
    }

    #[inline]
    fn take_idle(&self) -> Option<IdleInstance> {
        // One that was reset may have come back just when a defect was found.
        self.idle.take().filter(|idle_instance| {
            idle_instance.live.resetter.is_none() || self.record.defects() == 0
        })
    }

    /// Its service has used more than its share: it waits for a processor.
    #[cold]
    fn enter(&self, call: &Call<'_>) -> Result<(), CallError> {
        let entered = host::enter(&self.policy.granted, &call.context, &*call.watch);
        entered.map_err(|missed| CallError::missed(missed, Wanted::Permit))
    }

    fn slot(&self, depth: usize, waiter: Waiter<'_>) -> Result<Found, CallError> {
        let found = self.sandbox.slot(&self.idle, depth, waiter);
        found.map_err(|missed| CallError::missed(missed, Wanted::Instance))
    }

    /// Whether an instance may serve another request; resets it where requests
    /// are not to share one.
    fn is_as_new(&self, live: &mut Live) -> bool {
        let Live {
            store,
            resetter,
            size,
            ..
        } = live;
        match (self.policy.settings.isolation, resetter) {
            (Isolation::Shared, _) => true,
            (Isolation::Fresh, _) | (Isolation::Request, None) => false,
            // What can't be reset from inside: memory does not shrink, and the
            // table of handles is wasmtime's.
            (Isolation::Request, Some(_))
                if store.data().limits.size() != *size
                    || !store.data().host.handles_are_fresh() =>
            {
                false
            }
            (Isolation::Request, Some(resetter)) => resetter.reset(store),
        }
    }

    /// A new instance in a slot, once there is memory for it. One that will
    /// be reset is started as nobody: what it keeps of its start is there for
    /// every caller.
    fn fresh(
        &self,
        context: Context,
        watch: Arc<dyn Watch>,
        slot: Slot,
        report: &mut CallReport,
    ) -> Result<Live, CallError> {
        let deadline = context.deadline;
        let looks = Arc::clone(&watch);
        let waiter = Waiter::of(&*looks, &context);
        let reset = self.reset.as_ref().ok().filter(|reset| reset.wanted());
        if let Some(reset) = reset.filter(|_| !self.gave_up_resetting()) {
            let no_caller = Context {
                began: context.began,
                ..Context::of_loading(deadline)
            };
            let (mut store, service, instance) = self.started(no_caller, &watch, waiter, report)?;
            if store.data().host.was_asked() {
                self.note_that_it_asks();
            } else {
                // What the start grew by, the checkpoint grows by too.
                let limits = &mut store.data_mut().limits;
                let (before, _) = limits.size();
                let grown = limits.memory().saturating_sub(reset.info.first_memory);
                limits.allow_overhead(grown);
                let resetter = reset
                    .checkpoint(&mut store, &instance)
                    .map_err(|error| self.explain(&store, Phase::Start, &error, report))?;
                let guest = store.data_mut();
                let added = guest.limits.size().0 - before;
                guest.limits.take_back_overhead(grown.saturating_sub(added));
                // What the start was refused is nothing that a call was.
                guest.limits.renew();
                guest.host.renew(context, watch);
                if let Some(resetter) = &resetter {
                    guest.limits.keep(resetter.kept);
                }
                let size = guest.limits.size();
                return Ok(Live {
                    store,
                    service,
                    resetter,
                    size,
                    _slot: slot,
                });
            }
        }
        let (store, service, _) = self.started(context, &watch, waiter, report)?;
        let size = store.data().limits.size();
        Ok(Live {
            store,
            service,
            resetter: None,
            size,
            _slot: slot,
        })
    }

    /// Instantiates the component, within the deadline of `context`. There may
    /// be a slot for an instance, and none for its tables, memories or modules,
    /// because idle instances of others have them: those are given up.
    fn started(
        &self,
        context: Context,
        watch: &Arc<dyn Watch>,
        waiter: Waiter<'_>,
        report: &mut CallReport,
    ) -> Result<(Store<Guest>, Full, wasmtime::component::Instance), CallError> {
        let deadline = context.deadline;
        let mut pause = FIRST_RETRY;
        loop {
            let started = self.started_at_once(context.clone(), watch, waiter, report);
            let no_slot = matches!(&started, Err(CallError::NotBegun(Wanted::Instance)));
            if !no_slot || Instant::now() >= deadline {
                return started;
            }
            // What was found out about this attempt says nothing of the next one.
            (report.peak_memory, report.backtrace, report.stderr) = Default::default();
            if let Some(stop) = watch.tick() {
                let missed = WaitError::Stopped(stop);
                return Err(CallError::missed(missed, Wanted::Instance));
            }
            let is_first = pause == FIRST_RETRY;
            let waited = waiter.wait(|| {
                self.sandbox.reclaim(if is_first {
                    IdleEviction::Surplus
                } else {
                    IdleEviction::All
                });
                thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
                Ok(())
            });
            waited.map_err(|missed| CallError::missed(missed, Wanted::Instance))?;
            pause = (2 * pause).min(RETRY_EVERY);
        }
    }

    fn started_at_once(
        &self,
        context: Context,
        watch: &Arc<dyn Watch>,
        waiter: Waiter<'_>,
        report: &mut CallReport,
    ) -> Result<(Store<Guest>, Full, wasmtime::component::Instance), CallError> {
        let deadline = context.deadline;
        let mut store = self.store(context, Arc::clone(watch));
        let memory = self.first_reservation();
        let limits = &mut store.data_mut().limits;
        if !limits.reserve(memory, Instant::now()) {
            let reserved = waiter.take(|until| limits.reserve(memory, until));
            reserved.map_err(|missed| CallError::missed(missed, Wanted::Memory))?;
        }
        if Instant::now() >= deadline {
            return Err(CallError::NotBegun(Wanted::Instance));
        }
        let instance = self.linked.instantiate(&mut store).and_then(|instance| {
            let service = self.exports.load(&mut store, &instance)?;
            Ok((service, instance))
        });
        match instance {
            Ok((service, instance)) => Ok((store, service, instance)),
            Err(error) => Err(self.explain(&store, Phase::Start, &error, report)),
        }
    }

    fn ask(
        &self,
        live: &mut Live,
        action: &str,
        payload: Payload<'_>,
        report: &mut CallReport,
    ) -> Result<ServiceAnswer, CallError> {
        let Live { store, service, .. } = live;
        let payload = match payload {
            Payload::Json(text) => PayloadParam::Json(text),
            Payload::Binary(bytes) => PayloadParam::Binary(bytes),
        };
        let answer = service
            .mb_service_handler()
            .call_handle(&mut *store, action, payload);
        store.data_mut().host.finish();
        let answer = answer.map_err(|error| self.explain(store, Phase::Call, &error, report))?;
        Ok(match answer {
            Ok(PayloadResult::Json(text)) => ServiceAnswer::Json(text),
            Ok(PayloadResult::Binary(bytes)) => ServiceAnswer::Binary(bytes),
            Err(failure) => ServiceAnswer::Failure {
                code: failure.code,
                message: failure.message,
                details: failure.details,
            },
        })
    }

    /// What the component says of itself, in an instance of its own; and how
    /// much memory an instance begins with.
    ///
    /// # Errors
    /// If it does not answer before the deadline, or not at all.
    pub fn described(&self, deadline: Instant) -> Result<String, CallError> {
        let mut report = CallReport::new();
        let context = Context::of_loading(deadline);
        let waiter = Waiter::of(&Unwatched, &context);
        let mut live = match self.slot(context.depth(), waiter)? {
            Found::Slot(slot) => self.fresh(context, Arc::new(Unwatched), slot, &mut report)?,
            // Nobody has called it yet.
            Found::Idle(idle_instance) => idle_instance.live,
        };
        let kept = live.resetter.as_ref().map_or(0, |resetter| resetter.kept);
        self.note_first_memory(live.store.data().limits.memory(), kept);
        let text = live
            .service
            .mb_service_handler()
            .call_describe(&mut live.store);
        live.store.data_mut().host.finish();
        text.map_err(|error| self.explain(&live.store, Phase::Call, &error, &mut report))
    }

    fn store(&self, context: Context, watch: Arc<dyn Watch>) -> Store<Guest> {
        let sandbox = &self.sandbox;
        sandbox.keep_awake.signal();
        let host = Host::new(context, Arc::clone(&self.policy.granted), watch)
            .with_memory(&sandbox.memory);
        let overhead = self
            .reset
            .as_ref()
            .map_or(0, |reset| reset.info.added_memory);
        let guest = Guest {
            host,
            limits: Limits::new(self.policy.bounds(), overhead, &sandbox.memory),
        };
        let mut store = Store::new(&sandbox.engine, guest);
        store.limiter(|guest| guest);
        store.set_hostcall_fuel(self.policy.host_data());
        store.set_epoch_deadline(1);
        let keep_awake = sandbox.keep_awake.clone();
        store.epoch_deadline_callback(move |store| {
            keep_awake.signal();
            let host = &store.data().host;
            if let Some(stop) = host.tick() {
                return Err(stop.into());
            }
            host.take_run_permit(keep_awake.interval())?;
            Ok(UpdateDeadline::Continue(1))
        });
        store
    }

    /// From wasmtime's error to the one for the caller; the report gets what else
    /// is known of it.
    fn explain(
        &self,
        store: &Store<Guest>,
        phase: Phase,
        error: &wasmtime::Error,
        report: &mut CallReport,
    ) -> CallError {
        let Guest { host, limits } = store.data();
        let phase = if host.was_scheduled_out() {
            Phase::Scheduling
        } else if host.waiting() {
            Phase::HostCall
        } else {
            phase
        };
        let trace = error.downcast_ref::<WasmBacktrace>();
        report.peak_memory = limits.memory();
        report.backtrace = trace.map(frames).unwrap_or_default();
        report.stderr = host.stderr();
        self.judge(limits, phase, trace.is_some(), error)
    }

    fn judge(
        &self,
        limits: &Limits,
        phase: Phase,
        in_guest: bool,
        error: &wasmtime::Error,
    ) -> CallError {
        if let Some(stop) = error.downcast_ref::<Stop>() {
            return CallError::Stopped { stop: *stop, phase };
        }
        if error.is::<PoolConcurrencyLimitError>() {
            return CallError::NotBegun(Wanted::Instance);
        }
        let failed = |reason, message| CallError::Failed { reason, message };
        let trap = error.downcast_ref::<Trap>();
        if trap == Some(&Trap::StackOverflow) {
            return failed(
                Reason::Stack,
                format!("call stack exceeds the limit of {STACK} bytes"),
            );
        }
        // A guest ends itself where it gets no memory; any other trap has
        // another reason.
        let ended_itself = trap.is_none_or(|trap| *trap == Trap::UnreachableCodeReached);
        if limits.refused() && ended_itself {
            let bounds = self.policy.bounds();
            let message = format!(
                "needs more than the limit of {} bytes of memory or {} table elements",
                bounds.memory, bounds.table_elements
            );
            return failed(Reason::Memory, message);
        }
        if error.is::<ResourceTableError>() {
            return failed(
                Reason::HostData,
                format!("holds more handles than the limit of {MAX_HANDLES}"),
            );
        }
        let mut root = error.root_cause().to_string();
        root.truncate(root.floor_char_boundary(MAX_MESSAGE));
        // wasmtime keeps the type of this error to itself.
        if trap.is_none() && root.contains("fuel allocated for hostcalls") {
            let limit = self.policy.host_data();
            return match in_guest {
                true => failed(
                    Reason::HostData,
                    format!("host call carries more than the limit of {limit} bytes"),
                ),
                false => failed(
                    Reason::AnswerSize,
                    format!("answer exceeds the limit of {limit} bytes"),
                ),
            };
        }
        match (trap, phase) {
            (Some(trap), _) => failed(Reason::Trap, trap.to_string()),
            (None, Phase::Start) => failed(Reason::Start, root),
            // A host function refused to go on, so the component trapped there.
            (None, _) if in_guest => failed(Reason::Trap, root),
            (None, _) => failed(Reason::InvalidAnswer, root),
        }
    }
}

/// Waits for the memory of an answer until the deadline. The instance is given
/// up, since it holds some; its slot is kept, so that there are never more
/// answers without memory than slots.
fn wait_for_memory(
    reservation: &mut Reservation,
    size: usize,
    live: Live,
    deadline: Instant,
) -> Result<(), CallError> {
    let watch = live.store.data().host.watch();
    let Live {
        store,
        service,
        resetter,
        size: _,
        _slot,
    } = live;
    drop((store, service, resetter));
    watch.begin_wait();
    let mut looks = Waiter::inside(&*watch, deadline).looks();
    while !reservation.raise_until(size, looks.next) {
        looks.look().map_err(|missed| CallError::Stopped {
            stop: missed.into(),
            phase: Phase::Call,
        })?;
    }
    Ok(())
}

/// Makes an instance that is used again ready for its next call.
#[inline]
pub(super) fn renew(store: &mut Store<Guest>, context: Context, watch: Arc<dyn Watch>) {
    let guest = store.data_mut();
    guest.host.renew(context, watch);
    guest.limits.renew();
    store.set_epoch_deadline(1);
}

fn frames(trace: &WasmBacktrace) -> Vec<String> {
    let name = |frame: &wasmtime::FrameInfo| {
        let name = frame.func_name().map_or_else(
            || format!("function {}", frame.func_index()),
            |name| name.into(),
        );
        // An untrusted name: what is cut off here costs nothing.
        let demangled =
            rustc_demangle::demangle(&name[..name.floor_char_boundary(5 * MAX_FUNCTION_NAME)]);
        let mut text = format!("{demangled:#}");
        text.truncate(text.floor_char_boundary(MAX_FUNCTION_NAME));
        text
    };
    trace.frames().iter().take(MAX_FRAMES).map(name).collect()
}

/// A permit of one service's concurrency, released when dropped.
struct ConcurrencyPermit<'a>(&'a Budget);

impl<'a> ConcurrencyPermit<'a> {
    #[inline]
    fn take(permits: &'a Budget, waiter: Waiter<'_>) -> Result<Self, WaitError> {
        if permits.try_take(1) {
            return Ok(Self(permits));
        }
        waiter.take(|until| permits.take_until(1, until))?;
        Ok(Self(permits))
    }
}

impl Drop for ConcurrencyPermit<'_> {
    fn drop(&mut self) {
        self.0.release(1);
    }
}
