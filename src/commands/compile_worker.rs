//! `mb-server compile-worker`: what the server starts to compile a component
//! apart from itself. Not for people.

use super::{Exit, Result};
use crate::sandbox::Order;

/// Compile a component into the cache; the server calls this
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    order: Order,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    // The reason alone: the server puts the rest around it.
    Ok(match arguments.order.carry_out() {
        Ok(()) => Exit::Success,
        Err(error) => {
            complain!("{error}");
            Exit::Failure
        }
    })
}
