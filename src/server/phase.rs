//! Who is busy on a connection, who may speak last, and who turns off the
//! light. Only atomics: the interleavings are checked by `tests/interleavings`.

use super::sync::{AtomicU32, Ordering::SeqCst};

/// The drain has the last word, said or still being sent. Final.
const TOLD: u32 = 1 << 30;
/// A thread of the connection has it. Final.
const CLOSING: u32 = 1 << 31;
const FINAL: u32 = TOLD | CLOSING;

/// How far a connection has come.
///
/// Several threads may serve one connection: one reads, the others are busy
/// with calls that took long and were left behind by the one that reads.
#[derive(Debug)]
pub(crate) struct Phase {
    /// Threads that are busy, and one of the final marks. The marks are set
    /// by one atomic step; only who made that step speaks.
    state: AtomicU32,
    /// Threads that serve the connection, busy or not.
    attached: AtomicU32,
}

impl Phase {
    /// One thread serves it and is not busy.
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            attached: AtomicU32::new(1),
        }
    }

    /// A thread is about to serve a message. False if somebody has the last
    /// word: then nothing is begun.
    pub(crate) fn begin(&self) -> bool {
        self.step(|state| (state & FINAL == 0).then_some(state + 1))
    }

    /// A thread has served what it had. True if no other one is busy.
    ///
    /// The drain sets its flag before it looks here; a thread comes here
    /// before it looks at the flag. So one of the two sees the other.
    pub(crate) fn rest(&self) -> bool {
        self.state.fetch_sub(1, SeqCst) & !FINAL == 1
    }

    /// Takes the last word for a thread of the connection. False if somebody
    /// has it.
    pub(crate) fn close(&self) -> bool {
        self.step(|state| (state & FINAL == 0).then_some(state | CLOSING))
    }

    /// Takes the last word for somebody who does not serve the connection,
    /// as the drain, if nobody is busy.
    pub(crate) fn tell(&self) -> bool {
        // Written even where it stays as it is: so whoever rests after this
        // also sees what was stored before it, the drain's flag.
        let told = |state| Some(if state == 0 { TOLD } else { state });
        self.state.fetch_update(SeqCst, SeqCst, told) == Ok(0)
    }

    /// One thread more serves it.
    pub(crate) fn attach(&self) {
        self.attached.fetch_add(1, SeqCst);
    }

    /// A thread leaves. True for the last one, who ends the connection.
    pub(crate) fn detach(&self) -> bool {
        self.attached.fetch_sub(1, SeqCst) == 1
    }

    /// Threads that serve it.
    pub(crate) fn attached(&self) -> u32 {
        self.attached.load(SeqCst)
    }

    /// Nobody is busy and nobody has the last word.
    pub(crate) fn is_quiet(&self) -> bool {
        self.state.load(SeqCst) == 0
    }

    pub(crate) fn is_busy(&self) -> bool {
        let state = self.state.load(SeqCst);
        state & FINAL == 0 && state > 0
    }

    pub(crate) fn is_told(&self) -> bool {
        self.state.load(SeqCst) & TOLD != 0
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.state.load(SeqCst) & FINAL != 0
    }

    fn step(&self, next: impl Fn(u32) -> Option<u32>) -> bool {
        self.state.fetch_update(SeqCst, SeqCst, next).is_ok()
    }
}
