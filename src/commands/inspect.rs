//! `mb-server inspect`: what a component says of itself.

use std::path::PathBuf;

use super::{Exit, Result, failure, serve};
use crate::{
    budget::Budget,
    catalog::{LoadSettings, Policy, load_file},
    config::{Config, MemoryPlan},
    sandbox::Sandbox,
};

/// Print what a component says of itself, what it imports, its size and digest
///
/// Exit codes: 0 the server would serve it, 1 it would not, and why.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The component
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    serve::start_log("warn")?;
    let config = Config { max_connections: 1, ..Config::default() };
    let policy = Policy::new(&config, None).for_inspection();
    let memory = Budget::new(MemoryPlan::of(&config).shared);
    let sandbox = serve::sandbox_config(&config, &policy, &memory);
    let sandbox = Sandbox::new(sandbox).map_err(|e| failure(format!("{e:#}")))?;
    let settings = LoadSettings {
        dir: PathBuf::new(),
        max_size: config.sandbox.max_component_size.0,
        describe_timeout: config.sandbox.describe_timeout.0,
        policy,
    };
    let file = arguments.file.display();
    let service = load_file(&sandbox, &settings, &arguments.file).map_err(|e| failure(format!("{file}: {e}")))?;
    let said = &service.description;
    println!("name         {}", said.name);
    println!("version      {}", said.version);
    println!("description  {}", said.description);
    for (index, action) in said.actions.iter().enumerate() {
        println!("{:11}  {}  {}", if index == 0 { "actions" } else { "" }, action.name, action.description);
    }
    let imports = service.component.imports();
    println!("imports      {}", if imports.is_empty() { "nothing".into() } else { imports.join(", ") });
    let kind = if service.component.was_wrapped() { "core module, turned into a component" } else { "component" };
    println!("kind         {kind}");
    println!("size         {} bytes", service.size);
    println!("digest       {}", service.digest);
    Ok(Exit::Success)
}
