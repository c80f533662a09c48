//! `mb:service/context`: what a service may ask about the call it serves.

use std::{sync::Arc, time::Instant};

use super::{
    Host,
    bindings::mb::service::{context, types},
    calls::{CallChain, Calls},
};
use crate::wire::Version;

/// The connection that a call came over, as a service sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The server's id of the connection.
    pub connection_id: String,
    /// The authenticated principal, if any.
    pub principal: Option<String>,
    /// Whether the connection is encrypted.
    pub encrypted: bool,
}

/// One call, as the service may ask about it.
#[derive(Clone)]
pub struct Context {
    /// The caller's id of the request.
    pub request_id: Option<Arc<str>>,
    /// The request that caused this one.
    pub parent_request_id: Option<Arc<str>>,
    /// The version that the caller was written against; none while a
    /// component is loaded.
    pub requested_version: Option<Version>,
    /// The principal.
    pub caller: Arc<Caller>,
    /// When the call is stopped.
    pub deadline: Instant,
    /// When it began.
    pub began: Instant,
    /// Who serves the calls that this one makes.
    pub calls: Option<Arc<dyn Calls>>,
    /// The services that this call came through.
    pub chain: Option<Arc<CallChain>>,
}

impl Context {
    /// For a component that is loaded: nobody calls.
    #[must_use]
    pub fn of_loading(deadline: Instant) -> Self {
        Self::without_caller(Arc::default(), deadline)
    }

    pub(super) fn without_caller(caller: Arc<Caller>, deadline: Instant) -> Self {
        Self {
            request_id: None,
            parent_request_id: None,
            requested_version: None,
            caller,
            deadline,
            began: deadline,
            calls: None,
            chain: None,
        }
    }
}

impl Context {
    /// How many services this call came through.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.chain.as_ref().map_or(0, |link| link.depth())
    }
}

impl types::Host for Host {}

impl context::Host for Host {
    fn request_id(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.context.request_id.as_deref().map(str::to_owned))
    }

    fn parent_request_id(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.context.parent_request_id.as_deref().map(str::to_owned))
    }

    fn requested_version(&mut self) -> wasmtime::Result<String> {
        Ok(self
            .context
            .requested_version
            .map(|version| version.to_string())
            .unwrap_or_default())
    }

    fn principal(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.context.caller.principal.clone())
    }

    fn connection_id(&mut self) -> wasmtime::Result<String> {
        Ok(self.context.caller.connection_id.clone())
    }

    fn encrypted(&mut self) -> wasmtime::Result<bool> {
        Ok(self.context.caller.encrypted)
    }

    fn remaining_ms(&mut self) -> wasmtime::Result<u64> {
        let remaining = self
            .context
            .deadline
            .saturating_duration_since(Instant::now());
        Ok(u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX))
    }
}
