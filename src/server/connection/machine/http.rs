//! What becomes of a request of HTTP once its head was decided on.

use super::{Machine, State};
use crate::{
    http::{Exchange, Head, Refusal, Response, Upgrade},
    server::{connection::decoder::Decoder, peer::Peer},
    websocket,
};

impl Machine {
    /// Reads the body.
    pub(crate) fn admit(&mut self, head: &Head, exchange: Exchange, peer: &Peer) {
        let Decoder::Http(requests) = &mut self.own_input().decoder else {
            return;
        };
        match requests.admit(head, exchange) {
            Ok(false) => {}
            Ok(true) => {
                let exchange = Exchange::default();
                self.outbox.push_response(&Response::Continue, &exchange);
                self.leaves = true;
            }
            Err(refused) => {
                let (refusal, exchange) = *refused;
                self.refuse(&refusal, exchange, true, peer);
            }
        }
    }

    /// Answers without the body; `closes` where that is not read.
    pub(crate) fn refuse(
        &mut self,
        refusal: &Refusal,
        exchange: Exchange,
        closes: bool,
        peer: &Peer,
    ) {
        peer.traffic().errors.add(1);
        self.respond(&Response::Refusal(refusal), exchange, closes, peer);
    }

    /// The same with any response.
    pub(crate) fn respond(
        &mut self,
        response: &Response<'_>,
        mut exchange: Exchange,
        closes: bool,
        peer: &Peer,
    ) {
        exchange.closes |= closes;
        self.outbox.push_response(response, &exchange);
        peer.traffic().messages_in.add(1);
        peer.traffic().messages_out.add(1);
        self.quantum.messages += 1;
        (self.state, self.begun) = (State::Idle, None);
        if !exchange.closes
            && let Decoder::Http(requests) = &mut self.own_input().decoder
        {
            requests.incoming.skip();
        }
        self.batch += 1;
        self.batched();
    }

    /// Goes on with WebSocket. A peer that must authenticate has as long for
    /// that as any other.
    pub(crate) fn upgrade(
        &mut self,
        upgrade: &Upgrade,
        exchange: Exchange,
        must_authenticate: bool,
        peer: &Peer,
    ) {
        let exchange = Exchange {
            closes: false,
            ..exchange
        };
        let response = Response::SwitchingProtocols(upgrade);
        self.respond(&response, exchange, false, peer);
        if must_authenticate {
            let until = self.arrived + self.settings.config.handshake_timeout.0;
            self.hello_until.get_or_insert(until);
        } else {
            self.hello_until = None;
        }
        self.read_on(|buffer, most| Decoder::WebSocket(websocket::Incoming::new(buffer, most)));
        peer.speaks(self.input.decoder.protocol());
    }
}
