//! `wasi:keyvalue`: durable values of one service, in buckets that it names
//! itself.

use std::time::Instant;

use wasmtime::component::Resource;

use super::{
    Host,
    bindings::wasi::keyvalue::{atomics, batch, store},
};
use crate::store::{Namespace, StoreError};

/// An open bucket: its name.
pub struct Bucket(Box<str>);

/// A value as it was, to be replaced if it still is so.
pub struct Cas {
    bucket: Box<str>,
    key: String,
    seen: Option<Vec<u8>>,
}

type Answer<T> = wasmtime::Result<Result<T, store::Error>>;

fn refuse(error: &StoreError) -> store::Error {
    store::Error::Other(error.to_string())
}

impl Host {
    /// Works with the service's part of the store, in time.
    fn stored<T>(&mut self, work: impl FnOnce(&Namespace) -> Result<T, StoreError>) -> Answer<T> {
        let Some(namespace) = self.granted.keyvalue.clone() else {
            return Ok(Err(store::Error::AccessDenied));
        };
        self.waiting = true;
        let result = work(&namespace);
        if let Some(stop) = self.tick() {
            return Err(stop.into());
        }
        self.waiting = false;
        Ok(result.map_err(|error| refuse(&error)))
    }

    /// The same for a write, which waits for the disk.
    fn written<T>(
        &mut self,
        work: impl FnOnce(&Namespace, Instant) -> Result<T, StoreError>,
    ) -> Answer<T> {
        let deadline = self.context.deadline;
        self.waits();
        self.stored(|namespace| work(namespace, deadline))
    }

    fn bucket(&self, bucket: &Resource<Bucket>) -> wasmtime::Result<Box<str>> {
        Ok(self.table.get(bucket)?.0.clone())
    }
}

impl store::Host for Host {
    fn open(&mut self, identifier: String) -> Answer<Resource<Bucket>> {
        if let Err(error) = self.stored(|namespace| namespace.open(&identifier))? {
            return Ok(Err(error));
        }
        Ok(Ok(self.hand_out(Bucket(identifier.into()))?))
    }
}

impl store::HostBucket for Host {
    fn get(&mut self, bucket: Resource<Bucket>, key: String) -> Answer<Option<Vec<u8>>> {
        let bucket = self.bucket(&bucket)?;
        self.stored(|namespace| namespace.get(&bucket, &key))
    }

    fn set(&mut self, bucket: Resource<Bucket>, key: String, value: Vec<u8>) -> Answer<()> {
        let bucket = self.bucket(&bucket)?;
        self.written(|namespace, deadline| namespace.set(&bucket, key, value, deadline))
    }

    fn delete(&mut self, bucket: Resource<Bucket>, key: String) -> Answer<()> {
        let bucket = self.bucket(&bucket)?;
        self.written(|namespace, deadline| namespace.delete(&bucket, key, deadline))
    }

    fn exists(&mut self, bucket: Resource<Bucket>, key: String) -> Answer<bool> {
        let bucket = self.bucket(&bucket)?;
        self.stored(|namespace| namespace.exists(&bucket, &key))
    }

    fn list_keys(
        &mut self,
        bucket: Resource<Bucket>,
        cursor: Option<String>,
    ) -> Answer<store::KeyResponse> {
        let bucket = self.bucket(&bucket)?;
        let page = self.stored(|namespace| namespace.list(&bucket, cursor.as_deref()))?;
        Ok(page.map(|page| store::KeyResponse {
            keys: page.keys,
            cursor: page.next,
        }))
    }

    fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
        self.take_back(bucket)?;
        Ok(())
    }
}

impl atomics::Host for Host {
    fn increment(&mut self, bucket: Resource<Bucket>, key: String, delta: i64) -> Answer<i64> {
        let bucket = self.bucket(&bucket)?;
        self.written(|namespace, deadline| namespace.increment(&bucket, key, delta, deadline))
    }

    /// Where the value is another by now, the caller gets the new one to try
    /// again with.
    fn swap(
        &mut self,
        cas: Resource<Cas>,
        value: Vec<u8>,
    ) -> wasmtime::Result<Result<(), atomics::CasError>> {
        let Cas { bucket, key, seen } = self.take_back(cas)?;
        let swapped = self.written(|namespace, deadline| {
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
    fn look(&mut self, bucket: Box<str>, key: String) -> Answer<Resource<Cas>> {
        match self.stored(|namespace| namespace.get(&bucket, &key))? {
            Ok(seen) => Ok(Ok(self.hand_out(Cas { bucket, key, seen })?)),
            Err(error) => Ok(Err(error)),
        }
    }
}

impl atomics::HostCas for Host {
    fn new(&mut self, bucket: Resource<Bucket>, key: String) -> Answer<Resource<Cas>> {
        let bucket = self.bucket(&bucket)?;
        self.look(bucket, key)
    }

    fn current(&mut self, cas: Resource<Cas>) -> Answer<Option<Vec<u8>>> {
        Ok(Ok(self.table.get(&cas)?.seen.clone()))
    }

    fn drop(&mut self, cas: Resource<Cas>) -> wasmtime::Result<()> {
        self.take_back(cas)?;
        Ok(())
    }
}

impl batch::Host for Host {
    fn get_many(
        &mut self,
        bucket: Resource<Bucket>,
        keys: Vec<String>,
    ) -> Answer<Vec<Option<(String, Vec<u8>)>>> {
        let bucket = self.bucket(&bucket)?;
        let values = self.stored(|namespace| namespace.get_many(&bucket, &keys))?;
        Ok(values.map(|values| {
            keys.into_iter()
                .zip(values)
                .map(|(key, value)| Some((key, value?)))
                .collect()
        }))
    }

    fn set_many(&mut self, bucket: Resource<Bucket>, pairs: Vec<(String, Vec<u8>)>) -> Answer<()> {
        let bucket = self.bucket(&bucket)?;
        self.written(|namespace, deadline| namespace.set_many(&bucket, pairs, deadline))
    }

    fn delete_many(&mut self, bucket: Resource<Bucket>, keys: Vec<String>) -> Answer<()> {
        let bucket = self.bucket(&bucket)?;
        self.written(|namespace, deadline| namespace.delete_many(&bucket, keys, deadline))
    }
}
