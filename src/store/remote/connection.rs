//! One connection to one process of an engine: a question, then its answer,
//! both until an instant, and the answer of bounded size.

use std::{
    cell::RefCell,
    fmt, fs,
    io::{self, Read},
    net::TcpStream,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{Cmd, Parser, Value, cmd};
use rustix::{io::Errno, net::RecvFlags};
use rustls::{ClientConfig, pki_types::ServerName};

use crate::{
    budget::{Budget, Reservation},
    config::store::Node,
    transport::{Socket, Stream, TlsFault, resolve_until, set_options},
    trusted::{self, Purpose},
};

/// Time for connecting and logging in, at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// An answer of fewer bytes is not worth reserving memory for.
const SMALL: usize = 64 * 1024;
/// Copies of an answer while it is read: in the buffer, and what it becomes.
const COPIES: usize = 2;
/// Longest password, in bytes.
const MAX_PASSWORD: u64 = 4096;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing was sent, so nothing was done.
    Unsent(String),
    /// The question may have arrived, so it may have been done.
    Unanswered(String),
}

/// How connections of one engine are opened.
pub(super) struct Login {
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) user: Option<String>,
    pub(super) password_file: Option<PathBuf>,
    pub(super) db: u32,
    /// Where answers are reserved.
    pub(super) memory: Option<Arc<Budget>>,
}

/// What is asked of a node before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Nothing.
    Any,
    /// That it is the primary, which Sentinels may be late to know.
    Primary,
    /// That it is one of a cluster, so that several of them hold one store.
    Member,
    /// Nothing; it may want no password.
    Sentinel,
}

pub(super) struct Connection {
    stream: Stream,
    parser: Parser,
    memory: Option<Arc<Budget>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects, trying all addresses of the name in turn, and logs in.
    pub(super) fn open(
        node: &Node,
        login: &Login,
        role: Role,
        deadline: Instant,
    ) -> Result<Self, String> {
        let deadline = half_until(deadline);
        let stream = connect(node, login, deadline)?;
        let mut connection = Self {
            stream,
            parser: Parser::new(),
            memory: login.memory.clone(),
        };
        connection.log_in(login, role, deadline)?;
        Ok(connection)
    }

    fn log_in(&mut self, login: &Login, role: Role, deadline: Instant) -> Result<(), String> {
        if let Some(file) = &login.password_file {
            let mut auth = cmd("AUTH");
            if let Some(user) = &login.user {
                auth.arg(user);
            }
            auth.arg(read_password(file)?);
            match self.ask(&auth.get_packed_command(), SMALL, deadline) {
                // Its text may repeat the password.
                Ok(Value::ServerError(error)) if role != Role::Sentinel => {
                    return Err(format!("the engine refuses the login: {}", error.code()));
                }
                Ok(_) => {}
                Err(Fault::Unsent(why) | Fault::Unanswered(why)) => return Err(why),
            }
        }
        let mut ask = |command: &Cmd| match self.ask(&command.get_packed_command(), SMALL, deadline)
        {
            Ok(Value::ServerError(error)) => Err(refusal(&error)),
            Ok(value) => Ok(value),
            Err(Fault::Unsent(why) | Fault::Unanswered(why)) => Err(why),
        };
        if login.db > 0 && role != Role::Sentinel {
            ask(cmd("SELECT").arg(login.db))?;
        }
        match role {
            Role::Any | Role::Sentinel => {}
            Role::Member => {
                ask(cmd("CLUSTER").arg("MYID")).map_err(|why| {
                    format!("store.url has several nodes, and this one is not of a cluster: {why}")
                })?;
            }
            Role::Primary => {
                let Value::Array(said) = ask(&cmd("ROLE"))? else {
                    return Err("it does not say its role".into());
                };
                if said.first() != Some(&Value::BulkString(b"master".to_vec())) {
                    return Err("it is not the primary, as the Sentinels say".into());
                }
            }
        }
        Ok(())
    }

    /// Whether it can be used again: the peer has neither closed it nor sent
    /// what nobody asked for.
    pub(super) fn is_usable(&self) -> bool {
        let mut seen = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self.stream.socket().stream(), &mut seen[..], flags) {
            Err(Errno::AGAIN) => true,
            Err(_) | Ok((_, 0)) => false,
            // A ticket of TLS is read and passed over; the end is not.
            Ok(_) => {
                let soon = Instant::now() + Duration::from_millis(1);
                self.stream.is_encrypted()
                    && self
                        .stream
                        .read(&mut seen, soon)
                        .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
            }
        }
    }

    /// Sends a command and reads its answer, of so many bytes at most. After a
    /// fault the connection is of no use.
    pub(super) fn ask(
        &mut self,
        command: &[u8],
        limit: usize,
        deadline: Instant,
    ) -> Result<Value, Fault> {
        if Instant::now() >= deadline {
            return Err(Fault::Unsent("no time is left".into()));
        }
        let mut rest = command;
        while !rest.is_empty() {
            match self.stream.write(rest, deadline) {
                Ok(written) => rest = &rest[written..],
                // The engine does nothing before it has a command whole; but
                // what is encrypted may leave later.
                Err(error) if rest.len() == command.len() && !self.stream.is_encrypted() => {
                    return Err(Fault::Unsent(explain(&error)));
                }
                Err(error) => return Err(Fault::Unanswered(explain(&error))),
            }
        }
        self.stream
            .flush(deadline)
            .map_err(|error| Fault::Unanswered(explain(&error)))?;
        let mut answer = Answer {
            stream: &self.stream,
            deadline,
            limit,
            read: 0,
            held: self.memory.as_ref().map(Reservation::empty),
        };
        let failed = RefCell::new(None);
        let noting = Noting {
            answer: &mut answer,
            failed: &failed,
        };
        let value = self.parser.parse_value(noting);
        let large = answer.read > SMALL;
        let value = value.map_err(|error| {
            let why = failed.take().unwrap_or_else(|| error.to_string());
            Fault::Unanswered(why)
        })?;
        if large {
            // It would keep its buffer.
            self.parser = Parser::new();
        }
        Ok(value)
    }
}

/// What is read of an answer.
struct Answer<'a> {
    stream: &'a Stream,
    deadline: Instant,
    /// Bytes that may be read.
    limit: usize,
    /// Invariant: `read <= limit`.
    read: usize,
    held: Option<Reservation>,
}

impl Read for Answer<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.limit - self.read;
        if left == 0 {
            let problem = format!("the answer exceeds {} bytes", self.limit);
            return Err(io::Error::other(problem));
        }
        if let Some(held) = &mut self.held
            && self.read >= SMALL
            && !held.raise_until(COPIES * self.read.next_multiple_of(SMALL), self.deadline)
        {
            return Err(io::Error::other("no memory for the answer in time"));
        }
        let part = buf.len().min(left);
        let count = self.stream.read(&mut buf[..part], self.deadline)?;
        if count == 0 {
            return Err(io::Error::other("the engine closed the connection"));
        }
        self.read += count;
        Ok(count)
    }
}

/// Keeps the words of an error, which the parser replaces by its own.
struct Noting<'a, 'b> {
    answer: &'a mut Answer<'b>,
    failed: &'a RefCell<Option<String>>,
}

impl Read for Noting<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.answer.read(buf);
        if let Err(error) = &read {
            *self.failed.borrow_mut() = Some(explain(error));
        }
        read
    }
}

/// Half of the time until the deadline, so that another node may be asked in
/// the other half.
pub(super) fn half_until(deadline: Instant) -> Instant {
    let now = Instant::now();
    now + (deadline.saturating_duration_since(now) / 2).min(CONNECT_TIMEOUT)
}

fn connect(node: &Node, login: &Login, deadline: Instant) -> Result<Stream, String> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses = match node.host.parse() {
        Ok(ip) => vec![std::net::SocketAddr::new(ip, node.port)],
        Err(_) => {
            resolve_until(&node.host, node.port, deadline).map_err(|error| explain(&error))?
        }
    };
    for (tried, address) in addresses.iter().enumerate() {
        // The next one is to have its share where this one does not answer.
        let left = (addresses.len() - tried) as u32;
        let remaining = (deadline.saturating_duration_since(Instant::now()) / left)
            .max(Duration::from_millis(1));
        match TcpStream::connect_timeout(address, remaining) {
            Ok(stream) => {
                let _ = set_options(&stream);
                return secure(node, login, Socket::new(stream), deadline);
            }
            Err(error) => last = error,
        }
    }
    Err(explain(&last))
}

fn secure(node: &Node, login: &Login, socket: Socket, deadline: Instant) -> Result<Stream, String> {
    let Some(config) = &login.tls else {
        return Ok(Stream::plain(socket));
    };
    let name = ServerName::try_from(node.host.clone()).map_err(|error| error.to_string())?;
    let session = rustls::ClientConnection::new(Arc::clone(config), name)
        .map_err(|error| error.to_string())?;
    let stream = Stream::tls(socket, session.into());
    match stream.handshake(deadline) {
        Ok(()) => Ok(stream),
        Err(error) => Err(format!("TLS failed: {}", TlsFault::describe(&error))),
    }
}

fn read_password(file: &std::path::Path) -> Result<String, String> {
    let read = |file: fs::File| {
        let mut text = String::new();
        file.take(MAX_PASSWORD).read_to_string(&mut text)?;
        Ok(text)
    };
    let mut text = trusted::open(file, Purpose::Data)
        .and_then(read)
        .map_err(|error| format!("password {}: {error}", file.display()))?;
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

/// What an engine says against it.
pub(super) fn refusal(error: &redis::ServerError) -> String {
    match error.details() {
        Some(details) => format!("{} {details}", error.code()),
        None => error.code().into(),
    }
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => "no answer in time".into(),
        _ => error.to_string(),
    }
}
