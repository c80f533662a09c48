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

mod builder;
mod error;
mod link;
mod queue;
mod shared;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

pub use builder::Builder;
pub use error::{ClientError, ServerError};
#[cfg(feature = "compiler")]
pub(crate) use link::{CLOSED, SILENT, check_token_path};
use queue::{Entry, Sent, Slot};
use serde::{Serialize, de::DeserializeOwned};
use shared::ClientCore;

use crate::{
    locks::wait_while,
    wire::{
        DEFAULT_TIMEOUT, Payload, Topic, Version, header::MAX_TIMEOUT, message::MAX_PAYLOAD_SIZE,
    },
};

/// How much longer than the request's own timeout the client waits, for the
/// answer to travel.
const GRACE: Duration = Duration::from_secs(2);

/// Longest of the times that a caller chooses; a longer one is this.
const LONGEST_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// A connection to a server, shared by all clones of it. Ends with the last.
#[derive(Clone)]
pub struct Client {
    shared: Arc<ClientCore>,
    /// Tells the threads when the last clone is gone.
    _end: Arc<End>,
}

/// Ends the threads when dropped.
struct End(Arc<ClientCore>);

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
    /// How long the server may take, from now on and with all retries; an hour at
    /// most.
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
        Self {
            topic,
            version,
            request_id: None,
            timeout: DEFAULT_TIMEOUT,
            payload,
            idempotent: false,
        }
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
    shared: Arc<ClientCore>,
    id: Arc<str>,
    slot: Arc<Slot>,
    deadline: Instant,
    done: bool,
}

impl Client {
    /// For a server at `host:port`; IPv6 in brackets. A name is resolved again
    /// at each connection.
    #[must_use]
    pub fn builder(server: impl Into<String>) -> Builder {
        Builder::new(server.into())
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
        let topic = Topic::parse(topic)
            .map_err(|error| ClientError::NotSent(format!("{topic:?}: {error}")))?;
        let text = serde_json::to_string(payload)
            .map_err(|error| ClientError::NotSent(error.to_string()))?;
        match self.call(&Request::new(topic, Payload::Json(&text)))? {
            Answer::Json(text) => serde_json::from_str(&text).map_err(|error| {
                ClientError::Unexpected(format!("the answer is not what was expected: {error}"))
            }),
            Answer::Binary(_) => Err(ClientError::Unexpected(
                "the answer is bytes, not JSON".into(),
            )),
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
        let Request {
            topic,
            version,
            request_id,
            timeout,
            payload,
            idempotent,
        } = *request;
        if payload.as_bytes().len() > MAX_PAYLOAD_SIZE {
            let size = payload.as_bytes().len();
            return Err(ClientError::NotSent(format!(
                "a payload of {size} bytes exceeds {MAX_PAYLOAD_SIZE}, more than which no server takes"
            )));
        }
        let deadline = Instant::now() + timeout.min(MAX_TIMEOUT);
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
            retries: shared.settings.options.retries,
            sent: Sent::No,
            lost_once: false,
            slot: Arc::clone(&slot),
        };
        let limit = shared.settings.options.max_waiting;
        let is_full = |state: &mut shared::State| state.queue.len() >= limit;
        let (mut state, has_room) = wait_while(shared.state(), &shared.changed, deadline, is_full);
        if !has_room {
            return Err(ClientError::NotSent(format!(
                "{limit} requests wait for their answers already"
            )));
        }
        if state.queue.contains(&id) {
            return Err(ClientError::NotSent(format!("request id {id} is in use")));
        }
        if state.link.is_none() && !shared.settings.options.reconnect {
            let why = state
                .last_error
                .clone()
                .unwrap_or_else(|| "the connection was lost".into());
            return Err(ClientError::NotSent(why));
        }
        state.queue.push(Arc::clone(&id), entry);
        drop(state);
        shared.write_what_waits();
        Ok(Pending {
            shared: Arc::clone(shared),
            id,
            slot,
            deadline: deadline + GRACE,
            done: false,
        })
    }
}

impl Pending {
    /// The request's id, under which the server's operator finds it.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.id
    }

    /// Waits for the answer, until the request's timeout and 2 s for the way.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn wait(mut self) -> Result<Answer, ClientError> {
        self.done = true;
        if let Some(answer) = self.slot.wait(self.deadline) {
            return answer;
        }
        let (entry, last_error) = {
            let mut state = self.shared.state();
            (state.queue.remove(&self.id), state.last_error.clone())
        };
        self.shared.changed.notify_all();
        let late = "no answer within the timeout";
        match entry {
            // It came in the last moment.
            None => self
                .slot
                .wait(Instant::now())
                .unwrap_or_else(|| Err(ClientError::Unanswered(late.into()))),
            Some(entry) => {
                let why = match entry.sent {
                    Sent::Maybe(_) => late.into(),
                    Sent::No | Sent::Later(_) => {
                        last_error.unwrap_or_else(|| "not sent within its timeout".into())
                    }
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
