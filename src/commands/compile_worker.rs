//! `mb-server compile-worker`: what the server starts to compile a component
//! out of process. Not for people.

use super::{Exit, Result, usage};
use crate::sandbox::CompileJob;

/// Compile a component from standard input to standard output; the server
/// calls this
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// What to do, as JSON
    job: String,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let job: CompileJob = serde_json::from_str(&arguments.job).map_err(usage)?;
    // The reason alone: the server puts the rest around it.
    Ok(match job.run() {
        Ok(()) => Exit::Success,
        Err(error) => {
            complain!("{error}");
            Exit::Failure
        }
    })
}
