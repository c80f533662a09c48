//! One connection of a client, from the name to the hello.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::json;

use super::{
    builder::Settings,
    error::{ClientError, ServerError},
};
use crate::{
    transport::{Stream, TlsFault, connect_any, resolve_until, secure},
    wire::{
        Header, Incoming, Kind, Payload, Reassembly, SYSTEM_VERSION, Topic,
        message::{MAX_MESSAGE_SIZE, write_message},
    },
};

/// Of a server that takes connections and says nothing.
pub(crate) const SILENT: &str =
    "no answer to the hello in time; is it stopped, or busy with others?";
/// Of a server that ends the connection before its hello.
pub(crate) const CLOSED: &str = "it closed the connection";
/// First size of the read buffer, in bytes.
const READ_SIZE: usize = 8 * 1024;

/// An open connection that has said hello.
#[derive(Debug, Clone)]
pub(super) struct ClientConnection {
    pub(super) stream: Stream,
    /// Tells this connection from those before and after it.
    pub(super) number: u64,
    /// Silence after which something is to be sent.
    pub(super) keep_alive: Duration,
}

/// What the server says of itself; only what a client needs of it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Hello {
    pub(super) limits: HelloLimits,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HelloLimits {
    keep_alive_interval_ms: u64,
}

/// Connects, trying all addresses of the name in turn, and says hello.
pub(super) fn open(
    settings: &Settings,
    number: u64,
) -> Result<(ClientConnection, Reassembly), ClientError> {
    let stream = connect(settings).map_err(ClientError::NotSent)?;
    let deadline = Instant::now() + settings.options.handshake_timeout;
    if let Err(error) = stream.handshake(deadline) {
        return Err(ClientError::NotSent(format!(
            "TLS with {} failed, {}: {}",
            settings.options.server,
            TlsFault::of(&error),
            TlsFault::describe(&error)
        )));
    }
    let mut buffer = Reassembly::new(MAX_MESSAGE_SIZE, READ_SIZE);
    let hello = match hello(&stream, &mut buffer, settings, deadline) {
        Ok(answer) => answer.map_err(ClientError::Answered)?,
        Err(problem) => {
            let text = format!("{} does not let us in: {problem}", settings.options.server);
            return Err(ClientError::NotSent(text));
        }
    };
    let keep_alive = settings.options.keep_alive.min(Duration::from_millis(
        hello.limits.keep_alive_interval_ms.max(1),
    ));
    Ok((
        ClientConnection {
            stream,
            number,
            keep_alive,
        },
        buffer,
    ))
}

fn connect(settings: &Settings) -> Result<Stream, String> {
    let server = &settings.options.server;
    let describe = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                "; is the server running? `mb-server serve` starts one, --server names another"
            }
            _ => "",
        };
        format!("can't reach {server}: {error}{hint}")
    };
    let deadline = Instant::now() + settings.options.connect_timeout;
    let addresses = resolve_until(&settings.host, settings.port, deadline).map_err(describe)?;
    if settings.options.token.is_some()
        && settings.tls.is_none()
        && !settings.options.allow_unsecure
    {
        for address in &addresses {
            check_token_path(*address)?;
        }
    }
    let (stream, _) = connect_any(&addresses, deadline).map_err(describe)?;
    let tls = settings
        .tls
        .as_ref()
        .map(|(config, name)| (config, &**name));
    secure(stream, tls).map_err(|error| error.to_string())
}

/// Whether a token may be sent there without TLS.
///
/// # Errors
/// What to do instead, where others could read it on the way.
pub(crate) fn check_token_path(address: SocketAddr) -> Result<(), String> {
    if address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(format!(
        "the token was not sent: {address} is another machine, and without TLS everybody on the way could read it; use \
         TLS (--ca FILE), or allow it by name (--allow-unsecure)"
    ))
}

/// What the server says of itself, or why it refuses.
fn hello(
    stream: &Stream,
    buffer: &mut Reassembly,
    settings: &Settings,
    deadline: Instant,
) -> Result<Result<Hello, ServerError>, String> {
    let mut payload = json!({"client": settings.options.name, "protocol": "1.0"});
    if let Some(token) = &settings.options.token {
        payload["token"] = json!(token);
    }
    let topic = Topic::parse("system.hello").map_err(|error| error.to_string())?;
    let header = Header {
        kind: Kind::Request,
        topic,
        version: SYSTEM_VERSION,
        request_id: Some("hello"),
        parent_request_id: None,
        timeout: None,
    };
    let mut frame = Vec::new();
    write_message(&mut frame, &header, Payload::Json(&payload.to_string()));
    // A server that refuses before it has read everything says why.
    let sent = write_all(stream, &frame, deadline);
    loop {
        match buffer.next() {
            Err(error) => return Err(format!("it does not speak this protocol: {error}")),
            Ok(Some(Incoming::KeepAlive)) => {}
            Ok(Some(Incoming::Message { body, binary: _ })) => {
                let (header, payload) = Header::parse(body)
                    .map_err(|error| format!("it does not speak this protocol: {error}"))?;
                let answer = match header.kind {
                    Kind::Error => serde_json::from_slice(payload).map(Err),
                    _ => serde_json::from_slice(payload).map(Ok),
                };
                return answer.map_err(|error| format!("its hello can't be read: {error}"));
            }
            Ok(None) => match stream.read(buffer.spare(), deadline) {
                Ok(0) => {
                    return Err(sent
                        .err()
                        .map_or_else(|| CLOSED.into(), |error| error.to_string()));
                }
                Ok(count) => buffer.advance(count),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(SILENT.into());
                }
                Err(error) => return Err(format!("{}: {error}", TlsFault::of(&error))),
            },
        }
    }
}

fn write_all(stream: &Stream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = stream.write(bytes, deadline)?;
        bytes = &bytes[written..];
    }
    Ok(())
}
