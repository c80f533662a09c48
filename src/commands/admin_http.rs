//! Requests of the commands to the admin endpoint of a running server.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    path::PathBuf,
    time::Duration,
};

use serde_json::Value;

use super::{Exit, failure, printable, usage};
use crate::{
    admin::token,
    config::{self, Config, Flags},
};

/// For the server to be reached.
const CONNECT: Duration = Duration::from_secs(5);
/// For the server to answer; it may have to compile.
const ANSWER: Duration = Duration::from_secs(120);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 16 * 1024 * 1024;

/// Where the server is.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Place {
    /// Admin endpoint of the server [default: as in the settings]
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    /// Settings in TOML
    #[arg(long, value_name = "FILE", env = "MB_CONFIG")]
    config: Option<PathBuf>,
}

type Result<T> = std::result::Result<T, (Exit, String)>;

/// The endpoint of one server.
pub(super) struct Endpoint {
    address: String,
    config: Config,
}

impl Place {
    pub(super) fn endpoint(&self) -> Result<Endpoint> {
        let config = config::load(self.config.as_deref(), Flags::default()).map_err(usage)?.config;
        let address = self.admin.clone().unwrap_or_else(|| format!("{}:{}", config.admin.host, config.admin.port));
        Ok(Endpoint { address, config })
    }
}

impl Endpoint {
    /// A page, whatever its status.
    pub(super) fn get(&self, path: &str) -> Result<Value> {
        let (_, answer) = self.exchange("GET", path, "", "")?;
        serde_json::from_str(&answer)
            .map_err(|error| failure(format!("{path}: an answer that is not understood: {error}")))
    }

    /// Changes something; status and answer.
    pub(super) fn post(&self, path: &str, body: &str) -> Result<(u16, Value)> {
        let file = self.config.token_file();
        let token = token::load(&file).map_err(|error| {
            usage(format!("token {}: {error}; the server makes it, run this as the same user", file.display()))
        })?;
        let (status, answer) = self.exchange("POST", path, &format!("Authorization: Bearer {token}\r\n"), body)?;
        Ok((status, serde_json::from_str(&answer).unwrap_or_default()))
    }

    fn exchange(&self, method: &str, path: &str, headers: &str, body: &str) -> Result<(u16, String)> {
        let address = &self.address;
        let unreachable =
            |error: std::io::Error| (Exit::Unreachable, format!("can't reach the admin endpoint {address}: {error}"));
        let resolved: Vec<SocketAddr> = address.to_socket_addrs().map_err(unreachable)?.collect();
        let mut last = std::io::ErrorKind::NotFound.into();
        for place in resolved {
            match TcpStream::connect_timeout(&place, CONNECT) {
                Err(error) => last = error,
                Ok(mut stream) => {
                    let mut answer = String::new();
                    let length = body.len();
                    let request = format!(
                        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\
                         Connection: close\r\n\r\n{body}"
                    );
                    stream
                        .set_read_timeout(Some(ANSWER))
                        .and_then(|()| stream.write_all(request.as_bytes()))
                        .and_then(|()| stream.take(MAX_ANSWER).read_to_string(&mut answer))
                        .map_err(unreachable)?;
                    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
                    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
                    return Ok((status, body.to_owned()));
                }
            }
        }
        Err(unreachable(last))
    }
}

/// A text of the answer for a terminal.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}
