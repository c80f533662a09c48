//! `mb-server compile-worker`: what the server starts to compile a component
//! out of process. Not for people.

use super::{Exit, Result};
use crate::sandbox::CompileJob;

/// Compile a component from standard input to standard output; the server
/// calls this
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    job: CompileJob,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    // The reason alone: the server puts the rest around it.
    Ok(match arguments.job.run() {
        Ok(()) => Exit::Success,
        Err(error) => {
            complain!("{error}");
            Exit::Failure
        }
    })
}
