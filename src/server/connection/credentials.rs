//! What a peer has shown of itself, held against the present state: before
//! each message, as far as that is cheap, and at least once in each keep-alive
//! interval as a whole. And the age of its connection.

use std::{sync::Arc, time::Instant};

use super::{Certificate, Connection, close_reason::CloseReason};
use crate::{
    access::{Failure, Identity, log_refusal},
    dispatch::EXPIRED,
    log::Limiter,
    server::peer::CloseRequest,
    system::Channel,
    transport::TlsFault,
    wire::Code,
};

impl Connection {
    /// The handshake is done: whom the certificate stands for. It was verified
    /// with the handshake, but not where a session was resumed.
    pub(crate) fn read_certificate(&mut self) {
        let by = self.listener.tls.as_ref().map(|tls| tls.load_full());
        let Some(by) = by.filter(|tls| tls.takes_certificates()) else {
            return;
        };
        match by.verify(self.shown()) {
            Ok(valid) => {
                let expires = valid.expires;
                let demanded = by.demands_certificate();
                self.certificate = Some(Certificate { by, expires });
                match valid.principal {
                    Some(principal) => {
                        self.authenticate_as(
                            self.common.access.certified(&self.identity, &principal),
                        );
                    }
                    None if demanded => {}
                    None => self.log_unusable_certificate("no-name"),
                }
            }
            Err(TlsFault::NoCertificate) if !by.demands_certificate() => {}
            Err(fault) if !by.demands_certificate() => {
                self.log_unusable_certificate(fault.as_str());
            }
            Err(fault) => {
                let Self {
                    common, identity, ..
                } = self;
                common.metrics.handshake_failures.add(fault.as_str());
                common.access.failed(identity, Failure::Certificate);
                self.is_not_authenticated();
            }
        }
    }

    /// Certificates are not demanded, so the peer may stay, but it will wonder
    /// why it has no rights.
    fn log_unusable_certificate(&self, reason: &str) {
        static LINES: Limiter = Limiter::new();
        if LINES.allows("client certificate not usable") {
            let (connection, peer) = (self.peer.number(), self.peer.address());
            tracing::warn!(security = "authentication", connection, %peer, reason, "client certificate not usable, the peer is anonymous");
        }
    }

    fn shown(&self) -> &[rustls::pki_types::CertificateDer<'static>] {
        let channel = self.channel.as_ref();
        channel
            .and_then(Channel::peer_certificates)
            .unwrap_or_default()
    }

    /// The peer has authenticated.
    pub(crate) fn authenticate_as(&mut self, identity: Identity) {
        let (connection, principal) = (self.peer.number(), &*identity.principal.name);
        tracing::debug!(connection, principal, "authenticated");
        self.set_identity(identity);
        self.checked = self.machine.arrived();
        self.permit.authenticated();
        self.machine.authenticated();
    }

    /// A message is about to be served: rights are those of the moment, and
    /// whoever serves it sees whether the credentials are still valid.
    #[inline]
    pub(crate) fn update_identity(&mut self) {
        if let Some(current) = self.common.access.current(&self.identity) {
            self.set_identity(current);
        }
        let now = self.machine.arrived();
        if self.certificate.is_some() {
            self.verify_if_changed(now);
        }
        if self.is_too_old(now) {
            self.peer.request_close(CloseRequest::TOO_OLD);
        }
    }

    fn verify_if_changed(&mut self, now: Instant) {
        let Some(Certificate { by, expires }) = &self.certificate else {
            return;
        };
        let present = self.listener.tls.as_ref().map(|tls| tls.load());
        let same = present.is_some_and(|present| Arc::ptr_eq(&present, by));
        if !same || expires.is_some_and(|expires| expires <= now) {
            self.verify_certificate();
        }
    }

    fn verify_certificate(&mut self) {
        let Some(by) = self.listener.tls.as_ref().map(|tls| tls.load_full()) else {
            return;
        };
        match by.verify(self.shown()) {
            Ok(valid) => {
                let expires = valid.expires;
                self.certificate = Some(Certificate { by, expires });
            }
            Err(_) => self.set_identity(self.identity.with_invalid_certificate()),
        }
    }

    pub(crate) fn set_identity(&mut self, identity: Identity) {
        self.peer.settle(&self.common.metrics.usages);
        self.identity = Arc::new(identity);
        self.peer.set_identity(Arc::clone(&self.identity));
    }

    /// Whether the peer's credentials still hold; it ends where they do not.
    pub(crate) fn is_authenticated(&mut self) -> bool {
        let holds = !self.identity.is_invalid();
        if !holds {
            self.is_not_authenticated();
        }
        holds
    }

    fn is_not_authenticated(&mut self) {
        self.common.metrics.auth_failures.add("expired");
        log_refusal(&self.identity, EXPIRED);
        self.close_with(CloseReason::Notice(Code::Unauthorized, EXPIRED.into()));
    }

    fn is_too_old(&self, now: Instant) -> bool {
        self.common
            .settings
            .config
            .connection_max_age
            .unless_zero()
            .is_some_and(|most| now.saturating_duration_since(self.peer.since()) >= most)
    }

    /// When the peer is to be looked after although it is silent.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        if self.machine.close_reason().is_some() {
            return None;
        }
        let config = &self.common.settings.config;
        let known = self.identity.is_authenticated() || self.certificate.is_some();
        let credentials = known.then(|| self.checked + config.keep_alive_within());
        let most = config.connection_max_age.unless_zero();
        let most = most.filter(|_| self.peer.close_request().is_none());
        let age = most.and_then(|most| self.peer.since().checked_add(most));
        credentials.into_iter().chain(age).min()
    }

    /// Whether a silent peer may stay.
    pub(crate) fn check(&mut self, now: Instant) {
        if self.next_check().is_none_or(|at| at > now) {
            return;
        }
        let within = self.common.settings.config.keep_alive_within();
        if now.saturating_duration_since(self.checked) >= within {
            self.checked = now;
            if self.certificate.is_some() {
                self.verify_certificate();
            }
        }
        if self.is_authenticated() && self.is_too_old(now) {
            self.peer.request_close(CloseRequest::TOO_OLD);
        }
    }
}
