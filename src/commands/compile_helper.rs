//! `mb-server compile-helper`: what the server starts first, to have it start
//! the processes that compile. Not for people.

use super::{Exit, Result, failure};
use crate::sandbox::help;

/// Start the processes that compile, on requests over standard input; the
/// server calls this
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

pub(super) fn run(Arguments {}: &Arguments) -> Result {
    help().map_err(failure)?;
    Ok(Exit::Success)
}
