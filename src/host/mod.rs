//! What a component may import: one capability a file, and which of them the
//! operator grants it.
//!
//! The bindings are generated from `wit/`, so that the contract that authors
//! read is the one that the server holds.

pub mod calls;
pub mod context;
mod grants;
mod keyvalue;
mod link;
mod log;
mod settings;
mod waiter;
mod wasi;
mod watch;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use context::Context;
pub use grants::{GrantError, Granted};
pub use link::{LinkError, grant_for, link};
pub use waiter::{WaitError, Waiter};
use wasmtime::component::{Resource, ResourceTable, ResourceTableError};
pub use watch::{Stop, Unwatched, Watch};

pub use crate::store::{StoreError, Unflushed};

use crate::{
    budget::{Budget, Reservation},
    scheduler::{Payer, Ticket},
};

/// Handles of the host's resources that an instance may hold.
pub const MAX_HANDLES: usize = 1000;
/// What one call may write to the log, in bytes; the rest is dropped and counted.
const MAX_LOG: usize = 64 * 1024;

/// The generated side of the contract.
#[allow(
    missing_docs,
    unreachable_pub,
    reason = "generated; the documentation is in wit/"
)]
pub mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "full",
        ownership: Borrowing { duplicate_if_necessary: true },
        imports: { default: trappable },
        with: {
            "wasi:keyvalue/store.bucket": super::keyvalue::Bucket,
            "wasi:keyvalue/atomics.cas": super::keyvalue::Cas,
        },
    });
}

/// The interface that every component exports, in any minor version.
pub const HANDLER: &str = "mb:service/handler@1";

/// Bytes that the handles of one instance may hold without taking any.
const HANDLES_FREE: usize = 64 * 1024;

/// What the host functions of one call work with.
pub struct Host {
    context: Context,
    granted: Arc<Granted>,
    watch: Arc<dyn Watch>,
    table: ResourceTable,
    /// Numbers of handles that were dropped, the last one on top: in what
    /// order the component's own table gives them out again. Both tables count
    /// alike: each handle that the one gets, the other gets too.
    free: Vec<u32>,
    /// How often the call, or the start before it, has asked for more than
    /// constants.
    asked: u64,
    log: log::Meter,
    /// A host function waits: what a deadline that passes now interrupts.
    waiting: bool,
    /// The server's; none where nothing is bounded by it.
    memory: Option<Arc<Budget>>,
    /// What handles hold beyond what every instance may.
    handles: Option<Reservation>,
    /// Bytes that they hold.
    handle_bytes: usize,
    /// What the call wrote, and what it read, rests on that.
    unflushed: Option<Unflushed>,
    /// Stands in between two calls.
    no_caller: (Arc<context::Caller>, Arc<dyn Watch>),
}

impl Host {
    /// For one call of a component with these grants.
    #[must_use]
    pub fn new(context: Context, granted: Arc<Granted>, watch: Arc<dyn Watch>) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        let log = log::Meter::new(MAX_LOG);
        let no_caller = (Arc::default(), Arc::new(Unwatched) as Arc<dyn Watch>);
        Self {
            context,
            granted,
            watch,
            table,
            free: Vec::new(),
            asked: 0,
            log,
            waiting: false,
            memory: None,
            handles: None,
            handle_bytes: 0,
            unflushed: None,
            no_caller,
        }
    }

    /// Takes from the server's memory what the host holds for the component.
    #[must_use]
    pub fn with_memory(mut self, memory: &Arc<Budget>) -> Self {
        self.memory = Some(Arc::clone(memory));
        self
    }

    /// Memory for what the component has handed over, once it is there; the
    /// call is stopped if it is not in time.
    fn reserve(&mut self, bytes: usize) -> wasmtime::Result<Option<Reservation>> {
        let mut held = self.memory.as_ref().map(Reservation::empty);
        // Nobody could wait for more than there is.
        let limit = self.memory.as_ref().map_or(0, |memory| memory.limit());
        let bytes = bytes.min(limit);
        if let Some(held) = &mut held
            && !held.try_raise(bytes)
        {
            self.waiting = true;
            self.wait_for(|until| held.raise_until(bytes, until))?;
            self.waiting = false;
        }
        Ok(held)
    }

    /// For the next call of the same instance. Handles stay: they are part of
    /// what a shared instance keeps.
    #[inline]
    pub fn renew(&mut self, context: Context, watch: Arc<dyn Watch>) {
        self.finish();
        self.log = log::Meter::new(MAX_LOG);
        (self.context, self.watch, self.waiting) = (context, watch, false);
        self.asked = 0;
        self.unflushed = None;
    }

    /// What is to be on the disk before the answer of the call leaves.
    #[inline]
    pub fn take_unflushed(&mut self) -> Option<Unflushed> {
        self.unflushed.take()
    }

    /// The instance waits for its next call, and holds nothing of the one
    /// before: a connection is closed when nobody holds it any more.
    #[inline]
    pub fn rest(&mut self) {
        let (caller, watch) = &self.no_caller;
        self.context = Context::without_caller(Arc::clone(caller), self.context.deadline);
        self.watch = Arc::clone(watch);
    }

    /// The call is over: writes out what waits for the end of its line.
    #[inline]
    pub fn finish(&mut self) {
        let Self {
            context,
            granted,
            log,
            ..
        } = self;
        log.finish(granted, context);
    }

    /// The newest lines that the call printed to standard error.
    #[must_use]
    pub fn stderr(&self) -> Vec<String> {
        self.log.stderr()
    }

    /// A handle for the component, which holds so many bytes: those of an
    /// instance beyond the first 64 KiB are taken from the server's memory.
    fn create_large_handle<T: Send + 'static>(
        &mut self,
        resource: T,
        bytes: usize,
    ) -> wasmtime::Result<Resource<T>> {
        let beyond = |bytes: usize| bytes.saturating_sub(HANDLES_FREE);
        let sum = self.handle_bytes + bytes;
        if beyond(sum) > 0 {
            let more = self.reserve(beyond(sum) - beyond(self.handle_bytes))?;
            if let Some(more) = more {
                match &mut self.handles {
                    Some(handles) => handles.join(more),
                    none => *none = Some(more),
                }
            }
        }
        let handle = self.create_handle(resource)?;
        self.handle_bytes = sum;
        Ok(handle)
    }

    /// Drops such a handle for the component.
    fn drop_large_handle<T: Send + 'static>(
        &mut self,
        handle: Resource<T>,
        bytes: impl Fn(&T) -> usize,
    ) -> Result<T, ResourceTableError> {
        let resource = self.drop_handle(handle)?;
        self.handle_bytes -= bytes(&resource);
        if let Some(handles) = &mut self.handles {
            handles.set(self.handle_bytes.saturating_sub(HANDLES_FREE));
        }
        Ok(resource)
    }

    /// A handle for the component.
    fn create_handle<T: Send + 'static>(
        &mut self,
        resource: T,
    ) -> Result<Resource<T>, ResourceTableError> {
        let handle = self.table.push(resource)?;
        let again = self.free.pop();
        debug_assert!(again.is_none_or(|number| number == handle.rep()));
        Ok(handle)
    }

    /// Drops a handle for the component.
    fn drop_handle<T: Send + 'static>(
        &mut self,
        handle: Resource<T>,
    ) -> Result<T, ResourceTableError> {
        let number = handle.rep();
        let resource = self.table.delete(handle)?;
        self.free.push(number);
        Ok(resource)
    }

    /// Whether the component has no handle, and gets the same numbers for the
    /// next ones as a fresh instance: it may have had some, dropped in such
    /// an order that the smallest number comes first again.
    #[must_use]
    #[inline]
    pub fn handles_are_fresh(&self) -> bool {
        let order = self.free.iter().rev().zip(0..);
        self.table.is_empty() && order.into_iter().all(|(number, fresh)| *number == fresh)
    }

    /// Whether the component has asked for anything but constants.
    #[must_use]
    pub fn was_asked(&self) -> bool {
        self.asked > 0
    }

    /// Host functions that the call has called, but for those that give
    /// constants.
    #[must_use]
    pub fn host_calls(&self) -> u64 {
        self.asked
    }

    /// Counts a host function. Each one is taken for one that tells something,
    /// unless it says that it gives a constant.
    #[inline]
    pub fn asks(&mut self) -> &mut Self {
        self.asked += 1;
        self
    }

    /// The host function that is called gives the same to everybody, always.
    fn gives_constant(&mut self) {
        self.asked -= 1;
    }

    /// The call that is served.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Looks after the call.
    #[must_use]
    pub fn watch(&self) -> Arc<dyn Watch> {
        Arc::clone(&self.watch)
    }

    /// Whether a host function waits.
    #[must_use]
    pub fn waiting(&self) -> bool {
        self.waiting
    }

    /// Looks after the call at a tick: its deadline, then its watch.
    #[must_use]
    pub fn tick(&self) -> Option<Stop> {
        (Instant::now() >= self.context.deadline)
            .then_some(Stop::Deadline)
            .or_else(|| self.watch.tick())
    }

    /// The call has seen a tick, so long after the one before, and waits here
    /// for a run permit if it needs one.
    ///
    /// # Errors
    /// If it shall end instead.
    pub fn take_run_permit(&self, since_last_tick: Duration) -> Result<(), Stop> {
        let (Some(ticket), Some(payer)) = (self.watch.ticket(), self.payer()) else {
            return Ok(());
        };
        let attends = watch::Attends(&*self.watch);
        let cost = ticket.tick(&payer, since_last_tick, self.context.deadline, &attends);
        self.watch.costs(cost.map_err(watch::stop)?);
        Ok(())
    }

    /// Who pays for the call: the service that was called first.
    fn payer(&self) -> Option<Payer<'_>> {
        let own = self.granted.account.as_ref();
        let account = match &self.context.chain {
            Some(link) => link.first().account(),
            None => own,
        };
        Some(Payer {
            account: account?,
            principal: self.context.caller.principal.as_deref(),
            began: self.context.began,
        })
    }

    /// Whether the call was stopped while it waited for a run permit.
    #[must_use]
    pub fn was_scheduled_out(&self) -> bool {
        self.watch.ticket().is_some_and(Ticket::was_waiting)
    }

    /// The call is about to wait.
    pub fn begin_wait(&self) {
        self.watch.begin_wait();
    }

    /// The call has waited; says whether it shall end instead of going on.
    #[must_use]
    pub fn end_wait(&self) -> Option<Stop> {
        self.watch.end_wait(self.context.deadline)
    }

    /// Waits for what is taken by a function that waits until an instant and says
    /// whether it has it.
    ///
    /// # Errors
    /// If the call shall end instead.
    pub fn wait_for(&self, take: impl FnMut(Instant) -> bool) -> Result<(), Stop> {
        let waiter = Waiter::inside(&*self.watch, self.context.deadline);
        Ok(waiter.take(take)?)
    }

    /// Sleeps; the call ends if its time is over before.
    fn sleep(&mut self, until: Instant) -> wasmtime::Result<()> {
        self.waiting = true;
        watch::sleep(&*self.watch, until, self.context.deadline)?;
        self.waiting = false;
        Ok(())
    }
}

/// A call of a service that is over its share waits for a run permit before it
/// begins.
///
/// # Errors
/// If it shall end or be handed back instead.
#[cold]
pub fn enter(granted: &Granted, context: &Context, watch: &dyn Watch) -> Result<(), WaitError> {
    let (Some(ticket), Some(account)) = (watch.ticket(), &granted.account) else {
        return Ok(());
    };
    let payer = Payer {
        account,
        principal: context.caller.principal.as_deref(),
        began: context.began,
    };
    let entered = ticket.enter(&payer, context.deadline, &watch::Attends(watch));
    watch.begins();
    match entered {
        Ok(true) => Ok(()),
        Ok(false) => Err(WaitError::Postponed),
        Err(ended) => Err(WaitError::Stopped(watch::stop(ended))),
    }
}

/// Host functions exist for whatever store holds a [`Host`].
pub trait HasHost: 'static {
    /// The host's part of the store.
    fn host(&mut self) -> &mut Host;

    /// The same for a host function that is called.
    fn called(&mut self) -> &mut Host {
        self.host().asks()
    }
}
