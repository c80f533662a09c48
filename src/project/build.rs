//! From sources to one component.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use figment::{
    Figment,
    providers::{Format as _, Json, Toml},
};
use serde::Deserialize;

use super::{
    Language, Project, ProjectError,
    python::{ENTRY, pack},
    tools::{TARGET, build_js, cargo, componentize_py, finish, run, run_quietly},
};
use crate::{files, sandbox::componentize};

/// The world of a project's own, in `wit/world.wit`.
const WORLD: &str = "local:service/app";

/// What a component is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To be deployed: small and quick.
    Release,
    /// To be tried at once: built quickly, with names in backtraces.
    Dev,
}

/// A component that was built.
#[derive(Debug, Clone)]
pub struct Built {
    /// Its file.
    pub file: PathBuf,
    /// Bytes of it.
    pub size: u64,
    /// How long it took.
    pub took: Duration,
}

/// Builds a project; leaves one component in its [output](Project::output) and
/// other files there as they are. What the tools say goes to standard error,
/// what is done beside to `say`.
///
/// # Errors
/// A tool is missing, which is said with how to get it; or it failed.
pub fn build(project: &Project, kind: Kind, say: &dyn Fn(&str)) -> Result<Built, ProjectError> {
    let begun = Instant::now();
    let output = project.output(kind);
    let name = name(project)?;
    let bytes = match project.language {
        Language::Rust => rust(&project.dir, kind)?,
        Language::JavaScript | Language::TypeScript => javascript(&project.dir, &output, say)?,
        Language::Python => python(&project.dir, &output, say)?,
    };
    let bytes = componentize(&bytes).map_err(|error| ProjectError::Failed(error.to_string()))?;
    let file = output.join(format!("{name}.wasm"));
    // Under its name only once it is whole: a server may follow the folder.
    let written =
        fs::create_dir_all(&output).and_then(|()| files::replace(&file, files::ORDINARY, &bytes));
    written.map_err(|error| ProjectError::file(&file, &error))?;
    Ok(Built {
        file,
        size: bytes.len() as u64,
        took: begun.elapsed(),
    })
}

/// What cargo says of one thing that it built.
#[derive(Deserialize)]
struct Artifact {
    #[serde(default)]
    filenames: Vec<PathBuf>,
    #[serde(default)]
    manifest_path: PathBuf,
}

fn rust(dir: &Path, kind: Kind) -> Result<Vec<u8>, ProjectError> {
    let mut command = cargo(dir)?;
    command.args([
        "--target",
        TARGET,
        "--message-format",
        "json-render-diagnostics",
    ]);
    if kind == Kind::Release {
        command.arg("--release");
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output();
    let (status, stdout) = match output {
        Ok(output) => (Ok(output.status), output.stdout),
        Err(error) => (Err(error), Vec::new()),
    };
    finish("cargo build", command.get_program(), status)?;
    let manifest = dir.join(Language::Rust.manifest_name());
    let artifacts = String::from_utf8_lossy(&stdout);
    let mut built = artifacts
        .lines()
        .filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let component = built.find_map(|artifact| {
        let is_wasm = |file: &PathBuf| {
            file.extension()
                .is_some_and(|extension| extension == "wasm")
        };
        let file = artifact.filenames.into_iter().find(is_wasm)?;
        (artifact.manifest_path == manifest).then_some(file)
    });
    let file = component.ok_or_else(|| {
        ProjectError::Failed(
            "cargo built no WebAssembly: Cargo.toml wants [lib] crate-type = [\"cdylib\"]".into(),
        )
    })?;
    fs::read(&file).map_err(|error| ProjectError::file(&file, &error))
}

/// What the manifest of a project calls it.
pub(super) fn name(project: &Project) -> Result<String, ProjectError> {
    let manifest = project.dir.join(project.language.manifest_name());
    let (read, key) = match project.language {
        Language::Rust => (Figment::from(Toml::file_exact(&manifest)), "package.name"),
        Language::Python => (Figment::from(Toml::file_exact(&manifest)), "project.name"),
        Language::JavaScript | Language::TypeScript => {
            (Figment::from(Json::file_exact(&manifest)), "name")
        }
    };
    read.extract_inner(key)
        .map_err(|error| ProjectError::file(&manifest, &error))
}

// Both tools could leave out WASI, which their runtimes bring, but would then
// leave out all that is called `wasi:`, as the log; and the server has it.

fn javascript(dir: &Path, output: &Path, say: &dyn Fn(&str)) -> Result<Vec<u8>, ProjectError> {
    let mut command = build_js(dir, say)?;
    // What it says is of use where it succeeds too: esbuild warns.
    with_output(output, |out| {
        run("the build", command.arg(out).current_dir(dir))
    })
}

fn python(dir: &Path, output: &Path, say: &dyn Fn(&str)) -> Result<Vec<u8>, ProjectError> {
    let tool = componentize_py(dir, say)?;
    let packed = pack(dir, say)?;
    let mut command = Command::new(tool);
    // It would add the packages of whatever Python is in PATH.
    command
        .env("VIRTUAL_ENV", &packed.dir)
        .env_remove("PYTHONPATH");
    command.args(["--wit-path", "wit", "--world", WORLD, "componentize"]);
    command.args([ENTRY, "--python-path", "."]);
    command.current_dir(dir).arg("-o");
    with_output(output, |out| {
        run_quietly("componentize-py", command.arg(out))
    })
    .map_err(|error| packed.explain(error))
}

/// Has a tool make a component, and takes it.
fn with_output(
    output: &Path,
    make: impl FnOnce(&Path) -> Result<(), ProjectError>,
) -> Result<Vec<u8>, ProjectError> {
    let out = output.join(".new.wasm");
    fs::create_dir_all(output).map_err(|error| ProjectError::file(&out, &error))?;
    make(&out)?;
    let bytes = fs::read(&out).map_err(|error| ProjectError::file(&out, &error))?;
    let _ = fs::remove_file(&out);
    Ok(bytes)
}
