//! How far the end of the server has come, for all who wait or serve.

use std::{
    io::{self, PipeReader, PipeWriter, pipe},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// How far the end of the server has come. Rises only.
#[derive(Debug)]
pub(crate) struct DrainFlags {
    /// Readable from the moment that the server drains, for those who poll.
    pub(crate) wake: ShutdownEvent,
    /// No call is begun any more.
    pub(crate) draining: AtomicBool,
    /// Peers that do not take the closing ERROR are cut off.
    pub(crate) cuts_off: AtomicBool,
    /// Calls that still run are stopped.
    pub(crate) stop_calls: AtomicBool,
}

impl DrainFlags {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = ShutdownEvent::new()?;
        Ok(Self {
            wake,
            draining: AtomicBool::new(false),
            cuts_off: AtomicBool::new(false),
            stop_calls: AtomicBool::new(false),
        })
    }

    pub(crate) fn begin(&self) {
        self.draining.store(true, SeqCst);
        self.wake.set();
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(SeqCst)
    }

    pub(crate) fn is_cutting_off(&self) -> bool {
        self.cuts_off.load(SeqCst)
    }

    pub(crate) fn calls_stopped(&self) -> bool {
        self.stop_calls.load(SeqCst)
    }
}

/// Is readable, for good, once it was [set](ShutdownEvent::set).
///
/// A pipe whose end is closed: that can't fail, and there is no system without
/// pipes.
#[derive(Debug)]
pub(crate) struct ShutdownEvent {
    reader: PipeReader,
    writer: Mutex<Option<PipeWriter>>,
}

impl ShutdownEvent {
    /// # Errors
    /// If the system has no descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let (reader, writer) = pipe()?;
        Ok(Self {
            reader,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Wakes all who poll, now and later.
    pub(crate) fn set(&self) {
        drop(
            self.writer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }
}

impl AsFd for ShutdownEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn it_wakes_all_that_poll_from_then_on() {
        let event = ShutdownEvent::new().unwrap();
        let polled = || {
            let now = Timespec::default();
            poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)).unwrap()
        };
        assert_eq!(polled(), 0);
        event.set();
        event.set();
        assert_eq!((polled(), polled()), (1, 1));
    }
}
