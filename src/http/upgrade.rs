//! The handshake of WebSocket (RFC 6455 section 4.2).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha1::{Digest as _, Sha1};

use super::{head::tokens, response::Refusal};
use crate::wire::Code;

/// The subprotocol: messages of the wire protocol, without frame headers.
pub(super) const SUBPROTOCOL: &str = "mb.v1";

/// What every handshake joins to its key.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// An upgrade that may be answered with 101.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// Sec-WebSocket-Accept.
    pub accept: Box<str>,
    /// The client knows the subprotocol, so the response names it.
    pub names_subprotocol: bool,
}

/// The fields of a handshake.
#[derive(Debug, Default)]
pub(super) struct Handshake<'a> {
    /// Connection has `upgrade`.
    pub(super) is_upgrade: bool,
    /// Upgrade has `websocket`.
    pub(super) is_websocket: bool,
    pub(super) key: Option<&'a str>,
    pub(super) version: Option<&'a str>,
    pub(super) names_subprotocol: bool,
}

impl Handshake<'_> {
    pub(super) fn offers(&mut self, subprotocols: &[u8]) {
        self.names_subprotocol |= tokens(subprotocols).any(|name| name == SUBPROTOCOL.as_bytes());
    }

    /// Checks them.
    ///
    /// # Errors
    /// 426 where no WebSocket of version 13 is asked for, 400 for a wrong key.
    pub(super) fn check(&self) -> Result<Upgrade, Refusal> {
        if !self.is_upgrade || !self.is_websocket || self.version != Some("13") {
            let message = "this path takes WebSocket, version 13";
            return Err(Refusal::with_status(426, Code::InvalidRequest, message));
        }
        let bytes = self.key.and_then(|key| STANDARD.decode(key).ok());
        let Some(key) = self
            .key
            .filter(|_| bytes.is_some_and(|bytes| bytes.len() == 16))
        else {
            let message = "Sec-WebSocket-Key must be 16 bytes in base64";
            return Err(Refusal::new(Code::InvalidRequest, message));
        };
        let digest = Sha1::new().chain_update(key).chain_update(GUID).finalize();
        Ok(Upgrade {
            accept: STANDARD.encode(digest).into(),
            names_subprotocol: self.names_subprotocol,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_rfc() {
        let handshake = Handshake {
            is_upgrade: true,
            is_websocket: true,
            key: Some("dGhlIHNhbXBsZSBub25jZQ=="),
            version: Some("13"),
            names_subprotocol: false,
        };
        let accept = &*handshake.check().unwrap().accept;
        assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
