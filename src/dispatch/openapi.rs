//! What a caller may call, as an OpenAPI document.

use std::collections::BTreeMap;

use super::{Core, Refusal};
use crate::{
    access::{Identity, NO_VERSION},
    http::{Operation, document},
    wire::Code,
};

impl Core {
    /// One operation an action: of the highest version that the caller may call,
    /// which its path names where its rights do.
    pub(super) fn openapi(&self, identity: &Identity) -> Result<String, Refusal> {
        let catalog = self.catalog.load();
        let (mut operations, mut last) = (BTreeMap::new(), None);
        for service in catalog.services() {
            let description = &service.description;
            let is_highest = last.replace(&description.name) != Some(&description.name);
            let version = description.version;
            for action in &description.actions {
                let topic = format!("{}.{}", description.name, action.name);
                let names_version = !(is_highest && identity.may_call(&topic, NO_VERSION));
                let asked = [version.major, version.minor, version.patch];
                if names_version && !identity.may_call(&topic, asked) {
                    continue;
                }
                let [input, output] = action.valid_schemas();
                operations.entry(topic).or_insert(Operation {
                    service: &description.name,
                    version,
                    names_version,
                    description: &action.description,
                    input,
                    output,
                });
            }
        }
        document(&operations, identity.is_authentication_required())
            .map_err(|error| Refusal::new(Code::InternalError, error.to_string()))
    }
}
