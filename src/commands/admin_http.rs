//! Requests of the commands to the admin endpoint of a running server.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    os::unix::net::UnixStream,
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
    #[arg(long, value_name = "HOST:PORT|unix:FILE")]
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
        let config = config::load(self.config.as_deref(), Flags::default())
            .map_err(usage)?
            .config;
        let config::Admin {
            host,
            port,
            socket,
            allowed_hosts: _,
        } = &config.admin;
        let own = if host.is_empty() {
            format!("unix:{}", socket.display())
        } else {
            format!("{host}:{port}")
        };
        let address = self.admin.clone().unwrap_or(own);
        Ok(Endpoint { address, config })
    }
}

impl Endpoint {
    /// A page, whatever its status.
    pub(super) fn get(&self, path: &str) -> Result<Value> {
        let (mut status, mut answer) = self.exchange("GET", path, "", "")?;
        if status == 401 {
            // From another machine, reading takes it too.
            (status, answer) = self.exchange("GET", path, &self.authorization()?, "")?;
        }
        if status == 401 {
            return Err(failure(format!("{}: this is not its token", self.address)));
        }
        serde_json::from_str(&answer)
            .map_err(|error| failure(format!("{path}: an answer that is not understood: {error}")))
    }

    /// Changes something; status and answer.
    pub(super) fn post(&self, path: &str, body: &str) -> Result<(u16, Value)> {
        let (status, answer) = self.exchange("POST", path, &self.authorization()?, body)?;
        Ok((status, serde_json::from_str(&answer).unwrap_or_default()))
    }

    fn authorization(&self) -> Result<String> {
        let file = self.config.token_file();
        let token = token::load(&file).map_err(|error| {
            usage(format!(
                "token {}: {error}; the server makes it, run this as the same user",
                file.display()
            ))
        })?;
        Ok(format!("Authorization: Bearer {token}\r\n"))
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Result<(u16, String)> {
        let address = &self.address;
        let unreachable = |error: io::Error| {
            (
                Exit::Unreachable,
                format!("can't reach the admin endpoint {address}: {error}"),
            )
        };
        if let Some(file) = address.strip_prefix("unix:") {
            let stream = UnixStream::connect(file).map_err(unreachable)?;
            stream.set_read_timeout(Some(ANSWER)).map_err(unreachable)?;
            let headers = &format!("Host: localhost\r\n{headers}");
            return converse(stream, method, path, headers, body).map_err(unreachable);
        }
        let resolved: Vec<SocketAddr> = address.to_socket_addrs().map_err(unreachable)?.collect();
        let mut last = io::ErrorKind::NotFound.into();
        for place in resolved {
            match TcpStream::connect_timeout(&place, CONNECT) {
                Err(error) => last = error,
                Ok(stream) => {
                    stream.set_read_timeout(Some(ANSWER)).map_err(unreachable)?;
                    // One that is reached by its address is asked for by it.
                    let headers = &format!("Host: {}\r\n{headers}", host_of(place));
                    return converse(stream, method, path, headers, body).map_err(unreachable);
                }
            }
        }
        Err(unreachable(last))
    }
}

/// What the server answers to, for an address of its own.
fn host_of(place: SocketAddr) -> String {
    if place.ip().is_loopback() {
        "localhost".into()
    } else {
        place.to_string()
    }
}

/// Asks, and reads the answer to its end; status and body.
fn converse(
    mut stream: impl io::Read + io::Write,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> io::Result<(u16, String)> {
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    io::Read::take(stream, MAX_ANSWER).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0);
    Ok((status, body.to_owned()))
}

/// A text of the answer for a terminal.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}
