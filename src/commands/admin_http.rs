//! Requests of the commands to the admin endpoint of a running server.

use std::{
    borrow::Borrow,
    io::{self, BufRead, BufReader, Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::{Domain, SockAddr, Type};

use super::{Exit, Result, failure, printable, usage};
use crate::{
    admin::{MAX_ANSWER, is_loopback, token},
    config::{self, Config, Flags},
    files,
    transport::{Socket, connect_any, host_and_port, resolve_until},
};

/// For the server to be reached.
const CONNECT: Duration = Duration::from_secs(5);
/// For a page to arrive as a whole.
const PAGE: Duration = Duration::from_secs(5);
/// For a change to be made; the server may have to compile.
const CHANGE: Duration = Duration::from_secs(120);
/// For a backup to arrive as a whole.
const DOWNLOAD: Duration = Duration::from_secs(3600);
/// Longest head of its answer, in bytes.
const MAX_HEAD: u64 = 16 * 1024;
/// For a component to arrive and to be checked.
const UPLOAD: Duration = Duration::from_secs(420);
/// Headers of a component: it is sent once the server says that it wants it.
const EXPECT: &str = "Content-Type: application/wasm\r\nExpect: 100-continue\r\n";
/// Servers that one command asks at most: each takes a thread.
const MAX_SERVERS: usize = 64;
/// What to do about a server that is silent.
const STOPPED: &str = "; is the server stopped (kill -CONT PID lets it go on), or overloaded?";
/// What to do about an answer that is not ours.
pub(super) const NO_ADMIN: &str =
    "this is no admin endpoint of mb-server; --admin takes the address that `serve` prints for it";
/// Longest answer that is kept in memory, in bytes.
const MAX_READ: u64 = MAX_ANSWER as u64;

/// Where servers are.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct AdminTargets {
    /// Admin endpoint of a server; repeat it for several [default: as in the settings]
    #[arg(long, value_name = "HOST:PORT|unix:FILE")]
    admin: Vec<String>,
    /// Settings in TOML
    #[arg(long, value_name = "FILE", env = "MB_CONFIG")]
    config: Option<PathBuf>,
    /// Send the token also to another machine, where everybody on the way can read it
    #[arg(long)]
    allow_unsecure: bool,
}

/// The endpoint of one server.
pub(super) struct Endpoint {
    pub(super) address: String,
    token_file: PathBuf,
    deploy_token_file: PathBuf,
    /// The user has named the file of the token.
    is_token_named: bool,
    allow_unsecure: bool,
    /// Where that is over TCP, looked up once: the token goes where it was
    /// found to be allowed, and nowhere else.
    addresses: OnceLock<Vec<SocketAddr>>,
}

impl AdminTargets {
    pub(super) fn endpoints(&self) -> Result<Vec<Endpoint>> {
        let Self {
            admin,
            config,
            allow_unsecure,
        } = self;
        if admin.len() > MAX_SERVERS {
            return Err(usage(format!(
                "--admin is there {} times, at most {MAX_SERVERS} are taken",
                admin.len()
            )));
        }
        if let Some(twice) = (1..admin.len()).find(|at| admin[..*at].contains(&admin[*at])) {
            return Err(usage(format!("--admin {} is there twice", admin[twice])));
        }
        for address in admin {
            let checked = match address.strip_prefix("unix:") {
                Some(file) => SockAddr::unix(file)
                    .map_err(|error| format!("{address}: {error}"))
                    .map(|_| ()),
                None => host_and_port(address)
                    .map(|_| ())
                    .map_err(|error| format!("{error}; a socket is unix:FILE")),
            };
            checked.map_err(|error| usage(format!("--admin {error}")))?;
        }
        let config = config::load(config.as_deref(), Flags::default()).map_err(usage)?;
        let endpoint = |admin| Endpoint::new(admin, &config.config, *allow_unsecure);
        if admin.is_empty() {
            return Ok(vec![endpoint(None)]);
        }
        Ok(admin.iter().cloned().map(Some).map(endpoint).collect())
    }
}

/// Does the same with several servers at a time.
pub(super) fn on_all<S: Borrow<Endpoint> + Sync, T: Send>(
    servers: &[S],
    work: impl Fn(&Endpoint) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let start = |server| {
            let work = move || work(Borrow::borrow(server));
            // Where the system refuses a thread, this one does it, later.
            let started = thread::Builder::new().spawn_scoped(scope, work);
            started.map_err(|_| work)
        };
        let started: Vec<_> = servers.iter().map(start).collect();
        started
            .into_iter()
            .map(|started| match started {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(work) => work(),
            })
            .collect()
    })
}

impl Endpoint {
    /// The one at `address`, else that of the settings.
    pub(super) fn new(address: Option<String>, config: &Config, allow_unsecure: bool) -> Self {
        let config::Admin {
            host,
            port,
            socket,
            allowed_hosts: _,
            deploy: _,
            deploy_token: _,
        } = &config.admin;
        let own = || match host.is_empty() {
            true => format!("unix:{}", socket.display()),
            // An address of IPv6 has colons itself.
            false if host.contains(':') => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        Self {
            address: address.unwrap_or_else(own),
            token_file: config.token_file(),
            deploy_token_file: config.deploy_token_file(),
            is_token_named: false,
            allow_unsecure,
            addresses: OnceLock::new(),
        }
    }

    /// The token for deploys, in place of the one for changes.
    pub(super) fn for_deploys(self) -> Self {
        Self {
            token_file: self.deploy_token_file.clone(),
            ..self
        }
    }

    /// The token of a file, in place of that of the settings.
    pub(super) fn with_token(self, file: Option<&Path>) -> Self {
        match file {
            Some(file) => Self {
                token_file: file.to_owned(),
                is_token_named: true,
                ..self
            },
            None => self,
        }
    }

    /// A page, whatever its status.
    pub(super) fn get(&self, path: &str) -> Result<Value> {
        let (mut status, mut answer) = self.exchange("GET", path, "", b"", PAGE)?;
        if status == 401 {
            // From another machine, reading takes it too.
            let authorization = self.authorization()?;
            (status, answer) = self.exchange("GET", path, &authorization, b"", PAGE)?;
        }
        if status == 401 {
            return Err(failure(format!("{}: this is not its token", self.address)));
        }
        let page: Value = serde_json::from_str(&answer).map_err(|error| {
            failure(format!("{path}: an answer that is not understood: {error}"))
        })?;
        // The wire has pages of the same names, and says otherwise what it lacks.
        let refused = page["error"].is_string() || page["status"].is_string();
        if !page.is_object() || (status != 200 && !refused) {
            return Err(failure(format!("{}: {NO_ADMIN}", self.address)));
        }
        Ok(page)
    }

    /// Changes something; status and answer.
    pub(super) fn post(&self, path: &str, body: &str) -> Result<(u16, Value)> {
        let authorization = self.to_change()?;
        let body = body.as_bytes();
        let (status, answer) = self.exchange("POST", path, &authorization, body, CHANGE)?;
        Ok((status, serde_json::from_str(&answer).unwrap_or_default()))
    }

    /// Has the server do something whose answer may be long, and writes it out;
    /// the status and, where it is not 200, the answer.
    pub(super) fn download(&self, path: &str, out: &mut dyn io::Write) -> Result<(u16, String)> {
        let authorization = self.to_change()?;
        let (status, mut answer) = self.ask("POST", path, &authorization, b"", DOWNLOAD)?;
        if status != 200 {
            return Ok((status, self.rest(answer, DOWNLOAD)?));
        }
        let copied = io::copy(&mut answer, out);
        copied.map_err(|error| self.broke_off(&error, DOWNLOAD))?;
        Ok((200, String::new()))
    }

    /// Sends a component, once the server wants it; status and answer.
    pub(super) fn put(&self, path: &str, body: &[u8]) -> Result<(u16, Value)> {
        let headers = self.to_change()? + EXPECT;
        let (status, answer) = self.exchange("PUT", path, &headers, body, UPLOAD)?;
        Ok((status, serde_json::from_str(&answer).unwrap_or_default()))
    }

    fn broke_off(&self, error: &io::Error, patience: Duration) -> (Exit, String) {
        let address = &self.address;
        let problem = if error.kind() == io::ErrorKind::TimedOut {
            let seconds = patience.as_secs();
            format!(
                "the admin endpoint {address} takes connections and has not answered within {seconds} s{STOPPED}"
            )
        } else {
            format!("the admin endpoint {address} broke off: {error}")
        };
        (Exit::Unreachable, problem)
    }

    /// The header with the token, where it may be sent.
    fn authorization(&self) -> Result<String> {
        if !self.allow_unsecure && !self.address.starts_with("unix:") {
            let addresses = self.addresses(Instant::now() + CONNECT);
            let addresses = addresses.map_err(|error| self.unreachable(&error))?;
            if let Some(target) = addresses.iter().find(|target| !is_loopback(target)) {
                return Err(usage(format!(
                    "the token was not sent: {target} is another machine, and the admin endpoint speaks no TLS; use a \
                     tunnel, such as ssh -L 9090:127.0.0.1:9090, or --allow-unsecure if you mean it"
                )));
            }
        }
        let file = &self.token_file;
        let token = token::load(file).map_err(|error| {
            let hint = match self.is_token_named {
                true => "",
                false => "; the server makes it, run this as the same user",
            };
            usage(format!("token {}: {error}{hint}", file.display()))
        })?;
        Ok(format!("Authorization: Bearer {token}\r\n"))
    }

    /// The same for what takes long: a server that is stopped is found out before.
    fn to_change(&self) -> Result<String> {
        let authorization = self.authorization()?;
        self.exchange("GET", "/healthz", "", b"", PAGE)?;
        Ok(authorization)
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
        patience: Duration,
    ) -> Result<(u16, String)> {
        let (status, answer) = self.ask(method, path, headers, body, patience)?;
        Ok((status, self.rest(answer, patience)?))
    }

    /// Reads an answer to its end.
    fn rest(&self, answer: BufReader<Connection>, patience: Duration) -> Result<String> {
        files::read_text(answer, MAX_READ).map_err(|mut error| {
            if error.kind() == io::ErrorKind::FileTooLarge {
                error = io::Error::other(format!("it sent more than {MAX_READ} bytes"));
            }
            self.broke_off(&error, patience)
        })
    }

    /// Asks, and reads the answer to the end of its head, within this time.
    fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
        patience: Duration,
    ) -> Result<(u16, BufReader<Connection>)> {
        let (socket, host) = self
            .connect(Instant::now() + CONNECT)
            .map_err(|error| self.unreachable(&error))?;
        let deadline = Instant::now() + patience;
        let mut connection = BufReader::new(Connection { socket, deadline });
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        let mut converse = || {
            connection.get_mut().write_all(head.as_bytes())?;
            if headers.ends_with(EXPECT) {
                let status = read_head(&mut connection)?;
                if status != 100 {
                    return Ok(status);
                }
            }
            // A server that has refused it meanwhile says why.
            let _ = connection.get_mut().write_all(body);
            read_head(&mut connection)
        };
        let status = converse().map_err(|error| self.broke_off(&error, patience))?;
        Ok((status, connection))
    }

    fn unreachable(&self, error: &io::Error) -> (Exit, String) {
        let hint = match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => STOPPED,
            _ => "",
        };
        let address = &self.address;
        let problem = format!("can't reach the admin endpoint {address}: {error}{hint}");
        (Exit::Unreachable, problem)
    }

    /// A connection, and what the server is asked for by.
    fn connect(&self, deadline: Instant) -> io::Result<(Socket, String)> {
        if let Some(file) = self.address.strip_prefix("unix:") {
            let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
            let remaining = deadline.saturating_duration_since(Instant::now());
            socket.connect_timeout(&SockAddr::unix(file)?, remaining)?;
            return Ok((Socket::new(socket.into()), "localhost".into()));
        }
        let (stream, target) = connect_any(self.addresses(deadline)?, deadline)?;
        Ok((Socket::new(stream), host_of(target)))
    }

    /// Where it is over TCP.
    fn addresses(&self, deadline: Instant) -> io::Result<&[SocketAddr]> {
        if let Some(addresses) = self.addresses.get() {
            return Ok(addresses);
        }
        let (host, port) = host_and_port(&self.address).map_err(io::Error::other)?;
        let found = resolve_until(&host, port, deadline)?;
        Ok(self.addresses.get_or_init(|| found))
    }
}

/// What the server answers to, for an address of its own.
fn host_of(target: SocketAddr) -> String {
    if target.ip().is_loopback() {
        "localhost".into()
    } else {
        target.to_string()
    }
}

/// A connection all of whose reads and writes end at one instant.
struct Connection {
    socket: Socket,
    deadline: Instant,
}

impl io::Read for Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buf, self.deadline)
    }
}

impl io::Write for Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.socket.write(buf, self.deadline)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the head of an answer; its status, 0 where it has none.
fn read_head(from: &mut impl BufRead) -> io::Result<u16> {
    let mut from = from.take(MAX_HEAD);
    let (mut status, mut line) = (None, String::new());
    while line != "\r\n" {
        line.clear();
        if from.read_line(&mut line)? == 0 {
            let problem = "it closed the connection without an answer";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, problem));
        }
        status.get_or_insert_with(|| line.split(' ').nth(1)?.parse().ok());
    }
    Ok(status.flatten().unwrap_or(0))
}

/// A text of the answer for a terminal.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_the_settings_can_be_reached() {
        for (host, expected) in [
            ("127.0.0.1", "127.0.0.1:9090"),
            ("localhost", "localhost:9090"),
            ("::1", "[::1]:9090"),
        ] {
            let mut config = Config::default();
            config.admin.host = host.into();
            let endpoint = Endpoint::new(None, &config, false);
            assert_eq!(endpoint.address, expected);
            assert!(host_and_port(&endpoint.address).is_ok(), "{expected}");
        }
    }
}
