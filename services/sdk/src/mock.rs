//! A host for native tests: what the server would be to the service.
//!
//! In a plain `cargo test` there is no server. Each test thread has one of
//! these instead; a test says what it grants and answers, and asks afterwards
//! what came of it.
//!
//! ```
//! use mb_service::{config, keyvalue::Bucket, log, mock};
//!
//! mock::reset();
//! mock::config("currency", "EUR");
//! assert_eq!(config::get("currency").unwrap().as_deref(), Some("EUR"));
//!
//! Bucket::open("counters").unwrap().increment("visits", 2).unwrap();
//! assert_eq!(mock::value("counters", "visits").as_deref(), Some(&b"2"[..]));
//!
//! log::info("counted");
//! assert_eq!(mock::lines(), ["info: counted"]);
//! ```
//!
//! It has no limits, no quota and no deadline, and nothing fails by itself:
//! what a service does with a full store is seen in the server only.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    rc::Rc,
    time::{Duration, SystemTime},
};

use crate::{
    Payload,
    bindings::wasi::keyvalue::store::{Error, KeyResponse},
    calls::{CallError, Origin},
};

type Serves = Rc<dyn Fn(Payload) -> Result<Payload, CallError>>;

/// What the call under test sees.
#[derive(Default)]
struct State {
    config: BTreeMap<String, String>,
    buckets: BTreeMap<String, BTreeMap<String, Stored>>,
    passed: Duration,
    services: BTreeMap<String, Serves>,
    lines: Vec<String>,
    context: Context,
}

/// A value, and when it ends.
struct Stored {
    value: Vec<u8>,
    end: Option<SystemTime>,
}

/// What [`context`](mod@crate::context) tells; set with [`context()`].
#[derive(Debug, Clone)]
pub struct Context {
    /// The caller's id of the request.
    pub request_id: Option<String>,
    /// The request that caused this one.
    pub parent_request_id: Option<String>,
    /// The version that the caller was written against.
    pub requested_version: String,
    /// The principal.
    pub principal: Option<String>,
    /// The server's id of the connection.
    pub connection_id: String,
    /// Whether that connection is encrypted.
    pub encrypted: bool,
    /// The time until the deadline; here it does not pass.
    pub remaining: Duration,
}

impl Default for Context {
    fn default() -> Self {
        Self {
            request_id: Some("test".into()),
            parent_request_id: None,
            requested_version: "1.0.0".into(),
            principal: None,
            connection_id: "1".into(),
            encrypted: false,
            remaining: Duration::from_secs(5),
        }
    }
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

fn with<R>(act: impl FnOnce(&mut State) -> R) -> R {
    STATE.with_borrow_mut(act)
}

/// Forgets everything. Tests that share a thread want it first.
pub fn reset() {
    with(|state| *state = State::default());
}

/// Grants a value of configuration, or a secret.
pub fn config(key: &str, value: &str) {
    with(|state| state.config.insert(key.into(), value.into()));
}

/// Says what the call is.
pub fn context(context: Context) {
    with(|state| state.context = context);
}

/// Grants calls of a topic, and answers them.
pub fn service(topic: &str, answer: impl Fn(Payload) -> Result<Payload, CallError> + 'static) {
    with(|state| state.services.insert(topic.into(), Rc::new(answer)));
}

/// Has time pass: for [`now`](crate::now), and for values that end.
pub fn pass(time: Duration) {
    with(|state| state.passed += time);
}

pub(crate) fn passed() -> Option<Duration> {
    STATE.with(|state| Some(state.try_borrow().ok()?.passed))
}

/// The durable value of a key, if there is one.
#[must_use]
pub fn value(bucket: &str, key: &str) -> Option<Vec<u8>> {
    Bucket(bucket.into()).with(|values| Some(values.get(key)?.value.clone()))
}

/// Takes the lines of the log so far, each `level: text`.
#[must_use]
pub fn lines() -> Vec<String> {
    with(|state| std::mem::take(&mut state.lines))
}

pub(crate) fn log(level: &str, text: &str) {
    with(|state| state.lines.push(format!("{level}: {text}")));
}

pub(crate) fn config_value(key: &str) -> Option<String> {
    with(|state| state.config.get(key).cloned())
}

pub(crate) fn current() -> Context {
    with(|state| state.context.clone())
}

pub(crate) fn call(topic: &str, payload: &Payload) -> Result<Payload, CallError> {
    let serves = with(|state| state.services.get(topic).cloned());
    // Outside of the borrow: it may use the mock itself.
    serves.map_or_else(
        || {
            Err(CallError {
                code: "FORBIDDEN".into(),
                message: format!("{topic} is not granted; a test grants it with mock::service"),
                origin: Origin::Server,
                details: None,
            })
        },
        |serves| serves(payload.clone()),
    )
}

/// Stands for `wasi:keyvalue/store.bucket`.
pub(crate) struct Bucket(String);

impl Bucket {
    pub(crate) fn open(name: &str) -> Result<Self, Error> {
        Ok(Self(name.into()))
    }

    /// Works with what has not ended.
    fn with<R>(&self, act: impl FnOnce(&mut BTreeMap<String, Stored>) -> R) -> R {
        let now = crate::now();
        with(|state| {
            let values = state.buckets.entry(self.0.clone()).or_default();
            values.retain(|_, stored| stored.end.is_none_or(|end| end > now));
            act(values)
        })
    }

    fn put(&self, key: &str, value: &[u8], end: Option<SystemTime>) {
        let value = value.into();
        self.with(|values| values.insert(key.into(), Stored { value, end }));
    }

    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.with(|values| Some(values.get(key)?.value.clone())))
    }

    pub(crate) fn exists(&self, key: &str) -> Result<bool, Error> {
        Ok(self.with(|values| values.contains_key(key)))
    }

    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.put(key, value, None);
        Ok(())
    }

    pub(crate) fn set_for(&self, key: &str, value: &[u8], time: Duration) -> Result<(), Error> {
        self.put(key, value, Some(crate::now() + time));
        Ok(())
    }

    /// Leaves the end as it is.
    pub(crate) fn replace(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let end = self.with(|values| values.get(key)?.end);
        self.put(key, value, end);
        Ok(())
    }

    pub(crate) fn delete(&self, key: &str) -> Result<(), Error> {
        self.with(|values| values.remove(key));
        Ok(())
    }

    pub(crate) fn list_keys(&self, _cursor: Option<&str>) -> Result<KeyResponse, Error> {
        self.keys_from("")
    }

    pub(crate) fn keys_from(&self, prefix: &str) -> Result<KeyResponse, Error> {
        Ok(self.with(|values| KeyResponse {
            keys: values
                .keys()
                .filter(|key| key.starts_with(prefix))
                .cloned()
                .collect(),
            cursor: None,
        }))
    }

    pub(crate) fn increment(&self, key: &str, delta: i64) -> Result<i64, Error> {
        let text = self.get(key)?.unwrap_or_else(|| b"0".to_vec());
        let number: Option<i64> = std::str::from_utf8(&text)
            .ok()
            .and_then(|text| text.parse().ok());
        let sum = number.and_then(|number| number.checked_add(delta));
        let sum = sum.ok_or_else(|| {
            Error::Other(format!(
                "the value of {key} is no number that can be added to"
            ))
        })?;
        self.replace(key, sum.to_string().as_bytes())?;
        Ok(sum)
    }
}
