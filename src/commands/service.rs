//! `mb-server service`: what running servers serve, one server or several.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    Exit, Result,
    admin_http::{self, AdminTargets, Endpoint, on_all, text},
    deploy, failure, usage,
};
use crate::catalog::is_name;

/// Deploy a service to running servers, roll it back, disable or enable it
///
/// Asks each server over its admin endpoint, several where --admin is there
/// several times. Exit codes: 0 done, 1 a server refused, 2 usage, 3 a server
/// could not be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    Deploy(deploy::Arguments),
    /// Serve the file that a service had before the present one
    ///
    /// The earlier file is served until another one is put into the services
    /// folder, or until --undo.
    Rollback {
        #[command(flatten)]
        what: What,
        /// Serve the file in the services folder again
        #[arg(long)]
        undo: bool,
    },
    /// Stop serving a service, until it is enabled or the server starts again
    Disable {
        #[command(flatten)]
        what: What,
    },
    /// Serve a disabled service again
    Enable {
        #[command(flatten)]
        what: What,
    },
}

/// Which service, and on which servers.
#[derive(Debug, clap::Args)]
struct What {
    /// The service
    name: String,
    /// Which version, where there are several
    #[arg(long)]
    version: Option<String>,
    #[command(flatten)]
    servers: Servers,
}

/// Which servers, and what they are shown.
#[derive(Debug, clap::Args)]
pub(super) struct Servers {
    #[command(flatten)]
    targets: AdminTargets,
    /// File of the token [default: that of the server in the settings]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Servers {
    pub(super) fn to_change(&self) -> Result<Vec<Endpoint>> {
        self.with(|endpoint| endpoint)
    }

    pub(super) fn to_deploy(&self) -> Result<Vec<Endpoint>> {
        self.with(Endpoint::for_deploys)
    }

    fn with(&self, chosen: impl Fn(Endpoint) -> Endpoint) -> Result<Vec<Endpoint>> {
        let file = self.token_file.as_deref();
        let endpoints = self.targets.endpoints()?.into_iter();
        Ok(endpoints
            .map(|endpoint| chosen(endpoint).with_token(file))
            .collect())
    }
}

pub(super) fn run(arguments: &Arguments) -> Result {
    match &arguments.action {
        Action::Deploy(arguments) => deploy::run(arguments),
        Action::Rollback { what, undo } => change(what, "rollback", *undo),
        Action::Disable { what } => change(what, "disable", false),
        Action::Enable { what } => change(what, "enable", false),
    }
}

/// Has each server make a change, and says what came of it.
fn change(what: &What, change: &str, undo: bool) -> Result {
    let What {
        name,
        version,
        servers,
    } = what;
    if !is_name(name) {
        return Err(usage(format!("{name:?} is no name of a service")));
    }
    let mut body = json!({});
    if let Some(version) = version {
        body["version"] = json!(version);
    }
    if undo {
        body["undo"] = json!(true);
    }
    let (path, body) = (format!("/services/{name}/{change}"), body.to_string());
    let servers = servers.to_change()?;
    if let [server] = &*servers {
        say!("{}", done(server.post(&path, &body))?);
        return Ok(Exit::Success);
    }
    let answers = on_all(&servers, |server| {
        let answer = done(server.post(&path, &body));
        show(server, &answer);
        answer
    });
    match failed(&answers) {
        None => Ok(Exit::Success),
        Some(exit) => Err((exit, "not all servers have done it".into())),
    }
}

/// What an answer says was done.
pub(super) fn done(answer: Result<(u16, Value)>) -> Result<String> {
    let (status, answer) = answer?;
    if !answer["done"].is_string() && !answer["error"].is_string() {
        return Err(failure(admin_http::NO_ADMIN));
    }
    match (status, answer) {
        (200, answer) => Ok(text(&answer["done"])),
        (401, answer) => Err(failure(format!(
            "{}; --token-file names it",
            text(&answer["error"])
        ))),
        (_, answer) => Err(failure(text(&answer["error"]))),
    }
}

/// Prints what a server has answered.
pub(super) fn show(server: &Endpoint, answer: &Result<String>) {
    match answer {
        Ok(done) => say!("  {}  {done}", server.address),
        Err((_, error)) => say!("  {}  failed: {error}", server.address),
    }
}

/// How the command ends where not all servers have done it: unreachable, if
/// nothing else is wrong.
pub(super) fn failed<T>(answers: &[Result<T>]) -> Option<Exit> {
    let errors = answers.iter().filter_map(|answer| answer.as_ref().err());
    errors
        .map(|(exit, _)| *exit)
        .reduce(|one, other| if one == other { one } else { Exit::Failure })
}

/// The name of a file as a part of a path of the admin endpoint.
pub(super) fn file_stem(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}
