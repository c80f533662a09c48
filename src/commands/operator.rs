//! What the admin endpoint may do to a running server.

use std::sync::Arc;

use super::edge::Edge;
use crate::{admin::Commands, catalog::LiveCatalog, wire::Version};

/// The hands of the operator.
pub(super) struct Operator {
    pub(super) catalog: Arc<LiveCatalog>,
    pub(super) edge: Arc<Edge>,
}

impl Commands for Operator {
    fn reload(&self) -> Result<Vec<String>, String> {
        self.catalog.reload().map_err(|error| format!("the services folder can't be read: {error}"))
    }

    fn reload_tls(&self) -> Result<(), String> {
        self.edge.reload_tls()
    }

    fn rollback(&self, service: &str, version: Option<&str>) -> Result<String, String> {
        self.catalog.rollback(service, parse(version)?)
    }

    fn switch(&self, service: &str, version: Option<&str>, on: bool) -> Result<String, String> {
        self.catalog.switch(service, parse(version)?, on)
    }
}

fn parse(version: Option<&str>) -> Result<Option<Version>, String> {
    version.map(|text| text.parse().map_err(|_| format!("{text:?} is no version, as 1.2.0 is"))).transpose()
}
