//! What is stored under a key: a value behind a checksum of its place and
//! itself, so that a damaged page is never read as another value.

use sha2::{Digest as _, Sha256};

use super::StoreError;

/// Bytes of the checksum in front of each value.
const SEAL: usize = 8;

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

/// What is stored for a value.
pub(super) fn seal(entry_key: EntryKey<'_>, value: &[u8]) -> Vec<u8> {
    [&checksum(entry_key, value), value].concat()
}

/// The value of what is stored.
///
/// # Errors
/// It is not what was stored at this place.
pub(super) fn unseal<'a>(
    entry_key: EntryKey<'_>,
    stored: &'a [u8],
) -> Result<&'a [u8], StoreError> {
    match stored.split_first_chunk::<SEAL>() {
        Some((seal, value)) if *seal == checksum(entry_key, value) => Ok(value),
        _ => Err(StoreError::Damaged(named(entry_key))),
    }
}

/// A place, for people.
pub(super) fn named((service, bucket, key): EntryKey<'_>) -> String {
    format!("key {key:?} in bucket {bucket:?} of service {service:?}")
}

fn checksum((service, bucket, key): EntryKey<'_>, value: &[u8]) -> [u8; SEAL] {
    let mut hash = Sha256::new();
    for part in [service, bucket, key] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
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
        let stored = seal(entry_key, b"value");
        assert_eq!(unseal(entry_key, &stored), Ok(&b"value"[..]));
        assert_eq!(value_size(&stored), 5);
        for at in 0..stored.len() {
            let mut damaged = stored.clone();
            damaged[at] ^= 1;
            assert!(unseal(entry_key, &damaged).is_err(), "{at}");
        }
        assert!(unseal(("svc", "bk", "ey"), &stored).is_err());
        assert!(unseal(entry_key, &stored[..3]).is_err());
    }
}
