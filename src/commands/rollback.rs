//! `mb-server rollback`: asks a running server to serve the file of a service
//! from before the present one.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    path::PathBuf,
    time::Duration,
};

use super::{Exit, Result, failure, printable, usage};
use crate::{
    admin::token,
    config::{self, Flags},
};

/// For the server to be reached.
const CONNECT: Duration = Duration::from_secs(5);
/// For the server to answer; it may have to compile.
const ANSWER: Duration = Duration::from_secs(120);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1024 * 1024;

/// Go back to the file that a service had before the present one
///
/// Asks the running server over its admin endpoint; the token is read from
/// its state folder, so run it as the same user. The earlier file is served
/// until another one is put into the services folder. Exit codes: 0 done,
/// 1 the server refused, 2 usage, 3 could not reach the server.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The service
    name: String,
    /// Which version, where there are several
    #[arg(long)]
    version: Option<String>,
    /// Admin endpoint of the server [default: as in the settings]
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    /// Settings in TOML
    #[arg(long, value_name = "FILE", env = "MB_CONFIG")]
    config: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments { name, version, admin, config } = arguments;
    if !crate::catalog::is_name(name) {
        return Err(usage(format!("{name:?} is no name of a service")));
    }
    let config = config::load(config.as_deref(), Flags::default()).map_err(usage)?.config;
    let file = config.token_file();
    let token = token::load(&file).map_err(|error| {
        usage(format!("token {}: {error}; the server makes it, run this as the same user", file.display()))
    })?;
    let address = admin.clone().unwrap_or_else(|| format!("{}:{}", config.admin.host, config.admin.port));
    let body = version.as_ref().map(|version| serde_json::json!({"version": version}).to_string()).unwrap_or_default();
    let (status, answer) = post(&address, &format!("/services/{name}/rollback"), &token, &body)?;
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
    let text = |key: &str| printable(answer[key].as_str().unwrap_or("an answer that is not understood"));
    if status == 200 {
        say!("{}", text("done"));
        return Ok(Exit::Success);
    }
    Err(failure(text("error")))
}

/// One HTTP exchange: status and body.
fn post(address: &str, path: &str, token: &str, body: &str) -> std::result::Result<(u16, String), (Exit, String)> {
    let unreachable = |error: std::io::Error| (Exit::Unreachable, format!("admin endpoint {address}: {error}"));
    let resolved: Vec<SocketAddr> = address.to_socket_addrs().map_err(unreachable)?.collect();
    let first = resolved.first().ok_or_else(|| usage(format!("{address}: no such address")))?;
    let mut stream = TcpStream::connect_timeout(first, CONNECT).map_err(unreachable)?;
    stream.set_read_timeout(Some(ANSWER)).map_err(unreachable)?;
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {first}\r\nAuthorization: Bearer {token}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(unreachable)?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).map_err(unreachable)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| failure(format!("{address} is no admin endpoint of mb-server")))?;
    Ok((status, body.to_owned()))
}
