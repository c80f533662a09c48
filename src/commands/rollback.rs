//! `mb-server rollback`: asks a running server to serve the file of a service
//! from before the present one.

use serde_json::json;

use super::{
    Exit, Result,
    admin_http::{AdminTarget, text},
    failure, usage,
};

/// Go back to the file that a service had before the present one
///
/// Asks the running server over its admin endpoint; the token is read from
/// its state folder, so run it as the same user. The earlier file is served
/// until another one is put into the services folder,
/// or until --undo. Exit codes: 0 done,
/// 1 the server refused, 2 usage, 3 could not reach the server.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The service
    name: String,
    /// Which version, where there are several
    #[arg(long)]
    version: Option<String>,
    /// Serve the file in the services folder again
    #[arg(long)]
    undo: bool,
    #[command(flatten)]
    target: AdminTarget,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments {
        name,
        version,
        undo,
        target,
    } = arguments;
    if !crate::catalog::is_name(name) {
        return Err(usage(format!("{name:?} is no name of a service")));
    }
    let mut body = json!({});
    if let Some(version) = version {
        body["version"] = json!(version);
    }
    if *undo {
        body["undo"] = json!(true);
    }
    let (status, answer) = target
        .endpoint()?
        .post(&format!("/services/{name}/rollback"), &body.to_string())?;
    if status == 200 {
        say!("{}", text(&answer["done"]));
        return Ok(Exit::Success);
    }
    Err(failure(text(&answer["error"])))
}
