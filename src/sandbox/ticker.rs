//! The clock of the sandbox: raises the engine's epoch while calls run.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

use wasmtime::Engine;

/// Time between two ticks: how much later than its deadline a call may end.
pub const TICK: Duration = Duration::from_millis(1);

/// What a tick stands for at most, however late it is.
const LONGEST_INTERVAL: Duration = Duration::from_millis(10);

/// Ticks without a sign of use after which the thread sleeps: one second.
const TICKS_TO_SLEEP: u32 = 1000;

/// A thread that ticks while the sandbox is used and sleeps while it is not,
/// so that an idle server does not wake the machine.
#[derive(Debug)]
pub struct Ticker {
    shared: Arc<TickerState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct TickerState {
    /// Someone needs ticks. Set by every call and by every tick that a call
    /// sees, cleared by the thread once a second.
    used: AtomicBool,
    asleep: AtomicBool,
    stop: AtomicBool,
    /// Nanoseconds from the tick before to the last one: the system wakes the
    /// thread late where all processors are busy.
    interval: AtomicU64,
}

/// Keeps the ticker awake; held by whoever runs calls.
#[derive(Debug, Clone)]
pub struct KeepAwake {
    shared: Arc<TickerState>,
    thread: Thread,
}

impl Ticker {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system refuses another thread.
    pub fn start(engine: &Engine) -> std::io::Result<Self> {
        let shared = Arc::new(TickerState::default());
        let (engine, ticking) = (engine.clone(), Arc::clone(&shared));
        let thread = thread::Builder::new()
            .name("mb-ticker".into())
            .spawn(move || ticking.run(&engine))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A handle for those who run calls.
    ///
    /// # Panics
    /// Never: the thread is taken out only when the ticker is dropped.
    #[must_use]
    pub fn keep_awake(&self) -> KeepAwake {
        let thread = self
            .thread
            .as_ref()
            .expect("taken in drop only")
            .thread()
            .clone();
        KeepAwake {
            shared: Arc::clone(&self.shared),
            thread,
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl KeepAwake {
    /// Time from the tick before to the last one.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_nanos(self.shared.interval.load(Relaxed))
    }

    /// A call begins or goes on. Costs two reads as long as calls come often.
    pub fn signal(&self) {
        if !self.shared.used.load(SeqCst) {
            self.shared.used.store(true, SeqCst);
        }
        if self.shared.asleep.load(SeqCst) {
            self.thread.unpark();
        }
    }
}

impl TickerState {
    fn run(&self, engine: &Engine) {
        let mut last = Instant::now();
        while !self.stop.load(SeqCst) {
            for _ in 0..TICKS_TO_SLEEP {
                if self.stop.load(SeqCst) {
                    return;
                }
                thread::park_timeout(TICK);
                let now = Instant::now();
                let nanos = (now - last).min(LONGEST_INTERVAL).as_nanos();
                self.interval.store(nanos as u64, Relaxed);
                last = now;
                engine.increment_epoch();
            }
            if !self.used.swap(false, SeqCst) {
                // A signal sets `used` before it reads `asleep`, and here it is
                // the other way round: one of the two sees the other.
                self.asleep.store(true, SeqCst);
                while !self.used.load(SeqCst) && !self.stop.load(SeqCst) {
                    thread::park();
                }
                self.asleep.store(false, SeqCst);
                last = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_for_a_call_and_ends_when_dropped() {
        let ticker = Ticker::start(&Engine::default()).unwrap();
        let keep_awake = ticker.keep_awake();
        keep_awake.signal();
        assert!(keep_awake.shared.used.load(SeqCst));
        drop(ticker);
        assert_eq!(
            Arc::strong_count(&keep_awake.shared),
            1,
            "the thread is gone"
        );
    }
}
