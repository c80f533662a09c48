//! `mb-server compile`: machine code ahead of time, for hosts without a
//! compiler.

use std::{fs, path::PathBuf, time::Instant};

use super::{Exit, Result, failure, inspect::Inspector, usage};
use crate::{
    catalog::MAX_SIZE,
    files,
    log::Format,
    sandbox::{Ahead, Cpu, Precompiled, is_machine_code},
};

/// Compile a component ahead of time, for hosts that have no compiler
///
/// The file fits a server of the same version on the same architecture. The
/// server loads it from the services folder like a .wasm, but only if users
/// other than its own and root cannot write there: loading it needs as much
/// trust as starting a program. Exit codes: 0 compiled, 1 it is no service or does not
/// compile.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The component
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// File to write [default: FILE.cwasm, in the folder of the component]
    #[arg(long, short, value_name = "FILE.cwasm")]
    output: Option<PathBuf>,
    /// Use all features of this machine's processor; others may not load the file
    #[arg(long)]
    native: bool,
    /// For a server whose log says that instances are allocated on demand
    #[arg(long)]
    on_demand: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments {
        file,
        output,
        native,
        on_demand,
    } = arguments;
    super::serve::start_log("warn", Format::Text)?;
    let output = output
        .clone()
        .unwrap_or_else(|| file.with_extension("cwasm"));
    if output == *file {
        return Err(usage(format!(
            "{}: --output would replace it",
            file.display()
        )));
    }
    if !is_machine_code(&output) {
        return Err(usage(format!(
            "{}: machine code is served only from a file called .cwasm; end --output with it",
            output.display()
        )));
    }
    let bytes = fs::File::open(file)
        .and_then(|opened| files::read_bounded(opened, MAX_SIZE))
        .map_err(|error| usage(format!("{}: {error}", file.display())))?;
    if is_machine_code(file) || Precompiled::is_one(&bytes) {
        return Err(usage(format!(
            "{} is compiled code already; name its .wasm",
            file.display()
        )));
    }
    // That it is a service is said here, not on the host it is copied to.
    let inspector = Inspector::new()?;
    let service = inspector.load(file)?;
    complain!(
        "mb-server: compiling {} ({} bytes)",
        file.display(),
        bytes.len()
    );
    let begun = Instant::now();
    let ahead = Ahead {
        cpu: if *native { Cpu::This } else { Cpu::Any },
        on_demand: *on_demand,
    };
    let compiled = inspector
        .precompile(&bytes, ahead)
        .map_err(|error| failure(format!("{}: {error}", file.display())))?;
    let took = begun.elapsed().as_secs_f64();
    // Whole or not at all: a server may follow the folder.
    files::replace(&output, files::ORDINARY, &compiled)
        .map_err(|error| failure(format!("{}: {error}", output.display())))?;
    let description = &service.description;
    say!(
        "{}: {} {}, {} bytes, compiled in {took:.1} s",
        output.display(),
        description.name,
        description.version,
        compiled.len()
    );
    say!(
        "for mb-server {} on {}; digest for grants: {}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        crate::catalog::digest_of(&compiled)
    );
    Ok(Exit::Success)
}
