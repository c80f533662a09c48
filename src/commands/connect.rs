//! The flags with which `call`, `ping` and `bench` reach a server.

use std::{fmt::Display, fs::File, path::PathBuf, time::Duration};

use super::{Exit, Result, printable, usage};
use crate::{
    client::{Builder, Client, ClientError},
    files,
    transport::ClientTls,
};

/// Where a server with default settings listens.
pub(super) const DEFAULT_SERVER: &str = "127.0.0.1:8081";
/// The same with TLS.
const DEFAULT_TLS_SERVER: &str = "localhost:8444";

/// Longest file of a token, in bytes.
const MAX_TOKEN_SIZE: u64 = 4096;

/// For a step of connecting, whatever a request's timeout is.
const SHORTEST_STEP: Duration = Duration::from_secs(1);
const LONGEST_STEP: Duration = Duration::from_secs(5);

/// Pause before connecting is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(super) struct Connect {
    /// Where the server listens [default: 127.0.0.1:8081, with TLS localhost:8444]
    #[arg(long, value_name = "HOST:PORT")]
    server: Option<String>,
    /// Use TLS; --ca, --cert and --insecure do too
    #[arg(long)]
    tls: bool,
    /// PEM file of the CA that has signed the server's certificate
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file of the certificate to show
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// PEM file of its key
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The name that the server's certificate is for [default: the host]
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Take any certificate for the server's; for development only
    #[arg(long, conflicts_with = "ca")]
    insecure: bool,
    /// File that holds the token to show
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send the token also without TLS to another machine, where everybody on the network path can read it
    #[arg(long)]
    pub(super) allow_unsecure: bool,
    /// Try again so many times: connecting, and requests that were lost, which may then run twice; bench only connects again
    #[arg(long, value_name = "TIMES", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(super) retry: u32,
}

impl Connect {
    /// Connects, as often as `--retry` says. No step of it takes longer than
    /// the timeout of the request that is to follow, and 1 s to 5 s.
    pub(super) fn open(&self, timeout: Duration) -> Result<Client> {
        let step = timeout.clamp(SHORTEST_STEP, LONGEST_STEP);
        let builder = self
            .builder()?
            .connect_timeout(step)
            .handshake_timeout(step)
            .write_timeout(step);
        builder
            .check()
            .map_err(|error| usage(error.of_connection(self.server())))?;
        self.retried(|| {
            builder.clone().connect().map_err(|error| {
                let exit = match error {
                    ClientError::Answered(_) => Exit::Failure,
                    _ => Exit::Unreachable,
                };
                (exit, error.of_connection(self.server()))
            })
        })
    }

    /// Connects, as often as `--retry` says.
    pub(super) fn retried<T>(&self, mut connect: impl FnMut() -> Result<T>) -> Result<T> {
        let mut pause = FIRST_PAUSE;
        for _ in 0..self.retry {
            match connect() {
                Ok(connected) => return Ok(connected),
                Err((_, error)) => complain!("mb-server: {}; trying again", printable(&error)),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
        connect()
    }

    fn uses_tls(&self) -> bool {
        self.tls || self.ca.is_some() || self.cert.is_some() || self.insecure
    }

    pub(super) fn server(&self) -> &str {
        self.server.as_deref().unwrap_or(if self.uses_tls() {
            DEFAULT_TLS_SERVER
        } else {
            DEFAULT_SERVER
        })
    }

    fn builder(&self) -> Result<Builder> {
        let mut builder = Client::builder(self.server())
            .retries(self.retry)
            .reconnect(self.retry > 0)
            .allow_unsecure(self.allow_unsecure);
        if let Some(tls) = self.tls()? {
            builder = builder.tls(tls);
        }
        if let Some(token) = self.token()? {
            builder = builder.token(token);
        }
        Ok(builder)
    }

    pub(super) fn tls(&self) -> Result<Option<ClientTls>> {
        if !self.uses_tls() {
            return Ok(None);
        }
        if self.ca.is_none() && !self.insecure {
            return Err(usage(
                "TLS needs --ca, the file of the CA to trust, or --insecure for development",
            ));
        }
        Ok(Some(ClientTls {
            ca: self.ca.clone(),
            identity: self.cert.clone().zip(self.key.clone()),
            server_name: self.server_name.clone(),
            reject_unauthorized: !self.insecure,
        }))
    }

    pub(super) fn token(&self) -> Result<Option<String>> {
        let Some(file) = &self.token_file else {
            return Ok(None);
        };
        let wrong = |problem: &dyn Display| usage(format!("token {}: {problem}", file.display()));
        let token = File::open(file).and_then(|file| files::read_text(file, 2 * MAX_TOKEN_SIZE));
        let token = token.map_err(|error| wrong(&error))?;
        let token = token.trim();
        if token.is_empty() || token.len() as u64 > MAX_TOKEN_SIZE {
            let problem = format!("1 to {MAX_TOKEN_SIZE} bytes are expected");
            return Err(wrong(&problem));
        }
        Ok(Some(token.to_owned()))
    }
}
