//! Answers that have not left yet, in the order in which they leave.

use std::{collections::VecDeque, mem, sync::Arc, time::SystemTime};

use super::encoding::Encoding;
use crate::{
    budget::{Budget, Reservation},
    dispatch::Outcome,
    http::{Asks, Exchange, McpReply, Response},
    metrics::Traffic,
    wire::{Header, Kind, Version, buffer::KEPT_SIZE, message::error_document},
};

/// A payload of this many bytes or more is not copied to the others, but
/// leaves from where the service's answer was put.
pub(crate) const LARGE: usize = 32 * 1024;

/// Bytes that wait to be written.
pub(crate) struct Outbox {
    /// Small answers gather in one part, a large payload is one of its own.
    /// Invariant: only the last one may be empty.
    parts: VecDeque<Vec<u8>>,
    /// Of the first part. Invariant: at most its length.
    sent: usize,
    /// Bytes that the connection has for it without taking any.
    free: usize,
    /// Memory of the parts beyond that. Answers are there already, and large
    /// ones were reserved before: they are never refused for it, others wait.
    reservation: Reservation,
    /// A response has said that the connection closes behind it.
    said_close: bool,
}

impl Outbox {
    /// The one that a connection writes.
    pub(crate) fn new(memory: &Arc<Budget>) -> Self {
        Self::with(KEPT_SIZE, memory)
    }

    /// One beside it: all that it holds is taken.
    pub(crate) fn beside(memory: &Arc<Budget>) -> Self {
        Self::with(0, memory)
    }

    fn with(free: usize, memory: &Arc<Budget>) -> Self {
        Self {
            parts: VecDeque::new(),
            sent: 0,
            free,
            reservation: Reservation::empty(memory),
            said_close: false,
        }
    }

    /// Puts an answer behind what is there, and counts it.
    pub(crate) fn answer(
        &mut self,
        encoding: &Encoding,
        header: Option<&Header<'_>>,
        outcome: Outcome,
        served: Option<Version>,
        traffic: &Traffic,
    ) {
        self.said_close |= encoding.says_close();
        let outcome = match encoding.asks() {
            Asks::Tool(reply) => with_failure(reply, outcome, traffic),
            Asks::Topic | Asks::Services | Asks::Mcp(_) => outcome,
        };
        match outcome {
            Outcome::Silence
            | Outcome::Postponed(_)
            | Outcome::Redirect(_)
            | Outcome::Deferred(_) => return,
            Outcome::Json(text) => {
                self.respond(encoding, header, served, text.into_bytes(), false);
            }
            Outcome::Binary(bytes) => self.respond(encoding, header, served, bytes, true),
            Outcome::Response(status, body) => {
                encoding.write_response(self.end(), served, (status, &body));
            }
            Outcome::Error(code, body) => {
                traffic.errors.add(1);
                encoding.write_error(self.end(), header, served, (code, &body));
            }
        }
        traffic.messages_out.add(1);
        self.update_reservation();
    }

    /// A large payload is not copied once more.
    fn respond(
        &mut self,
        encoding: &Encoding,
        request: Option<&Header<'_>>,
        served: Option<Version>,
        payload: Vec<u8>,
        binary: bool,
    ) {
        let header = request.map(|request| Header {
            kind: Kind::Response,
            parent_request_id: None,
            timeout: None,
            ..*request
        });
        let size = payload.len();
        encoding.write_head(self.end(), header.as_ref(), served, (size, binary));
        if encoding.omits_payload() {
            return;
        }
        if size < LARGE {
            self.end().extend_from_slice(&payload);
        } else {
            self.push(payload);
        }
    }

    /// Puts a response that no service gives behind what is there.
    pub(crate) fn push_response(&mut self, response: &Response<'_>, exchange: &Exchange) {
        self.said_close |= exchange.closes;
        response.write(self.end(), exchange, None);
        self.update_reservation();
    }

    /// Puts small bytes behind what is there.
    pub(crate) fn push_bytes(&mut self, bytes: &[u8]) {
        self.end().extend_from_slice(bytes);
        self.update_reservation();
    }

    /// Puts all that another one has, and has not begun to send, behind what
    /// is there.
    pub(crate) fn append(&mut self, other: &mut Self) {
        assert_eq!(other.sent, 0, "the other one sends nothing itself");
        for part in mem::take(&mut other.parts) {
            if part.len() >= LARGE {
                self.push(part);
            } else {
                self.end().extend_from_slice(&part);
            }
        }
        self.said_close |= other.said_close;
        other.update_reservation();
        self.update_reservation();
    }

    /// Whether nothing may follow any more.
    pub(crate) fn said_close(&self) -> bool {
        self.said_close
    }

    /// Where the next small thing is written to.
    fn end(&mut self) -> &mut Vec<u8> {
        if self.parts.is_empty() {
            self.parts.push_back(Vec::new());
        }
        let last = self.parts.len() - 1;
        &mut self.parts[last]
    }

    /// Puts a large payload behind what is there.
    fn push(&mut self, payload: Vec<u8>) {
        if self.parts.back().is_some_and(Vec::is_empty) {
            self.parts.pop_back();
        }
        self.parts.push_back(payload);
        self.parts.push_back(Vec::new());
    }

    /// What is to be written next; empty if nothing waits.
    pub(crate) fn next(&self) -> &[u8] {
        self.parts.front().map_or(&[], |part| &part[self.sent..])
    }

    /// So much of that was written.
    pub(crate) fn advance(&mut self, sent: usize) {
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
                self.update_reservation();
            }
        }
    }

    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(Vec::len).sum::<usize>() - self.sent
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.next().is_empty()
    }

    /// Drops what waits, and releases its memory.
    pub(crate) fn clear(&mut self) {
        self.parts.truncate(1);
        if let Some(part) = self.parts.front_mut() {
            part.clear();
            part.shrink_to(KEPT_SIZE);
        }
        self.sent = 0;
        self.update_reservation();
    }

    /// Counts the memory of what was put in.
    fn update_reservation(&mut self) {
        let held: usize = self.parts.iter().map(Vec::capacity).sum();
        let beyond = held.saturating_sub(self.free);
        if beyond != self.reservation.held() {
            self.reservation.set(beyond);
        }
    }
}

/// The failure of a tool is a result of MCP.
fn with_failure(reply: &McpReply, outcome: Outcome, traffic: &Traffic) -> Outcome {
    let Outcome::Error(_, body) = outcome else {
        return outcome;
    };
    traffic.errors.add(1);
    let text = error_document(&body, SystemTime::now());
    Outcome::Json(reply.called(&String::from_utf8_lossy(&text), true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_outboxes_one_is_free() {
        let memory = Budget::new(0);
        let (mut own, mut late) = (Outbox::new(&memory), Outbox::beside(&memory));
        for outbox in [&mut own, &mut late] {
            outbox.push_bytes(&[7; 1000]);
        }
        assert!(memory.used() >= 1000, "{}", memory.used());
        own.append(&mut late);
        assert_eq!((own.len(), memory.used()), (2000, 0));
    }

    #[test]
    fn what_goes_in_comes_out_in_order_and_is_paid_for_as_long_as_it_waits() {
        for last in [&b"two"[..], b""] {
            let memory = Budget::new(0);
            let mut outbox = Outbox::new(&memory);
            outbox.end().extend_from_slice(b"one");
            outbox.push(vec![7; 100_000]);
            outbox.end().extend_from_slice(last);
            outbox.update_reservation();
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
