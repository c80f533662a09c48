//! `wasi:io`: streams that end in the log, and polling that ends at the
//! call's deadline.

use std::time::{Duration, Instant};

use wasmtime::component::Resource;

use super::bindings::wasi::io::{error, poll, streams};
use crate::host::{Host, log::Stream};

/// What one write may carry.
const MAX_WRITE: u64 = 64 * 1024;

/// An instant that never comes within a call: calls last an hour at most.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// An error of a stream; there are none.
pub struct Error;

/// Something to wait for: an instant.
pub struct Pollable {
    at: Instant,
}

/// Standard input: at its end from the start.
pub struct InputStream;

/// Standard output or error: the log.
pub struct OutputStream(pub(super) Stream);

impl Pollable {
    /// Ready from an instant on.
    pub(super) fn at(at: Instant) -> Self {
        Self { at }
    }

    /// Ready so many nanoseconds from now.
    pub(super) fn after(nanos: u64) -> Self {
        Self {
            at: Instant::now() + Duration::from_nanos(nanos).min(NEVER),
        }
    }
}

impl error::Host for Host {}

impl error::HostError for Host {
    fn to_debug_string(&mut self, _: Resource<Error>) -> wasmtime::Result<String> {
        Ok("error".into())
    }

    fn drop(&mut self, error: Resource<Error>) -> wasmtime::Result<()> {
        self.drop_handle(error)?;
        Ok(())
    }
}

impl poll::Host for Host {
    fn poll(&mut self, pollables: Vec<Resource<Pollable>>) -> wasmtime::Result<Vec<u32>> {
        let ready_at = |host: &Self| {
            pollables
                .iter()
                .map(|p| host.table.get(p).map(|p| p.at))
                .collect::<Result<Vec<_>, _>>()
        };
        let instants = ready_at(self)?;
        // The contract wants a trap for an empty list, since nothing would wake it.
        let first = instants
            .iter()
            .min()
            .ok_or_else(|| wasmtime::format_err!("poll of nothing"))?;
        self.sleep(*first)?;
        let now = Instant::now();
        let ready = instants.iter().zip(0_u32..).filter(|(at, _)| **at <= now);
        Ok(ready.map(|(_, index)| index).collect())
    }
}

impl poll::HostPollable for Host {
    fn ready(&mut self, pollable: Resource<Pollable>) -> wasmtime::Result<bool> {
        Ok(self.table.get(&pollable)?.at <= Instant::now())
    }

    fn block(&mut self, pollable: Resource<Pollable>) -> wasmtime::Result<()> {
        let at = self.table.get(&pollable)?.at;
        self.sleep(at)
    }

    fn drop(&mut self, pollable: Resource<Pollable>) -> wasmtime::Result<()> {
        self.drop_handle(pollable)?;
        Ok(())
    }
}

type Streamed<T> = wasmtime::Result<Result<T, streams::StreamError>>;

const CLOSED: Result<u64, streams::StreamError> = Err(streams::StreamError::Closed);

impl streams::Host for Host {}

impl streams::HostInputStream for Host {
    fn read(&mut self, _: Resource<InputStream>, _: u64) -> Streamed<Vec<u8>> {
        Ok(Err(streams::StreamError::Closed))
    }

    fn blocking_read(&mut self, stream: Resource<InputStream>, size: u64) -> Streamed<Vec<u8>> {
        self.read(stream, size)
    }

    fn skip(&mut self, _: Resource<InputStream>, _: u64) -> Streamed<u64> {
        Ok(CLOSED)
    }

    fn blocking_skip(&mut self, _: Resource<InputStream>, _: u64) -> Streamed<u64> {
        Ok(CLOSED)
    }

    fn subscribe(&mut self, _: Resource<InputStream>) -> wasmtime::Result<Resource<Pollable>> {
        Ok(self.create_handle(Pollable::at(Instant::now()))?)
    }

    fn drop(&mut self, stream: Resource<InputStream>) -> wasmtime::Result<()> {
        self.drop_handle(stream)?;
        Ok(())
    }
}

impl streams::HostOutputStream for Host {
    fn check_write(&mut self, _: Resource<OutputStream>) -> Streamed<u64> {
        Ok(Ok(MAX_WRITE))
    }

    fn write(&mut self, stream: Resource<OutputStream>, contents: Vec<u8>) -> Streamed<()> {
        let OutputStream(to) = *self.table.get(&stream)?;
        self.print(to, &contents);
        Ok(Ok(()))
    }

    fn blocking_write_and_flush(
        &mut self,
        stream: Resource<OutputStream>,
        contents: Vec<u8>,
    ) -> Streamed<()> {
        streams::HostOutputStream::write(self, stream, contents)
    }

    fn flush(&mut self, _: Resource<OutputStream>) -> Streamed<()> {
        Ok(Ok(()))
    }

    fn blocking_flush(&mut self, _: Resource<OutputStream>) -> Streamed<()> {
        Ok(Ok(()))
    }

    fn subscribe(&mut self, _: Resource<OutputStream>) -> wasmtime::Result<Resource<Pollable>> {
        Ok(self.create_handle(Pollable::at(Instant::now()))?)
    }

    /// Zeros say nothing in a log.
    fn write_zeroes(&mut self, _: Resource<OutputStream>, _: u64) -> Streamed<()> {
        Ok(Ok(()))
    }

    fn blocking_write_zeroes_and_flush(
        &mut self,
        _: Resource<OutputStream>,
        _: u64,
    ) -> Streamed<()> {
        Ok(Ok(()))
    }

    fn splice(
        &mut self,
        _: Resource<OutputStream>,
        _: Resource<InputStream>,
        _: u64,
    ) -> Streamed<u64> {
        Ok(CLOSED)
    }

    fn blocking_splice(
        &mut self,
        _: Resource<OutputStream>,
        _: Resource<InputStream>,
        _: u64,
    ) -> Streamed<u64> {
        Ok(CLOSED)
    }

    fn drop(&mut self, stream: Resource<OutputStream>) -> wasmtime::Result<()> {
        self.drop_handle(stream)?;
        Ok(())
    }
}
