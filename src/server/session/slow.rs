//! A call that takes long: another thread goes on with its connection, and
//! whoever looks at the server sees it.

use std::{
    cell::{Cell, OnceCell, RefCell},
    sync::Arc,
};

use super::{End, Session};
use crate::{
    budget::Charge,
    host::{Stop, Watch},
    server::connection::{Connection, Farewell},
    wire::Header,
};

/// Ticks of the sandbox, a millisecond each, that a call sees before another
/// thread goes on with its connection: so it has taken 1 to 2 ms.
const TICKS_UNTIL_SLOW: u32 = 2;

scoped_tls::scoped_thread_local! {
    /// What this thread serves a message of. A call's watch is asked on the
    /// thread of the call, deep inside of it, and finds its session here.
    pub(super) static SERVED: Session
}

impl Session {
    /// Another thread goes on while this one is in a slow call, if there is
    /// one and the bound of calls at the same time allows it.
    fn hand_over(&self) {
        self.shared.poller.step_aside();
        let phase = self.connection.phase();
        if self.relieved.get().is_some()
            || self.connection.draining()
            || phase.attached() as usize >= self.shared.settings.max_in_flight
        {
            return;
        }
        let settings = &self.shared.settings;
        let buffer = self.buffer.split();
        let mut charge = Charge::none(&settings.memory);
        charge.set(buffer.capacity().saturating_sub(settings.read_buffer_size));
        let next = Self {
            buffer,
            charge,
            shared: Arc::clone(&self.shared),
            listener: Arc::clone(&self.listener),
            connection: Arc::clone(&self.connection),
            tls: self.tls.clone(),
            certificate: self.certificate.clone(),
            checked: self.checked,
            permit: Arc::clone(&self.permit),
            at_poller: self.at_poller,
            identity: Arc::clone(&self.identity),
            handshake_until: self.handshake_until,
            active: self.active,
            midway_since: None,
            ticks: Cell::new(0),
            at_hand: Cell::default(),
            listed: RefCell::default(),
            relieved: OnceCell::new(),
        };
        let next = Box::new(next);
        phase.attach();
        match self.permit.relieve(move || next.run(Self::serve_on)) {
            Some(spare) => drop(self.relieved.set(spare)),
            // This thread stays attached, so it is not the last one that goes.
            None => drop(phase.detach()),
        }
    }

    /// Shows the call at hand to whoever looks, and says whether the operator
    /// wants it stopped.
    fn list(&self, waits: bool) -> bool {
        let mut listed = self.listed.borrow_mut();
        let listed = listed.get_or_insert_with(|| {
            let (begin, end) = self.at_hand.get();
            let header = Header::parse(self.buffer.message(begin..end))
                .ok()
                .map(|(header, _)| header);
            let principal = self.identity.caller.principal.clone();
            let timeout = self.shared.settings.default_timeout;
            self.shared.running.list(
                self.connection.number(),
                header.as_ref(),
                principal,
                self.active,
                timeout,
            )
        });
        listed.call.waits(waits);
        listed.call.is_killed()
    }

    /// The slow call has its answer; the connection is another thread's.
    pub(super) fn leave_behind(&self) -> End {
        self.connection.answered();
        if let Err(end) = self.flush() {
            return end;
        }
        if self.connection.phase().rest()
            && let Some(Farewell { code, message }) = self.connection.farewell()
            && self.connection.tell_if_quiet(code, message)
        {
            // As the drain does where nobody is busy; the other thread reads.
            self.shared.metrics.count_error(Some(code));
            self.connection.send_last_word();
        }
        End::Relieved
    }
}

/// While a call takes long, neither the answers before it nor the requests
/// after it shall wait for it.
impl Watch for Connection {
    fn tick(&self) -> Option<Stop> {
        let slow = served(|session| {
            session.ticks.set(session.ticks.get() + 1);
            // The first one says nothing: a quick call may just have begun.
            // Answers sent for it would come apart from those after them, and
            // so would the requests that their client sends next.
            (session.ticks.get() >= TICKS_UNTIL_SLOW).then(|| {
                session.hand_over();
                session.list(false)
            })
        });
        let killed = slow.flatten();
        if killed.is_some() {
            self.send_early();
        }
        let killed = killed.unwrap_or(false).then_some(Stop::Killed);
        killed.or_else(|| self.calls_stopped().then_some(Stop::Shutdown))
    }

    fn waits(&self) {
        served(|session| {
            session.hand_over();
            session.list(true);
        });
        self.send_early();
    }
}

/// With what this thread serves; nothing in a test of a part.
fn served<R>(act: impl FnOnce(&Session) -> R) -> Option<R> {
    SERVED.is_set().then(|| SERVED.with(act))
}
