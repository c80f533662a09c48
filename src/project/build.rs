//! From sources to one component.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use figment::{
    Figment,
    providers::{Format as _, Toml},
};
use serde::Deserialize;

use super::{
    Language, OUTPUT, Project, ProjectError,
    tools::{TARGET, cargo, componentize_js, componentize_py, finish, run_quietly},
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

/// Builds a project; leaves one component in its folder `dist`. What the
/// tools say goes to standard error, what is done beside to `say`.
///
/// # Errors
/// A tool is missing, which is said with how to get it; or it failed.
pub fn build(project: &Project, kind: Kind, say: &dyn Fn(&str)) -> Result<Built, ProjectError> {
    let begun = Instant::now();
    let (name, bytes) = match project.language {
        Language::Rust => rust(&project.dir, kind)?,
        Language::JavaScript => javascript(&project.dir, say)?,
        Language::Python => python(&project.dir, say)?,
    };
    let bytes = componentize(&bytes).map_err(|error| ProjectError::Failed(error.to_string()))?;
    let output = project.output();
    let file = output.join(format!("{name}.wasm"));
    // Under its name only once it is whole: a server may follow the folder.
    let written = fs::create_dir_all(&output)
        .and_then(|()| remove_others(&output, &file))
        .and_then(|()| files::replace(&file, files::ORDINARY, &bytes));
    written.map_err(|error| ProjectError::file(&file, &error))?;
    Ok(Built {
        file,
        size: bytes.len() as u64,
        took: begun.elapsed(),
    })
}

/// One component: what was built under another name goes.
fn remove_others(output: &Path, file: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(output)? {
        let path = entry?.path();
        if path != file
            && path
                .extension()
                .is_some_and(|extension| extension == "wasm")
        {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// What cargo says of one thing that it built.
#[derive(Deserialize)]
struct Artifact {
    #[serde(default)]
    filenames: Vec<PathBuf>,
    #[serde(default)]
    manifest_path: PathBuf,
}

fn rust(dir: &Path, kind: Kind) -> Result<(String, Vec<u8>), ProjectError> {
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
    let manifest = dir.join(Language::Rust.mark());
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
    let package: Manifest = read_toml(&manifest)?;
    let bytes = fs::read(&file).map_err(|error| ProjectError::file(&file, &error))?;
    Ok((package.package.name, bytes))
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Manifest {
    package: Named,
}

#[derive(Deserialize)]
struct PyProject {
    project: Named,
}

fn read_toml<T: for<'de> Deserialize<'de>>(file: &Path) -> Result<T, ProjectError> {
    let read = Figment::from(Toml::file_exact(file)).extract();
    read.map_err(|error| ProjectError::File {
        path: file.into(),
        error: error.to_string(),
    })
}

// Both tools could leave out WASI, which their runtimes bring, but would then
// leave out all that is called `wasi:`, as the log; and the server has it.

fn javascript(dir: &Path, say: &dyn Fn(&str)) -> Result<(String, Vec<u8>), ProjectError> {
    let manifest = dir.join(Language::JavaScript.mark());
    let text = fs::read(&manifest).map_err(|error| ProjectError::file(&manifest, &error))?;
    let Named { name } = serde_json::from_slice(&text).map_err(|error| ProjectError::File {
        path: manifest,
        error: error.to_string(),
    })?;
    let mut command = Command::new(componentize_js(dir, say)?);
    command.args([
        "--wit",
        "wit",
        "--world",
        WORLD,
        "--js",
        "service.js",
        "--module-root",
        ".",
        "--sync",
    ]);
    made("componentize-qjs", command, dir).map(|bytes| (name, bytes))
}

fn python(dir: &Path, say: &dyn Fn(&str)) -> Result<(String, Vec<u8>), ProjectError> {
    let PyProject {
        project: Named { name },
    } = read_toml(&dir.join(Language::Python.mark()))?;
    let mut command = Command::new(componentize_py(dir, say)?);
    command.args(["--wit-path", "wit", "--world", WORLD, "componentize", "app"]);
    made("componentize-py", command, dir).map(|bytes| (name, bytes))
}

/// Has a tool make a component, and takes it.
fn made(name: &str, mut command: Command, dir: &Path) -> Result<Vec<u8>, ProjectError> {
    let out = dir.join(OUTPUT).join(".made.wasm");
    fs::create_dir_all(dir.join(OUTPUT)).map_err(|error| ProjectError::file(&out, &error))?;
    run_quietly(name, command.arg("-o").arg(&out).current_dir(dir))?;
    let bytes = fs::read(&out).map_err(|error| ProjectError::file(&out, &error))?;
    let _ = fs::remove_file(&out);
    Ok(bytes)
}
