//! The tools of other people that turn sources into WebAssembly.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::SystemTime,
};

use super::{Language, ProjectError};

/// What Rust compiles to.
pub(super) const TARGET: &str = "wasm32-unknown-unknown";
/// The build script of the npm package, in `node_modules`.
const JS_BUILD: &str = "mb-service/build.mjs";
/// Where Debian's packages have the compiler and the library's source.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_LIBRARY: &str = "/usr/lib/rustlib/src/rust/library";

/// In `.venv`, the text of the requirements that were installed into it.
const INSTALLED: &str = "mb-server-requirements.txt";
/// Files of requirements that include each other, at most so deep.
const MAX_INCLUDED: usize = 8;

/// A program in one of the folders of PATH.
pub(super) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(file)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// `cargo build` for WebAssembly: rustup's compiler if it has the target, or
/// else Debian's, which compiles the standard library too.
pub(super) fn cargo(dir: &Path) -> Result<Command, ProjectError> {
    let library = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .current_dir(dir)
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let has_std = |library: &PathBuf| {
        fs::read_dir(library).is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libstd-"))
            })
        })
    };
    let mut command = if library.as_ref().is_some_and(has_std) {
        let mut command = Command::new("cargo");
        command.arg("build");
        command
    } else if let Some(linker) = debian_linker() {
        let mut command = Command::new(DEBIAN_CARGO);
        command
            .env("RUSTC", DEBIAN_RUSTC)
            .env("RUSTC_BOOTSTRAP", "1");
        command.args([
            "build",
            "-Zbuild-std=std,panic_abort",
            "-Zbuild-std-features=",
            "--config",
        ]);
        command.arg(format!("target.{TARGET}.linker='{}'", linker.display()));
        command
    } else {
        return Err(ProjectError::Missing(format!(
            "no Rust compiler for {TARGET} here; install one of these and try again:\n  with rustup: rustup target \
             add {TARGET}\n  on Debian without rustup: apt-get install rustc-web cargo-web rust-web-src lld-22"
        )));
    };
    // They would replace the linker's flags of .cargo/config.toml, or build
    // something else. A target folder of the user's own is shared with `cargo
    // test`, and cargo says where it puts what it builds.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    command.current_dir(dir);
    Ok(command)
}

fn debian_linker() -> Option<PathBuf> {
    let there = [DEBIAN_RUSTC, DEBIAN_CARGO]
        .iter()
        .all(|file| is_program(Path::new(file)));
    if !there || !Path::new(DEBIAN_LIBRARY).is_dir() {
        return None;
    }
    let mut linkers: Vec<_> = fs::read_dir("/usr/bin")
        .ok()?
        .filter_map(|file| Some(file.ok()?.path()))
        .collect();
    linkers.retain(|file| {
        file.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("wasm-ld"))
    });
    linkers.sort();
    linkers.pop()
}

/// The build script of the npm package `mb-service`. What package.json names is
/// installed first where that has changed since.
pub(super) fn build_js(dir: &Path, say: &dyn Fn(&str)) -> Result<Command, ProjectError> {
    let (Some(node), Some(npm)) = (in_path("node"), in_path("npm")) else {
        return Err(ProjectError::Missing(
            "node or npm is not here: install Node.js 20 or newer with npm (on Debian: apt-get install nodejs npm) \
             and try again"
                .into(),
        ));
    };
    // In a workspace of npm, packages lie further up.
    let modules = || {
        dir.ancestors()
            .map(|dir| dir.join("node_modules"))
            .find(|modules| modules.join(JS_BUILD).is_file())
    };
    let list = |modules: &Path| modules.join(".package-lock.json");
    let is_fresh = |modules: PathBuf| {
        !is_newer(
            &dir.join(Language::JavaScript.manifest_name()),
            &list(&modules),
        )
    };
    if !modules().is_some_and(is_fresh) {
        say("npm install: what package.json names, into node_modules");
        run(
            "npm install",
            Command::new(npm)
                .args(["install", "--no-audit", "--no-fund", "--loglevel=error"])
                .current_dir(dir),
        )?;
    }
    let modules = modules().ok_or_else(|| {
        ProjectError::Failed(
            "package.json lacks the dependency mb-service: \"mb-service\": \"file:./sdk\", with the folder sdk of a project that mb-server new has created"
                .into(),
        )
    })?;
    // npm leaves its list as it is where nothing else has changed.
    let _ = fs::File::options()
        .append(true)
        .open(list(&modules))
        .and_then(|file| file.set_modified(SystemTime::now()));
    let mut command = Command::new(node);
    command.arg(modules.join(JS_BUILD));
    Ok(command)
}

fn is_newer(file: &Path, other: &Path) -> bool {
    let modified = |file: &Path| {
        fs::metadata(file)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    modified(file) > modified(other)
}

/// The program of the Python package, with what else the project requires:
/// installed into its `.venv` at first, and whenever `requirements.txt` has
/// changed.
pub(super) fn componentize_py(dir: &Path, say: &dyn Fn(&str)) -> Result<PathBuf, ProjectError> {
    let venv = dir.join(".venv");
    let program = venv.join("bin/componentize-py");
    let wanted = requirements(&dir.join("requirements.txt"), 0)?;
    let stamp = venv.join(INSTALLED);
    let installed = fs::read_to_string(&stamp).unwrap_or_default();
    if program.exists() && installed == wanted {
        return Ok(program);
    }
    let Some(python) = in_path("python3") else {
        return Err(ProjectError::Missing(
            "python3 is not here: install Python 3.10 or newer with venv (on Debian: apt-get install python3-venv) \
             and try again"
                .into(),
        ));
    };
    if is_program(&venv.join("bin/pip")) {
        say("pip install: requirements.txt has changed");
    } else {
        say("python3 -m venv, pip install: once, into .venv");
        let result = run(
            "python3 -m venv .venv",
            Command::new(python)
                .args(["-m", "venv", ".venv"])
                .current_dir(dir),
        );
        result.map_err(|error| {
            ProjectError::Missing(format!(
                "{error}\non Debian, apt-get install python3-venv may help"
            ))
        })?;
    }
    // Until it is done, what is there is not what is wanted.
    let _ = fs::remove_file(&stamp);
    let arguments = [
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        "requirements.txt",
    ];
    run(
        "pip install",
        Command::new(venv.join("bin/pip"))
            .args(arguments)
            .current_dir(dir),
    )?;
    if !program.exists() {
        return Err(ProjectError::Failed(
            "requirements.txt lacks componentize-py".into(),
        ));
    }
    fs::write(&stamp, wanted).map_err(|error| ProjectError::file(&stamp, &error))?;
    Ok(program)
}

/// The text of a file of requirements, with those that it includes.
fn requirements(file: &Path, depth: usize) -> Result<String, ProjectError> {
    let mut all = fs::read_to_string(file).map_err(|error| ProjectError::file(file, &error))?;
    let included: Vec<_> = all
        .lines()
        .filter_map(|line| {
            let flags = ["-r", "--requirement", "-c", "--constraint"];
            let rest = flags
                .iter()
                .find_map(|flag| line.trim().strip_prefix(flag))?;
            Some(rest.trim_start_matches(['=', ' ']).trim().to_owned())
        })
        .collect();
    for name in included {
        if depth < MAX_INCLUDED && !name.contains("://") {
            all += &requirements(&file.with_file_name(name), depth + 1)?;
        }
    }
    Ok(all)
}

/// Runs a tool that installs something; what it says goes to standard error.
pub(super) fn run(name: &str, command: &mut Command) -> Result<(), ProjectError> {
    let status = command.stdin(Stdio::null()).stdout(io::stderr()).status();
    finish(name, command.get_program(), status)
}

/// Runs a tool to its end; what it says goes to standard error where it fails.
pub(super) fn run_quietly(name: &str, command: &mut Command) -> Result<(), ProjectError> {
    // Where the tool itself was when it found a mistake helps nobody.
    command.env("RUST_BACKTRACE", "0").stdin(Stdio::null());
    let (status, text) = match command.output() {
        Ok(Output {
            status,
            stdout,
            stderr,
        }) => (Ok(status), [stdout, stderr].concat()),
        Err(error) => (Err(error), Vec::new()),
    };
    if status.as_ref().is_ok_and(|status| !status.success()) {
        let _ = io::stderr().write_all(&text);
    }
    finish(name, command.get_program(), status)
}

/// From how a tool exited to the error for the user.
pub(super) fn finish(
    name: &str,
    program: &OsStr,
    status: io::Result<std::process::ExitStatus>,
) -> Result<(), ProjectError> {
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(ProjectError::Failed(format!(
            "{name} failed: {status}; what it says is above"
        ))),
        Err(error) => Err(ProjectError::Missing(format!(
            "{}: {error}",
            program.to_string_lossy()
        ))),
    }
}
