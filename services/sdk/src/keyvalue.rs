//! Durable values of this service: the grant `keyvalue`.
//!
//! Keys are texts of 1 to 1,024 bytes, values bytes, at most 1 MiB. What was
//! written is on the disk before the function returns. Buckets need not be
//! made: each name is one.

use std::time::Duration;

use crate::Failure;
#[cfg(target_arch = "wasm32")]
use crate::bindings::{
    mb::service::values,
    wasi::keyvalue::{atomics, batch, store},
};
#[cfg(not(target_arch = "wasm32"))]
use crate::{bindings::wasi::keyvalue::store, mock};

pub use store::Error;

/// A set of keys.
#[cfg(target_arch = "wasm32")]
pub struct Bucket(store::Bucket);

/// A set of keys.
#[cfg(not(target_arch = "wasm32"))]
pub struct Bucket(mock::Bucket);

impl Bucket {
    /// Opens a bucket: at most 64 letters, digits, `.`, `_` and `-`, or none.
    ///
    /// # Errors
    /// The name breaks that, or the store fails.
    pub fn open(name: &str) -> Result<Self, Error> {
        #[cfg(target_arch = "wasm32")]
        return store::open(name).map(Self);
        #[cfg(not(target_arch = "wasm32"))]
        mock::Bucket::open(name).map(Self)
    }

    /// The value of a key, if there is one.
    ///
    /// # Errors
    /// The key breaks its bounds, or the store fails; likewise below.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.0.get(key)
    }

    /// Whether a key has a value.
    ///
    /// # Errors
    /// As [`Bucket::get`].
    pub fn exists(&self, key: &str) -> Result<bool, Error> {
        self.0.exists(key)
    }

    /// Sets a value.
    ///
    /// # Errors
    /// As [`Bucket::get`]; the quota is used up.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.0.set(key, value)
    }

    /// Sets a value that ends after a time of 1 ms to ten years: then the key has
    /// none. [`Bucket::increment`] and [`Bucket::update`] leave the end as it is,
    /// [`Bucket::set`] removes it.
    ///
    /// # Errors
    /// As [`Bucket::set`]; the time is out of that range.
    pub fn set_for(&self, key: &str, value: &[u8], time: Duration) -> Result<(), Error> {
        #[cfg(target_arch = "wasm32")]
        {
            let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            values::set_for(&self.0, key, value, milliseconds)
        }
        #[cfg(not(target_arch = "wasm32"))]
        self.0.set_for(key, value, time)
    }

    /// Removes a key; one without a value is no error.
    ///
    /// # Errors
    /// As [`Bucket::get`].
    pub fn delete(&self, key: &str) -> Result<(), Error> {
        self.0.delete(key)
    }

    /// All keys in order, read page by page.
    pub fn keys(&self) -> Keys<'_> {
        Keys {
            bucket: self,
            prefix: None,
            page: Vec::new().into_iter(),
            cursor: Some(None),
        }
    }

    /// The keys that begin with `prefix`, in order, read page by page.
    pub fn keys_from(&self, prefix: &str) -> Keys<'_> {
        Keys {
            prefix: Some(prefix.into()),
            ..self.keys()
        }
    }

    /// Adds to a number, whatever other calls do meanwhile, and returns the
    /// sum. A key without a value counts as 0; [`Bucket::get`] finds decimal
    /// text.
    ///
    /// # Errors
    /// As [`Bucket::set`]; the value is no number.
    pub fn increment(&self, key: &str, delta: i64) -> Result<i64, Error> {
        #[cfg(target_arch = "wasm32")]
        return atomics::increment(&self.0, key, delta);
        #[cfg(not(target_arch = "wasm32"))]
        self.0.increment(key, delta)
    }

    /// Sets a key to what a function makes of its value. The function is
    /// called again if another call was quicker.
    ///
    /// # Errors
    /// As [`Bucket::set`].
    pub fn update(
        &self,
        key: &str,
        mut change: impl FnMut(Option<Vec<u8>>) -> Vec<u8>,
    ) -> Result<(), Error> {
        self.try_update(key, |value| Ok(change(value)))
    }

    /// The same with a function that may refuse; then nothing is written.
    ///
    /// # Errors
    /// As [`Bucket::set`]; what the function refuses with.
    pub fn try_update<E: From<Error>>(
        &self,
        key: &str,
        mut change: impl FnMut(Option<Vec<u8>>) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        #[cfg(target_arch = "wasm32")]
        {
            let mut seen = atomics::Cas::new(&self.0, key)?;
            loop {
                let value = change(seen.current()?)?;
                match atomics::swap(seen, &value) {
                    Ok(()) => return Ok(()),
                    Err(atomics::CasError::StoreError(error)) => return Err(error.into()),
                    Err(atomics::CasError::CasFailed(now)) => seen = now,
                }
            }
        }
        #[cfg(not(target_arch = "wasm32"))]
        {
            let value = change(self.get(key)?)?;
            Ok(self.0.replace(key, &value)?)
        }
    }

    /// Sets several values, all or none.
    ///
    /// # Errors
    /// As [`Bucket::set`]; more than 1,000 keys or 4 MiB.
    pub fn set_many(&self, pairs: &[(String, Vec<u8>)]) -> Result<(), Error> {
        #[cfg(target_arch = "wasm32")]
        return batch::set_many(&self.0, pairs);
        #[cfg(not(target_arch = "wasm32"))]
        pairs
            .iter()
            .try_for_each(|(key, value)| self.set(key, value))
    }

    /// Removes several keys, all or none.
    ///
    /// # Errors
    /// As [`Bucket::set_many`].
    pub fn delete_many(&self, keys: &[String]) -> Result<(), Error> {
        #[cfg(target_arch = "wasm32")]
        return batch::delete_many(&self.0, keys);
        #[cfg(not(target_arch = "wasm32"))]
        keys.iter().try_for_each(|key| self.delete(key))
    }
}

impl Bucket {
    fn page(
        &self,
        prefix: Option<&str>,
        cursor: Option<&str>,
    ) -> Result<store::KeyResponse, Error> {
        match prefix {
            None => self.0.list_keys(cursor),
            #[cfg(target_arch = "wasm32")]
            Some(prefix) => values::keys_from(&self.0, prefix, cursor),
            #[cfg(not(target_arch = "wasm32"))]
            Some(prefix) => self.0.keys_from(prefix),
        }
    }
}

/// The keys of a bucket. Ends after an error.
pub struct Keys<'a> {
    bucket: &'a Bucket,
    /// None for all keys, which needs nothing that is newer than the contract's
    /// first version.
    prefix: Option<String>,
    page: std::vec::IntoIter<String>,
    /// Where the next page begins: none at the end, none inside at the start.
    cursor: Option<Option<String>>,
}

impl Iterator for Keys<'_> {
    type Item = Result<String, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(key) = self.page.next() {
                return Some(Ok(key));
            }
            let cursor = self.cursor.take()?;
            match self.bucket.page(self.prefix.as_deref(), cursor.as_deref()) {
                Err(error) => return Some(Err(error)),
                Ok(page) => {
                    self.page = page.keys.into_iter();
                    self.cursor = page.cursor.map(Some);
                }
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = match error {
            Error::NoSuchStore => "there is no such store".to_owned(),
            Error::AccessDenied => "durable values are not granted".to_owned(),
            Error::Other(message) => message,
        };
        Self::new("STORE_FAILED", message)
    }
}
