//! The contract's WIT and the SDK, as they were when this program was built.

use std::{fs, path::Path};

use super::ProjectError;

/// Files of a folder of the repository, each by its path in there.
macro_rules! files {
    ($folder:literal: $($file:literal)+) => {
        &[$(($file, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $folder, "/", $file)))),+]
    };
}
pub(super) use files;

/// The contract itself.
pub const CONTRACT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/wit/service.wit"));

/// What the contract builds upon.
const DEPENDENCIES: &[(&str, &str)] = files!("wit/deps":
    "cli/cli.wit" "clocks/clocks.wit" "config/config.wit" "io/io.wit" "keyvalue/keyvalue.wit"
    "logging/logging.wit" "random/random.wit"
);

/// The crate `mb-service`.
pub(super) const SDK: &[(&str, &str)] = files!("services/sdk":
    "Cargo.toml" "src/calls.rs" "src/clock.rs" "src/config.rs" "src/context.rs"
    "src/describe.rs" "src/handler.rs" "src/keyvalue.rs" "src/lib.rs" "src/log.rs"
    "src/macros.rs" "src/mock.rs" "src/payload.rs" "src/schema.rs"
);

/// The npm package `mb-service`.
pub(super) const SDK_JS: &[(&str, &str)] = files!("services/sdk-js":
    "build.mjs" "calls.js" "config.js" "context.js" "failure.js" "host/calls.js"
    "host/config.js" "host/context.js" "host/keyvalue.js" "host/log.js" "index.d.ts" "index.js"
    "json.js" "keyvalue.js" "log.js" "mock.d.ts" "mock/calls.js" "mock/config.js"
    "mock/context.js" "mock/handler.js" "mock/index.js" "mock/keyvalue.js" "mock/log.js"
    "mock/state.js" "package.json" "reason.js" "runtime/absent.js" "runtime/clone.js"
    "runtime/configure.js" "runtime/console.js" "runtime/from-async.js" "runtime/handler.js"
    "runtime/jobs.js" "runtime/phase.js" "runtime/promise.js" "runtime/random.js"
    "runtime/stack.js" "runtime/start.js" "runtime/text.js" "runtime/url.js"
);

/// Writes the contract as a package of its own, with what it builds upon
/// beside it in `deps`: a folder that the tools of any language read.
///
/// # Errors
/// A file can't be written.
pub fn write_contract(dir: &Path) -> Result<(), ProjectError> {
    write(&dir.join("service.wit"), CONTRACT)?;
    DEPENDENCIES
        .iter()
        .try_for_each(|(file, text)| write(&dir.join("deps").join(file), text))
}

/// The same as dependencies of a package that stands in `dir`.
pub(super) fn write_as_dependency(dir: &Path) -> Result<(), ProjectError> {
    write(&dir.join("deps/mb-service/service.wit"), CONTRACT)?;
    DEPENDENCIES
        .iter()
        .try_for_each(|(file, text)| write(&dir.join("deps").join(file), text))
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), ProjectError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let written = fs::create_dir_all(parent).and_then(|()| fs::write(path, text));
    written.map_err(|error| ProjectError::file(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(root: &str, ending: &str) -> Vec<String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
        let (mut dirs, mut found) = (vec![root.clone()], Vec::new());
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    if !path.ends_with("node_modules") {
                        dirs.push(path);
                    }
                } else if path
                    .extension()
                    .is_some_and(|extension| extension == ending)
                {
                    found.push(path.strip_prefix(&root).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn no_file_is_forgotten() {
        let listed = |files: &[(&str, &str)], ending: &str| -> Vec<_> {
            files
                .iter()
                .map(|(file, _)| (*file).to_owned())
                .filter(|file| file.ends_with(ending))
                .collect()
        };
        assert_eq!(listed(DEPENDENCIES, "wit"), names("wit/deps", "wit"));
        assert_eq!(listed(SDK, "rs"), names("services/sdk", "rs"));
        for ending in ["js", "mjs", "ts"] {
            let found = names("services/sdk-js", ending);
            assert_eq!(listed(SDK_JS, &format!(".{ending}")), found);
        }
    }
}
