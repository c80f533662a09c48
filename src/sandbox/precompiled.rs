//! Files of machine code that was compiled ahead of time.
//!
//! Loading one is as trusting as starting a program, so it is done only where
//! nobody but this user and root can have written it, only as it was written,
//! and only for the version that wrote it. The cache of compiled code holds the
//! same files. Each begins with a line that says what it is; the rest is what
//! wasmtime's compiler made:
//!
//! ```text
//! MB-COMPILED/3 {"arch":"x86_64","code":"sha256:…","component":"sha256:…","reset":{"Err":"its modules …"},"sections":{…},"server":"0.1.0","size":9000,"wrapped":false}\n
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use wasmtime::{Engine, component::Component};

use super::{
    component::{Compiled, Loaded},
    reset::{FreshReason, ResetInfo},
};

/// What such a file begins with.
pub(super) const MAGIC: &[u8] = b"MB-COMPILED/3 ";
/// The same, of every version.
const ANY_MAGIC: &[u8] = b"MB-COMPILED/";
/// Longest first line, in bytes: a reason may be 300 bytes, each an escape.
const MAX_LINE: usize = 4096;
/// What such a file is for, beside the architecture.
const SERVER: &str = env!("CARGO_PKG_VERSION");

/// The first line: what the file says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Version of the server whose compiler made it.
    pub server: String,
    /// Architecture of the processor.
    pub arch: String,
    /// Digest of the WebAssembly that it was made from.
    pub component: String,
    /// Bytes of that WebAssembly.
    pub size: u64,
    /// The same by what they are.
    pub sections: Sections,
    /// Digest of what follows.
    pub code: String,
    /// That WebAssembly was a core module.
    pub wrapped: bool,
    /// What is to be known to reset its instances, or why they can't be reset.
    pub reset: Result<ResetInfo, FreshReason>,
}

/// Bytes of a WebAssembly file by what they are, all modules together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sections {
    /// Code.
    pub code: u64,
    /// Data.
    pub data: u64,
    /// Names and other custom sections.
    pub custom: u64,
}

impl Head {
    /// Reads the head of a file, and returns it with the machine code behind
    /// it. For people: what it says is not checked, and nothing is run.
    ///
    /// # Errors
    /// The file has none.
    pub fn read(bytes: &[u8]) -> Result<(Self, &[u8]), PrecompiledError> {
        let broken = |what: &str| PrecompiledError::Broken(what.into());
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Err(if bytes.starts_with(ANY_MAGIC) {
                PrecompiledError::OtherFormat
            } else if bytes.starts_with(b"\0asm") {
                PrecompiledError::Wasm
            } else {
                broken("it does not begin as one does")
            });
        };
        let end = rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        let (line, code) = rest.split_at(end.ok_or_else(|| broken("its first line has no end"))?);
        let head = serde_json::from_slice(line)
            .map_err(|error| broken(&format!("its first line: {error}")))?;
        Ok((head, &code[1..]))
    }
}

/// Machine code that is as it was written, for this version and architecture.
pub struct Precompiled<'a> {
    code: &'a [u8],
    head: Head,
}

impl<'a> Precompiled<'a> {
    /// Whether these bytes are meant to be such a file.
    #[must_use]
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(ANY_MAGIC)
    }

    /// Checks the bytes of a file. Who could have written it is not seen in
    /// them; see [`super::ComponentFile`].
    ///
    /// # Errors
    /// It is for another version, or it is not as it was written.
    pub fn of(bytes: &'a [u8]) -> Result<Self, PrecompiledError> {
        let (head, code) = Head::read(bytes)?;
        let Head { server, arch, .. } = &head;
        if (&**server, &**arch) != (SERVER, std::env::consts::ARCH) {
            return Err(PrecompiledError::CompiledFor {
                server: server.clone(),
                arch: arch.clone(),
            });
        }
        if head.code != format!("sha256:{}", hex_digest(code)) {
            let what = "its digest is not the recorded one";
            return Err(PrecompiledError::Broken(what.into()));
        }
        Ok(Self { code, head })
    }

    pub(super) fn load(&self, engine: &Engine) -> Result<Loaded, PrecompiledError> {
        let compiled = self.deserialize(engine)?;
        Ok(Loaded {
            compiled,
            wrapped: self.head.wrapped,
            reset: self.head.reset.clone(),
            code: Compiled {
                size: self.code.len(),
                took: None,
                sections: self.head.sections,
            },
        })
    }

    #[allow(
        unsafe_code,
        reason = "wasmtime can't check machine code that comes from outside"
    )]
    fn deserialize(&self, engine: &Engine) -> Result<Component, PrecompiledError> {
        // SAFETY: the bytes must be what a compiler of wasmtime wrote. Their
        // digest is the one that `file` recorded. They come from the compiler
        // of this program, from its private cache, or by `ComponentFile::read`
        // from a file that only those can have changed who can replace this
        // program as well. wasmtime itself refuses what was made for another
        // version of it, other settings, or a processor that can do more.
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
    sections: Sections,
    code: &[u8],
) -> Vec<u8> {
    let head = Head {
        server: SERVER.into(),
        arch: std::env::consts::ARCH.into(),
        component: format!("sha256:{}", hex_digest(component)),
        size: component.len() as u64,
        sections,
        code: format!("sha256:{}", hex_digest(code)),
        wrapped,
        reset,
    };
    let line = serde_json::json!(head).to_string();
    [MAGIC, line.as_bytes(), b"\n", code].concat()
}

/// SHA-256, hexadecimal.
pub(crate) fn hex_digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// Why compiled code is not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrecompiledError {
    /// Others than this user and root can write the file, or a folder that it
    /// is in.
    #[error("compiled code is loaded only from where only this server's user and root can write, and others can write to {}: \
        chown and chmod go-w it, or serve the .wasm", .0.display())]
    OpenToOthers(PathBuf),
    /// It was made for another version, or another kind of processor.
    #[error(
        "compiled for mb-server {server} on {arch}, this is {SERVER} on {}: compile the .wasm once more",
        std::env::consts::ARCH
    )]
    CompiledFor {
        /// That version.
        server: String,
        /// That architecture.
        arch: String,
    },
    /// It was made by a version that wrote such files in another way.
    #[error(
        "compiled for another version of mb-server, this is {SERVER}: compile the .wasm once more"
    )]
    OtherFormat,
    /// It is WebAssembly, under the wrong name.
    #[error("WebAssembly in a file called .cwasm, which holds machine code: call it .wasm")]
    Wasm,
    /// It is not as it was written.
    #[error("a broken file of compiled code, {0}: copy it again, or compile it again")]
    Broken(String),
    /// wasmtime does not take it.
    #[error(
        "compiled code that does not fit this server or its processor: {0}; compile it for them"
    )]
    Engine(String),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[cfg(feature = "compiler")]
    #[test]
    fn what_was_changed_or_made_for_others_is_refused() {
        let reset = Err(FreshReason::because("no"));
        let good = file(b"component", true, reset, Sections::default(), b"code");
        let opened = Precompiled::of(&good).unwrap();
        assert_eq!(
            (opened.code, opened.head.wrapped),
            (b"code".as_slice(), true)
        );
        let text = String::from_utf8(good.clone()).unwrap();
        let refused = |text: &str| Precompiled::of(text.as_bytes()).err().unwrap();
        let compiled_for = PrecompiledError::CompiledFor {
            server: "0.0.9".into(),
            arch: std::env::consts::ARCH.into(),
        };
        assert_eq!(refused(&text.replace(SERVER, "0.0.9")), compiled_for);
        assert!(matches!(
            refused(&text.replace(std::env::consts::ARCH, "pdp11")),
            PrecompiledError::CompiledFor { .. }
        ));
        for at in 0..good.len() {
            let mut changed = good.clone();
            changed[at] ^= 1;
            let of_component = text.find("sha256:").unwrap()..text.find(",\"server").unwrap();
            let of_size = text.find("\"size\"").unwrap()..text.find(",\"wrapped").unwrap();
            let of_component = [of_component, of_size]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>();
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

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Precompiled::of(&bytes);
            let _ = Precompiled::of(&[MAGIC, &bytes].concat());
        }
    }
}
