//! `mb-server token`: the tokens with which clients authenticate.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{Exit, Result, failure, output, printable, usage};
use crate::{
    access::tokens::{self, Entry},
    config::{self, Flags, Right},
};

const LONGEST_LIFETIME: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// Create, list and revoke the tokens of clients
///
/// The file holds a digest of each token, never the token itself. A running
/// server picks changes up by itself.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// The file of tokens [default: `tokens` of the settings, or tokens.json in the state folder]
    #[arg(long, value_name = "FILE", global = true)]
    file: Option<PathBuf>,
    /// Settings in TOML
    #[arg(long, value_name = "FILE", env = "MB_CONFIG", global = true)]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a token and print it, the only time that it is shown
    New {
        /// The principal that it authenticates
        principal: String,
        /// When it expires, such as 30days or 12h [default: never]
        #[arg(long, value_name = "TIME", value_parser = lifetime)]
        expires: Option<Duration>,
        /// What may be called with it, such as math.* or orders.create@1; may be repeated [default: what
        /// `[principals.NAME]` of the settings allows]
        #[arg(long = "right", value_name = "RIGHT")]
        rights: Vec<Right>,
    },
    /// List the tokens
    List,
    /// Revoke a token; connections that were opened with it are closed at their next request
    Revoke {
        /// Its id, as `list` shows it
        id: String,
    },
}

/// A time after which a token expires.
fn lifetime(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > LONGEST_LIFETIME {
        return Err("more than 100 years; leave --expires out for a token that never does".into());
    }
    if time.is_zero() {
        return Err("0 s; a token is revoked with `mb-server token revoke ID`".into());
    }
    Ok(time)
}

pub(super) fn run(arguments: Arguments) -> Result {
    let file = match arguments.file {
        Some(file) => file,
        None => config::load(arguments.config.as_deref(), Flags::default())
            .map_err(usage)?
            .config
            .client_tokens(),
    };
    match arguments.command {
        Command::New {
            principal,
            expires,
            rights,
        } => {
            let expires = expires.map(|left| SystemTime::now() + left);
            let rights = (!rights.is_empty()).then_some(rights);
            let (id, token) =
                tokens::create(&file, &principal, expires, rights).map_err(failure)?;
            complain!(
                "token {id} of {principal} is in {}; it is shown only now:",
                file.display()
            );
            say!("{token}");
            if output::is_over() {
                return Err(failure(format!(
                    "the token could not be printed, so nobody has it: mb-server token revoke {id}"
                )));
            }
        }
        Command::List => {
            let entries = tokens::list(&file).map_err(failure)?;
            if entries.is_empty() {
                complain!(
                    "no tokens in {}; `mb-server token new PRINCIPAL` makes one",
                    file.display()
                );
            }
            for Entry {
                id,
                sha256: _,
                principal,
                created,
                expires,
                rights,
            } in entries
            {
                let rights = rights.map_or("those of the principal".to_owned(), |rights| {
                    rights
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join(" ")
                });
                let expires = expires.unwrap_or_else(|| "never".into());
                let principal = printable(&principal);
                say!("{id}  {principal}  created {created}  expires {expires}  rights: {rights}");
            }
        }
        Command::Revoke { id } => {
            let entry = tokens::revoke(&file, &id).map_err(failure)?;
            say!("revoked token {id} of {}", printable(&entry.principal));
        }
    }
    Ok(Exit::Success)
}
