//! `wasi:random`: the kernel's random numbers, for the insecure interfaces too.

use super::bindings::wasi::random::{insecure, insecure_seed, random};
use crate::host::Host;

/// What one call may ask for, in bytes. A guest that wants more asks again.
const MAX_BYTES: u64 = 64 * 1024;

fn bytes(count: u64) -> wasmtime::Result<Vec<u8>> {
    wasmtime::ensure!(
        count <= MAX_BYTES,
        "{count} random bytes exceed the limit of {MAX_BYTES}"
    );
    let mut bytes = vec![0; usize::try_from(count)?];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

fn number() -> wasmtime::Result<u64> {
    let bytes = bytes(8)?;
    Ok(bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

impl random::Host for Host {
    fn get_random_bytes(&mut self, count: u64) -> wasmtime::Result<Vec<u8>> {
        bytes(count)
    }

    fn get_random_u64(&mut self) -> wasmtime::Result<u64> {
        number()
    }
}

impl insecure::Host for Host {
    fn get_insecure_random_bytes(&mut self, count: u64) -> wasmtime::Result<Vec<u8>> {
        bytes(count)
    }

    fn get_insecure_random_u64(&mut self) -> wasmtime::Result<u64> {
        number()
    }
}

impl insecure_seed::Host for Host {
    fn insecure_seed(&mut self) -> wasmtime::Result<(u64, u64)> {
        Ok((number()?, number()?))
    }
}
