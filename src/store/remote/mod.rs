//! The engine of several machines: Valkey or Redis. Each operation is one
//! script, which the engine does whole or not at all, so that quotas and the
//! order of keys hold whichever server asks.
//!
//! All that is held of a service has one hash tag, so it is in one slot of a
//! cluster: a hash of the values, a sorted set of the names in order, one of
//! when those end that do, and what all count.

mod backup;
mod connection;
mod nodes;
mod pipeline;
mod pool;

use std::{
    collections::BTreeMap,
    io::{self, BufRead, Write},
    ops::Bound::{Excluded, Included, Unbounded},
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};

use redis::{Cmd, RedisWrite as _, Script, Value};

use super::{
    Change, Checked, Done, Engine, EngineResult, Health, KeyPage, MAX_BATCH_BYTES, MAX_KEY,
    MAX_PAGE, MAX_VALUE, Op, Size, StoreError, batch_too_large, digest,
    entry::{EntryKey, OVERHEAD},
};
use crate::{
    budget::{Budget, Reservation},
    config::store::Remote as Settings,
    locks::lock,
    transport::{ClientTls, client_config},
};
use connection::Login;
use nodes::{Nodes, Question};

/// An engine that has not answered for so long is taken for one that is away.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Of the time that a call has left, its operation gets so many tenths: a
/// service is to see the failure, and to answer with it.
const SHARE: u32 = 9;
/// Copies of a value that is sent: itself, in a command, and as it is sent.
const COPIES: usize = 3;
/// Services at which one look looks, in turn: of a hundred servers with a
/// hundred services each, one engine is to notice nothing.
const TENDED: usize = 8;
/// Longest value that is read together with the answers of others, in bytes. A
/// longer one is asked for again.
const SHORT_VALUE: usize = 4096;
/// Why an answer can't be used.
const UNEXPECTED: &str = "its answer is none of this program's scripts";
/// Bytes of an answer beside the values or names in it.
const FRAME: usize = 32 * 1024;

macro_rules! script {
    ($name:ident, $($file:literal),+) => {
        static $name: LazyLock<(Script, &str)> = LazyLock::new(|| {
            let text = concat!($(include_str!(concat!("scripts/", $file, ".lua"))),+);
            (Script::new(text), text)
        });
    };
}

script!(GET, "common", "get");
script!(EXISTS, "common", "exists");
script!(LIST, "common", "list");
script!(PUT, "common", "put");
script!(INCREMENT, "increment-fast", "common", "increment");
script!(SWAP, "common", "swap");
script!(TEND, "common", "tend");
script!(SCAN, "common", "scan");

/// An engine over the network.
pub(super) struct Remote {
    nodes: Nodes,
    memory: Option<Arc<Budget>>,
    health: Health,
    services: Mutex<Services>,
}

#[derive(Default)]
struct Services {
    /// What each uses, in bytes, as of the last look at it.
    used: BTreeMap<Arc<str>, u64>,
    /// At which one was looked last.
    last: Arc<str>,
}

impl Services {
    /// Those whose turn it is.
    fn next(&self) -> Vec<Arc<str>> {
        let later = (Excluded(&*self.last), Unbounded);
        let earlier = (Unbounded, Included(&*self.last));
        let in_turn = [later, earlier].map(|part| self.used.range::<str, _>(part));
        let names = in_turn.into_iter().flatten();
        names
            .take(TENDED)
            .map(|(name, _)| Arc::clone(name))
            .collect()
    }
}

impl Remote {
    /// Connects to nothing yet.
    pub(super) fn new(settings: Settings, memory: Option<Arc<Budget>>) -> Result<Self, StoreError> {
        let tls = if settings.tls {
            let tls = ClientTls {
                ca: settings.ca.clone(),
                ..ClientTls::default()
            };
            let config =
                client_config(&tls).map_err(|error| StoreError::Away(error.to_string()))?;
            let mut config = (*config).clone();
            // That of our own protocol.
            config.alpn_protocols.clear();
            Some(Arc::new(config))
        } else {
            None
        };
        let login = Login {
            tls,
            user: settings.user.clone(),
            password_file: settings.password_file.clone(),
            db: settings.db,
            memory: memory.clone(),
        };
        Ok(Self {
            nodes: Nodes::new(settings, login),
            memory,
            health: Health::default(),
            services: Mutex::default(),
        })
    }

    /// Runs a script on what is held of a service.
    fn run(
        &self,
        service: &str,
        (script, text): &(Script, &str),
        arguments: &dyn Fn(&mut Cmd),
        limit: usize,
        deadline: Instant,
    ) -> Result<Value, StoreError> {
        let build = |name: &str, script: &str| {
            // What a short command has.
            let mut command = Cmd::with_capacity(16, 512);
            command.arg(name).arg(script).arg(4);
            for part in ["values", "keys", "ends", "used"] {
                command.write_arg_fmt(format_args!("mb:{{{service}}}:{part}"));
            }
            // An entry's name has a byte between bucket and key.
            command.arg(service.len() as u64 + OVERHEAD - 1);
            arguments(&mut command);
            command.get_packed_command()
        };
        let question = Question {
            command: &build("EVALSHA", script.get_hash()),
            whole: &|| build("EVAL", text),
            limit: limit + FRAME,
            deadline: before(deadline),
        };
        let begun = Instant::now();
        let result = self.nodes.ask(service, &question);
        self.health.asked(&result, begun);
        result
    }

    /// The parts of a script's answer: what came of it, and a value.
    fn outcome(
        &self,
        op: &Op,
        script: &(Script, &str),
        arguments: &dyn Fn(&mut Cmd),
        deadline: Instant,
    ) -> Result<(Vec<u8>, Vec<u8>), StoreError> {
        let with_quota = |command: &mut Cmd| {
            command.arg(op.quota);
            arguments(command);
        };
        let answer = self.run(&op.service, script, &with_quota, 0, deadline)?;
        // It has answered, so it may have written.
        let parts = strings(answer).map_err(|_| StoreError::Unconfirmed(UNEXPECTED.into()))?;
        let mut parts = parts.into_iter().map(Option::unwrap_or_default);
        Ok((
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        ))
    }

    /// Memory for a value that goes back to the engine.
    fn reserve(&self, bytes: usize, deadline: Instant) -> Result<Option<Reservation>, StoreError> {
        let Some(memory) = self.memory.as_ref().filter(|_| bytes >= FRAME) else {
            return Ok(None);
        };
        let mut held = Reservation::empty(memory);
        // Nobody could wait for more than there is.
        let bytes = (COPIES * bytes).min(memory.limit());
        if held.raise_until(bytes, before(deadline)) {
            Ok(Some(held))
        } else {
            Err(StoreError::Away("no memory in time".into()))
        }
    }

    fn put<'a>(
        &self,
        op: &Op,
        pairs: impl Iterator<Item = (&'a str, Option<&'a [u8]>)>,
        life: Option<Duration>,
        deadline: Instant,
    ) -> Result<Done, StoreError> {
        // Of a key that stands twice the last one counts.
        let last: BTreeMap<_, _> = pairs.collect();
        let arguments = |command: &mut Cmd| {
            match life {
                Some(life) => command.arg(u64::try_from(life.as_millis()).unwrap_or(u64::MAX)),
                None => command.arg(""),
            };
            for (key, value) in &last {
                command.arg(name(&op.bucket, key));
                match value {
                    Some(value) => command.arg("1").arg(*value),
                    None => command.arg("0").arg(""),
                };
            }
        };
        let (kind, value) = self.outcome(op, &PUT, &arguments, deadline)?;
        match &kind[..] {
            b"written" => Ok(Done::Written),
            _ => Err(refused(op, &kind, &value)),
        }
    }

    fn increment(
        &self,
        op: &Op,
        key: &str,
        delta: i64,
        deadline: Instant,
    ) -> Result<Done, StoreError> {
        let arguments = |command: &mut Cmd| {
            command.arg(name(&op.bucket, key)).arg(delta);
        };
        let (kind, value) = self.outcome(op, &INCREMENT, &arguments, deadline)?;
        match &kind[..] {
            b"number" => std::str::from_utf8(&value)
                .ok()
                .and_then(|text| text.parse().ok())
                .map(Done::Number)
                .ok_or(StoreError::NotANumber),
            _ => Err(refused(op, &kind, &value)),
        }
    }

    /// Holds the value against the digest here, and has the engine compare the
    /// whole of it.
    fn swap(
        &self,
        op: &Op,
        key: &str,
        expected: Option<super::Digest>,
        value: &[u8],
        deadline: Instant,
    ) -> Result<Done, StoreError> {
        let present = match expected {
            None => None,
            Some(expected) => {
                let (present, _) = self.get((&op.service, &op.bucket, key), deadline)?;
                match present.filter(|present| digest(present) == expected) {
                    None => return Ok(Done::Swapped(false)),
                    present => present,
                }
            }
        };
        let _held = self.reserve(present.as_ref().map_or(0, Vec::len), deadline)?;
        let arguments = |command: &mut Cmd| {
            command.arg(name(&op.bucket, key));
            match &present {
                Some(present) => command.arg("1").arg(&**present),
                None => command.arg("0").arg(""),
            };
            command.arg(value);
        };
        let (kind, detail) = self.outcome(op, &SWAP, &arguments, deadline)?;
        match &kind[..] {
            b"swapped" => Ok(Done::Swapped(true)),
            b"differs" => Ok(Done::Swapped(false)),
            _ => Err(refused(op, &kind, &detail)),
        }
    }
}

impl Engine for Remote {
    fn get(
        &self,
        (service, bucket, key): EntryKey<'_>,
        deadline: Instant,
    ) -> EngineResult<Option<Vec<u8>>> {
        let get = |limit: usize| {
            let arguments = |command: &mut Cmd| {
                command.arg(limit).arg(limit).arg(name(bucket, key));
            };
            self.run(service, &GET, &arguments, limit, deadline)
        };
        let mut answer = get(SHORT_VALUE)?;
        // A size, where it is longer.
        if matches!(answer, Value::Int(_)) {
            answer = get(MAX_VALUE)?;
        }
        Ok((values(answer)?.into_iter().next().flatten(), None))
    }

    fn exists(
        &self,
        (service, bucket, key): EntryKey<'_>,
        deadline: Instant,
    ) -> EngineResult<bool> {
        let arguments = |command: &mut Cmd| {
            command.arg(name(bucket, key));
        };
        let answer = self.run(service, &EXISTS, &arguments, 0, deadline)?;
        Ok((answer == Value::Int(1), None))
    }

    fn get_many(
        &self,
        (service, bucket): (&str, &str),
        keys: &[String],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let arguments = |command: &mut Cmd| {
            command.arg(MAX_VALUE).arg(MAX_BATCH_BYTES);
            for key in keys {
                command.arg(name(bucket, key));
            }
        };
        let answer = self.run(service, &GET, &arguments, MAX_BATCH_BYTES, deadline)?;
        let values = values(answer)?;
        if values.len() == keys.len() {
            Ok(values)
        } else {
            Err(unexpected())
        }
    }

    fn list(
        &self,
        (service, bucket): (&str, &str),
        prefix: &str,
        from: &str,
        deadline: Instant,
    ) -> Result<KeyPage, StoreError> {
        let arguments = |command: &mut Cmd| {
            let lowest = [b"[", &*name(bucket, from)].concat();
            // No text has the byte 0xff.
            let above = [b"(", &*name(bucket, prefix), b"\xff"].concat();
            command.arg(lowest).arg(above).arg(MAX_PAGE);
        };
        let limit = (MAX_PAGE + 1) * (MAX_KEY + 128);
        let answer = self.run(service, &LIST, &arguments, limit, deadline)?;
        let key = |name: Vec<u8>| {
            let key = name.get(bucket.len() + 1..).ok_or_else(unexpected)?;
            String::from_utf8(key.to_vec()).map_err(|_| unexpected())
        };
        let mut names = strings(answer)?.into_iter();
        let next = names.next().flatten().map(key).transpose()?;
        let keys = names.flatten().map(key).collect::<Result<_, _>>()?;
        Ok(KeyPage { keys, next })
    }

    fn write(&self, op: &Op, deadline: Instant) -> EngineResult<Done> {
        let done = match &op.change {
            Change::Put(pairs) => {
                let pairs = pairs.iter().map(|(key, value)| (&**key, value.as_deref()));
                self.put(op, pairs, None, deadline)
            }
            Change::SetFor { key, value, life } => {
                let pair = (&**key, Some(&**value));
                self.put(op, [pair].into_iter(), Some(*life), deadline)
            }
            // This engine finds them by itself.
            Change::End(_) => Ok(Done::Written),
            Change::Increment { key, delta } => self.increment(op, key, *delta, deadline),
            Change::Swap {
                key,
                expected,
                value,
            } => self.swap(op, key, *expected, value, deadline),
        };
        Ok((done?, None))
    }

    fn waits(&self) -> bool {
        true
    }

    fn health(&self) -> &Health {
        &self.health
    }

    /// As of the last look.
    fn size(&self) -> Result<Size, StoreError> {
        Ok(Size {
            used: lock(&self.services).used.values().sum(),
            on_disk: 0,
        })
    }

    fn compact(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn export(&self, out: &mut dyn Write, _: &mut dyn FnMut(&str)) -> io::Result<Checked> {
        self.write_backup(out)
    }

    fn import(&self, input: &mut dyn BufRead, merge: bool) -> Result<u64, StoreError> {
        self.read_backup(input, merge)
    }

    fn serves(&self, service: &Arc<str>) {
        let mut services = lock(&self.services);
        services.used.entry(Arc::clone(service)).or_default();
    }

    /// Looks at some services: what they use, and what of them has ended. So it
    /// is noticed without any call that the engine is away, or back.
    fn tend(&self) {
        let names = lock(&self.services).next();
        for service in names {
            // One whose values can't be read does not stop the turn.
            lock(&self.services).last = Arc::clone(&service);
            let deadline = Instant::now() + Duration::from_secs(2);
            let Ok(answer) = self.run(&service, &TEND, &|_| {}, 0, deadline) else {
                return;
            };
            if let Value::Array(parts) = answer
                && let Some(Value::BulkString(used)) = parts.get(1)
                && let Some(used) = std::str::from_utf8(used)
                    .ok()
                    .and_then(|text| text.parse().ok())
            {
                lock(&self.services).used.insert(service, used);
            }
        }
    }
}

/// Before the deadline of a call, so that the service still sees what came of
/// it.
fn before(deadline: Instant) -> Instant {
    let now = Instant::now();
    let remaining = deadline.saturating_duration_since(now).min(MAX_WAIT);
    now + remaining * SHARE / 10
}

/// The name of an entry: as in a file, keys of a bucket are together and in
/// order, because no bucket's name has a NUL.
fn name(bucket: &str, key: &str) -> Vec<u8> {
    [bucket.as_bytes(), b"\0", key.as_bytes()].concat()
}

/// Values, unless they are too large: such ones are not this program's.
fn values(answer: Value) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
    match answer {
        Value::Int(size) => {
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            if size > MAX_BATCH_BYTES {
                Err(batch_too_large(size))
            } else {
                Err(StoreError::Value { size })
            }
        }
        answer => strings(answer),
    }
}

fn strings(answer: Value) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
    let Value::Array(parts) = answer else {
        return Err(unexpected());
    };
    let string = |part| match part {
        Value::BulkString(bytes) => Ok(Some(bytes)),
        Value::Nil => Ok(None),
        _ => Err(unexpected()),
    };
    parts.into_iter().map(string).collect()
}

fn unexpected() -> StoreError {
    StoreError::Refused(UNEXPECTED.into())
}

/// Why a script wrote nothing.
fn refused(op: &Op, kind: &[u8], value: &[u8]) -> StoreError {
    let number = || std::str::from_utf8(value).ok()?.parse().ok();
    match kind {
        b"quota" => StoreError::Quota {
            wanted: number().unwrap_or(u64::MAX),
            limit: op.quota,
        },
        b"number" => StoreError::NotANumber,
        _ => StoreError::Unconfirmed(UNEXPECTED.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_looked_at_in_turn() {
        let name = |number: usize| Arc::<str>::from(format!("s{number:02}"));
        let mut services = Services::default();
        assert!(services.next().is_empty());
        services.used = (0..3).map(|number| (name(number), 0)).collect();
        assert_eq!(services.next(), [name(0), name(1), name(2)]);
        services.used = (0..TENDED + 2).map(|number| (name(number), 0)).collect();
        for first in [0, TENDED, 2 * TENDED] {
            let expected: Vec<_> = (first..first + TENDED)
                .map(|number| name(number % (TENDED + 2)))
                .collect();
            let next = services.next();
            assert_eq!(next, expected);
            services.last = Arc::clone(&next[TENDED - 1]);
        }
    }
}
