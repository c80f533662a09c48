//! What is stored under a key: a value behind a checksum of its place and
//! itself, so that a damaged page is never read as another value.

use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest as _, Sha256};

use super::StoreError;

/// Bytes of the checksum in front of each value.
const SEAL: usize = 8;

/// What stands behind a value that ends, and behind the time.
const TAIL: &[u8; 8] = b"\0mb-end\0";

/// What an entry counts beside its value, its key and the names of its service
/// and bucket, in bytes: about what the file needs to hold them.
pub(super) const OVERHEAD: u64 = 32;

/// Service, bucket and key.
pub(super) type EntryKey<'a> = (&'a str, &'a str, &'a str);

/// What an entry counts towards its service's quota, in bytes.
pub(super) fn counted((service, bucket, key): EntryKey<'_>, value: usize) -> u64 {
    (service.len() + bucket.len() + key.len() + value) as u64 + OVERHEAD
}

/// The size of a value, of what is stored for it.
pub(super) fn value_size(stored: &[u8]) -> usize {
    stored.len().saturating_sub(SEAL)
}

/// What is stored for a value, which may end (milliseconds since 1970): a tail
/// says when, so that what was stored before there were ends is read as ever.
pub(super) fn seal(entry_key: EntryKey<'_>, value: &[u8], end: Option<u64>) -> Vec<u8> {
    let seal = checksum(entry_key, value, end);
    match end {
        None => [&seal, value].concat(),
        Some(end) => [&seal, value, &end.to_be_bytes(), TAIL].concat(),
    }
}

/// A value, and when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unsealed<'a> {
    pub(super) value: &'a [u8],
    pub(super) end: Option<u64>,
}

impl<'a> Unsealed<'a> {
    /// Itself, unless it has ended.
    pub(super) fn live(self) -> Option<Self> {
        self.end.is_none_or(|end| end > now()).then_some(self)
    }
}

/// The value of what is stored.
///
/// # Errors
/// It is not what was stored at this place.
pub(super) fn unseal<'a>(
    entry_key: EntryKey<'_>,
    stored: &'a [u8],
) -> Result<Unsealed<'a>, StoreError> {
    if let Some(unsealed) = unseal_ending(entry_key, stored) {
        return Ok(unsealed);
    }
    match stored.split_first_chunk::<SEAL>() {
        Some((seal, value)) if *seal == checksum(entry_key, value, None) => {
            Ok(Unsealed { value, end: None })
        }
        _ => Err(StoreError::Damaged(named(entry_key))),
    }
}

/// The same of one that ends; a value may only look like one.
fn unseal_ending<'a>(entry_key: EntryKey<'_>, stored: &'a [u8]) -> Option<Unsealed<'a>> {
    let (rest, end) = stored.strip_suffix(TAIL)?.split_last_chunk()?;
    let (seal, value) = rest.split_first_chunk::<SEAL>()?;
    let end = Some(u64::from_be_bytes(*end));
    (*seal == checksum(entry_key, value, end)).then_some(Unsealed { value, end })
}

/// Whether what is stored has ended. Of what does not end, it looks at the last
/// bytes only.
pub(super) fn has_ended(entry_key: EntryKey<'_>, stored: &[u8]) -> bool {
    unseal_ending(entry_key, stored).is_some_and(|unsealed| unsealed.live().is_none())
}

/// Bytes that an end counts.
pub(super) const fn tail_size(end: Option<u64>) -> usize {
    if end.is_some() { 8 + TAIL.len() } else { 0 }
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// A place, for people.
pub(super) fn named((service, bucket, key): EntryKey<'_>) -> String {
    format!("key {key:?} in bucket {bucket:?} of service {service:?}")
}

fn checksum((service, bucket, key): EntryKey<'_>, value: &[u8], end: Option<u64>) -> [u8; SEAL] {
    let mut hash = Sha256::new();
    for part in [service, bucket, key] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    if let Some(end) = end {
        hash.update(u64::MAX.to_le_bytes());
        hash.update(end.to_le_bytes());
    }
    hash.update(value);
    let mut seal = [0; SEAL];
    seal.copy_from_slice(&hash.finalize()[..SEAL]);
    seal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_only_as_it_was_and_where_it_was() {
        let entry_key = ("svc", "b", "key");
        for end in [None, Some(0), Some(u64::MAX)] {
            let stored = seal(entry_key, b"value", end);
            let value = &b"value"[..];
            assert_eq!(unseal(entry_key, &stored), Ok(Unsealed { value, end }));
            assert_eq!(value_size(&stored), 5 + tail_size(end));
            assert_eq!(has_ended(entry_key, &stored), end == Some(0));
            for at in 0..stored.len() {
                let mut damaged = stored.clone();
                damaged[at] ^= 1;
                assert!(unseal(entry_key, &damaged).is_err(), "{at}");
                assert!(!has_ended(entry_key, &damaged));
            }
            assert!(unseal(("svc", "bk", "ey"), &stored).is_err());
            assert!(unseal(entry_key, &stored[..3]).is_err());
            // What a service may write to have it taken for one that ended.
            let disguised = seal(entry_key, &stored[SEAL..], None);
            let unsealed = unseal(entry_key, &disguised).unwrap();
            assert_eq!((unsealed.value, unsealed.end), (&stored[SEAL..], None));
            assert!(!has_ended(entry_key, &disguised));
        }
    }
}
