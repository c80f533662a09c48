//! Requests of HTTP, one at a time: each is answered before the next one is
//! looked at.

use super::message::{Message, Taken};
use crate::{
    http::{self, Exchange, Framing, Head, Incoming, Refusal, Route},
    server::encoding::Encoding,
    wire::Buffer,
};

/// See the module.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) incoming: Incoming,
    /// The request whose body is read.
    admitted: Option<Admitted>,
    /// The call of a request was left, so nothing behind it is looked at.
    pub(super) is_busy: bool,
}

/// A request whose head was admitted.
#[derive(Debug)]
struct Admitted {
    exchange: Exchange,
    any_version: bool,
}

impl Requests {
    pub(super) fn new(buffer: Buffer, max_message_size: usize) -> Self {
        Self {
            incoming: Incoming::new(buffer, max_message_size),
            admitted: None,
            is_busy: false,
        }
    }

    pub(super) fn take(&mut self) -> Option<Taken> {
        if self.is_busy {
            return None;
        }
        match self.incoming.take() {
            Ok(None) => None,
            Ok(Some(http::Taken::Head(head))) => Some(Taken::Head(head)),
            Ok(Some(http::Taken::Message { body, binary })) => {
                let Admitted {
                    exchange,
                    any_version,
                } = self.admitted.take()?;
                let encoding = Encoding::Http(Box::new(exchange));
                Some(Taken::Message(Message {
                    any_version,
                    ..Message::new(body, binary, encoding)
                }))
            }
            Err(refusal) => {
                let admitted = self.admitted.take();
                let exchange = admitted.map(|admitted| admitted.exchange);
                Some(Taken::Refused(refusal, exchange.unwrap_or_default()))
            }
        }
    }

    /// Reads the body of a request whose head was taken. Returns whether the
    /// client waits for leave to send it.
    pub(super) fn admit(
        &mut self,
        head: &Head,
        exchange: Exchange,
    ) -> Result<bool, Box<(Refusal, Exchange)>> {
        if let Err(refusal) = self.incoming.admit(head, &exchange.request_id) {
            return Err(Box::new((refusal, exchange)));
        }
        self.admitted = Some(Admitted {
            exchange,
            any_version: matches!(head.asked, Ok(Route::Message { version: None, .. })),
        });
        let is_there =
            head.framing == Framing::Length(0) || !self.incoming.buffer().unparsed().is_empty();
        Ok(head.expects_continue && !is_there)
    }

    /// The request that gets an ERROR when the connection closes: one that is
    /// being read, or whose call has not begun.
    pub(super) fn closing_encoding(&self, postponed: Option<Message>) -> Option<Encoding> {
        if let Some(Message {
            encoding: Encoding::Http(mut exchange),
            ..
        }) = postponed
        {
            exchange.closes = true;
            return Some(Encoding::Http(exchange));
        }
        let exchange = self.admitted.as_ref().map(|admitted| &admitted.exchange);
        if exchange.is_none() && !self.incoming.is_midway() {
            return None;
        }
        let exchange = Exchange {
            closes: true,
            ..exchange.cloned().unwrap_or_default()
        };
        Some(Encoding::Http(Box::new(exchange)))
    }

    pub(super) fn split(&self) -> Self {
        Self {
            incoming: self.incoming.split(),
            admitted: None,
            is_busy: true,
        }
    }
}
