//! What a peer has shown of itself, held against the present state: before
//! each message, as far as that is cheap, and at least once in each keep-alive
//! interval as a whole. And the age of its connection.

use std::{sync::Arc, time::Instant};

use super::{End, Session};
use crate::{
    access::{Failure, Identity, log_refusal},
    dispatch::ENDED,
    log::Limiter,
    server::connection::Farewell,
    transport::{ServerTls, TlsFault},
    wire::Code,
};

/// A certificate that was valid when it was last verified.
#[derive(Clone)]
pub(super) struct Certificate {
    /// The CAs and revocation lists that it was verified with.
    by: Arc<ServerTls>,
    expires: Option<Instant>,
}

impl Session {
    /// The handshake is done: whom the certificate stands for. It was verified
    /// with the handshake, but not where a session was resumed.
    pub(super) fn read_certificate(&mut self) -> Result<(), End> {
        let Some(by) = self.tls.clone().filter(|tls| tls.takes_certificates()) else {
            return Ok(());
        };
        let shown = self.connection.stream().peer_certificates();
        match by.verify(shown.as_deref().unwrap_or_default()) {
            Ok(valid) => {
                let expires = valid.expires;
                let demanded = by.demands_certificate();
                self.certificate = Some(Certificate { by, expires });
                match valid.principal {
                    Some(principal) => {
                        self.is_now(self.shared.access.certified(&self.identity, &principal));
                    }
                    None if demanded => {}
                    None => self.log_unusable_certificate("no-name"),
                }
                Ok(())
            }
            Err(TlsFault::NoCertificate) if !by.demands_certificate() => Ok(()),
            Err(fault) if !by.demands_certificate() => {
                self.log_unusable_certificate(fault.as_str());
                Ok(())
            }
            Err(fault) => {
                let metrics = &self.shared.metrics;
                metrics.handshake_failures.add(fault.as_str());
                self.shared
                    .access
                    .failed(&self.identity, Failure::Certificate);
                Err(self.not_authenticated())
            }
        }
    }

    /// Certificates are not demanded, so the peer may stay, but it will wonder
    /// why it has no rights.
    fn log_unusable_certificate(&self, reason: &str) {
        static LINES: Limiter = Limiter::new();
        if LINES.allows("client certificate not usable") {
            let (connection, peer) = (self.connection.number(), self.connection.peer());
            tracing::warn!(security = "authentication", connection, %peer, reason, "client certificate not usable, the peer is anonymous");
        }
    }

    /// A message is about to be served: rights are those of the moment, and
    /// whoever serves it sees whether the credentials have ended.
    #[inline]
    pub(super) fn update_identity(&mut self) {
        if let Some(current) = self.shared.access.current(&self.identity) {
            self.set_identity(current);
        }
        if self.certificate.is_some() {
            self.verify_if_changed(self.active);
        }
        if self.is_too_old(self.active) {
            self.connection.retire(Farewell::TOO_OLD);
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
        let shown = self.connection.stream().peer_certificates();
        match by.verify(shown.as_deref().unwrap_or_default()) {
            Ok(valid) => {
                let expires = valid.expires;
                self.certificate = Some(Certificate { by, expires });
            }
            Err(_) => self.set_identity(self.identity.ended()),
        }
    }

    pub(super) fn set_identity(&mut self, identity: Identity) {
        self.identity = Arc::new(identity.clone());
        self.connection.is_now(identity);
    }

    /// A peer whose credentials have ended is told so.
    pub(super) fn still_authenticated(&self) -> Result<(), End> {
        if self.identity.has_ended() {
            return Err(self.not_authenticated());
        }
        Ok(())
    }

    fn not_authenticated(&self) -> End {
        self.shared.metrics.auth_failures.add("ended");
        log_refusal(&self.identity, ENDED);
        End::Notice(Code::Unauthorized, ENDED.into())
    }

    fn is_too_old(&self, now: Instant) -> bool {
        self.shared
            .settings
            .connection_max_age
            .is_some_and(|most| now.saturating_duration_since(self.connection.begun()) >= most)
    }

    /// Whether a silent peer is to be told something before it has been silent
    /// for too long.
    pub(super) fn is_expired(&self, now: Instant) -> bool {
        self.identity.has_ended() || self.is_too_old(now)
    }

    /// When a thread that waits for a silent peer looks after it the next time.
    pub(super) fn next_check(&self) -> Option<Instant> {
        let settings = &self.shared.settings;
        let known = self.identity.is_known() || self.certificate.is_some();
        let credentials = known.then(|| self.checked + settings.keep_alive_interval);
        let most = settings.connection_max_age;
        let age = most.and_then(|most| self.connection.begun().checked_add(most));
        credentials.into_iter().chain(age).min()
    }

    /// Before a thread waits: whether the peer may stay.
    pub(super) fn check(&mut self) -> Result<(), End> {
        if self.next_check().is_none() {
            return Ok(());
        }
        let now = Instant::now();
        if now.saturating_duration_since(self.checked) >= self.shared.settings.keep_alive_interval {
            self.checked = now;
            if self.certificate.is_some() {
                self.verify_certificate();
            }
        }
        self.still_authenticated()?;
        if self.is_too_old(now) {
            self.connection.retire(Farewell::TOO_OLD);
            let closes = self.connection.phase().close();
            return Err(if closes {
                End::Farewell(Farewell::TOO_OLD)
            } else {
                End::Told
            });
        }
        Ok(())
    }
}
