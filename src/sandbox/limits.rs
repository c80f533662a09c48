//! What one instance may hold, counted over all that it holds.

use wasmtime::ResourceLimiter;

/// Elements of all tables of one instance. A function table of a large
/// Python or JavaScript component has about 10,000.
pub const MAX_TABLE_ELEMENTS: usize = 40_000;

/// One limit for the sum of all memories, and one for that of all tables.
///
/// wasmtime's own `StoreLimits` holds each memory against the limit alone, so
/// a component with fifty memories gets fifty times as much.
#[derive(Debug)]
pub struct Limits {
    max_memory: usize,
    /// Invariant: `memory <= max_memory`.
    memory: usize,
    /// Invariant: `table_elements <= MAX_TABLE_ELEMENTS`.
    table_elements: usize,
    refused: bool,
}

impl Limits {
    /// Nothing held yet, and at most `max_memory` bytes to come.
    #[must_use]
    pub fn new(max_memory: usize) -> Self {
        Self { max_memory, memory: 0, table_elements: 0, refused: false }
    }

    /// Bytes of linear memory; it never shrinks, so this is the peak too.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Whether the instance was ever refused something.
    #[must_use]
    pub fn refused(&self) -> bool {
        self.refused
    }

    /// Grants the growth of one of the counters, or remembers the refusal.
    fn grow(counter: &mut usize, refused: &mut bool, limit: usize, current: usize, desired: usize) -> bool {
        let grown = counter.saturating_add(desired.saturating_sub(current));
        if grown > limit {
            *refused = true;
            return false;
        }
        *counter = grown;
        true
    }
}

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(Self::grow(&mut self.memory, &mut self.refused, self.max_memory, current, desired))
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.refused = true;
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(Self::grow(&mut self.table_elements, &mut self.refused, MAX_TABLE_ELEMENTS, current, desired))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_counts_not_the_single_memory() {
        let mut limits = Limits::new(100);
        assert!(limits.memory_growing(0, 60, None).unwrap());
        assert!(limits.memory_growing(0, 40, None).unwrap(), "a second memory");
        assert_eq!((limits.memory(), limits.refused()), (100, false));
        assert!(!limits.memory_growing(40, 41, None).unwrap());
        assert_eq!((limits.memory(), limits.refused()), (100, true));
    }

    #[test]
    fn tables_have_a_sum_of_their_own() {
        let mut limits = Limits::new(0);
        assert!(limits.table_growing(0, MAX_TABLE_ELEMENTS, None).unwrap());
        assert!(!limits.table_growing(0, 1, None).unwrap());
        assert!(limits.refused());
    }
}
