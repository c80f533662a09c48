//! The bare connections of `bench`, by the flags of the other clients.

use std::{
    io::{self, Read as _, Write as _},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Exit, connect::Connect, usage};
use crate::{
    client::check_token_path,
    load::LoadStream,
    transport::{HTTP_ALPN, client_config, connect_any, host_and_port, resolve_until, server_name},
    wire::FrameHeader,
};

/// Longest answer to a hello that is read, in bytes.
const MAX_HELLO_SIZE: usize = 64 * 1024;

impl Connect {
    /// Bare connections. Those for frames have said hello where a token is to be
    /// shown; over HTTP each request shows it.
    pub(super) fn load_streams(
        &self,
        count: usize,
        timeout: Duration,
        is_http: bool,
    ) -> Result<Vec<LoadStream>, (Exit, String)> {
        let server = self.server();
        let unreachable = |error: &dyn std::fmt::Display| {
            (Exit::Unreachable, format!("can't reach {server}: {error}"))
        };
        let (host, port) = host_and_port(server).map_err(usage)?;
        let addresses = resolve_until(&host, port, Instant::now() + timeout)
            .map_err(|error| unreachable(&error))?;
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
        let mut open = || -> io::Result<LoadStream> {
            let (stream, address) = connect_any(&addresses, Instant::now() + timeout)?;
            addresses = vec![address];
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            let mut stream = match &tls {
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
            };
            if let Some(token) = token.as_ref().filter(|_| !is_http) {
                hello(&mut stream, token)?;
            }
            Ok(stream)
        };
        let explain = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::ConnectionRefused => {
                    "; is the server running? `mb-server serve` starts one"
                }
                _ => "",
            };
            format!("{error}{hint}")
        };
        (0..count)
            .map(|_| self.retried(|| open().map_err(explain)))
            .collect::<Result<_, _>>()
            .map_err(|error| unreachable(&error))
    }
}

/// Shows a token, and waits until it was taken.
fn hello(stream: &mut LoadStream, token: &str) -> io::Result<()> {
    let body = format!(
        "REQUEST:system.hello:1.0.0:hello\n{}",
        serde_json::json!({ "token": token })
    );
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
    if answer.starts_with(b"RESPONSE:") {
        return Ok(());
    }
    Err(io::Error::other(super::printable(
        &String::from_utf8_lossy(&answer),
    )))
}
