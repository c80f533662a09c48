//! A blocking client that many threads share: it pipelines their requests
//! over one connection, keeps that alive, and connects again when it is lost.
//!
//! ```no_run
//! use mb_server::client::Client;
//! # fn main() -> Result<(), mb_server::client::ClientError> {
//! let client = Client::builder("127.0.0.1:8081").connect()?;
//! let sum: serde_json::Value = client.call_json("calc.add", &serde_json::json!({"a": 2, "b": 40}))?;
//! # Ok(())
//! # }
//! ```
//!
//! What is sent again, and what is not: a request of which it is certain that
//! the server did not begin it (it did not leave as a whole; the server
//! answered `SERVICE_UNAVAILABLE`; or the server said `SHUTTING_DOWN` and
//! ended the stream in order), and one that its caller calls idempotent.
//! Every other request that was lost ends with [`ClientError::Unanswered`].

mod error;
mod link;
mod queue;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

pub use error::{ClientError, Refusal};
use link::Link;
use queue::{Entry, Loss, Queue, Sent, Slot};
use rustls::ClientConfig;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    transport::{ClientTls, client_config},
    wire::{DEFAULT_TIMEOUT, Header, Incoming, Kind, Payload, Reassembly, Topic, Version, frame::KEEPALIVE_FRAME},
};

/// How much longer than the request's own timeout the client waits, for the
/// answer to travel.
const GRACE: Duration = Duration::from_secs(2);

/// First and longest pause between two tries to connect; each is shortened by
/// up to half, by chance, so that many clients don't come back at once.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often a request is sent again at most, unless the builder says.
const DEFAULT_RETRIES: u32 = 3;

/// Requests without an answer at the same time, unless the builder says.
const DEFAULT_MAX_WAITING: usize = 1024;

/// How long the client's own thread sleeps at least, unless it is woken.
const LEAST_SLEEP: Duration = Duration::from_millis(1);

/// How long a request that was refused for want of room waits at least.
const LEAST_RETRY: Duration = Duration::from_millis(1);

/// A connection to a server, shared by all clones of it. Ends with the last.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    /// Tells the threads when the last clone is gone.
    _end: Arc<End>,
}

/// Says how to connect; see [`Client::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    server: String,
    name: String,
    tls: Option<ClientTls>,
    token: Option<String>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    write_timeout: Duration,
    keep_alive: Duration,
    reconnect: bool,
    retries: u32,
    max_waiting: usize,
    piece_size: Option<usize>,
}

/// What the builder has settled.
struct Settings {
    server: String,
    host: String,
    port: u16,
    name: String,
    tls: Option<(Arc<ClientConfig>, String)>,
    token: Option<String>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    write_timeout: Duration,
    keep_alive: Duration,
    reconnect: bool,
    retries: u32,
    max_waiting: usize,
    piece_size: Option<usize>,
}

struct Shared {
    settings: Settings,
    state: Mutex<State>,
    /// The state has changed: a connection, room, something to be done.
    changed: Condvar,
    /// Held by the one thread that writes.
    writing: Mutex<()>,
    ids: AtomicU64,
    /// Tells this client's requests from those of others, in logs.
    prefix: String,
}

#[derive(Default)]
struct State {
    queue: Queue,
    link: Option<Link>,
    /// When the last byte was sent.
    active: Option<Instant>,
    /// A keep-alive is to be sent.
    keep_alive_due: bool,
    /// Why there is no connection.
    trouble: Option<String>,
    closed: bool,
}

/// Ends the threads when dropped.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        if let Some(link) = state.link.take() {
            link.stream.shut_down();
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Service and action.
    pub topic: Topic<'a>,
    /// The version that the caller was written against.
    pub version: Version,
    /// Joins the answer to it, 1 to 64 of letters, digits, `.`, `_` and `-`;
    /// none for one of the client's own making.
    pub request_id: Option<&'a str>,
    /// How long the server may take, from now on and with all retries.
    pub timeout: Duration,
    /// JSON or bytes.
    pub payload: Payload<'a>,
    /// Running it twice does no harm, so it is sent again when it is not
    /// certain whether it ran.
    pub idempotent: bool,
}

impl<'a> Request<'a> {
    /// A request with the default timeout, for version 1.0.0.
    #[must_use]
    pub fn new(topic: Topic<'a>, payload: Payload<'a>) -> Self {
        let version = Version::new(1, 0, 0);
        Self { topic, version, request_id: None, timeout: DEFAULT_TIMEOUT, payload, idempotent: false }
    }
}

/// A good answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// One JSON text.
    Json(String),
    /// Opaque bytes.
    Binary(Vec<u8>),
}

/// An answer that has not come yet. Dropped, the request goes on, and its
/// answer is dropped as well.
pub struct Pending {
    shared: Arc<Shared>,
    id: Arc<str>,
    slot: Arc<Slot>,
    deadline: Instant,
    done: bool,
}

impl Builder {
    /// Uses TLS.
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Uses TLS and trusts the CAs of a PEM file.
    #[must_use]
    pub fn ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.tls.get_or_insert_default().ca = Some(file.into());
        self
    }

    /// Shows a certificate; PEM files of its chain and its key.
    #[must_use]
    pub fn certificate(mut self, cert: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        self.tls.get_or_insert_default().identity = Some((cert.as_ref().into(), key.as_ref().into()));
        self
    }

    /// Says hello with a token.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Who the client says it is, as `name/version`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// For TCP to connect; 5 s unless said.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// For TLS and the hello together; 5 s unless said.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// For a write to be taken; 10 s unless said.
    #[must_use]
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.write_timeout = timeout;
        self
    }

    /// Silence after which a keep-alive is sent; 30 s unless said, or less if
    /// the server asks for it.
    #[must_use]
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = interval;
        self
    }

    /// Whether to connect again after a loss; it is, unless said.
    #[must_use]
    pub fn reconnect(mut self, reconnect: bool) -> Self {
        self.reconnect = reconnect;
        self
    }

    /// How often a request is sent again at most; 3 unless said.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Requests without an answer at the same time; one more waits for room.
    /// 1,024 unless said.
    #[must_use]
    pub fn max_waiting(mut self, requests: usize) -> Self {
        self.max_waiting = requests.max(1);
        self
    }

    /// Messages leave in pieces of at most so many bytes; whole unless said.
    #[must_use]
    pub fn piece_size(mut self, bytes: usize) -> Self {
        self.piece_size = Some(bytes.max(1));
        self
    }

    fn settle(self) -> Result<Settings, String> {
        let Self {
            server,
            name,
            tls,
            token,
            connect_timeout,
            handshake_timeout,
            write_timeout,
            keep_alive,
            reconnect,
            retries,
            max_waiting,
            piece_size,
        } = self;
        let wrong = || format!("{server:?} is no HOST:PORT, as localhost:8081 or [::1]:8081 is");
        let (host, port) = server.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        if bare.is_none() && host.contains(':') || host.is_empty() {
            return Err(wrong());
        }
        let host = bare.unwrap_or(host).to_owned();
        let tls = match tls {
            None => None,
            Some(tls) => {
                let config = client_config(&tls).map_err(|error| error.to_string())?;
                Some((config, tls.server_name.unwrap_or_else(|| host.clone())))
            }
        };
        Ok(Settings {
            server,
            host,
            port,
            name,
            tls,
            token,
            connect_timeout,
            handshake_timeout,
            write_timeout,
            keep_alive,
            reconnect,
            retries,
            max_waiting,
            piece_size,
        })
    }

    /// Connects, and says hello.
    ///
    /// # Errors
    /// [`ClientError::NotSent`] says what is wrong: an address, a file, the
    /// server, its certificate or ours, the token.
    pub fn connect(self) -> Result<Client, ClientError> {
        let settings = self.settle().map_err(ClientError::NotSent)?;
        let (link, buffer) = link::open(&settings, 1).map_err(ClientError::NotSent)?;
        let state = State { link: Some(link.clone()), active: Some(Instant::now()), ..State::default() };
        let shared = Arc::new(Shared {
            settings,
            state: Mutex::new(state),
            changed: Condvar::new(),
            writing: Mutex::default(),
            ids: AtomicU64::new(1),
            prefix: uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(),
        });
        let no_thread = |error: io::Error| ClientError::NotSent(format!("can't start a thread: {error}"));
        let end = End(Arc::clone(&shared));
        spawn_reader(&shared, link, buffer).map_err(no_thread)?;
        let manager = Arc::clone(&shared);
        thread::Builder::new().name("mb-client".into()).spawn(move || manager.manage()).map_err(no_thread)?;
        Ok(Client { shared, _end: Arc::new(end) })
    }
}

impl Client {
    /// For a server at `host:port`; IPv6 in brackets. A name is resolved anew
    /// at each connection.
    #[must_use]
    pub fn builder(server: impl Into<String>) -> Builder {
        Builder {
            server: server.into(),
            name: concat!("mb-server/", env!("CARGO_PKG_VERSION")).into(),
            tls: None,
            token: None,
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(30),
            reconnect: true,
            retries: DEFAULT_RETRIES,
            max_waiting: DEFAULT_MAX_WAITING,
            piece_size: None,
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call(&self, request: &Request<'_>) -> Result<Answer, ClientError> {
        self.send(request)?.wait()
    }

    /// Asks with a value and waits for another, both as JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call_json<T: Serialize + ?Sized, R: DeserializeOwned>(
        &self,
        topic: &str,
        payload: &T,
    ) -> Result<R, ClientError> {
        let topic = Topic::parse(topic).map_err(|error| ClientError::NotSent(format!("{topic:?}: {error}")))?;
        let text = serde_json::to_string(payload).map_err(|error| ClientError::NotSent(error.to_string()))?;
        match self.call(&Request::new(topic, Payload::Json(&text)))? {
            Answer::Json(text) => serde_json::from_str(&text)
                .map_err(|error| ClientError::Unexpected(format!("the answer is not what was expected: {error}"))),
            Answer::Binary(_) => Err(ClientError::Unexpected("the answer is bytes, not JSON".into())),
        }
    }

    /// Asks; the answer can be waited for later. Waits only while as many
    /// requests as there may be have no answer.
    ///
    /// # Errors
    /// [`ClientError::NotSent`] if there is no room until the deadline, the
    /// request id is taken or wrong, or the client does not connect again.
    pub fn send(&self, request: &Request<'_>) -> Result<Pending, ClientError> {
        let shared = &self.shared;
        let Request { topic, version, request_id, timeout, payload, idempotent } = *request;
        let deadline = Instant::now() + timeout;
        let id: Arc<str> = match request_id {
            Some(id) if crate::wire::header::is_request_id(id) => id.into(),
            Some(id) => return Err(ClientError::NotSent(format!("{id:?} is no request id"))),
            None => format!("{}-{}", shared.prefix, shared.ids.fetch_add(1, Relaxed)).into(),
        };
        let slot = Arc::new(Slot::default());
        let entry = Entry {
            topic: topic.as_str().into(),
            version,
            payload: payload.as_bytes().to_vec(),
            binary: payload.is_binary(),
            deadline,
            idempotent,
            retries: shared.settings.retries,
            sent: Sent::No,
            lost_once: false,
            slot: Arc::clone(&slot),
        };
        let mut state = shared.state();
        while state.queue.len() >= shared.settings.max_waiting {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                let limit = shared.settings.max_waiting;
                return Err(ClientError::NotSent(format!("{limit} requests wait for their answers already")));
            }
            state = shared.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.queue.contains(&id) {
            return Err(ClientError::NotSent(format!("request id {id} is in use")));
        }
        if state.link.is_none() && !shared.settings.reconnect {
            let why = state.trouble.clone().unwrap_or_else(|| "the connection was lost".into());
            return Err(ClientError::NotSent(why));
        }
        state.queue.push(Arc::clone(&id), entry);
        drop(state);
        shared.write_what_waits();
        Ok(Pending { shared: Arc::clone(shared), id, slot, deadline: deadline + GRACE, done: false })
    }
}

impl Pending {
    /// Waits for the answer, until the request's timeout and 2 s for the way.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn wait(mut self) -> Result<Answer, ClientError> {
        self.done = true;
        if let Some(answer) = self.slot.wait(self.deadline) {
            return answer;
        }
        let (entry, trouble) = {
            let mut state = self.shared.state();
            (state.queue.remove(&self.id), state.trouble.clone())
        };
        self.shared.changed.notify_all();
        let late = "no answer within the timeout";
        match entry {
            // It came in the last moment.
            None => self.slot.wait(Instant::now()).unwrap_or_else(|| Err(ClientError::Unanswered(late.into()))),
            Some(entry) => {
                let why = match entry.sent {
                    Sent::Maybe(_) => late.into(),
                    Sent::No | Sent::Later(_) => trouble.unwrap_or_else(|| "not sent within its timeout".into()),
                };
                Err(entry.without_answer(false, why))
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.done {
            self.shared.state().queue.remove(&self.id);
            self.shared.changed.notify_all();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what there is to be sent, unless another thread is at it, which
    /// then sends this too: so what many threads say leaves together.
    fn write_what_waits(&self) {
        loop {
            let Ok(_writing) = self.writing.try_lock() else { return };
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
        let Some(link) = state.link.clone() else { return false };
        let keep_alive = std::mem::take(&mut state.keep_alive_due);
        let batch = state.queue.take_batch(link.number, self.settings.piece_size, Instant::now());
        if batch.is_some() || keep_alive {
            state.active = Some(Instant::now());
        }
        drop(state);
        let bytes = match (&batch, keep_alive) {
            (Some(batch), _) => &*batch.bytes,
            (None, true) => &KEEPALIVE_FRAME,
            (None, false) => return false,
        };
        let deadline = Instant::now() + self.settings.write_timeout;
        let mut written = 0;
        while written < bytes.len() {
            match link.stream.write(&bytes[written..], deadline) {
                Ok(count) => written += count,
                Err(error) => {
                    // Of what was encrypted, any part may have left.
                    let left = if link.stream.is_encrypted() { bytes.len() } else { written };
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
    fn lost(&self, link: &Link, why: &str, nothing_begun: bool) {
        link.stream.shut_down();
        let mut state = self.state();
        if state.link.as_ref().is_some_and(|current| current.number == link.number) {
            state.link = None;
            state.trouble = Some(format!("connection to {} lost: {why}", self.settings.server));
        }
        let reconnect = self.settings.reconnect && !state.closed;
        let why = format!("connection to {} lost: {why}", self.settings.server);
        state.queue.lost(&Loss { link: link.number, why, nothing_begun, reconnect });
        drop(state);
        self.changed.notify_all();
    }

    /// The client's own thread: connects again, sends again, keeps alive.
    fn manage(self: Arc<Self>) {
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
                let next = state.queue.next_due().into_iter().chain([due(&state)]).min().unwrap_or(now);
                // Whoever writes at the moment writes all of it.
                let until = next.max(now + LEAST_SLEEP);
                self.sleep(state, until);
                continue;
            }
            if !self.settings.reconnect {
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
                    state.trouble = None;
                    state.active = Some(Instant::now());
                    state.link = Some(link.clone());
                    drop(state);
                    if let Err(error) = spawn_reader(&self, link.clone(), buffer) {
                        self.lost(&link, &format!("can't start a thread: {error}"), true);
                    }
                    self.write_what_waits();
                }
                Err(trouble) => {
                    let mut state = self.state();
                    state.trouble = Some(trouble);
                    // Between half of it and all of it.
                    let chance = u32::from(uuid::Uuid::new_v4().as_bytes()[0]);
                    let until = Instant::now() + pause / 2 + pause / 2 * chance / 256;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    while !state.closed && Instant::now() < until {
                        let remaining = until.saturating_duration_since(Instant::now());
                        state = self.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            }
        }
    }

    /// Sleeps until that time, or until the state has changed.
    fn sleep(&self, state: MutexGuard<'_, State>, until: Instant) {
        if !state.closed && state.link.is_some() {
            let remaining = until.saturating_duration_since(Instant::now());
            drop(self.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Hands an answer to the one who waits for it; says whether the server
    /// has said that it begins nothing more.
    fn answered(&self, header: &Header<'_>, payload: &[u8], binary: bool) -> Result<bool, String> {
        let text = || String::from_utf8(payload.to_vec()).map_err(|error| error.to_string());
        let answer = match header.kind {
            Kind::Response if binary => Ok(Answer::Binary(payload.to_vec())),
            Kind::Response => Ok(Answer::Json(text()?)),
            Kind::Error => Err(serde_json::from_slice::<Refusal>(payload).map_err(|error| error.to_string())?),
            Kind::Request | Kind::Publish => return Err(format!("a server does not send {}", header.kind.as_str())),
        };
        let Some(id) = header.request_id else {
            // What names no request concerns all of them.
            return match answer {
                Err(refusal) if refusal.code == "SHUTTING_DOWN" => Ok(true),
                Err(refusal) => {
                    self.state().trouble = Some(refusal.to_string());
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
            let wait = Duration::from_millis(refusal.retry_after_ms().unwrap_or(0)).max(LEAST_RETRY);
            if state.queue.retry_later(id, Instant::now() + wait) {
                drop(state);
                self.changed.notify_all();
                return Ok(false);
            }
        }
        // One that nobody waits for any more is dropped.
        let entry = state.queue.remove(id);
        let full = state.queue.len() + 1 >= self.settings.max_waiting;
        drop(state);
        if let Some(entry) = entry {
            entry.slot.put(answer.map_err(|refusal| match refusal.nothing_ran() {
                true if entry.lost_once => ClientError::Unanswered(format!("lost, and sent again: {refusal}")),
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
fn spawn_reader(shared: &Arc<Shared>, link: Link, mut buffer: Reassembly) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let read = move || {
        let mut ending = false;
        let why = loop {
            match read_some(&shared, &link, &mut buffer, &mut ending) {
                Ok(()) => {}
                Err(why) => break why,
            }
        };
        let orderly = why.is_none() && !buffer.is_midway();
        let said = shared.state().trouble.take();
        let why = why.or(said).unwrap_or_else(|| "the server closed it".into());
        shared.lost(&link, &why, ending && orderly);
    };
    thread::Builder::new().name("mb-client-read".into()).spawn(read).map(drop)
}

/// Reads once and hands on what is whole. The error is why no more will come,
/// none for the orderly end of the stream.
fn read_some(shared: &Shared, link: &Link, buffer: &mut Reassembly, ending: &mut bool) -> Result<(), Option<String>> {
    while let Some(incoming) = buffer.next().map_err(|error| Some(error.to_string()))? {
        let Incoming::Message { body, binary } = incoming else { continue };
        let (header, payload) = Header::parse(body).map_err(|error| Some(error.to_string()))?;
        *ending |= shared.answered(&header, payload, binary).map_err(Some)?;
    }
    // A server that is there answers keep-alives: three of them without a
    // word, and it is not.
    let deadline = Instant::now() + link.keep_alive * 3 + shared.settings.write_timeout;
    match link.stream.read(buffer.spare(), deadline) {
        Ok(0) => Err(None),
        Ok(count) => {
            buffer.advance(count);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(Some("the server says nothing any more".into())),
        Err(error) => Err(Some(error.to_string())),
    }
}
