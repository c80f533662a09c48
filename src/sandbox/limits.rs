//! What one instance may hold, counted over all that it holds.

use std::{sync::Arc, time::Instant};

use mb_reset::CARD;
use wasmtime::ResourceLimiter;

use super::instance::Guest;
use crate::{
    budget::{Budget, Reservation},
    config::memory::KEPT_MEMORY,
};

/// Memories of one component. Fifty small ones are odd but harmless: the sum
/// of them is what is limited.
pub(super) const MAX_MEMORIES: usize = 64;
/// Tables of one component. JavaScript has three, Python more.
pub(super) const MAX_TABLES: usize = 64;

/// Core instances in one component: those of Python come in dozens.
pub(super) const MAX_CORE_INSTANCES: usize = 1000;

/// Elements of all tables of one instance together.
pub const TABLE_ELEMENTS: usize = 40_000;

/// Bytes of a page of WebAssembly.
const WASM_PAGE: usize = 64 * 1024;

/// What an instance may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of all linear memories together.
    pub memory: usize,
    /// Elements of all tables together.
    pub table_elements: usize,
}

/// One limit for the sum of all memories, and one for that of all tables; and
/// what of the memory is taken from the server's.
///
/// wasmtime's own `StoreLimits` holds each memory against the limit alone, so
/// a component with fifty memories gets fifty times as much.
#[derive(Debug)]
pub struct Limits {
    bounds: Bounds,
    /// Memory of the instance that is not the guest's own, and does not count.
    overhead: usize,
    /// With what does not count. Invariant: `memory <= bounds.memory +
    /// overhead`.
    memory: usize,
    /// Invariant: `table_elements <= bounds.table_elements`.
    table_elements: usize,
    /// Memory kept for resets, in bytes.
    kept: usize,
    /// What the memory exceeds that which every instance keeps anyway.
    reservation: Reservation,
    refused: bool,
    /// What was allowed last: taken back where wasmtime can't do it.
    last_growth: usize,
}

impl Limits {
    /// Nothing held yet. So many bytes of memory, made with the instance, are
    /// not the guest's own.
    #[must_use]
    pub fn new(bounds: Bounds, overhead: usize, shared: &Arc<Budget>) -> Self {
        Self {
            bounds,
            overhead,
            memory: 0,
            table_elements: 0,
            kept: 0,
            reservation: Reservation::empty(shared),
            refused: false,
            last_growth: 0,
        }
    }

    /// Takes from the server's memory what an instance of this size needs,
    /// before it is made.
    pub fn reserve(&mut self, memory: usize, deadline: Instant) -> bool {
        self.reservation.raise_until(beyond_kept(memory), deadline)
    }

    /// Bytes of linear memory; it never shrinks, so this is the peak too.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory.saturating_sub(self.overhead)
    }

    /// Whether anything is taken from the server's memory.
    pub(super) fn holds_shared(&self) -> bool {
        self.reservation.held() > 0
    }

    /// Bytes of memory and elements of tables that the instance has.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.memory, self.table_elements)
    }

    /// So many bytes that are about to be added are not the guest's own.
    pub(super) fn allow_overhead(&mut self, bytes: usize) {
        self.overhead += bytes;
    }

    /// So many of them were not added.
    pub(super) fn take_back_overhead(&mut self, bytes: usize) {
        self.overhead -= bytes;
    }

    /// Takes from the server's memory, whatever there is, what is kept beside
    /// the guest's own.
    pub fn keep(&mut self, bytes: usize) {
        self.kept = bytes;
        self.reservation.set(self.needed());
    }

    /// What is taken from the server's memory.
    fn needed(&self) -> usize {
        beyond_kept(self.memory() + self.kept)
    }

    /// Whether the instance was refused something in this call.
    #[must_use]
    pub fn refused(&self) -> bool {
        self.refused
    }

    /// For the next call of the same instance.
    pub fn renew(&mut self) {
        self.refused = false;
    }

    /// The new sum, if it is within the limit.
    fn grown(
        &mut self,
        held: usize,
        limit: usize,
        current: usize,
        desired: usize,
    ) -> Option<usize> {
        let sum = held.saturating_add(desired.saturating_sub(current));
        if sum > limit {
            self.refused = true;
            return None;
        }
        Some(sum)
    }
}

/// An instance's first 512 KiB are counted with the pool that keeps them.
fn beyond_kept(memory: usize) -> usize {
    memory.saturating_sub(KEPT_MEMORY.0)
}

/// Whether a component asks for more than it allows itself: no limit of ours.
fn beyond_its_own(desired: usize, maximum: Option<usize>) -> bool {
    maximum.is_some_and(|maximum| desired > maximum)
}

impl ResourceLimiter for Guest {
    /// Waits for the server's memory where others hold it, until the call's
    /// time is over.
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let Self { host, limits } = self;
        if beyond_its_own(desired, maximum) {
            return Ok(false);
        }
        // The cards grow with the guest's memory, a byte for a KiB.
        let cards = if limits.overhead > 0 {
            limits.bounds.memory / CARD + WASM_PAGE
        } else {
            0
        };
        let limit = limits.bounds.memory.saturating_add(limits.overhead + cards);
        let Some(sum) = limits.grown(limits.memory, limit, current, desired) else {
            return Ok(false);
        };
        let needed = beyond_kept(sum.saturating_sub(limits.overhead) + limits.kept);
        if !limits.reservation.raise_until(needed, Instant::now()) {
            host.wait_for(|until| limits.reservation.raise_until(needed, until))?;
        }
        limits.last_growth = sum - limits.memory;
        limits.memory = sum;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        let limits = &mut self.limits;
        limits.refused = true;
        limits.memory -= std::mem::take(&mut limits.last_growth);
        limits.reservation.set(limits.needed());
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let limits = &mut self.limits;
        let sum = limits.grown(
            limits.table_elements,
            limits.bounds.table_elements,
            current,
            desired,
        );
        limits.table_elements = sum.unwrap_or(limits.table_elements);
        Ok(sum.is_some())
    }

    fn instances(&self) -> usize {
        MAX_CORE_INSTANCES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::host::{Context, Granted, Host, Stop, Unwatched};

    fn guest(
        memory: usize,
        table_elements: usize,
        shared: &Arc<Budget>,
        deadline: Instant,
    ) -> Guest {
        let granted = Granted::for_inspection("x");
        let host = Host::new(Context::of_loading(deadline), granted, Arc::new(Unwatched));
        Guest {
            host,
            limits: Limits::new(
                Bounds {
                    memory,
                    table_elements,
                },
                0,
                shared,
            ),
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn the_sum_counts_not_the_single_memory() {
        let mut guest = guest(100, 0, &Budget::new(0), soon());
        assert!(guest.memory_growing(0, 60, None).unwrap());
        assert!(
            guest.memory_growing(0, 40, None).unwrap(),
            "a second memory"
        );
        assert_eq!(
            (guest.limits.memory(), guest.limits.refused()),
            (100, false)
        );
        assert!(!guest.memory_growing(40, 41, None).unwrap());
        assert_eq!((guest.limits.memory(), guest.limits.refused()), (100, true));
    }

    #[test]
    fn growth_that_fails_does_not_count() {
        let shared = Budget::new(1 << 20);
        let mut guest = guest(8 << 20, 10, &shared, soon());
        let kept = KEPT_MEMORY.0;
        assert!(guest.memory_growing(0, kept + 100, None).unwrap());
        assert!(guest.memory_growing(kept + 100, kept + 300, None).unwrap());
        guest
            .memory_grow_failed(wasmtime::format_err!("no"))
            .unwrap();
        assert_eq!((guest.limits.memory(), shared.used()), (kept + 100, 100));
        guest.limits.renew();
        // What the component itself does not allow is no limit of the server's.
        assert!(!guest.memory_growing(kept, 2 * kept, Some(kept)).unwrap());
        assert_eq!(
            (guest.limits.memory(), guest.limits.refused()),
            (kept + 100, false)
        );
    }

    #[test]
    fn what_is_kept_for_resets_counts_with_shared_memory() {
        let shared = Budget::new(4 << 20);
        let mut guest = guest(8 << 20, 10, &shared, soon());
        let kept = KEPT_MEMORY.0;
        assert!(guest.memory_growing(0, kept, None).unwrap());
        guest.limits.keep(1000);
        assert!(guest.memory_growing(kept, kept + 500, None).unwrap());
        assert_eq!(shared.used(), 1500);
        assert!(guest.memory_growing(kept + 500, kept + 700, None).unwrap());
        guest
            .memory_grow_failed(wasmtime::format_err!("no"))
            .unwrap();
        assert_eq!(shared.used(), 1500);
    }

    #[test]
    fn tables_have_a_sum_of_their_own() {
        let mut guest = guest(0, 10, &Budget::new(0), soon());
        assert!(guest.table_growing(0, 10, None).unwrap());
        assert!(!guest.table_growing(0, 1, None).unwrap());
        assert!(guest.limits.refused());
    }

    #[test]
    fn what_exceeds_the_kept_part_is_the_servers() {
        let shared = Budget::new(100);
        let limit = KEPT_MEMORY.0 + 1000;
        let mut first = guest(limit, 0, &shared, soon());
        assert!(first.memory_growing(0, KEPT_MEMORY.0 + 80, None).unwrap());
        assert_eq!(shared.used(), 80);
        let mut late = guest(limit, 0, &shared, Instant::now());
        let error = late
            .memory_growing(0, KEPT_MEMORY.0 + 30, None)
            .unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&Stop::Deadline));
        drop(first);
        assert_eq!(shared.used(), 0);
        assert!(late.memory_growing(0, KEPT_MEMORY.0 + 30, None).unwrap());
    }
}
