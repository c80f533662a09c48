//! What the log needs beyond `tracing`: a bound for lines that strangers can
//! cause, and the text of a panic.

use std::{
    any::Any,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines of one kind within [`WINDOW`]; more are counted, not written.
const MAX_LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// Bounds one kind of line, so that no client can fill the disk with it.
#[derive(Debug)]
pub struct Limiter(Mutex<State>);

#[derive(Debug)]
struct State {
    /// When the window began; none before the first line.
    began: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

/// Whether a line is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is, after a word on how many were not.
    Write {
        suppressed: u64,
    },
    Suppress,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

impl Limiter {
    /// One that has let nothing through.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(State { began: None, lines: 0, suppressed: 0 }))
    }

    /// Whether a line may be written now. The first one after some were not
    /// is preceded by a line that says how many.
    #[must_use]
    pub fn allows(&self, what: &str) -> bool {
        match self.judge(Instant::now()) {
            Verdict::Suppress => false,
            Verdict::Write { suppressed } => {
                if suppressed > 0 {
                    tracing::warn!("{suppressed} more lines were suppressed: {what}");
                }
                true
            }
        }
    }

    fn judge(&self, now: Instant) -> Verdict {
        // Nothing in here panics, and nothing is logged under the lock.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            state.began = Some(now);
            state.lines = 0;
        }
        if state.lines == MAX_LINES {
            state.suppressed += 1;
            return Verdict::Suppress;
        }
        state.lines += 1;
        Verdict::Write { suppressed: std::mem::take(&mut state.suppressed) }
    }
}

/// What a panic says.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_a_second_and_then_how_many_were_not() {
        let limiter = Limiter::new();
        let begun = Instant::now();
        let at = |millis: u64| limiter.judge(begun + Duration::from_millis(millis));
        let write = |suppressed| Verdict::Write { suppressed };
        for line in 0..MAX_LINES {
            assert_eq!(at(u64::from(line)), write(0), "{line}");
        }
        for _ in 0..500 {
            assert_eq!(at(999), Verdict::Suppress);
        }
        assert_eq!(at(1000), write(500), "a new second, and what the last one lacks");
        assert_eq!(at(1001), write(0));
        assert_eq!(at(60_000), write(0));
    }

    #[test]
    fn panics_have_a_text() {
        let text = |panic: Box<dyn Any + Send>| panic_text(&*panic).to_owned();
        assert_eq!(text(Box::new("word")), "word");
        assert_eq!(text(Box::new(String::from("words"))), "words");
        assert_eq!(text(Box::new(7)), "no message");
    }
}
