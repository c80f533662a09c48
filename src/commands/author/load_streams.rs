//! The bare connections of `bench`, by the flags of the other clients.

use std::{
    io::{self, Read as _, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{Exit, Result, connect::Connect, usage};
use crate::{
    client::{CLOSED, SILENT, ServerError, check_token_path},
    load::LoadStream,
    transport::{HTTP_ALPN, client_config, connect_any, host_and_port, resolve_until, server_name},
    wire::{FrameHeader, Header, Kind},
};

/// Longest answer to a hello that is read, in bytes.
const MAX_HELLO_SIZE: usize = 64 * 1024;

impl Connect {
    /// Bare connections. Those for frames have said hello; over HTTP each request
    /// shows the token.
    pub(super) fn load_streams(
        &self,
        count: usize,
        timeout: Duration,
        is_http: bool,
    ) -> Result<Vec<LoadStream>> {
        let server = self.server();
        let unreachable = |error: io::Error| {
            let problem = match error.kind() {
                io::ErrorKind::ConnectionRefused => {
                    format!("{error}; is the server running? `mb-server serve` starts one")
                }
                // The timeout of the socket.
                io::ErrorKind::WouldBlock => SILENT.into(),
                io::ErrorKind::UnexpectedEof => CLOSED.into(),
                _ => error.to_string(),
            };
            let problem = format!("can't reach {server}: {problem}");
            (Exit::Unreachable, problem)
        };
        let (host, port) = host_and_port(server).map_err(usage)?;
        let addresses =
            resolve_until(&host, port, Instant::now() + timeout).map_err(unreachable)?;
        let tls = self.tls()?.map(|tls| {
            let name = server_name(tls.server_name.as_ref().unwrap_or(&host)).map_err(usage)?;
            let mut config = client_config(&tls).map_err(usage)?;
            if is_http {
                Arc::make_mut(&mut config).alpn_protocols = vec![HTTP_ALPN.to_vec()];
            }
            Ok((config, name))
        });
        let (tls, token) = (tls.transpose()?, self.token()?);
        if token.is_some() && tls.is_none() && !self.allow_unsecure {
            for address in &addresses {
                check_token_path(*address).map_err(usage)?;
            }
        }
        // All go where the first one went.
        let mut addresses = addresses;
        let mut connect = || -> io::Result<LoadStream> {
            let (stream, address) = connect_any(&addresses, Instant::now() + timeout)?;
            addresses = vec![address];
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            Ok(match &tls {
                None => LoadStream::Plain(stream),
                Some((config, name)) => {
                    let session = rustls::ClientConnection::new(Arc::clone(config), name.clone());
                    let mut stream =
                        rustls::StreamOwned::new(session.map_err(io::Error::other)?, stream);
                    while stream.conn.is_handshaking() {
                        stream.conn.complete_io(&mut stream.sock)?;
                    }
                    LoadStream::Tls(Box::new(stream))
                }
            })
        };
        let mut open = || {
            let mut stream = connect().map_err(unreachable)?;
            if !is_http {
                let refusal = hello(&mut stream, token.as_deref()).map_err(unreachable)?;
                if let Some(refusal) = refusal {
                    let problem = format!("{server} does not let us in: {refusal}");
                    return Err((Exit::Failure, problem));
                }
            }
            Ok(stream)
        };
        (0..count).map(|_| self.retried(&mut open)).collect()
    }
}

/// Says hello, with a token or without; why the server refuses it, if it does.
fn hello(stream: &mut LoadStream, token: Option<&str>) -> io::Result<Option<String>> {
    let payload = token.map_or_else(|| json!({}), |token| json!({ "token": token }));
    let body = format!("REQUEST:system.hello:1.0.0:hello\n{payload}");
    let header = FrameHeader {
        length: body.len() as u32,
        keep_alive: false,
        binary: false,
        more: false,
    };
    stream.write_all(&[&header.encode(), body.as_bytes()].concat())?;
    stream.flush()?;
    let mut head = [0; 8];
    stream.read_exact(&mut head)?;
    let header = FrameHeader::parse(head)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    let mut answer = vec![0; (header.length as usize).min(MAX_HELLO_SIZE)];
    stream.read_exact(&mut answer)?;
    let no_answer = || io::Error::new(io::ErrorKind::InvalidData, "an answer that is none");
    let (header, payload) = Header::parse(&answer).map_err(|_| no_answer())?;
    if header.kind != Kind::Error {
        return Ok(None);
    }
    let refusal: ServerError = serde_json::from_slice(payload).map_err(|_| no_answer())?;
    Ok(Some(refusal.to_string()))
}
