//! One connection to one process of an engine: commands, then their answers,
//! both until an instant, and each answer of bounded size.

use std::{
    fmt, io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{Cmd, Parser, Value, cmd};
use rustix::{io::Errno, net::RecvFlags};
use rustls::ClientConfig;

use crate::{
    budget::{Budget, Reservation},
    config::store::Node,
    files,
    store::StoreError,
    transport::{Stream, TlsFault, connect_any, resolve_until, secure},
    trusted::{self, Purpose},
};

/// Time for connecting and logging in, at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// An answer of fewer bytes is not worth reserving memory for. One that comes
/// together with those of others has no more.
pub(super) const SMALL: usize = 64 * 1024;
/// Why nothing was sent.
pub(super) const NO_TIME: &str = "no time is left";
/// Why nothing came by the deadline.
pub(super) const LATE: &str = "no answer in time";
/// Why a connection is of no use whose engine sends more than it was asked for.
pub(super) const UNASKED: &str = "an answer to no command";
/// Bytes that are read at once, at least.
const PART: usize = 4096;
/// Copies of an answer while it is read: in the buffer, and what it becomes.
const COPIES: usize = 2;
/// Longest password, in bytes.
const MAX_PASSWORD: u64 = 4096;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// The command may have arrived, so it may have been done.
    pub(super) was_sent: bool,
    pub(super) why: String,
}

impl Fault {
    pub(super) fn unsent(why: impl Into<String>) -> Self {
        Self {
            was_sent: false,
            why: why.into(),
        }
    }

    pub(super) fn unanswered(why: impl Into<String>) -> Self {
        Self {
            was_sent: true,
            why: why.into(),
        }
    }
}

impl From<Fault> for StoreError {
    fn from(Fault { was_sent, why }: Fault) -> Self {
        if was_sent {
            Self::Unconfirmed(why)
        } else {
            Self::Away(why)
        }
    }
}

/// How connections of one engine are opened.
#[derive(Default)]
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
    /// What was read and belongs to answers that are not whole yet.
    read: Vec<u8>,
    /// Is handed whole answers only, so nothing of them stays in it.
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
            read: Vec::new(),
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
                Err(fault) => return Err(fault.why),
            }
        }
        let mut ask = |command: &Cmd| match self.ask(&command.get_packed_command(), SMALL, deadline)
        {
            Ok(Value::ServerError(error)) => Err(refusal(&error)),
            Ok(value) => Ok(value),
            Err(fault) => Err(fault.why),
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
        self.send(command, deadline)?;
        let mut held = self.memory.as_ref().map(Reservation::empty);
        let answer = loop {
            if let Some(answer) = self.answer()? {
                break answer;
            }
            if let Some(held) = &mut held
                && self.read.len() >= SMALL
                && !held.raise_until(COPIES * self.read.len().next_multiple_of(SMALL), deadline)
            {
                return Err(Fault::unanswered("no memory for the answer in time"));
            }
            self.fill(limit, deadline)
                .map_err(|error| Fault::unanswered(explain(&error)))?;
        };
        if self.is_between() {
            Ok(answer)
        } else {
            Err(Fault::unanswered(UNASKED))
        }
    }

    /// Sends commands. After a fault the connection is of no use.
    pub(super) fn send(&mut self, commands: &[u8], deadline: Instant) -> Result<(), Fault> {
        if Instant::now() >= deadline {
            return Err(Fault::unsent(NO_TIME));
        }
        let mut rest = commands;
        while !rest.is_empty() {
            match self.stream.write(rest, deadline) {
                Ok(written) => rest = &rest[written..],
                // The engine does nothing before it has a command whole; but
                // what is encrypted may leave later.
                Err(error) if rest.len() == commands.len() && !self.stream.is_encrypted() => {
                    return Err(Fault::unsent(explain(&error)));
                }
                Err(error) => return Err(Fault::unanswered(explain(&error))),
            }
        }
        self.stream
            .flush(deadline)
            .map_err(|error| Fault::unanswered(explain(&error)))
    }

    /// Waits for answers of at most [`SMALL`] bytes each, and appends those that
    /// are whole by then; none at the deadline, or if only a part of one came.
    /// After a fault the connection is of no use.
    pub(super) fn receive(
        &mut self,
        answers: &mut Vec<Value>,
        deadline: Instant,
    ) -> Result<(), Fault> {
        match self.fill(SMALL, deadline) {
            Ok(()) => {}
            // The system gives up on a peer by the same name.
            Err(error) if error.kind() == io::ErrorKind::TimedOut && Instant::now() >= deadline => {
                return Ok(());
            }
            Err(error) => return Err(Fault::unanswered(explain(&error))),
        }
        while let Some(answer) = self.answer()? {
            answers.push(answer);
        }
        Ok(())
    }

    /// Whether nothing was read of a next answer. What has arrived meanwhile,
    /// [`Self::is_usable`] finds.
    pub(super) fn is_between(&self) -> bool {
        self.read.is_empty()
    }

    /// Reads more of an answer of at most `limit` bytes.
    fn fill(&mut self, limit: usize, deadline: Instant) -> io::Result<()> {
        let begun = self.read.len();
        let part = begun.clamp(PART, SMALL).min(limit.saturating_sub(begun));
        if part == 0 {
            let problem = format!("the answer exceeds {limit} bytes");
            return Err(io::Error::other(problem));
        }
        self.read.resize(begun + part, 0);
        let read = self.stream.read(&mut self.read[begun..], deadline);
        self.read.truncate(begun + *read.as_ref().unwrap_or(&0));
        match read? {
            0 => Err(io::Error::other("the engine closed the connection")),
            _ => Ok(()),
        }
    }

    /// Takes the next answer, if it was read whole.
    fn answer(&mut self) -> Result<Option<Value>, Fault> {
        let Some(length) = answer_length(&self.read) else {
            return Ok(None);
        };
        let answer = self.parser.parse_value(&self.read[..length]);
        self.read.drain(..length);
        if length > SMALL {
            // Both would keep their buffers.
            self.read.shrink_to(SMALL);
            self.parser = Parser::new();
        }
        answer
            .map(Some)
            .map_err(|error| Fault::unanswered(error.to_string()))
    }
}

/// Bytes of the first answer, if all of them are there. Of malformed ones, up to
/// the line that shows it. Source: RESP2.
fn answer_length(read: &[u8]) -> Option<usize> {
    let mut at = 0;
    let mut values = 1_usize;
    while values > 0 {
        let line = read.get(at..)?;
        let end = line.windows(2).position(|two| two == b"\r\n")?;
        let number = || {
            std::str::from_utf8(line.get(1..end)?)
                .ok()?
                .parse::<i64>()
                .ok()
        };
        at += end + 2;
        values -= 1;
        match (line[0], number().map(usize::try_from)) {
            (b'$', Some(Ok(bytes))) => at = at.checked_add(bytes)?.checked_add(2)?,
            (b'*', Some(Ok(more))) => values = values.checked_add(more)?,
            // A null, or a line that is the value.
            (b'$' | b'*', Some(Err(_))) | (b'+' | b'-' | b':', _) => {}
            _ => return Some(at),
        }
    }
    (at <= read.len()).then_some(at)
}

/// Half of the time until the deadline, so that another node may be asked in
/// the other half.
pub(super) fn half_until(deadline: Instant) -> Instant {
    let now = Instant::now();
    now + (deadline.saturating_duration_since(now) / 2).min(CONNECT_TIMEOUT)
}

fn connect(node: &Node, login: &Login, deadline: Instant) -> Result<Stream, String> {
    let open = || {
        let addresses = resolve_until(&node.host, node.port, deadline)?;
        let (stream, _) = connect_any(&addresses, deadline)?;
        secure(
            stream,
            login.tls.as_ref().map(|config| (config, &*node.host)),
        )
    };
    let stream = open().map_err(|error| explain(&error))?;
    match stream.handshake(deadline) {
        Ok(()) => Ok(stream),
        Err(error) => Err(format!("TLS failed: {}", TlsFault::describe(&error))),
    }
}

fn read_password(file: &std::path::Path) -> Result<String, String> {
    let mut text = trusted::open(file, Purpose::Data)
        .and_then(|file| files::read_text(file, MAX_PASSWORD))
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
        io::ErrorKind::TimedOut => LATE.into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_parts_do() {
        let answers = [
            "+OK\r\n",
            "-ERR no\r\n",
            ":-7\r\n",
            "$-1\r\n",
            "$0\r\n\r\n",
            "$4\r\na\r\nb\r\n",
            "*-1\r\n",
            "*0\r\n",
            "*3\r\n:1\r\n*2\r\n$1\r\nx\r\n$-1\r\n+z\r\n",
        ];
        for answer in answers {
            let twice = answer.repeat(2);
            for cut in 0..=twice.len() {
                let expected = (cut >= answer.len()).then_some(answer.len());
                assert_eq!(
                    answer_length(&twice.as_bytes()[..cut]),
                    expected,
                    "{twice:?}"
                );
            }
            redis::parse_redis_value(answer.as_bytes()).unwrap();
        }
        for wrong in [
            "\r\n",
            "?\r\n",
            "$\r\n",
            "$x\r\n",
            "*1\r\n!\r\n",
            "\u{e9}\r\n",
        ] {
            assert_eq!(
                answer_length(wrong.as_bytes()),
                Some(wrong.len()),
                "{wrong:?}"
            );
            redis::parse_redis_value(wrong.as_bytes()).unwrap_err();
        }
        for huge in ["$9223372036854775807\r\n", "*9223372036854775807\r\n:1\r\n"] {
            assert_eq!(answer_length(huge.as_bytes()), None);
        }
    }
}
