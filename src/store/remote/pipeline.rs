//! Short commands of many calls on one connection. They are sent together and
//! answered together, so that the engine and this program need one system call
//! where each would need its own.
//!
//! One of the callers leads (leader and followers): it owns the connection,
//! sends what waits, reads answers and hands them out. Once it has its own
//! answer, another caller leads. So a single caller sends and reads by itself,
//! and no thread is needed that does nothing else.
//!
//! A caller leaves at its deadline. What it sent may have been done. Where the
//! engine has not answered anybody for a while, the connection may hang: then
//! the pipeline is closed, callers whose commands were not sent take another
//! connection, and so do new ones. Those who have sent theirs wait here until
//! their own deadlines.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use redis::Value;

use super::{
    connection::{Fault, LATE, UNASKED},
    pool::Lease,
};
use crate::config::store::Node;
use crate::locks::lock;

/// Why a caller leaves that others kept from sending.
const UNSENT: &str = "not sent in time";

/// Time that a leader has for sending, even where its deadline comes sooner: a
/// part of a command would break the connection for all.
const GRACE: Duration = Duration::from_millis(100);
/// A connection without any answer for so long may hang. A flush of the engine's
/// disk takes less, unless that is busy.
const STALL: Duration = Duration::from_millis(250);

/// The commands on one connection.
pub(super) struct Pipeline {
    /// Whom errors name.
    node: Node,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    unsent: VecDeque<Command>,
    /// Who is owed an answer, in the order of the answers.
    sent: VecDeque<Arc<Mailbox>>,
    /// When the engine has answered last, or had something to answer again.
    quiet_since: Option<Instant>,
    is_closed: bool,
}

struct Command {
    bytes: Vec<u8>,
    mailbox: Arc<Mailbox>,
}

/// A call that waits for the answer to its command.
pub(super) struct Caller {
    pipeline: Arc<Pipeline>,
    mailbox: Arc<Mailbox>,
}

/// Where a caller is notified.
struct Mailbox {
    thread: Thread,
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    /// The connection, if the caller is to lead.
    lead: Option<Lease>,
    end: Option<End>,
    /// Nobody looks here any more.
    is_left: bool,
}

/// What came of a command: an answer or a fault; none where the pipeline was
/// closed before the command was sent.
pub(super) type End = Option<Result<Value, Fault>>;

impl Mailbox {
    /// Has its caller lead, unless it has gone.
    fn lead(&self, lease: &mut Option<Lease>) {
        let mut content = lock(&self.content);
        if !content.is_left {
            content.lead = lease.take();
            drop(content);
            self.thread.unpark();
        }
    }

    fn end(&self, end: End) {
        lock(&self.content).end = Some(end);
        self.thread.unpark();
    }
}

impl Pipeline {
    /// A pipeline with one command, whose caller is to lead.
    pub(super) fn open(node: &Node, command: &[u8]) -> (Arc<Self>, Caller) {
        let pipeline = Arc::new(Self {
            node: node.clone(),
            state: Mutex::default(),
        });
        let caller = pipeline.add(&mut lock(&pipeline.state), command);
        (pipeline, caller)
    }

    /// Adds a command, unless the pipeline is closed.
    pub(super) fn join(self: &Arc<Self>, command: &[u8]) -> Option<Caller> {
        let mut state = lock(&self.state);
        (!state.is_closed).then(|| self.add(&mut state, command))
    }

    fn add(self: &Arc<Self>, state: &mut State, command: &[u8]) -> Caller {
        let mailbox = Arc::new(Mailbox {
            thread: thread::current(),
            content: Mutex::default(),
        });
        state.unsent.push_back(Command {
            bytes: command.to_vec(),
            mailbox: Arc::clone(&mailbox),
        });
        Caller {
            pipeline: Arc::clone(self),
            mailbox,
        }
    }

    /// Takes the commands that wait. Their callers are owed answers from now on.
    fn take_unsent(&self) -> (Vec<u8>, usize) {
        let mut state = lock(&self.state);
        let unsent = std::mem::take(&mut state.unsent);
        let count = unsent.len();
        if state.sent.is_empty() {
            state.quiet_since = Some(Instant::now());
        }
        let mut commands = Vec::with_capacity(unsent.iter().map(|one| one.bytes.len()).sum());
        for command in unsent {
            commands.extend(command.bytes);
            state.sent.push_back(command.mailbox);
        }
        (commands, count)
    }

    /// Takes the callers of the next answers; none if fewer are owed.
    fn take_owed(&self, answers: usize) -> Option<Vec<Arc<Mailbox>>> {
        let mut state = lock(&self.state);
        if answers > 0 {
            state.quiet_since = Some(Instant::now());
        }
        let are_owed = answers <= state.sent.len();
        are_owed.then(|| state.sent.drain(..answers).collect())
    }

    /// Ends all waiting after a fault. The last `unsent` commands were not sent.
    fn fail(&self, why: &str, unsent: usize) {
        let mut state = lock(&self.state);
        state.close();
        let sent = state.sent.len() - unsent;
        for (number, caller) in state.sent.drain(..).enumerate() {
            caller.end(Some(Err(Fault {
                was_sent: number < sent,
                why: why.into(),
            })));
        }
    }

    /// Has another caller lead. If there is none, the pipeline is closed, and its
    /// connection is free unless an answer is owed.
    fn hand_over(&self, lease: Lease) {
        let mut lease = Some(lease);
        let mut state = lock(&self.state);
        let unsent = state.unsent.iter().map(|command| &command.mailbox);
        for caller in state.sent.iter().chain(unsent) {
            caller.lead(&mut lease);
            if lease.is_none() {
                return;
            }
        }
        state.close();
        if let Some(lease) = lease.filter(|_| !state.sent.is_empty()) {
            lease.discard();
        }
    }

    /// Names the node to whoever reads of a fault.
    fn named(&self, why: &str) -> String {
        format!("{}: {why}", self.node)
    }
}

impl State {
    /// Closes it if the connection may hang.
    fn close_if_stalled(&mut self) {
        let is_quiet = self
            .quiet_since
            .is_some_and(|since| since.elapsed() >= STALL);
        if is_quiet && !self.sent.is_empty() {
            self.close();
        }
    }

    /// Takes no more commands. The callers of unsent ones go elsewhere.
    fn close(&mut self) {
        self.is_closed = true;
        for command in self.unsent.drain(..) {
            command.mailbox.end(None);
        }
    }
}

impl Caller {
    /// Waits for the answer, and leads when the lead is handed over.
    pub(super) fn wait(self, deadline: Instant) -> End {
        loop {
            let mut content = lock(&self.mailbox.content);
            if let Some(lease) = content.lead.take() {
                drop(content);
                return self.lead(lease, deadline);
            }
            if let Some(end) = content.end.take() {
                return end;
            }
            drop(content);
            let now = Instant::now();
            let remaining = deadline.saturating_duration_since(now);
            if remaining.is_zero() {
                return self.leave();
            }
            thread::park_timeout(remaining.min(STALL));
            if now.elapsed() >= STALL {
                lock(&self.pipeline.state).close_if_stalled();
            }
        }
    }

    /// Sends and reads for all until the own answer is there.
    pub(super) fn lead(self, lease: Lease, deadline: Instant) -> End {
        let mut leading = Leading {
            pipeline: Arc::clone(&self.pipeline),
            lease: Some(lease),
        };
        let mut answers: Vec<(Arc<Mailbox>, Value)> = Vec::new();
        loop {
            // The engine works on these while callers wake up.
            if Instant::now() < deadline {
                leading.send(deadline);
            }
            for (caller, answer) in answers {
                caller.end(Some(Ok(answer)));
            }
            if let Some(end) = lock(&self.mailbox.content).end.take() {
                return end;
            }
            if Instant::now() >= deadline {
                // Before the lead is handed over.
                return self.leave();
            }
            answers = leading.receive(deadline);
        }
    }

    /// Gives up at the deadline, unless there was a notice.
    fn leave(self) -> End {
        let mut state = lock(&self.pipeline.state);
        let mut content = lock(&self.mailbox.content);
        content.is_left = true;
        let (lead, end) = (content.lead.take(), content.end.take());
        drop(content);
        let end = end.unwrap_or_else(|| {
            let waits = state.unsent.len();
            state
                .unsent
                .retain(|command| !Arc::ptr_eq(&command.mailbox, &self.mailbox));
            let was_sent = state.unsent.len() == waits;
            let why = if was_sent { LATE } else { UNSENT };
            let why = self.pipeline.named(why);
            state.close_if_stalled();
            Some(Err(Fault { was_sent, why }))
        });
        drop(state);
        if let Some(lease) = lead {
            self.pipeline.hand_over(lease);
        }
        end
    }
}

/// The lead: its owner has the connection until it hands it over.
struct Leading {
    pipeline: Arc<Pipeline>,
    /// None after a fault, of which all who are owed an answer were notified.
    lease: Option<Lease>,
}

impl Leading {
    fn send(&mut self, deadline: Instant) {
        let Some(lease) = &mut self.lease else { return };
        let (commands, count) = self.pipeline.take_unsent();
        if count == 0 {
            return;
        }
        let deadline = deadline.max(Instant::now() + GRACE);
        let sent = lease.using(|connection| connection.send(&commands, deadline));
        if let Err(Fault { was_sent, why }) = sent {
            self.fail(&why, if was_sent { 0 } else { count });
        }
    }

    /// Reads answers. Each is assigned to its caller before more commands are
    /// sent, so that no caller gets an answer that was there before its command.
    fn receive(&mut self, deadline: Instant) -> Vec<(Arc<Mailbox>, Value)> {
        let Some(lease) = &mut self.lease else {
            return Vec::new();
        };
        let mut answers = Vec::new();
        let received = lease.using(|connection| connection.receive(&mut answers, deadline));
        let Some(callers) = self.pipeline.take_owed(answers.len()) else {
            self.fail(&self.pipeline.named(UNASKED), 0);
            return Vec::new();
        };
        if let Err(fault) = received {
            self.fail(&fault.why, 0);
        }
        callers.into_iter().zip(answers).collect()
    }

    fn fail(&mut self, why: &str, unsent: usize) {
        if let Some(lease) = self.lease.take() {
            lease.discard();
        }
        self.pipeline.fail(why, unsent);
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        if thread::panicking() {
            let why = self
                .pipeline
                .named("the thread that reads answers panicked");
            self.fail(&why, 0);
        } else if let Some(lease) = self.lease.take() {
            self.pipeline.hand_over(lease);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::store::Node,
        store::remote::{
            connection::{Login, Role},
            pool::Pool,
        },
    };
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        net::{TcpListener, TcpStream},
        thread::ScopedJoinHandle,
    };

    /// Longer than a stall.
    const SOON: Duration = Duration::from_millis(600);
    const LATER: Duration = Duration::from_secs(30);

    type Answer = Result<Value, Fault>;

    /// Stands in for an engine; the test reads the commands and answers them.
    struct StandIn(TcpListener);

    struct Accepted(BufReader<TcpStream>);

    impl StandIn {
        fn new() -> (Self, Arc<Pool>) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let node = Node {
                host: "127.0.0.1".into(),
                port: listener.local_addr().unwrap().port(),
            };
            let pool = Arc::new(Pool::new(node, Role::Any, Arc::<Login>::default()));
            (Self(listener), pool)
        }

        fn accept(&self) -> Accepted {
            let stream = self.0.accept().unwrap().0;
            stream.set_nodelay(true).unwrap();
            Accepted(BufReader::new(stream))
        }
    }

    impl Accepted {
        fn expect(&mut self, command: &str) {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            assert_eq!(line.trim_end(), command);
        }

        fn answer(&mut self, bytes: &str) {
            self.0.get_mut().write_all(bytes.as_bytes()).unwrap();
        }
    }

    fn ask(pool: &Arc<Pool>, command: &str, time: Duration) -> Answer {
        pool.ask_pipelined(format!("{command}\n").as_bytes(), Instant::now() + time)
    }

    /// Asks in a thread; returns once the command waits to be sent.
    fn asks<'scope>(
        scope: &'scope thread::Scope<'scope, '_>,
        pool: &'scope Arc<Pool>,
        command: &'static str,
        time: Duration,
    ) -> ScopedJoinHandle<'scope, Answer> {
        let waiting = || {
            let open = pool.pipeline().upgrade();
            open.map_or(0, |open| lock(&open.state).unsent.len())
        };
        let before = waiting();
        let asking = scope.spawn(move || ask(pool, command, time));
        while waiting() == before {
            thread::yield_now();
        }
        asking
    }

    #[test]
    fn each_gets_its_own_answer() {
        let (engine, pool) = StandIn::new();
        thread::spawn(move || {
            loop {
                let mut accepted = engine.accept();
                thread::spawn(move || {
                    let mut line = String::new();
                    while accepted.0.read_line(&mut line).is_ok_and(|read| read > 0) {
                        let answer = format!(":{}\r\n", line.trim_end());
                        let (begin, rest) = answer.split_at(answer.len() / 2);
                        accepted.answer(begin);
                        accepted.answer(rest);
                        line.clear();
                    }
                });
            }
        });
        thread::scope(|scope| {
            for caller in 0..8 {
                let pool = &pool;
                scope.spawn(move || {
                    for number in caller * 1000..caller * 1000 + 500 {
                        let answer = ask(pool, &number.to_string(), LATER);
                        assert_eq!(answer, Ok(Value::Int(number)));
                    }
                });
            }
        });
    }

    #[test]
    fn commands_that_wait_are_sent_together_and_the_lead_goes_on() {
        let (engine, pool) = StandIn::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| ask(&pool, "first", LATER));
            let mut one = engine.accept();
            one.expect("first");
            let leaves = asks(scope, &pool, "leaves", SOON);
            let stays = asks(scope, &pool, "stays", LATER);
            one.answer(":1\r\n");
            assert_eq!(first.join().unwrap(), Ok(Value::Int(1)));
            one.expect("leaves");
            one.expect("stays");
            // It leads now, and leaves in the middle of its answer.
            one.answer("$6\r\nlea");
            let left = leaves.join().unwrap();
            assert_eq!(
                left,
                Err(Fault::unanswered(format!("{}: {LATE}", pool.node())))
            );
            // The connection may hang, so another one is opened.
            let other = scope.spawn(|| ask(&pool, "other", LATER));
            let mut two = engine.accept();
            two.expect("other");
            two.answer(":3\r\n");
            assert_eq!(other.join().unwrap(), Ok(Value::Int(3)));
            one.answer("ves\r\n:2\r\n");
            assert_eq!(stays.join().unwrap(), Ok(Value::Int(2)));
        });
    }

    #[test]
    fn what_was_not_sent_says_so_or_goes_elsewhere() {
        let (engine, pool) = StandIn::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| ask(&pool, "first", LATER));
            let mut one = engine.accept();
            one.expect("first");
            let late = ask(&pool, "late", STALL / 5);
            assert!(!late.unwrap_err().was_sent);
            // Nobody is answered for a while, so this one does not wait longer.
            let waits = asks(scope, &pool, "waits", LATER);
            let mut two = engine.accept();
            two.expect("waits");
            let queued = asks(scope, &pool, "queued", LATER);
            // A cut connection leaves open what was sent, and that alone.
            drop(two);
            let cut = waits.join().unwrap();
            assert!(cut.unwrap_err().was_sent);
            let mut three = engine.accept();
            three.expect("queued");
            three.answer("+OK\r\n");
            assert_eq!(queued.join().unwrap(), Ok(Value::Okay));
            one.answer(":1\r\n");
            assert_eq!(first.join().unwrap(), Ok(Value::Int(1)));
            // Both are free again, and the one that was used last is next.
            let again = scope.spawn(|| ask(&pool, "again", LATER));
            one.expect("again");
            one.answer(":4\r\n");
            assert_eq!(again.join().unwrap(), Ok(Value::Int(4)));
        });
    }

    #[test]
    fn an_answer_to_no_command_ends_the_connection() {
        let (engine, pool) = StandIn::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| ask(&pool, "first", LATER));
            let mut one = engine.accept();
            one.expect("first");
            // It is not sent before it: that answer would be taken for its own.
            let next = asks(scope, &pool, "next", LATER);
            one.answer(":1\r\n:2\r\n");
            let unasked = first.join().unwrap().unwrap_err();
            assert!(unasked.was_sent && unasked.why.ends_with(UNASKED));
            let mut two = engine.accept();
            two.expect("next");
            two.answer(":3\r\n");
            assert_eq!(next.join().unwrap(), Ok(Value::Int(3)));
        });
    }
}
