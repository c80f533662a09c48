//! What a component that was built for WASI 0.2 finds: clocks, random
//! numbers, output that goes to the log, an empty environment, and files and
//! sockets that refuse everything.
//!
//! Every wait ends at the call's deadline; nothing here starts a thread or an
//! async runtime. In reading order: `io` (streams and polling), `clocks`,
//! `random`, `cli`, `refused`.

mod cli;
mod clocks;
mod io;
mod random;
pub(super) mod refused;

use wasmtime::component::{HasSelf, Linker};

use super::{HasHost, Host};

/// The generated side of WASI.
#[allow(missing_docs, unreachable_pub, reason = "generated")]
pub(super) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "wasi",
        imports: { default: trappable },
        with: {
            "wasi:io/error.error": super::io::Error,
            "wasi:io/poll.pollable": super::io::Pollable,
            "wasi:io/streams.input-stream": super::io::InputStream,
            "wasi:io/streams.output-stream": super::io::OutputStream,
            "wasi:cli/terminal-input.terminal-input": super::cli::Terminal,
            "wasi:cli/terminal-output.terminal-output": super::cli::Terminal,
        },
    });
}

/// Links all but files and sockets.
pub(super) fn add_to_linker<T: HasHost>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    bindings::Wasi::add_to_linker::<T, HasSelf<Host>>(linker, T::called)
}
