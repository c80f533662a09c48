//! The subcommands, one file each.

/// Prints a line; see [`output`].
macro_rules! say {
    ($($arguments:tt)*) => { $crate::commands::output::say(format_args!($($arguments)*)) };
}

/// The same for standard error, which has no buffer: the line is one write, or
/// a line of the log, whose thread writes there too, would stand within it.
macro_rules! complain {
    ($($arguments:tt)*) => {{
        use std::io::Write as _;
        let line = format!("{}\n", format_args!($($arguments)*));
        let _ = std::io::stderr().write_all(line.as_bytes());
    }};
}

mod admin_http;
mod admin_listeners;
#[cfg(feature = "compiler")]
mod author;
mod call;
mod check;
mod completions;
mod confine;
mod connect;
mod deploy;
mod edge;
mod live_settings;
mod notify;
mod operator;
mod output;
mod ping;
#[cfg(all(test, feature = "compiler"))]
mod reference;
mod serve;
mod service;
mod serving;
mod status;
mod store;
mod token;
mod watch;
mod why;

use std::{io, process::ExitCode, thread, time::Duration};

use clap::{Parser, Subcommand};

use crate::log::{self, escaped};

/// What a second signal ends the process with: that of an interrupted one.
const INTERRUPTED: i32 = 130;

/// What the process ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// The service or the server answered ERROR, or the server could not go on.
    Failure = 1,
    /// Wrong arguments or settings.
    Usage = 2,
    /// The server could not be reached.
    Unreachable = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Turns WebAssembly components into network services.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = if cfg!(feature = "compiler") {
        "Start with: mb-server serve, or write a service: mb-server new NAME --lang rust|js|ts|python"
    } else {
        "Built without a compiler: serves what mb-server compile wrote elsewhere. Start with: mb-server serve"
    }
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Arguments),
    #[cfg(feature = "compiler")]
    #[command(flatten)]
    Author(author::Command),
    Call(call::Arguments),
    Ping(ping::Arguments),
    Check(check::Arguments),
    Status(status::Arguments),
    Why(why::Arguments),
    Store(store::Arguments),
    Service(service::Arguments),
    Token(token::Arguments),
    Completions(completions::Arguments),
}

impl Arguments {
    /// Runs the command.
    #[must_use]
    pub fn run(self) -> Exit {
        let _flush = FlushLog;
        // It serves whether or not somebody reads what it says.
        let is_server = matches!(self.command, Command::Serve(_));
        let result = match self.command {
            Command::Serve(arguments) => serve::run(arguments),
            #[cfg(feature = "compiler")]
            Command::Author(command) => command.run(),
            Command::Call(arguments) => call::run(&arguments),
            Command::Ping(arguments) => ping::run(&arguments),
            Command::Check(arguments) => check::run(&arguments),
            Command::Status(arguments) => status::run(&arguments),
            Command::Why(arguments) => why::run(&arguments),
            Command::Store(arguments) => store::run(&arguments),
            Command::Service(arguments) => service::run(&arguments),
            Command::Token(arguments) => token::run(arguments),
            Command::Completions(arguments) => completions::run(&arguments),
        };
        let result = match (result, output::lost()) {
            (Ok(Exit::Success), Some(error)) if !is_server => {
                Err(failure(format!("can't write to standard output: {error}")))
            }
            (result, _) => result,
        };
        result.unwrap_or_else(|(exit, message)| {
            log::print(&format!("mb-server: {}", printable_lines(&message)));
            exit
        })
    }
}

/// Writes the rest of the log when the command ends, by a panic too.
struct FlushLog;

impl Drop for FlushLog {
    fn drop(&mut self) {
        log::flush();
    }
}

/// How a command ends: well, or with a message.
type Result<T = Exit, E = (Exit, String)> = std::result::Result<T, E>;

/// A usage error.
fn usage(message: impl std::fmt::Display) -> (Exit, String) {
    (Exit::Usage, message.to_string())
}

/// A failure while running.
fn failure(message: impl std::fmt::Display) -> (Exit, String) {
    (Exit::Failure, message.to_string())
}

/// Does something after each pause, from a thread of its own, for as long as
/// that returns true.
fn every(
    name: &str,
    pause: Duration,
    mut work: impl FnMut() -> bool + Send + 'static,
) -> io::Result<()> {
    spawn(name, move || {
        loop {
            thread::sleep(pause);
            if !work() {
                return;
            }
        }
    })
}

/// Starts a thread of this name.
fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let named = thread::Builder::new().name(name.into());
    named.spawn(work).map(drop)
}

/// Untrusted text for a terminal, on one line: what would move the cursor,
/// change colours or turn the direction of writing is shown as an escape.
fn printable(text: &str) -> String {
    escaped(text, &[])
}

/// The same for a text of several lines.
fn printable_lines(text: &str) -> String {
    escaped(text, &['\n', '\t'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_untrusted_peers() {
        assert_eq!(
            printable("Zählt, \u{1f600} \"all\" \\ of it"),
            "Zählt, \u{1f600} \"all\" \\ of it"
        );
        assert_eq!(
            printable("\x1b[2J\r\n\u{9b}\u{202e}"),
            "\\u{1b}[2J\\r\\n\\u{9b}\\u{202e}"
        );
        assert_eq!(printable_lines("a\tb\n\x1b[2J\r"), "a\tb\n\\u{1b}[2J\\r");
    }
}
