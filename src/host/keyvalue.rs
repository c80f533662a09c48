//! `wasi:keyvalue` and `mb:service/values`: durable values of one service, in
//! buckets that it names itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use wasmtime::component::Resource;

use super::{
    Host,
    bindings::{
        mb::service::values,
        wasi::keyvalue::{atomics, batch, store},
    },
};
use crate::{
    budget::Reservation,
    store::{Digest, MAX_BATCH_BYTES, Namespace, StoreError, Unflushed, digest},
};

/// An open bucket: its name.
pub struct Bucket(Box<str>);

/// A key, to be given another value if the one it has is still the one that
/// the guest saw last. That one is not held: a guest may have as many handles
/// as [`MAX_HANDLES`](super::MAX_HANDLES) says, and each value may be of 1 MiB.
pub struct Cas {
    bucket: Box<str>,
    key: String,
    seen: Option<Digest>,
}

impl Cas {
    /// Bytes of one.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.bucket.len()
    }
}

/// Copies that a write holds of its values until they are on the disk: the one
/// that the component handed over, the sealed one, and that in a page.
const COPIES: usize = 3;

/// Writes of fewer bytes are not worth reserving memory for, and nobody waits
/// for them but the answer of their call.
const SMALL: usize = 1024;
/// What each of several keys adds to that.
const PAIR: usize = 32;

type StoreResult<T> = wasmtime::Result<Result<T, store::Error>>;

fn refuse(error: &StoreError) -> store::Error {
    store::Error::Other(error.for_service())
}

impl Host {
    /// Works with the service's part of the store, in time. What is not on the
    /// disk then is what the call's answer has to wait for.
    fn stored<T>(
        &mut self,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> StoreResult<T> {
        let waits = self.granted.keeps_state;
        self.stored_with(None, waits, work)
    }

    /// The same with memory that is held until it is on the disk, and waiting
    /// for that.
    fn stored_with<T>(
        &mut self,
        held: Option<Reservation>,
        waits: bool,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> StoreResult<T> {
        let granted = Arc::clone(&self.granted);
        let Some(namespace) = &granted.keyvalue else {
            return Ok(Err(store::Error::AccessDenied));
        };
        if namespace.waits() {
            self.begin_wait();
        }
        self.waiting = true;
        let deadline = self.context.deadline;
        let ahead = namespace.ahead();
        let mut result = work(&ahead, deadline);
        if let Some(unflushed) = ahead.unflushed() {
            // While the disk is behind, nobody goes on without it.
            if waits || namespace.backlog().is_some() {
                self.begin_wait();
                let flushed = unflushed.wait(deadline);
                if let Err(StoreError::Unconfirmed(_)) = flushed {
                    unflushed.keep(held);
                }
                result = result.and_then(|value| flushed.map(|()| value));
            } else {
                Unflushed::join(&mut self.unflushed, unflushed);
            }
        }
        if let Some(stop) = self.tick().or_else(|| self.end_wait()) {
            return Err(stop.into());
        }
        self.waiting = false;
        Ok(result.map_err(|error| refuse(&error)))
    }

    /// The same for several keys, which are read from the disk.
    fn stored_of<T>(
        &mut self,
        bucket: &str,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> StoreResult<T> {
        let namespace = self.granted.keyvalue.as_ref();
        let unflushed = namespace.and_then(|namespace| namespace.unflushed_of(bucket));
        self.stored_after(unflushed, work)
    }

    /// The same once others are on the disk.
    fn stored_after<T>(
        &mut self,
        others: Option<Unflushed>,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> StoreResult<T> {
        if !self.waits_for(others) {
            return self.stored(|_, _| Err(StoreError::Busy));
        }
        self.stored(work)
    }

    /// Waits for the disk; false if the deadline passes meanwhile.
    fn waits_for(&mut self, others: Option<Unflushed>) -> bool {
        let Some(others) = others else { return true };
        self.begin_wait();
        // Where that failed, the next one may succeed.
        let flushed = others.wait(self.context.deadline);
        !matches!(flushed, Err(StoreError::Unconfirmed(_)))
    }

    /// The same for a write of so many bytes. One that is not small waits for
    /// memory, and for the disk.
    fn written<T>(
        &mut self,
        bytes: usize,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> StoreResult<T> {
        let namespace = self.granted.keyvalue.as_ref();
        let backlog = namespace.and_then(Namespace::backlog);
        // What the store refuses for its size waits for nothing.
        if !(SMALL..MAX_BATCH_BYTES).contains(&bytes) {
            return self.stored_after(backlog, work);
        }
        let held = self.reserve(COPIES * bytes)?;
        if !self.waits_for(backlog) {
            return self.stored(|_, _| Err(StoreError::Busy));
        }
        self.begin_wait();
        self.stored_with(held, true, work)
    }

    fn bucket(&self, bucket: &Resource<Bucket>) -> wasmtime::Result<Box<str>> {
        Ok(self.table.get(bucket)?.0.clone())
    }
}

impl store::Host for Host {
    fn open(&mut self, identifier: String) -> StoreResult<Resource<Bucket>> {
        // Asks nobody, so it waits for nothing.
        let Some(namespace) = &self.granted.keyvalue else {
            return Ok(Err(store::Error::AccessDenied));
        };
        if let Err(error) = namespace.open(&identifier) {
            return Ok(Err(refuse(&error)));
        }
        Ok(Ok(self.create_handle(Bucket(identifier.into()))?))
    }
}

impl store::HostBucket for Host {
    fn get(&mut self, bucket: Resource<Bucket>, key: String) -> StoreResult<Option<Vec<u8>>> {
        let bucket = self.bucket(&bucket)?;
        self.stored(|namespace, deadline| namespace.get(&bucket, &key, deadline))
    }

    fn set(&mut self, bucket: Resource<Bucket>, key: String, value: Vec<u8>) -> StoreResult<()> {
        let bucket = self.bucket(&bucket)?;
        let bytes = key.len() + value.len();
        self.written(bytes, |namespace, deadline| {
            namespace.set(&bucket, key, value, deadline)
        })
    }

    fn delete(&mut self, bucket: Resource<Bucket>, key: String) -> StoreResult<()> {
        let bucket = self.bucket(&bucket)?;
        self.written(0, |namespace, deadline| {
            namespace.delete(&bucket, key, deadline)
        })
    }

    fn exists(&mut self, bucket: Resource<Bucket>, key: String) -> StoreResult<bool> {
        let bucket = self.bucket(&bucket)?;
        self.stored(|namespace, deadline| namespace.exists(&bucket, &key, deadline))
    }

    fn list_keys(
        &mut self,
        bucket: Resource<Bucket>,
        cursor: Option<String>,
    ) -> StoreResult<store::KeyResponse> {
        let bucket = self.bucket(&bucket)?;
        let page = self.stored_of(&bucket, |namespace, deadline| {
            namespace.list(&bucket, "", cursor.as_deref(), deadline)
        })?;
        Ok(page.map(|page| store::KeyResponse {
            keys: page.keys,
            cursor: page.next,
        }))
    }

    fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
        self.drop_handle(bucket)?;
        Ok(())
    }
}

impl values::Host for Host {
    fn set_for(
        &mut self,
        bucket: Resource<Bucket>,
        key: String,
        value: Vec<u8>,
        milliseconds: u64,
    ) -> StoreResult<()> {
        let bucket = self.bucket(&bucket)?;
        let bytes = key.len() + value.len();
        let life = Duration::from_millis(milliseconds);
        self.written(bytes, |namespace, deadline| {
            namespace.set_for(&bucket, key, value, life, deadline)
        })
    }

    fn keys_from(
        &mut self,
        bucket: Resource<Bucket>,
        prefix: String,
        cursor: Option<String>,
    ) -> StoreResult<store::KeyResponse> {
        let bucket = self.bucket(&bucket)?;
        let page = self.stored_of(&bucket, |namespace, deadline| {
            namespace.list(&bucket, &prefix, cursor.as_deref(), deadline)
        })?;
        Ok(page.map(|page| store::KeyResponse {
            keys: page.keys,
            cursor: page.next,
        }))
    }
}

impl atomics::Host for Host {
    fn increment(&mut self, bucket: Resource<Bucket>, key: String, delta: i64) -> StoreResult<i64> {
        let bucket = self.bucket(&bucket)?;
        self.written(0, |namespace, deadline| {
            namespace.increment(&bucket, key, delta, deadline)
        })
    }

    /// Where the value is another by now, the caller gets the new one to try
    /// again with.
    fn swap(
        &mut self,
        cas: Resource<Cas>,
        value: Vec<u8>,
    ) -> wasmtime::Result<Result<(), atomics::CasError>> {
        let Cas { bucket, key, seen } = self.drop_large_handle(cas, Cas::bytes)?;
        let swapped = self.written(key.len() + value.len(), |namespace, deadline| {
            namespace.swap(&bucket, key.clone(), seen, value, deadline)
        })?;
        match swapped {
            Ok(true) => Ok(Ok(())),
            Ok(false) => Ok(Err(match self.look(bucket, key)? {
                Ok(now) => atomics::CasError::CasFailed(now),
                Err(error) => atomics::CasError::StoreError(error),
            })),
            Err(error) => Ok(Err(atomics::CasError::StoreError(error))),
        }
    }
}

impl Host {
    fn look(&mut self, bucket: Box<str>, key: String) -> StoreResult<Resource<Cas>> {
        match self.stored(|namespace, deadline| namespace.digest(&bucket, &key, deadline))? {
            Ok(seen) => {
                let cas = Cas { bucket, key, seen };
                let bytes = cas.bytes();
                Ok(Ok(self.create_large_handle(cas, bytes)?))
            }
            Err(error) => Ok(Err(error)),
        }
    }
}

impl atomics::HostCas for Host {
    fn new(&mut self, bucket: Resource<Bucket>, key: String) -> StoreResult<Resource<Cas>> {
        let bucket = self.bucket(&bucket)?;
        self.look(bucket, key)
    }

    /// Reads the value. Where it has changed, the guest sees the new one, and
    /// that is what a swap holds against the store from then on.
    fn current(&mut self, cas: Resource<Cas>) -> StoreResult<Option<Vec<u8>>> {
        let Cas { bucket, key, .. } = self.table.get(&cas)?;
        let (bucket, key) = (bucket.clone(), key.clone());
        let now = self.stored(|namespace, deadline| namespace.get(&bucket, &key, deadline))?;
        if let Ok(now) = &now {
            self.table.get_mut(&cas)?.seen = now.as_deref().map(digest);
        }
        Ok(now)
    }

    fn drop(&mut self, cas: Resource<Cas>) -> wasmtime::Result<()> {
        self.drop_large_handle(cas, Cas::bytes)?;
        Ok(())
    }
}

impl batch::Host for Host {
    fn get_many(
        &mut self,
        bucket: Resource<Bucket>,
        keys: Vec<String>,
    ) -> StoreResult<Vec<Option<(String, Vec<u8>)>>> {
        let bucket = self.bucket(&bucket)?;
        let values = self.stored_of(&bucket, |namespace, deadline| {
            namespace.get_many(&bucket, &keys, deadline)
        })?;
        Ok(values.map(|values| {
            keys.into_iter()
                .zip(values)
                .map(|(key, value)| Some((key, value?)))
                .collect()
        }))
    }

    fn set_many(
        &mut self,
        bucket: Resource<Bucket>,
        pairs: Vec<(String, Vec<u8>)>,
    ) -> StoreResult<()> {
        let bucket = self.bucket(&bucket)?;
        let bytes = pairs
            .iter()
            .map(|(key, value)| PAIR + key.len() + value.len())
            .sum();
        self.written(bytes, |namespace, deadline| {
            namespace.set_many(&bucket, pairs, deadline)
        })
    }

    fn delete_many(&mut self, bucket: Resource<Bucket>, keys: Vec<String>) -> StoreResult<()> {
        let bucket = self.bucket(&bucket)?;
        let bytes = keys.iter().map(|key| PAIR + key.len()).sum();
        self.written(bytes, |namespace, deadline| {
            namespace.delete_many(&bucket, keys, deadline)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        budget::Budget,
        config::{Config, services::settings_of},
        host::{Context, Granted, Stop, Unwatched, context::Caller},
        store::Store,
    };

    fn host(store: &Arc<Store>) -> Host {
        let mut settings = settings_of(&Config::default().services, "x");
        settings.grants.keyvalue = Some(true);
        let granted = Granted::new("x", &settings, "", Some(store), None).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let context = Context::without_caller(Arc::new(Caller::default()), deadline);
        Host::new(context, granted, Arc::new(Unwatched))
    }

    /// Borrowed again for each call, as the component's own handle is.
    fn same<T: 'static>(handle: &Resource<T>) -> Resource<T> {
        Resource::new_borrow(handle.rep())
    }

    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    #[test]
    fn handles_hold_no_values() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store.redb"), 1 << 20).unwrap();
        let mut host = host(&store);
        let bucket = store::Host::open(&mut host, "b".into()).unwrap().unwrap();
        let value = vec![7; crate::store::MAX_VALUE];
        store::HostBucket::set(&mut host, same(&bucket), "k".into(), value)
            .unwrap()
            .unwrap();
        let before = resident();
        for _ in 0..300 {
            atomics::HostCas::new(&mut host, same(&bucket), "k".into())
                .unwrap()
                .unwrap();
        }
        // Other tests run beside this one; it would take 300 MiB.
        let grown = resident().saturating_sub(before);
        assert!(grown < 200 << 20, "{grown} bytes");
    }

    #[test]
    fn what_the_host_holds_is_taken_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store.redb"), 1 << 20).unwrap();
        let memory = Budget::new(1 << 20);
        let mut host = host(&store).with_memory(&memory);
        let bucket = store::Host::open(&mut host, "b".into()).unwrap().unwrap();
        let keys: Vec<_> = (0..200)
            .map(|_| {
                atomics::HostCas::new(&mut host, same(&bucket), "k".repeat(1000))
                    .unwrap()
                    .unwrap()
            })
            .collect();
        assert!(memory.used() > 200 * 1000 - 64 * 1024, "{}", memory.used());
        for cas in keys {
            atomics::HostCas::drop(&mut host, cas).unwrap();
        }
        assert_eq!(memory.used(), 0);
        let write = |host: &mut Host, size: usize| {
            store::HostBucket::set(host, same(&bucket), "k".into(), vec![7; size])
        };
        write(&mut host, 200_000).unwrap().unwrap();
        assert_eq!(memory.used(), 0, "it is on the disk");
        host.context.deadline = Instant::now();
        let stopped = write(&mut host, 500_000).unwrap_err();
        assert_eq!(stopped.downcast_ref(), Some(&Stop::Deadline));
    }

    #[test]
    fn a_swap_is_held_against_what_was_seen_last() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store.redb"), 1 << 20).unwrap();
        let mut host = host(&store);
        let bucket = store::Host::open(&mut host, "b".into()).unwrap().unwrap();
        let set = |host: &mut Host, value: &[u8]| {
            store::HostBucket::set(host, same(&bucket), "k".into(), value.to_vec())
                .unwrap()
                .unwrap();
        };
        let new = |host: &mut Host| {
            atomics::HostCas::new(host, same(&bucket), "k".into())
                .unwrap()
                .unwrap()
        };
        let current = |host: &mut Host, cas: &Resource<Cas>| {
            atomics::HostCas::current(host, same(cas)).unwrap().unwrap()
        };
        let swap = |host: &mut Host, cas, value: &[u8]| {
            atomics::Host::swap(host, cas, value.to_vec()).unwrap()
        };
        let cas = new(&mut host);
        assert_eq!(current(&mut host, &cas), None);
        set(&mut host, b"1");
        // Not looked at again, so it is still expected not to be there.
        let Err(atomics::CasError::CasFailed(cas)) = swap(&mut host, cas, b"2") else {
            panic!("it has changed");
        };
        set(&mut host, b"3");
        assert_eq!(current(&mut host, &cas).as_deref(), Some(&b"3"[..]));
        assert!(swap(&mut host, cas, b"4").is_ok());
        let cas = new(&mut host);
        assert_eq!(current(&mut host, &cas).as_deref(), Some(&b"4"[..]));
        assert!(swap(&mut host, cas, b"5").is_ok());
    }
}
