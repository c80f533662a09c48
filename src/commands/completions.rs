//! `mb-server completions`: what a shell needs to complete commands.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Exit, Result};

/// Print the completions of a shell
///
/// For bash: mb-server completions bash >
/// ~/.local/share/bash-completion/completions/mb-server
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let mut text = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut super::Arguments::command(),
        "mb-server",
        &mut text,
    );
    say!("{}", String::from_utf8_lossy(&text).trim_end());
    Ok(Exit::Success)
}
