//! The connections to one process of an engine: a bounded number, shared by all
//! calls, each used by one at a time.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use redis::Value;

use super::connection::{Connection, Fault, Login, Role};
use crate::config::store::{MAX_CONNECTIONS, Node};

pub(super) struct Pool {
    node: Node,
    role: Role,
    login: Arc<Login>,
    state: Mutex<State>,
    freed: Condvar,
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
        }
    }

    /// A connection, once one is free.
    pub(super) fn take(self: &Arc<Self>, deadline: Instant) -> Result<Lease, Fault> {
        let mut state = self.lock();
        loop {
            if let Some(connection) = state.idle.pop() {
                drop(state);
                let is_usable = connection.is_usable();
                // Gives the place back if it is not.
                let lease = self.lease(is_usable.then_some(connection));
                if is_usable {
                    return Ok(lease);
                }
                drop(lease);
                state = self.lock();
            } else if state.open < MAX_CONNECTIONS {
                state.open += 1;
                drop(state);
                // Gives the place back if that fails.
                let mut lease = self.lease(None);
                let opened = Connection::open(&self.node, &self.login, self.role, deadline);
                lease.connection =
                    Some(opened.map_err(|why| Fault::Unsent(format!("{}: {why}", self.node)))?);
                return Ok(lease);
            } else {
                let remaining = deadline.saturating_duration_since(Instant::now());
                if remaining.is_zero() {
                    return Err(Fault::Unsent(format!(
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
    }

    fn lease(self: &Arc<Self>, connection: Option<Connection>) -> Lease {
        Lease {
            pool: Arc::clone(self),
            connection,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in use. It is shared again unless it had a fault.
pub(super) struct Lease {
    pool: Arc<Pool>,
    /// None before it is open, and after a fault.
    connection: Option<Connection>,
}

impl Lease {
    /// As [`Connection::ask`].
    pub(super) fn ask(
        &mut self,
        command: &[u8],
        limit: usize,
        deadline: Instant,
    ) -> Result<Value, Fault> {
        // Nor is it shared again after a panic.
        let Some(mut connection) = self.connection.take() else {
            return Err(Fault::Unsent("the connection had a fault before".into()));
        };
        let named = |why| format!("{}: {why}", self.pool.node);
        let answer = connection
            .ask(command, limit, deadline)
            .map_err(|fault| match fault {
                Fault::Unsent(why) => Fault::Unsent(named(why)),
                Fault::Unanswered(why) => Fault::Unanswered(named(why)),
            })?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        match self.connection.take() {
            Some(connection) => state.idle.push(connection),
            None => state.open -= 1,
        }
        drop(state);
        self.pool.freed.notify_one();
    }
}
