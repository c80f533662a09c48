//! Files of machine code that was compiled ahead of time.
//!
//! Loading one is as trusting as starting a program, so it is done only where
//! nobody but this user and root can have written it, only as it was written,
//! and only for the version that wrote it. The cache of compiled code holds the
//! same files. Each begins with a line that says what it is; the rest is what
//! wasmtime's compiler made:
//!
//! ```text
//! MB-COMPILED/2 {"arch":"x86_64","code":"sha256:…","component":"sha256:…","reset":{"Err":"its modules …"},"server":"0.1.0","wrapped":false}\n
//! ```

use std::{
    borrow::Cow,
    fmt, fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use wasmtime::{Engine, component::Component};

use super::{
    component::{Compiled, Loaded},
    reset::{FreshReason, ResetInfo},
};

/// What such a file begins with.
const MARK: &[u8] = b"MB-COMPILED/2 ";
/// Longest first line, in bytes.
const MAX_LINE: usize = 1024;
/// What such a file is for, beside the architecture.
const SERVER: &str = env!("CARGO_PKG_VERSION");

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About<'a> {
    /// Version of the server whose compiler made it.
    server: Cow<'a, str>,
    /// Architecture of the processor.
    arch: Cow<'a, str>,
    /// Digest of the WebAssembly that it was made from.
    component: Cow<'a, str>,
    /// Digest of what follows.
    code: Cow<'a, str>,
    /// That WebAssembly was a core module.
    wrapped: bool,
    /// What is to be known to reset its instances, or why they can't be reset.
    reset: Result<ResetInfo, FreshReason>,
}

/// Machine code that may be loaded: whoever has this has looked at who could
/// have written it.
pub struct Precompiled<'a> {
    code: &'a [u8],
    wrapped: bool,
    reset: Result<ResetInfo, FreshReason>,
}

impl<'a> Precompiled<'a> {
    /// Whether these bytes are meant to be such a file.
    #[must_use]
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(MARK)
    }

    /// Looks at the bytes of a file, and at who can write that file and the
    /// folders above it.
    ///
    /// # Errors
    /// Somebody else can write it, it is for another version, or it is not as
    /// it was written.
    pub fn open(file: &Path, bytes: &'a [u8]) -> Result<Self, PrecompiledError> {
        match open_to_others(file) {
            Ok(None) => Self::of(bytes),
            Ok(Some(path)) => Err(PrecompiledError::OpenToOthers(path)),
            Err(error) => Err(PrecompiledError::Broken(error.to_string())),
        }
    }

    pub(super) fn of(bytes: &'a [u8]) -> Result<Self, PrecompiledError> {
        let broken = |what: &str| PrecompiledError::Broken(what.into());
        let rest = bytes
            .strip_prefix(MARK)
            .ok_or_else(|| broken("it does not begin as one does"))?;
        let end = rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        let (line, code) = rest.split_at(end.ok_or_else(|| broken("its first line has no end"))?);
        let code = &code[1..];
        let About {
            server,
            arch,
            component: _,
            code: digest,
            wrapped,
            reset,
        } = serde_json::from_slice(line)
            .map_err(|error| broken(&format!("its first line: {error}")))?;
        if (&*server, &*arch) != (SERVER, std::env::consts::ARCH) {
            return Err(PrecompiledError::MadeFor {
                server: server.into(),
                arch: arch.into(),
            });
        }
        if digest != format!("sha256:{}", hex_digest(code)) {
            return Err(broken("its digest is not the recorded one"));
        }
        Ok(Self {
            code,
            wrapped,
            reset,
        })
    }

    pub(super) fn load(&self, engine: &Engine) -> Result<Loaded, PrecompiledError> {
        let compiled = self.deserialize(engine)?;
        Ok(Loaded {
            compiled,
            wrapped: self.wrapped,
            reset: self.reset.clone(),
            code: Compiled {
                size: self.code.len(),
                took: None,
            },
        })
    }

    #[allow(
        unsafe_code,
        reason = "wasmtime can't check machine code that comes from outside"
    )]
    fn deserialize(&self, engine: &Engine) -> Result<Component, PrecompiledError> {
        // SAFETY: the bytes must be what a compiler of wasmtime wrote. Their
        // digest is the one that `file` recorded, and `open` has seen that
        // nobody can have changed both but those who can replace this program
        // as well. wasmtime itself refuses what was made for another version
        // of it, other settings, or a processor that can do more.
        let loaded = unsafe { Component::deserialize(engine, self.code) };
        loaded.map_err(|error| PrecompiledError::Engine(format!("{error:#}")))
    }
}

/// The file that holds the code that was made of a component or core module.
#[cfg(feature = "compiler")]
pub(super) fn file(
    component: &[u8],
    wrapped: bool,
    reset: Result<ResetInfo, FreshReason>,
    code: &[u8],
) -> Vec<u8> {
    let about = About {
        server: SERVER.into(),
        arch: std::env::consts::ARCH.into(),
        component: format!("sha256:{}", hex_digest(component)).into(),
        code: format!("sha256:{}", hex_digest(code)).into(),
        wrapped,
        reset,
    };
    let line = serde_json::json!(about).to_string();
    [MARK, line.as_bytes(), b"\n", code].concat()
}

/// SHA-256, hexadecimal.
pub(crate) fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The file, or the first of its folders upwards, that others than this user
/// and root can write. A folder above, where others can add files but not
/// rename those of others (as `/tmp`), is none.
fn open_to_others(file: &Path) -> io::Result<Option<PathBuf>> {
    const STICKY: u32 = 0o1000;
    let file = fs::canonicalize(file)?;
    let own = rustix::process::geteuid().as_raw();
    for (depth, path) in file.ancestors().enumerate() {
        let metadata = fs::symlink_metadata(path)?;
        let mode = metadata.permissions().mode();
        let kept_apart = depth > 1 && mode & STICKY != 0;
        if ![0, own].contains(&metadata.uid()) || mode & 0o022 != 0 && !kept_apart {
            return Ok(Some(path.into()));
        }
    }
    Ok(None)
}

/// Why compiled code is not loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrecompiledError {
    /// Others than this user and root can write the file, or a folder that it
    /// is in.
    OpenToOthers(PathBuf),
    /// It was made for another version, or another kind of processor.
    MadeFor {
        /// That version.
        server: String,
        /// That architecture.
        arch: String,
    },
    /// It is not as it was written.
    Broken(String),
    /// wasmtime does not take it.
    Engine(String),
}

impl fmt::Display for PrecompiledError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OpenToOthers(path) => write!(
                f,
                "compiled code is loaded only from where nobody but this server's user and root can write, and {} is \
                 open to others: chown and chmod go-w it, or serve the .wasm",
                path.display()
            ),
            Self::MadeFor { server, arch } => write!(
                f,
                "compiled for mb-server {server} on {arch}, this is {SERVER} on {}: compile the .wasm once more",
                std::env::consts::ARCH
            ),
            Self::Broken(what) => write!(
                f,
                "a broken file of compiled code, {what}: copy it again, or compile anew"
            ),
            Self::Engine(error) => {
                write!(
                    f,
                    "compiled code that does not fit this server or its processor: {error}; compile it for them"
                )
            }
        }
    }
}

impl std::error::Error for PrecompiledError {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use proptest::prelude::*;

    use super::*;

    #[cfg(feature = "compiler")]
    #[test]
    fn what_was_changed_or_made_for_others_is_refused() {
        let good = file(b"component", true, Err(FreshReason::because("no")), b"code");
        let opened = Precompiled::of(&good).unwrap();
        assert_eq!((opened.code, opened.wrapped), (b"code".as_slice(), true));
        let text = String::from_utf8(good.clone()).unwrap();
        let refused = |text: &str| Precompiled::of(text.as_bytes()).err().unwrap();
        let made_for = PrecompiledError::MadeFor {
            server: "0.0.9".into(),
            arch: std::env::consts::ARCH.into(),
        };
        assert_eq!(refused(&text.replace(SERVER, "0.0.9")), made_for);
        assert!(matches!(
            refused(&text.replace(std::env::consts::ARCH, "pdp11")),
            PrecompiledError::MadeFor { .. }
        ));
        for at in 0..good.len() {
            let mut changed = good.clone();
            changed[at] ^= 1;
            let of_component = text.find("sha256:").unwrap()..text.find(",\"server").unwrap();
            // What it was made from is said for people.
            if Precompiled::of(&changed).is_ok() {
                assert!(
                    of_component.contains(&at) || text[at..].starts_with(['t', 'r', 'u', 'e']),
                    "{at}"
                );
            }
            assert!(Precompiled::of(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn who_else_can_write() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("services");
        fs::create_dir(&dir).unwrap();
        let file = dir.join("x.cwasm");
        fs::write(&file, "x").unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(&dir, 0o755);
        mode(&file, 0o644);
        assert_eq!(
            open_to_others(&file).unwrap(),
            None,
            "though /tmp is everybody's"
        );
        for (path, bad, good) in [
            (&file, 0o664, 0o644),
            (&dir, 0o757, 0o755),
            (&dir, 0o1777, 0o755),
        ] {
            mode(path, bad);
            let canonical = fs::canonicalize(path).unwrap();
            assert_eq!(open_to_others(&file).unwrap(), Some(canonical), "{bad:o}");
            mode(path, good);
        }
        let link = parent.path().join("link.cwasm");
        symlink(&file, &link).unwrap();
        assert_eq!(
            open_to_others(&link).unwrap(),
            None,
            "what counts is where it leads"
        );
        // Only root can give a file away.
        if chown(&file, Some(12345), None).is_ok() {
            assert_eq!(
                open_to_others(&file).unwrap(),
                Some(fs::canonicalize(&file).unwrap())
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Precompiled::of(&bytes);
            let _ = Precompiled::of(&[MARK, &bytes].concat());
        }
    }
}
