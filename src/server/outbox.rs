//! Answers that have not left yet, in the order in which they leave.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    budget::{Budget, Charge},
    wire::reassembly::KEPT_SIZE,
};

/// A payload of this many bytes or more is not copied to the others, but
/// leaves from where the service's answer was put.
pub(super) const LARGE: usize = 32 * 1024;

/// Bytes that wait to be written.
pub(super) struct Outbox {
    /// Small answers gather in one part, a large payload is one of its own.
    /// Invariant: there is at least one, and only the last one may be empty.
    parts: VecDeque<Vec<u8>>,
    /// Of the first part. Invariant: `sent <= parts[0].len()`.
    sent: usize,
    /// A write failed; nothing can be sent any more.
    pub(super) broken: bool,
    /// Memory of the parts beyond what every connection keeps. Answers are
    /// there already: they are never refused for it, others wait.
    charge: Charge,
}

impl Outbox {
    pub(super) fn new(memory: &Arc<Budget>) -> Self {
        Self {
            parts: VecDeque::from([Vec::new()]),
            sent: 0,
            broken: false,
            charge: Charge::none(memory),
        }
    }

    /// Where the next small thing is written to.
    pub(super) fn end(&mut self) -> &mut Vec<u8> {
        if self.parts.is_empty() {
            self.parts.push_back(Vec::new());
        }
        let last = self.parts.len() - 1;
        &mut self.parts[last]
    }

    /// Puts a large payload behind what is there.
    pub(super) fn push(&mut self, payload: Vec<u8>) {
        self.parts.push_back(payload);
        self.parts.push_back(Vec::new());
    }

    /// What is to be written next; empty if nothing waits.
    pub(super) fn next(&self) -> &[u8] {
        &self.parts[0][self.sent..]
    }

    /// So much of that was written.
    pub(super) fn advance(&mut self, sent: usize) {
        self.sent += sent;
        assert!(
            self.sent <= self.parts[0].len(),
            "more was sent than there was"
        );
        if self.sent == self.parts[0].len() {
            if self.parts.len() == 1 {
                self.clear();
            } else {
                self.parts.pop_front();
                self.sent = 0;
                self.recharge();
            }
        }
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(Vec::len).sum::<usize>() - self.sent
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next().is_empty()
    }

    /// Drops what waits, and gives back what it took.
    pub(super) fn clear(&mut self) {
        self.parts.truncate(1);
        self.parts[0].clear();
        self.parts[0].shrink_to(KEPT_SIZE);
        self.sent = 0;
        self.recharge();
    }

    /// Counts the memory of what was put in.
    pub(super) fn recharge(&mut self) {
        let held: usize = self.parts.iter().map(Vec::capacity).sum();
        let beyond = held.saturating_sub(KEPT_SIZE);
        if beyond != self.charge.held() {
            self.charge.set(beyond);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order_and_is_paid_for_as_long_as_it_waits() {
        for last in [&b"two"[..], b""] {
            let memory = Budget::new(0);
            let mut outbox = Outbox::new(&memory);
            outbox.end().extend_from_slice(b"one");
            outbox.push(vec![7; 100_000]);
            outbox.end().extend_from_slice(last);
            outbox.recharge();
            assert_eq!(outbox.len(), 100_003 + last.len());
            assert!(memory.used() >= 100_003 - KEPT_SIZE, "{}", memory.used());
            let mut written = Vec::new();
            while !outbox.is_empty() {
                let some = outbox.next().len().min(70_000);
                written.extend_from_slice(&outbox.next()[..some]);
                outbox.advance(some);
            }
            assert_eq!(written, [&b"one"[..], &[7; 100_000], last].concat());
            assert_eq!((outbox.len(), memory.used()), (0, 0));
        }
    }
}
