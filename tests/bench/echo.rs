//! The service `echo` in this process, without network.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use mb_server::{
    budget::Budget,
    catalog::{LoadSettings, Service, ServicePolicies, load_file},
    config::{Config, Isolation, MemoryPlan, ServiceSettings},
    host::{Context, Unwatched},
    sandbox::{Call, CompilerConfig, Sandbox, SandboxConfig, ServiceAnswer},
    scheduler::Scheduler,
    wire::Payload,
};

/// Its component, loaded.
pub struct Echo(Service);

impl Echo {
    /// With a pool of so many instances, or as many as the defaults give, and
    /// this folder of compiled code, or the user's.
    pub fn load(
        isolation: Isolation,
        instances: Option<usize>,
        cache_dir: Option<PathBuf>,
    ) -> Self {
        let mut config = Config::default();
        let settings = ServiceSettings {
            isolation,
            ..ServiceSettings::default()
        };
        config.services.insert("echo".into(), settings);
        let policy = ServicePolicies::new(&config, None, Scheduler::of_this_machine());
        let plan = MemoryPlan::of(&config);
        let sandbox = Sandbox::new(SandboxConfig {
            largest_instance: policy.largest_instance(),
            instances: instances.unwrap_or(plan.instances),
            memory: Budget::new(plan.shared),
            compiler: CompilerConfig {
                cache_dir,
                ..CompilerConfig::default()
            },
            call_depth: 1,
            verify_resets: config.verify_resets,
        })
        .expect("an engine");
        let settings = LoadSettings {
            dir: "services/dist".into(),
            policy,
        };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("services/dist/echo.wasm");
        Self(load_file(&sandbox, &settings, &file).expect("echo loads"))
    }

    /// One call of `say`.
    pub fn say(&self, payload: &str) -> ServiceAnswer {
        let call = Call {
            action: "say",
            payload: Payload::Json(payload),
            context: Context::of_loading(Instant::now() + Duration::from_secs(60)),
            watch: Arc::new(Unwatched),
        };
        self.0.component.call(call).result.expect("an answer")
    }
}
