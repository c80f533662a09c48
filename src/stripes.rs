//! One of something for each processor: threads that run at the same time
//! write to different cache lines.

/// Most stripes, however many processors there are.
const MAX_STRIPES: usize = 16;

/// Two cache lines, because processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// The stripes. A thread may be moved between any two of its steps, so each
/// stripe is still shared; it is only seldom contended.
#[derive(Debug)]
pub struct Stripes<T>(Box<[Padded<T>]>);

impl<T: Default> Default for Stripes<T> {
    /// As many as there are processors, rounded up to a power of two.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let stripes = processors.next_power_of_two().min(MAX_STRIPES);
        Self((0..stripes).map(|_| Padded::default()).collect())
    }
}

impl<T> Stripes<T> {
    /// That of the processor on which this thread runs just now.
    #[must_use]
    pub fn own(&self) -> &T {
        // The length is a power of two.
        &self.0[rustix::thread::sched_getcpu() & (self.0.len() - 1)].0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    #[test]
    fn what_all_threads_add_is_in_all_stripes_together() {
        let stripes = Stripes::<AtomicUsize>::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        stripes.own().fetch_add(1, Relaxed);
                    }
                });
            }
        });
        assert_eq!(
            stripes
                .iter()
                .map(|stripe| stripe.load(Relaxed))
                .sum::<usize>(),
            4000
        );
    }
}
