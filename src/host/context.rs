//! `mb:service/context`: what a service may ask about the call it serves.

use std::{sync::Arc, time::Instant};

use super::bindings::mb::service::context::Host;
use crate::wire::Version;

/// The connection that a call came over, as a service sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The server's id of the connection.
    pub connection_id: String,
    /// Who is asking, once somebody has shown who they are.
    pub principal: Option<String>,
    /// Whether the connection is encrypted.
    pub encrypted: bool,
}

/// One call, as the service may ask about it.
#[derive(Debug, Clone)]
pub struct Context {
    /// The caller's id of the request.
    pub request_id: Option<Box<str>>,
    /// The request that caused this one.
    pub parent_request_id: Option<Box<str>>,
    /// The version that the caller was written against; none while a
    /// component is loaded.
    pub requested_version: Option<Version>,
    /// Who is asking.
    pub caller: Arc<Caller>,
    /// When the call is stopped.
    pub deadline: Instant,
}

impl Host for Context {
    fn request_id(&mut self) -> Option<String> {
        self.request_id.as_deref().map(str::to_owned)
    }

    fn parent_request_id(&mut self) -> Option<String> {
        self.parent_request_id.as_deref().map(str::to_owned)
    }

    fn requested_version(&mut self) -> String {
        self.requested_version.map(|version| version.to_string()).unwrap_or_default()
    }

    fn principal(&mut self) -> Option<String> {
        self.caller.principal.clone()
    }

    fn connection_id(&mut self) -> String {
        self.caller.connection_id.clone()
    }

    fn encrypted(&mut self) -> bool {
        self.caller.encrypted
    }

    fn remaining_ms(&mut self) -> u64 {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX)
    }
}
