//! From a file's bytes to something that can be called.

use std::{borrow::Cow, fmt, sync::Arc, time::Instant};

use wasmtime::component;
use wit_component::ComponentEncoder;

use super::{
    engine::Sandbox,
    instance::{CallError, Guest},
};
use crate::host::{Context, HANDLER, OFFERED, bindings::ServicePre, context::Caller};

/// A compiled component, its imports linked and its exports looked up: what
/// is left for a call is to instantiate and to run.
pub struct Component {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) pre: ServicePre<Guest>,
    imports: Vec<String>,
    wrapped: bool,
}

impl Component {
    /// Compiles a component, or takes its compiled code from the cache. A
    /// core module with embedded WIT, which is what `cargo build` leaves for
    /// a target without components, is turned into a component first.
    ///
    /// # Errors
    /// Says what to do about it, for the author of the component.
    pub fn load(sandbox: &Arc<Sandbox>, bytes: &[u8]) -> Result<Self, LoadError> {
        let (bytes, wrapped) = componentize(bytes)?;
        let compiled = component::Component::new(&sandbox.engine, &bytes).map_err(LoadError::compile)?;
        let kind = compiled.component_type();
        let imports: Vec<_> = kind.imports(&sandbox.engine).map(|(name, _)| name.to_owned()).collect();
        if let Some(import) = imports.iter().find(|import| !is_offered(import)) {
            return Err(LoadError::Import { import: import.clone() });
        }
        let exports: Vec<_> = kind.exports(&sandbox.engine).map(|(name, _)| name.to_owned()).collect();
        if !exports.iter().any(|name| name == HANDLER) {
            return Err(LoadError::Export { exports });
        }
        let linked = sandbox.linker.instantiate_pre(&compiled).map_err(|e| LoadError::Contract(format!("{e:#}")))?;
        let pre = ServicePre::new(linked).map_err(|e| LoadError::Contract(format!("{e:#}")))?;
        Ok(Self { sandbox: Arc::clone(sandbox), pre, imports, wrapped })
    }

    /// Interfaces that the component imports.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.imports
    }

    /// Whether the file was a core module.
    #[must_use]
    pub fn was_wrapped(&self) -> bool {
        self.wrapped
    }

    /// Asks the component who it is.
    ///
    /// # Errors
    /// If it does not answer before the deadline, or not at all.
    pub fn described(&self, deadline: Instant) -> Result<String, CallError> {
        let caller = Arc::new(Caller::default());
        self.describe(Context { request_id: None, parent_request_id: None, requested_version: None, caller, deadline })
    }
}

/// Whether the server offers an import, to the letter: another version of an
/// interface is another one.
fn is_offered(import: &str) -> bool {
    OFFERED.contains(&import)
}

/// Takes a component as it is and wraps a core module.
fn componentize(bytes: &[u8]) -> Result<(Cow<'_, [u8]>, bool), LoadError> {
    const MAGIC: &[u8] = b"\0asm";
    let Some((version, layer)) = bytes.strip_prefix(MAGIC).and_then(|rest| {
        let (head, _) = rest.split_first_chunk::<4>()?;
        Some((u16::from_le_bytes([head[0], head[1]]), u16::from_le_bytes([head[2], head[3]])))
    }) else {
        return Err(LoadError::NotWasm { empty: bytes.is_empty() });
    };
    match layer {
        0 if version == 1 => {
            let encode = || ComponentEncoder::default().validate(true).module(bytes)?.encode();
            encode().map(|component| (Cow::Owned(component), true)).map_err(|e| LoadError::Module(format!("{e:#}")))
        }
        _ => Ok((Cow::Borrowed(bytes), false)),
    }
}

/// Why a file can't be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadError {
    /// No WebAssembly at all.
    NotWasm {
        /// The file holds nothing.
        empty: bool,
    },
    /// A core module that can't become a component.
    Module(String),
    /// Does not validate or compile.
    Compile(String),
    /// Imports what the server does not offer.
    Import {
        /// The first such interface.
        import: String,
    },
    /// Lacks the interface that makes it a service.
    Export {
        /// What it exports instead.
        exports: Vec<String>,
    },
    /// The interfaces have the right names but not the right types.
    Contract(String),
}

impl LoadError {
    #[allow(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
    fn compile(error: wasmtime::Error) -> Self {
        Self::Compile(format!("{error:#}"))
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWasm { empty: true } => f.write_str("the file is empty; was it copied to its end?"),
            Self::NotWasm { empty: false } => f.write_str(
                "not WebAssembly: the file does not begin with the bytes \\0asm; a component in binary form is wanted",
            ),
            Self::Module(error) => write!(
                f,
                "a core module that can't be turned into a component: {error}; build it with the SDK, or with \
                 bindings generated from the world mb:service/service"
            ),
            Self::Compile(error) => write!(f, "does not compile: {error}"),
            Self::Import { import } => {
                write!(f, "imports {import}, which this server does not offer; it offers {}", OFFERED.join(" and "))
            }
            Self::Export { exports } => {
                let exports = if exports.is_empty() { "nothing".into() } else { exports.join(", ") };
                write!(
                    f,
                    "does not export {HANDLER}, so it is no service for this server; it exports {exports}; build it \
                     against the world mb:service/service@1.0.0"
                )
            }
            Self::Contract(error) => {
                write!(f, "does not fit the contract mb:service@1.0.0, was it built against another one? {error}")
            }
        }
    }
}

impl std::error::Error for LoadError {}
