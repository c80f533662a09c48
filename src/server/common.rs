//! What all connections of the server share.

use std::sync::Arc;

use super::{
    by_address::ByAddress, drain::DrainFlags, peer::Peer, running::RunningCalls,
    settings::ServerSettings,
};
use crate::{
    access::{Access, Identity},
    log::{AUDIT, Limiter},
    metrics::Metrics,
    system::Linger,
    wire::{Code, ErrorBody, Header},
};

/// See the module.
pub(crate) struct Common {
    pub(crate) settings: Arc<ServerSettings>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Arc<Access>,
    pub(crate) drain: Arc<DrainFlags>,
    pub(crate) linger: Linger,
    pub(crate) handshakes: Arc<ByAddress>,
    /// Calls that take long.
    pub(crate) running: Arc<RunningCalls>,
}

impl Common {
    /// A request was answered with an ERROR.
    pub(crate) fn note_error(
        &self,
        peer: &Peer,
        identity: &Identity,
        header: Option<&Header<'_>>,
        code: Option<Code>,
        body: &ErrorBody<'_>,
    ) {
        self.metrics.count_error(code);
        let request_id = header.and_then(|header| header.request_id).unwrap_or("-");
        static LINES: Limiter = Limiter::audit();
        // A peer that asks for what its rights do not cover may be probing.
        if code == Some(Code::Forbidden) && LINES.allows("forbidden") {
            tracing::warn!(
                target: AUDIT,
                security = "rights",
                connection = peer.number(),
                peer = %peer.address(),
                principal = &*identity.principal.name,
                topic = header.map_or("-", |header| header.topic.as_str()),
                request_id,
                "forbidden: {}", body.message
            );
        }
        tracing::debug!(
            connection = peer.number(),
            request_id,
            code = %body.code,
            "answered with an error: {}",
            body.message
        );
    }
}
