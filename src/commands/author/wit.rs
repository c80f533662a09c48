//! `mb-server wit`: the contract, for any tool chain.

use std::path::PathBuf;

use super::{Exit, Result, failure, usage};
use crate::project::{CONTRACT, check_free, write_contract};

/// Print the contract between a service and the server, as WIT
///
/// With --dir it is written with the interfaces that it builds upon, as the
/// tools of any language take it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A folder to write it to, which must not exist
    #[arg(long)]
    dir: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Some(dir) = &arguments.dir else {
        say!("{}", CONTRACT.trim_end());
        return Ok(Exit::Success);
    };
    check_free(dir).map_err(usage)?;
    write_contract(dir).map_err(failure)?;
    say!("wrote {}: service.wit, and deps beside it", dir.display());
    Ok(Exit::Success)
}
