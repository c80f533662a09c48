//! `mb-server inspect`: what a component says of itself.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Exit, Result, call::print, failure, printable, serve, serving, usage};
use crate::{
    budget::Budget,
    catalog::{
        FileError, LoadSettings, MAX_SIZE, Service, ServicePolicies, breaks, digest_of,
        fingerprint, load_file, may_break,
    },
    config::{Config, MemoryPlan},
    files,
    host::grant_for,
    log::Format,
    sandbox::{
        Ahead, CompileWorker, CompilerConfig, Head, LoadError, Precompiled, Sandbox, Sections,
        is_machine_code,
    },
    scheduler::Scheduler,
};

/// Print what a component says of itself, what it imports, its size and digest
///
/// Shows schemas, the grants that imports need, sizes by section, and the time
/// to compile. Of a .cwasm it prints the header and runs nothing. Exit codes: 0
/// the server would serve it, grants apart; 1 it would not, with size, digest
/// and the reason; or, with --against, it would break callers and its version
/// does not say so.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The component
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// An older version: report what would break its callers
    #[arg(long, value_name = "OLD.wasm")]
    against: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    serve::start_log("warn", Format::Text)?;
    if let Some(old) = &arguments.against
        && let Some(machine) = [&arguments.file, old]
            .into_iter()
            .find(|file| is_machine_code(file))
    {
        return Err(usage(format!(
            "{} is machine code, which says nothing unless it is run: compare the .wasm files",
            machine.display()
        )));
    }
    if is_machine_code(&arguments.file) {
        return show_head(&arguments.file);
    }
    let inspector = Inspector::new()?;
    let service = inspector.load(&arguments.file)?;
    match &arguments.against {
        Some(old) => compare(&inspector.load(old)?, &service),
        None => inspector.show(&service),
    }
}

/// A sandbox that grants everything, and calls nothing but `describe`.
pub(super) struct Inspector {
    sandbox: Arc<Sandbox>,
    worker: CompileWorker,
    settings: LoadSettings,
}

impl Inspector {
    pub(super) fn new() -> Result<Self> {
        let config = Config {
            max_connections: 1,
            ..Config::default()
        };
        let policy = ServicePolicies::new(&config, None, Scheduler::new(1)).for_inspection();
        let memory = Budget::new(MemoryPlan::of(&config).shared);
        let worker = serving::compile_worker();
        let compiler = CompilerConfig {
            worker: Some(worker.clone()),
            ..CompilerConfig::default()
        };
        let sandbox = serving::sandbox_config(&config, &policy, &memory, compiler);
        let sandbox = Sandbox::new(sandbox).map_err(|e| failure(format!("{e:#}")))?;
        let settings = LoadSettings {
            dir: PathBuf::new(),
            policy,
        };
        Ok(Self {
            sandbox,
            worker,
            settings,
        })
    }

    pub(super) fn load(&self, file: &Path) -> Result<Service> {
        load_file(&self.sandbox, &self.settings, file).map_err(|error| refuse(file, &error))
    }

    /// Compiles a file ahead of time.
    pub(super) fn precompile(&self, bytes: &[u8], ahead: Ahead) -> Result<Vec<u8>, LoadError> {
        self.worker.precompile(bytes, ahead)
    }

    fn show(&self, service: &Service) -> Result {
        let mut text = String::new();
        let description = &service.description;
        text += &row("name", &description.name);
        text += &row("version", &description.version.to_string());
        text += &row("description", &description.description);
        for (index, action) in description.actions.iter().enumerate() {
            let title = if index == 0 { "actions" } else { "" };
            text += &row(title, &format!("{}  {}", action.name, action.description));
            for (word, schema) in [("takes", &action.input), ("answers", &action.output)] {
                if let Some(schema) = schema {
                    text += &row("", &format!("  {word} {schema}"));
                }
            }
        }
        let imports = service.component.imports();
        for (index, import) in imports.iter().enumerate() {
            let title = if index == 0 { "imports" } else { "" };
            let needs = grant_for(import)
                .map(|grant| format!("  needs the grant {grant}"))
                .unwrap_or_default();
            text += &row(title, &format!("{import}{needs}"));
        }
        if imports.is_empty() {
            text += &row("imports", "nothing");
        }
        text += &row("kind", kind(service.component.was_wrapped()));
        text += &row(
            "memory",
            &format!(
                "{} KiB when an instance begins",
                service.component.first_memory() / 1024
            ),
        );
        let each = match service.component.fresh_reason() {
            None => "finds an instance that was reset after the call before".to_owned(),
            Some(reason) => format!("gets an instance of its own, because {reason}"),
        };
        text += &row("each call", &each);
        let code = service.component.code();
        text += &row(
            "size",
            &format!(
                "{} bytes: {}",
                service.size,
                parts(service.size, code.sections)
            ),
        );
        let kib = code.size / 1024;
        let compiled = match code.took {
            Some(took) => format!(
                "to {kib} KiB, in {} ms; cached for the next start",
                took.as_millis()
            ),
            None => format!("to {kib} KiB, taken from the cache"),
        };
        text += &row("compiled", &compiled);
        text += &row("digest", &service.digest);
        print(text.as_bytes(), b"")
    }
}

/// Prints what the head of a file of machine code says. Nothing of it is run.
fn show_head(file: &Path) -> Result {
    let name = printable(&file.display().to_string());
    let wrong = |error: &dyn std::fmt::Display| failure(format!("{name}: {error}"));
    let bytes = File::open(file).and_then(|opened| files::read_bounded(opened, MAX_SIZE));
    let bytes = bytes.map_err(|error| wrong(&error))?;
    let (head, code) = Head::read(&bytes).map_err(|error| wrong(&error))?;
    let mut text = row("file", &name);
    text += &row("kind", "machine code");
    text += &row(
        "compiled",
        &format!(
            "ahead of time, for mb-server {} on {}",
            head.server, head.arch
        ),
    );
    text += &row(
        "made from",
        &format!("{}, {}", head.component, kind(head.wrapped)),
    );
    text += &row(
        "its size",
        &format!("{} bytes: {}", head.size, parts(head.size, head.sections)),
    );
    text += &row(
        "each call",
        &match &head.reset {
            Ok(_) => "can find an instance that was reset after the call before".to_owned(),
            Err(reason) => format!("gets an instance of its own, because {reason}"),
        },
    );
    text += &row(
        "size",
        &format!("{} bytes, {} of them code", bytes.len(), code.len()),
    );
    text += &row("digest", &digest_of(&bytes));
    print(text.as_bytes(), b"")?;
    Precompiled::of(&bytes).map_err(|error| wrong(&error))?;
    Ok(Exit::Success)
}

fn kind(wrapped: bool) -> &'static str {
    if wrapped {
        "core module, turned into a component"
    } else {
        "component"
    }
}

fn parts(size: u64, sections: Sections) -> String {
    let Sections { code, data, custom } = sections;
    let rest = size.saturating_sub(code + data + custom);
    format!("{code} code, {data} data, {custom} names and other custom sections, {rest} rest")
}

/// Tells what the newer of two would break.
fn compare(old: &Service, new: &Service) -> Result {
    let (before, now) = (&old.description, &new.description);
    let found = breaks(before, now);
    let title = format!("{} {} against {}", now.name, now.version, before.version);
    if found.is_empty() {
        let text = format!("{}: nothing breaks its callers\n", printable(&title));
        return print(text.as_bytes(), b"");
    }
    let lines: String = found
        .iter()
        .map(|line| format!("  {}\n", printable(line)))
        .collect();
    let text = format!("{} breaks its callers:\n{lines}", printable(&title));
    print(text.as_bytes(), b"")?;
    if may_break(before, now) {
        return print(
            b"its version says so: callers of the old one are not routed to it\n",
            b"",
        );
    }
    let next = if before.version.major == 0 {
        format!("0.{}.0", before.version.minor + 1)
    } else {
        format!("{}.0.0", before.version.major + 1)
    };
    Err(failure(format!(
        "callers of {} would be routed to {}: call it {next}, or mend the above",
        before.version, now.version
    )))
}

/// Of a file that would not be served: what can be known of it, and why.
fn refuse(file: &Path, error: &FileError) -> (Exit, String) {
    let name = file.display().to_string();
    if let Ok((size, digest)) = fingerprint(file) {
        let mut text = row("file", &name) + &row("size", &format!("{size} bytes"));
        if let Some(digest) = digest {
            text += &row("digest", &digest);
        }
        // The reason is what matters.
        let _ = print(text.as_bytes(), b"");
    }
    failure(format!(
        "{}: {}",
        printable(&name),
        printable(&error.to_string())
    ))
}

fn row(title: &str, value: &str) -> String {
    format!("{title:11}  {}\n", printable(value))
}
