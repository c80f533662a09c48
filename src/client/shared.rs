//! What all clones of a client share, and its two threads: one reads, one
//! connects again, sends again and keeps alive.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use super::{
    Answer, ClientError, ServerError,
    builder::Settings,
    link::{self, ClientConnection},
    queue::{Loss, Queue},
};
use crate::{
    locks::{lock, wait_while},
    wire::{Header, Incoming, Kind, Reassembly, frame::KEEPALIVE_FRAME},
};

/// First and longest pause between two tries to connect; each is shortened by
/// up to half, by chance, so that many clients don't come back at once.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How long the client's own thread sleeps at least, unless it is woken.
const LEAST_SLEEP: Duration = Duration::from_millis(1);

/// How long a request that was refused for want of room waits at least.
const LEAST_RETRY: Duration = Duration::from_millis(1);

pub(super) struct ClientCore {
    pub(super) settings: Settings,
    pub(super) state: Mutex<State>,
    /// The state has changed: a connection, room, something to be done.
    pub(super) changed: Condvar,
    /// Held by the one thread that writes.
    pub(super) writing: Mutex<()>,
    pub(super) ids: AtomicU64,
    /// Tells this client's requests from those of others, in logs.
    pub(super) prefix: String,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) queue: Queue,
    pub(super) link: Option<ClientConnection>,
    /// When the last byte was sent.
    pub(super) active: Option<Instant>,
    /// A keep-alive is to be sent.
    pub(super) keep_alive_due: bool,
    /// Why there is no connection.
    pub(super) last_error: Option<String>,
    pub(super) closed: bool,
}

impl ClientCore {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        lock(&self.state)
    }

    /// Sends what there is to be sent, unless another thread is at it, which
    /// then sends this too: so what many threads say leaves together.
    pub(super) fn write_what_waits(&self) {
        loop {
            let Ok(_writing) = self.writing.try_lock() else {
                return;
            };
            while self.write_some() {}
            drop(_writing);
            // Somebody may have come between the last look and the unlocking.
            let state = self.state();
            if state.link.is_none() || !state.keep_alive_due && !state.queue.has_unsent() {
                return;
            }
        }
    }

    /// Sends one batch; says whether there may be more.
    fn write_some(&self) -> bool {
        let mut state = self.state();
        let Some(link) = state.link.clone() else {
            return false;
        };
        let keep_alive = std::mem::take(&mut state.keep_alive_due);
        let batch = state.queue.take_batch(link.number, Instant::now());
        if batch.is_some() || keep_alive {
            state.active = Some(Instant::now());
        }
        drop(state);
        let bytes = match (&batch, keep_alive) {
            (Some(batch), _) => &*batch.bytes,
            (None, true) => &KEEPALIVE_FRAME,
            (None, false) => return false,
        };
        let deadline = Instant::now() + self.settings.options.write_timeout;
        let mut written = 0;
        while written < bytes.len() {
            match link.stream.write(&bytes[written..], deadline) {
                Ok(count) => written += count,
                Err(error) => {
                    // Of what was encrypted, any part may have left.
                    let left = if link.stream.is_encrypted() {
                        bytes.len()
                    } else {
                        written
                    };
                    if let Some(batch) = &batch {
                        self.state().queue.cut_short(batch, left);
                    }
                    self.lost(&link, &format!("sending failed: {error}"), false);
                    return false;
                }
            }
        }
        true
    }

    /// A connection is lost, as its reader or a writer has noticed.
    fn lost(&self, link: &ClientConnection, why: &str, nothing_begun: bool) {
        let mut state = self.state();
        if state
            .link
            .as_ref()
            .is_some_and(|current| current.number == link.number)
        {
            state.link = None;
            state.last_error = Some(format!(
                "connection to {} lost: {why}",
                self.settings.options.server
            ));
        }
        let reconnect = self.settings.options.reconnect && !state.closed;
        let why = format!("connection to {} lost: {why}", self.settings.options.server);
        state.queue.lost(&Loss {
            link: link.number,
            why,
            nothing_begun,
            reconnect,
        });
        drop(state);
        // Not before: a thread that is writing would then fail, and tell of a
        // loss where the reader knows of an orderly end.
        link.stream.shut_down();
        self.changed.notify_all();
    }

    /// The client's own thread: connects again, sends again, keeps alive.
    pub(super) fn manage(self: Arc<Self>) {
        let mut number = 1;
        let mut pause = FIRST_PAUSE;
        loop {
            let mut state = self.state();
            if state.closed {
                return;
            }
            let now = Instant::now();
            state.queue.wake_due(now);
            if let Some(keep_alive) = state.link.as_ref().map(|link| link.keep_alive) {
                pause = FIRST_PAUSE;
                let due = |state: &State| state.active.unwrap_or(now) + keep_alive;
                state.keep_alive_due = due(&state) <= now;
                if state.keep_alive_due || state.queue.has_unsent() {
                    drop(state);
                    self.write_what_waits();
                    state = self.state();
                }
                // What has come to be due meanwhile is seen under the lock
                // that the sleep gives up.
                let next = state
                    .queue
                    .next_due()
                    .into_iter()
                    .chain([due(&state)])
                    .min()
                    .unwrap_or(now);
                // Whoever writes at the moment writes all of it.
                let until = next.max(now + LEAST_SLEEP);
                self.sleep(state, until);
                continue;
            }
            if !self.settings.options.reconnect {
                return;
            }
            drop(state);
            number += 1;
            match link::open(&self.settings, number) {
                Ok((link, buffer)) => {
                    let mut state = self.state();
                    if state.closed {
                        link.stream.shut_down();
                        return;
                    }
                    state.last_error = None;
                    state.active = Some(Instant::now());
                    state.link = Some(link.clone());
                    drop(state);
                    if let Err(error) = spawn_reader(&self, link.clone(), buffer) {
                        self.lost(&link, &format!("can't start a thread: {error}"), true);
                    }
                    self.write_what_waits();
                }
                Err(error) => {
                    let mut state = self.state();
                    state.last_error = Some(error.of_connection(&self.settings.options.server));
                    // Between half of it and all of it.
                    let chance = u32::from(uuid::Uuid::new_v4().as_bytes()[0]);
                    let until = Instant::now() + pause / 2 + pause / 2 * chance / 256;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    drop(wait_while(state, &self.changed, until, |state| {
                        !state.closed
                    }));
                }
            }
        }
    }

    /// Sleeps until that time, or until the state has changed.
    fn sleep(&self, state: MutexGuard<'_, State>, until: Instant) {
        if !state.closed && state.link.is_some() {
            let remaining = until.saturating_duration_since(Instant::now());
            drop(
                self.changed
                    .wait_timeout(state, remaining)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// Hands an answer to the one who waits for it; says whether the server
    /// has said that it begins nothing more.
    fn answered(&self, header: &Header<'_>, payload: &[u8], binary: bool) -> Result<bool, String> {
        let text = || String::from_utf8(payload.to_vec()).map_err(|error| error.to_string());
        let answer = match header.kind {
            Kind::Response if binary => Ok(Answer::Binary(payload.to_vec())),
            Kind::Response => Ok(Answer::Json(text()?)),
            Kind::Error => Err(serde_json::from_slice::<ServerError>(payload)
                .map_err(|error| error.to_string())?),
            Kind::Request | Kind::Publish => {
                return Err(format!("a server does not send {}", header.kind.as_str()));
            }
        };
        let Some(id) = header.request_id else {
            // What names no request concerns all of them.
            return match answer {
                Err(refusal) if refusal.code == "SHUTTING_DOWN" => Ok(true),
                Err(refusal) => {
                    self.state().last_error = Some(refusal.to_string());
                    Ok(false)
                }
                Ok(_) => Ok(false),
            };
        };
        let mut state = self.state();
        if let Err(refusal) = &answer
            && refusal.code == "SERVICE_UNAVAILABLE"
            && refusal.nothing_ran()
        {
            let wait =
                Duration::from_millis(refusal.retry_after_ms().unwrap_or(0)).max(LEAST_RETRY);
            if state.queue.retry_later(id, Instant::now() + wait) {
                drop(state);
                self.changed.notify_all();
                return Ok(false);
            }
        }
        // One that nobody waits for any more is dropped.
        let entry = state.queue.remove(id);
        let full = state.queue.len() + 1 >= self.settings.options.max_waiting;
        drop(state);
        if let Some(entry) = entry {
            entry
                .slot
                .put(answer.map_err(|refusal| match refusal.nothing_ran() {
                    true if entry.lost_once => {
                        ClientError::Unanswered(format!("lost, and sent again: {refusal}"))
                    }
                    _ => ClientError::Answered(refusal),
                }));
        }
        if full {
            self.changed.notify_all();
        }
        Ok(false)
    }
}

/// Starts the thread that reads one connection to its end.
pub(super) fn spawn_reader(
    shared: &Arc<ClientCore>,
    link: ClientConnection,
    mut buffer: Reassembly,
) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let read = move || {
        let mut ending = false;
        let mut read_all = || loop {
            if let Err(why) = read_some(&shared, &link, &mut buffer, &mut ending) {
                break why;
            }
        };
        // Whoever waits for an answer is not left alone by a defect.
        let why = catch_unwind(AssertUnwindSafe(&mut read_all))
            .unwrap_or_else(|_| Some("a defect of the client".into()));
        let orderly = why.is_none() && !buffer.is_midway();
        let reported = shared.state().last_error.take();
        let why = why
            .or(reported)
            .unwrap_or_else(|| "the server closed it".into());
        shared.lost(&link, &why, ending && orderly);
    };
    thread::Builder::new()
        .name("mb-client-read".into())
        .spawn(read)
        .map(drop)
}

/// Reads once and hands on what is whole. The error is why no more will come,
/// none for the orderly end of the stream.
fn read_some(
    shared: &ClientCore,
    link: &ClientConnection,
    buffer: &mut Reassembly,
    ending: &mut bool,
) -> Result<(), Option<String>> {
    while let Some(incoming) = buffer.next().map_err(|error| Some(error.to_string()))? {
        let Incoming::Message { body, binary } = incoming else {
            continue;
        };
        let (header, payload) = Header::parse(body).map_err(|error| Some(error.to_string()))?;
        *ending |= shared.answered(&header, payload, binary).map_err(Some)?;
    }
    // A server that is there answers keep-alives: three of them without a
    // word, and it is not.
    let deadline = Instant::now() + link.keep_alive * 3 + shared.settings.options.write_timeout;
    match link.stream.read(buffer.spare(), deadline) {
        Ok(0) => Err(None),
        Ok(count) => {
            buffer.advance(count);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(Some("the server no longer answers".into()))
        }
        Err(error) => Err(Some(error.to_string())),
    }
}
