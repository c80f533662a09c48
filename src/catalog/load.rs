//! From a file to a service: what the file's name says, what the component
//! says, and that the two agree.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{
    Service,
    description::{Description, DescriptionError, is_name},
    inputs::Inputs,
    policy::ServicePolicies,
    truncated::is_truncated,
};
use crate::{
    budget::Rate,
    files,
    host::{GrantError, Stop},
    log::{Limiter, panic_text},
    sandbox::{
        CallError, Component, ComponentFile, LoadError, PrecompiledError, Sandbox, hex_digest,
    },
    trusted::OpenToOthers,
    wire::Version,
};

/// The endings of a component's file: WebAssembly, machine code. Where one stem has both, a server that
/// can compile takes the first, one that can't the second.
pub(super) const ENDINGS: [&str; 2] = ["wasm", "cwasm"];
/// The one that is taken of two.
const PREFERRED: &str = ENDINGS[if cfg!(feature = "compiler") { 0 } else { 1 }];

/// A load that takes longer says so, and again each time this much later.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Largest component file, in bytes.
pub const MAX_SIZE: u64 = 256 * 1024 * 1024;

/// How long `describe` may take, where the service's own timeout is not shorter.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where components come from, and what they may take and use.
#[derive(Clone)]
pub struct LoadSettings {
    /// The folder.
    pub dir: PathBuf,
    /// What each service may take and use.
    pub policy: ServicePolicies,
}

/// What the name of a file promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName {
    /// The service.
    pub name: String,
    /// Its version, where the name holds one.
    pub version: Option<Version>,
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.version
            .map_or(Ok(()), |version| write!(f, " {version}"))
    }
}

impl FileName {
    /// Reads `NAME.wasm` or `NAME@VERSION.wasm`, or the same with `.cwasm`.
    ///
    /// # Errors
    /// If it is neither.
    pub fn parse(file: &Path) -> Result<Self, FileError> {
        let stem = file
            .file_stem()
            .and_then(|stem| stem.to_str())
            .ok_or(FileError::Name)?;
        let (name, version) = match stem.split_once('@') {
            None => (stem, None),
            Some((name, version)) => (name, Some(version.parse().map_err(|_| FileError::Name)?)),
        };
        if is_name(name) {
            Ok(Self {
                name: name.into(),
                version,
            })
        } else {
            Err(FileError::Name)
        }
    }
}

/// The component files of a folder, sorted by name; also those that can't be
/// looked at, as where a disk or a link fails. What begins with a dot is a
/// file that is still being copied, to many tools.
///
/// # Errors
/// If the folder can't be read.
pub fn component_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if ENDINGS.iter().any(|ending| has_ending(&path, ending)) && !hidden && is_there(&path) {
            files.push(path);
        }
    }
    files.sort();
    let preferred: BTreeSet<_> = files
        .iter()
        .filter(|path| has_ending(path, PREFERRED) && !path.is_dir())
        .cloned()
        .collect();
    files.retain(|path| {
        has_ending(path, PREFERRED) || !preferred.contains(&path.with_extension(PREFERRED))
    });
    Ok(files)
}

/// Whether this is a file, or may be one that can't be looked at just now. A
/// folder of this name is a mistake that reading it will name.
fn is_there(path: &Path) -> bool {
    match fs::metadata(path) {
        Ok(metadata) => metadata.is_file() || metadata.is_dir(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

pub(super) fn has_ending(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|ending| ending == wanted)
}

/// Loads one file, whatever folder it is in.
///
/// # Errors
/// Says what is wrong with it and what to do.
pub fn load_file(
    sandbox: &Arc<Sandbox>,
    settings: &LoadSettings,
    file: &Path,
) -> Result<Service, FileError> {
    let code = read_code(file)?;
    load_code(sandbox, settings, file, &code)
}

/// Loads what was read under the name of a file.
pub(super) fn load_code(
    sandbox: &Arc<Sandbox>,
    settings: &LoadSettings,
    file: &Path,
    code: &ComponentFile,
) -> Result<Service, FileError> {
    contain(|| load_contained(sandbox, settings, file, code))
}

/// Reads a component's file.
pub(super) fn read_code(file: &Path) -> Result<ComponentFile, FileError> {
    ComponentFile::read(file, MAX_SIZE).map_err(|error| match OpenToOthers::of(&error) {
        Some(OpenToOthers(path)) => {
            LoadError::from(PrecompiledError::OpenToOthers(path.clone())).into()
        }
        None => FileError::unread(&error),
    })
}

/// An untrusted file may reach a defect of the compiler: a panic of it is
/// this file's failure, and the others are served.
fn contain<T>(work: impl FnOnce() -> Result<T, FileError>) -> Result<T, FileError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(FileError::Panic(panic_text(&*panic).to_owned())))
}

fn load_contained(
    sandbox: &Arc<Sandbox>,
    settings: &LoadSettings,
    file: &Path,
    code: &ComponentFile,
) -> Result<Service, FileError> {
    let promised = FileName::parse(file)?;
    let bytes = code.bytes();
    if !code.is_machine() && !bytes.is_empty() && is_truncated(bytes) {
        return Err(FileError::Truncated { size: bytes.len() });
    }
    let digest = digest_of(bytes);
    let policy = settings
        .policy
        .component_policy(&promised.name, &digest)
        .map_err(FileError::Grant)?;
    let rate = Rate::per_second(policy.settings.rate);
    let timeout = DESCRIBE_TIMEOUT.min(policy.settings.timeout.0);
    let component = with_progress(file, bytes.len(), || {
        Component::load(sandbox, code, &digest, policy)
    })?;
    let text = component
        .described(Instant::now() + timeout)
        .map_err(|e| FileError::describe(e, timeout))?;
    let description = Description::parse(&text)?;
    let agrees = promised.name == description.name
        && promised.version.is_none_or(|v| v == description.version);
    if !agrees {
        return Err(FileError::Disagrees {
            promised,
            name: description.name,
            version: description.version,
        });
    }
    let inputs = component
        .policy()
        .settings
        .validate
        .then(|| Inputs::of(&description))
        .transpose()?;
    Ok(Service {
        description,
        file: file.into(),
        digest,
        size: bytes.len() as u64,
        component,
        inputs,
        stats: Arc::default(),
        rate,
        failed_lines: Limiter::new(),
    })
}

/// `sha256:` and the hexadecimal digest.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex_digest(bytes))
}

/// What can be known of a file that is no service: its size, and its digest
/// unless it exceeds the limit.
///
/// # Errors
/// If the file can't be read.
pub fn fingerprint(file: &Path) -> std::io::Result<(u64, Option<String>)> {
    let metadata = fs::metadata(file)?;
    // A pipe or a device has no end that could be waited for.
    let bytes = if metadata.is_file() {
        read_bounded(file).ok()
    } else {
        None
    };
    Ok((metadata.len(), bytes.map(|bytes| digest_of(&bytes))))
}

pub(super) fn read_bounded(file: &Path) -> Result<Vec<u8>, FileError> {
    fs::File::open(file)
        .and_then(|opened| files::read_bounded(opened, MAX_SIZE))
        .map_err(|error| FileError::unread(&error))
}

/// Compiling a large component takes seconds; nobody shall think that the
/// server hangs.
fn with_progress<T>(file: &Path, size: usize, work: impl FnOnce() -> T) -> T {
    let (done, waiting) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let report = move || {
            let begun = Instant::now();
            while waiting.recv_timeout(PROGRESS_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                let secs = begun.elapsed().as_secs();
                tracing::info!(
                    "compiling {} ({size} bytes), {secs} s so far",
                    file.display()
                );
            }
        };
        // It is loaded as well without reports.
        let _ = thread::Builder::new().spawn_scoped(scope, report);
        let result = work();
        drop(done);
        result
    })
}

/// Why a file is no service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The name is neither `NAME.wasm` nor `NAME@VERSION.wasm`.
    #[error(
        "a component's file is called NAME.wasm or NAME@VERSION.wasm, where NAME is the service's name and \
        VERSION its MAJOR.MINOR.PATCH; rename it"
    )]
    Name,
    /// The earlier file in its place can't be served.
    #[error("{problem}")]
    Kept {
        /// Why.
        problem: String,
        /// Whether it may be served at the next look.
        may_pass: bool,
    },
    /// It is larger than 256 MiB, or no file.
    #[error("can't be read: {0}")]
    Unfit(String),
    /// The file can't be read.
    #[error("can't be read: {0}")]
    Read(String),
    /// The file ends too early.
    #[error(
        "the file is cut short: it ends after {size} bytes, in the middle of a section; copy it again"
    )]
    Truncated {
        /// Where, in bytes.
        size: usize,
    },
    /// Its grants are not available.
    #[error(transparent)]
    Grant(GrantError),
    /// It is no component for this server.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Loading it panicked.
    #[error("loading it met a defect of the server or of its compiler, please report it: {0}")]
    Panic(String),
    /// It does not state its name and version.
    #[error("its describe {0}")]
    Silent(String),
    /// What it says does not follow the schema.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// Its name or version differs from that of its file.
    #[error(
        "the component says that it is {name} {version}, its file that it is {promised}; call the file {name}.wasm or \
        {name}@{version}.wasm if you mean it"
    )]
    Disagrees {
        /// What the file says.
        promised: FileName,
        /// The name that the component says.
        name: String,
        /// The version that the component says.
        version: Version,
    },
}

impl FileError {
    /// Whether the same file may load at the next look.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Read(_) | Self::Load(LoadError::NoProcess(_)) => true,
            Self::Kept { may_pass, .. } => *may_pass,
            _ => false,
        }
    }

    fn unread(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::FileTooLarge | io::ErrorKind::IsADirectory => {
                Self::Unfit(error.to_string())
            }
            _ => Self::Read(error.to_string()),
        }
    }

    fn describe(error: CallError, timeout: Duration) -> Self {
        Self::Silent(match error {
            CallError::Stopped {
                stop: Stop::Deadline,
                ..
            } => {
                format!("did not return within {} ms", timeout.as_millis())
            }
            CallError::Failed { reason, message } => {
                format!("failed ({}): {message}", reason.as_str())
            }
            other @ (CallError::NotBegun(_) | CallError::Postponed | CallError::Stopped { .. }) => {
                format!("could not run: {other:?}")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_failure_of_one_file() {
        let file = Path::new("calc.wasm");
        let result =
            contain(|| with_progress(file, 0, || -> Result<(), _> { panic!("no such register") }));
        assert_eq!(result, Err(FileError::Panic("no such register".into())));
    }

    #[test]
    fn file_names() {
        let check = |file: &str, expected: Option<(&str, Option<Version>)>| {
            let parsed = FileName::parse(Path::new(file)).ok();
            let expected = expected.map(|(name, version)| FileName {
                name: name.into(),
                version,
            });
            assert_eq!(parsed, expected, "{file}");
        };
        check("/x/calc.wasm", Some(("calc", None)));
        check(
            "calc@1.2.3.wasm",
            Some(("calc", Some(Version::new(1, 2, 3)))),
        );
        check("a-b_2.wasm", Some(("a-b_2", None)));
        for bad in [
            "calc@1.2.wasm",
            "calc@.wasm",
            "@1.0.0.wasm",
            "a.b.wasm",
            "2.wasm",
            "system.wasm",
            "a b.wasm",
        ] {
            check(bad, None);
        }
    }
}
