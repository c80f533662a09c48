//! `mb-server inspect`: what a component says of itself.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::{Exit, Result, failure, printable, serve};
use crate::{
    budget::Budget,
    catalog::{FileError, LoadSettings, Policy, fingerprint, load_file},
    config::{Config, MemoryPlan},
    sandbox::Sandbox,
};

/// Print what a component says of itself, what it imports, its size and digest
///
/// Exit codes: 0 the server would serve it, grants apart, 1 it would not: then file,
/// size and digest, and why.
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
    let service = match load_file(&sandbox, &settings, &arguments.file) {
        Ok(service) => service,
        Err(error) => return Err(refuse(&arguments.file, &settings, &error)),
    };
    let mut text = String::new();
    let said = &service.description;
    text += &row("name", &said.name);
    text += &row("version", &said.version.to_string());
    text += &row("description", &said.description);
    for (index, action) in said.actions.iter().enumerate() {
        let title = if index == 0 { "actions" } else { "" };
        text += &row(title, &format!("{}  {}", action.name, action.description));
    }
    let imports = service.component.imports();
    text += &row("imports", &if imports.is_empty() { "nothing".into() } else { imports.join(", ") });
    let wrapped = service.component.was_wrapped();
    text += &row("kind", if wrapped { "core module, turned into a component" } else { "component" });
    text += &row("size", &format!("{} bytes", service.size));
    text += &row("digest", &service.digest);
    print(&text)?;
    Ok(Exit::Success)
}

/// Of a file that would not be served: what can be known of it, and why.
fn refuse(file: &Path, settings: &LoadSettings, error: &FileError) -> (Exit, String) {
    let name = file.display().to_string();
    if let Ok((size, digest)) = fingerprint(file, settings.max_size) {
        let mut text = row("file", &name) + &row("size", &format!("{size} bytes"));
        if let Some(digest) = digest {
            text += &row("digest", &digest);
        }
        // The reason is what matters.
        let _ = print(&text);
    }
    failure(format!("{}: {}", printable(&name), printable(&error.to_string())))
}

fn row(title: &str, value: &str) -> String {
    format!("{title:11}  {}\n", printable(value))
}

/// A reader that has seen enough is no failure.
fn print(text: &str) -> std::result::Result<(), (Exit, String)> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(failure(error)),
        _ => Ok(()),
    }
}
