//! An event that happens once, for whoever polls.

use std::{
    io::{self, PipeReader, PipeWriter, pipe},
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, PoisonError},
};

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
    fn it_wakes_whoever_polls_from_then_on() {
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
