//! A service's project on the disk: made from a template, and built with the
//! tools of its language.

mod build;
mod contract;
mod python;
mod template;
mod tools;

use std::{
    fmt,
    path::{Path, PathBuf},
};

pub use build::{Built, Kind, build};
pub use contract::{CONTRACT, write_contract};
pub use template::create;

/// Where a project's component is put.
pub const OUTPUT: &str = "dist";
/// What a project is served with while it is developed.
pub const SETTINGS: &str = "mb-server.toml";
/// Files of `mb-server dev`.
pub const DEV_STATE: &str = ".dev";
/// Longest name of a project, in bytes.
const MAX_NAME_SIZE: usize = 64;

/// What a project is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// Rust
    Rust,
    /// JavaScript, run by QuickJS
    #[value(name = "js", alias = "javascript")]
    JavaScript,
    /// TypeScript, run by QuickJS
    #[value(name = "ts", alias = "typescript")]
    TypeScript,
    /// Python, run by CPython
    #[value(alias = "py")]
    Python,
}

impl Language {
    /// Those that a project is detected as; TypeScript is built as JavaScript
    /// is.
    const DETECTED: [Self; 3] = [Self::Rust, Self::JavaScript, Self::Python];

    /// The file that tells a project of this language.
    const fn manifest_name(self) -> &'static str {
        match self {
            Self::Rust => "Cargo.toml",
            Self::JavaScript | Self::TypeScript => "package.json",
            Self::Python => "pyproject.toml",
        }
    }
}

/// A project that is there.
#[derive(Debug, Clone)]
pub struct Project {
    /// Its folder.
    pub dir: PathBuf,
    /// What it is written in.
    pub language: Language,
}

impl Project {
    /// Finds out what lies in a folder.
    ///
    /// # Errors
    /// There is no project.
    pub fn find(dir: &Path) -> Result<Self, ProjectError> {
        let found = Language::DETECTED
            .into_iter()
            .find(|language| dir.join(language.manifest_name()).is_file());
        let language = found.ok_or_else(|| {
            let manifests = Language::DETECTED.map(Language::manifest_name).join(", ");
            ProjectError::Failed(format!(
                "no project in {}: none of {manifests} is there; mb-server new NAME --lang rust|js|ts|python creates one",
                dir.display()
            ))
        })?;
        let dir = dir
            .canonicalize()
            .map_err(|error| ProjectError::file(dir, &error))?;
        Ok(Self { dir, language })
    }

    /// What its manifest calls it, and with it the service and the file.
    ///
    /// # Errors
    /// The manifest can't be read, or has no name.
    pub fn name(&self) -> Result<String, ProjectError> {
        build::name(self)
    }

    /// Where a component is put: what is to be deployed in the folder `dist`,
    /// what `mb-server dev` serves among its own files.
    #[must_use]
    pub fn output(&self, kind: Kind) -> PathBuf {
        match kind {
            Kind::Release => self.dir.join(OUTPUT),
            Kind::Dev => self.dir.join(DEV_STATE).join("services"),
        }
    }
}

/// Whether a project may be called so: what crates, npm packages, files and
/// services may all be called.
///
/// # Errors
/// Says what it may be called.
pub fn check_name(name: &str) -> Result<(), ProjectError> {
    let fine = name.len() <= MAX_NAME_SIZE
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.ends_with('-')
        && !name.contains("--");
    // Crates can't be called like these, or nothing good comes of it.
    let taken = [
        "system",
        "test",
        "core",
        "std",
        "alloc",
        "fn",
        "mod",
        "use",
        "self",
        "super",
        "crate",
        "mb-service",
    ];
    if fine && !taken.contains(&name) {
        return Ok(());
    }
    Err(ProjectError::Failed(format!(
        "{name:?} is no name for a project: take a lower-case letter, then lower-case letters, digits and \
         single dashes, at most {MAX_NAME_SIZE} in all, and no word that Rust or the server keeps for itself"
    )))
}

/// Why there is no project, or no component of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProjectError {
    /// A tool is not installed.
    #[error("{0}")]
    Missing(String),
    /// A name, a file or what a tool said.
    #[error("{0}")]
    Failed(String),
}

impl ProjectError {
    fn file(path: &Path, error: &dyn fmt::Display) -> Self {
        Self::Failed(format!("{}: {error}", path.display()))
    }
}

/// Checks that a folder can be created.
///
/// # Errors
/// Something is there already.
pub fn check_free(dir: &Path) -> Result<(), ProjectError> {
    match dir.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(_) => Err(ProjectError::Failed(format!(
            "{} exists already; nothing was written",
            dir.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn names() {
        for good in ["hello", "a", "my-service-2", &"a".repeat(64)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "Hello",
            "2",
            "-a",
            "a-",
            "a--b",
            "a_b",
            "ä",
            "a b",
            "a/b",
            "..",
            "system",
            "fn",
            &"a".repeat(65),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_made_is_found_again() {
        for language in Language::value_variants() {
            let language = *language;
            let parent = tempfile::tempdir().unwrap();
            let dir = parent.path().join("some-name");
            let nothing = Project::find(parent.path()).unwrap_err().to_string();
            assert!(nothing.starts_with("no project in"), "{nothing}");
            create(&dir, "some-name", language).unwrap();
            assert_eq!(
                Project::find(&dir).unwrap().language.manifest_name(),
                language.manifest_name()
            );
            let taken = create(&dir, "some-name", language).unwrap_err().to_string();
            assert!(taken.contains("exists already"), "{taken}");
            let readme = std::fs::read_to_string(dir.join("README.md")).unwrap();
            assert!(
                readme.contains("mb-server call some-name.greet") && !readme.contains("{{"),
                "{readme}"
            );
        }
    }
}
