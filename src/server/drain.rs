//! How far the end of the server has come, for all who wait or serve.

use std::{
    io::{self, PipeReader, PipeWriter, pipe},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// How far the end of the server has come. Rises only.
#[derive(Debug)]
pub(crate) struct DrainFlags {
    /// Readable from the moment that the server drains, for those who poll: a
    /// pipe whose end is closed, which can't fail.
    pub(crate) wake: PipeReader,
    writer: Mutex<Option<PipeWriter>>,
    /// No call is begun any more.
    pub(crate) draining: AtomicBool,
    /// Peers that do not take the closing ERROR are cut off.
    pub(crate) cuts_off: AtomicBool,
    /// Calls that still run are stopped.
    pub(crate) stop_calls: AtomicBool,
}

impl DrainFlags {
    /// # Errors
    /// If the system has no descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let (wake, writer) = pipe()?;
        Ok(Self {
            wake,
            writer: Mutex::new(Some(writer)),
            draining: AtomicBool::new(false),
            cuts_off: AtomicBool::new(false),
            stop_calls: AtomicBool::new(false),
        })
    }

    pub(crate) fn begin(&self) {
        self.draining.store(true, SeqCst);
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        drop(writer.take());
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

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn it_wakes_all_that_poll_from_then_on() {
        let drain = DrainFlags::new().unwrap();
        let polled = || {
            let now = Timespec::default();
            poll(&mut [PollFd::new(&drain.wake, PollFlags::IN)], Some(&now)).unwrap()
        };
        assert_eq!(polled(), 0);
        drain.begin();
        drain.begin();
        assert_eq!((polled(), polled()), (1, 1));
    }
}
