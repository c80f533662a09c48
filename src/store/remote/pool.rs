//! The connections to one process of an engine: a bounded number, shared by all
//! calls. Each is used by one call at a time, or as a pipeline by many whose
//! commands are short.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use redis::Value;

use super::{
    connection::{Connection, Fault, Login, NO_TIME, Role},
    pipeline::{End, Pipeline},
};
use crate::config::store::{MAX_CONNECTIONS, Node};
use crate::locks::lock;

pub(super) struct Pool {
    node: Node,
    role: Role,
    login: Arc<Login>,
    state: Mutex<State>,
    freed: Condvar,
    /// The last one, while somebody waits for an answer on it.
    pipeline: Mutex<Weak<Pipeline>>,
    /// Pipelines so far.
    opened: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// The one that was used last on top.
    idle: Vec<Connection>,
    /// Those in use included. Invariant: `idle.len() <= open <= MAX_CONNECTIONS`.
    open: usize,
}

impl Pool {
    pub(super) fn new(node: Node, role: Role, login: Arc<Login>) -> Self {
        Self {
            node,
            role,
            login,
            state: Mutex::default(),
            freed: Condvar::new(),
            pipeline: Mutex::default(),
            opened: AtomicUsize::new(0),
        }
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// Sends a short command together with those of others, and waits for its
    /// answer of at most [`SMALL`](super::connection::SMALL) bytes.
    pub(super) fn ask_pipelined(
        self: &Arc<Self>,
        command: &[u8],
        deadline: Instant,
    ) -> Result<Value, Fault> {
        while Instant::now() < deadline {
            let opened = self.opened.load(SeqCst);
            let open = self.pipeline().upgrade();
            let end = if let Some(caller) = open.and_then(|open| open.join(command)) {
                caller.wait(deadline)
            } else if let Some(lease) =
                self.take_while(deadline, || self.opened.load(SeqCst) == opened)?
            {
                self.open_pipeline(command, lease, deadline)
            } else {
                None
            };
            if let Some(answer) = end {
                return answer;
            }
        }
        Err(Fault::unsent(NO_TIME))
    }

    fn open_pipeline(&self, command: &[u8], lease: Lease, deadline: Instant) -> End {
        let mut pipeline = self.pipeline();
        // Another caller may have been quicker.
        if let Some(caller) = pipeline.upgrade().and_then(|open| open.join(command)) {
            drop((pipeline, lease));
            return caller.wait(deadline);
        }
        let (opened, caller) = Pipeline::open(&self.node, command);
        *pipeline = Arc::downgrade(&opened);
        drop(pipeline);
        // Those who wait for a connection need none any more.
        self.opened.fetch_add(1, SeqCst);
        drop(lock(&self.state));
        self.freed.notify_all();
        caller.lead(lease, deadline)
    }

    pub(super) fn pipeline(&self) -> MutexGuard<'_, Weak<Pipeline>> {
        lock(&self.pipeline)
    }

    /// A connection, once one is free.
    pub(super) fn take(self: &Arc<Self>, deadline: Instant) -> Result<Lease, Fault> {
        let lease = self.take_while(deadline, || true)?;
        lease.ok_or_else(|| Fault::unsent(NO_TIME))
    }

    /// The same; none once it is not wanted any more.
    fn take_while(
        self: &Arc<Self>,
        deadline: Instant,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Option<Lease>, Fault> {
        let mut state = lock(&self.state);
        while is_wanted() {
            if let Some(connection) = state.idle.pop() {
                drop(state);
                let is_usable = connection.is_usable();
                // Gives the place back if it is not.
                let lease = self.lease(is_usable.then_some(connection));
                if is_usable {
                    return Ok(Some(lease));
                }
                drop(lease);
                state = lock(&self.state);
            } else if state.open < MAX_CONNECTIONS {
                state.open += 1;
                drop(state);
                // Gives the place back if that fails.
                let mut lease = self.lease(None);
                let opened = Connection::open(&self.node, &self.login, self.role, deadline);
                lease.connection =
                    Some(opened.map_err(|why| Fault::unsent(format!("{}: {why}", self.node)))?);
                return Ok(Some(lease));
            } else {
                let remaining = deadline.saturating_duration_since(Instant::now());
                if remaining.is_zero() {
                    return Err(Fault::unsent(format!(
                        "{}: all {MAX_CONNECTIONS} connections are in use",
                        self.node
                    )));
                }
                state = self
                    .freed
                    .wait_timeout(state, remaining)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        Ok(None)
    }

    fn lease(self: &Arc<Self>, connection: Option<Connection>) -> Lease {
        Lease {
            pool: Arc::clone(self),
            connection,
        }
    }
}

/// A connection in use. It is shared again unless it had a fault.
pub(super) struct Lease {
    pool: Arc<Pool>,
    /// None before it is open, and after a fault.
    connection: Option<Connection>,
}

impl Lease {
    /// The connection is not shared again.
    pub(super) fn discard(mut self) {
        self.connection = None;
    }

    /// Uses the connection, which is not shared again after a fault, or a panic.
    pub(super) fn using<T>(
        &mut self,
        work: impl FnOnce(&mut Connection) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let Some(mut connection) = self.connection.take() else {
            return Err(Fault::unsent("the connection had a fault before"));
        };
        let done = work(&mut connection).map_err(|mut fault| {
            fault.why = format!("{}: {}", self.pool.node, fault.why);
            fault
        })?;
        self.connection = Some(connection);
        Ok(done)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        match self.connection.take().filter(Connection::is_between) {
            Some(connection) => state.idle.push(connection),
            None => state.open -= 1,
        }
        drop(state);
        self.pool.freed.notify_one();
    }
}
