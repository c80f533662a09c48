//! From a service's name to the policy that it runs under.

use std::sync::Arc;

use crate::{
    config::{
        Bytes, Config, MemoryPlan, ServiceSettings, Services,
        services::{Disabled, settings_of},
    },
    host::{GrantError, Granted},
    sandbox::ComponentPolicy,
    scheduler::Scheduler,
    store::Store,
    wire::Version,
};

/// What the operator settled for services, whoever they are.
#[derive(Clone)]
pub struct ServicePolicies {
    services: Services,
    /// Linear memory of an instance of a service whose settings name none.
    default_memory: Bytes,
    max_message_size: usize,
    /// Of durable values, where any service is granted them.
    store: Option<Arc<Store>>,
    scheduler: Arc<Scheduler>,
    /// Components are only looked at: all imports are linked, none is served.
    inspects: bool,
}

impl ServicePolicies {
    /// What the settings say.
    #[must_use]
    pub fn new(config: &Config, store: Option<Arc<Store>>, scheduler: Arc<Scheduler>) -> Self {
        Self {
            services: config.services.clone(),
            default_memory: MemoryPlan::of(config).default_instance(),
            max_message_size: config.max_message_size.0,
            store,
            scheduler,
            inspects: false,
        }
    }

    /// What other settings say, with the same store.
    ///
    /// # Errors
    /// If they grant durable values and there is no store yet.
    pub(super) fn renewed(&self, config: &Config) -> Result<Self, String> {
        let stored = |service: &ServiceSettings| service.grants.keyvalue == Some(true);
        if self.store.is_none() && config.services.values().any(stored) {
            return Err(
                "grants.keyvalue is the first one, and the store is opened at the start: restart"
                    .into(),
            );
        }
        Ok(Self {
            services: config.services.clone(),
            ..self.clone()
        })
    }

    /// The same for components that are only looked at.
    #[must_use]
    pub fn for_inspection(mut self) -> Self {
        self.inspects = true;
        self
    }

    /// The settings of one service.
    #[must_use]
    pub fn settings(&self, name: &str) -> ServiceSettings {
        settings_of(&self.services, name)
    }

    /// Whether the settings switch off this version of a service.
    #[must_use]
    pub fn is_disabled(&self, name: &str, version: Version) -> bool {
        match self.settings(name).disabled {
            Disabled::All(all) => all,
            Disabled::Versions(versions) => versions.contains(&version.to_string()),
        }
    }

    /// Linear memory of the largest instance that any service may have.
    #[must_use]
    pub fn largest_instance(&self) -> usize {
        let own = self.services.values().filter_map(|service| service.memory);
        own.chain([self.default_memory])
            .map(|memory| memory.0)
            .max()
            .unwrap_or_default()
    }

    /// The policy for the file of a service that has this digest.
    ///
    /// # Errors
    /// If its grants are not available.
    pub fn component_policy(
        &self,
        name: &str,
        digest: &str,
    ) -> Result<ComponentPolicy, GrantError> {
        let settings = self.settings(name);
        let granted = match self.inspects {
            true => Granted::for_inspection(name),
            false => {
                let weight = f64::from(settings.weight);
                let cpu = settings.cpu.bound();
                let account = self.scheduler.service(name, weight, cpu);
                Granted::new(name, &settings, digest, self.store.as_ref(), Some(account))?
            }
        };
        Ok(ComponentPolicy {
            memory: settings.memory.unwrap_or(self.default_memory).0,
            answer_size: self.max_message_size,
            granted: Arc::clone(&granted),
            settings,
        })
    }
}
