//! `mb-server call`: one request, its answer to standard output.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    time::Duration,
};

use super::{Exit, Result, failure, printable, usage};
use crate::{
    client::{Answer, Client, ClientError, Request},
    wire::{DEFAULT_TIMEOUT, Payload, Topic, Version, header::MAX_TIMEOUT, json},
};

/// Where a server with default settings listens.
pub(super) const DEFAULT_SERVER: &str = "127.0.0.1:8081";

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Send one request and print its answer
///
/// The payload of the answer goes to standard output, an error as
/// CODE: message to standard error. Exit codes: 0 answered, 1 the service or
/// the server answered an error, 2 wrong usage, 3 the server could not be
/// reached.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  mb-server call calc.add '{\"a\":2,\"b\":40}'\n  \
                        mb-server call echo.say --binary @picture.png > same.png")]
pub(super) struct Arguments {
    /// Service and action, such as calc.add
    topic: String,
    /// JSON, or - to read it from standard input, or @FILE [default: none, which counts as null]
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// Where the server listens
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_SERVER)]
    server: String,
    /// The version of the service that you write for
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    version: Version,
    /// How long the service may take
    #[arg(long, value_name = "MS", default_value_t = u64::try_from(DEFAULT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
          value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    timeout: u64,
    /// Send the payload as opaque bytes, not as JSON
    #[arg(long)]
    binary: bool,
}

const _: () = assert!(MAX_TIMEOUT.as_millis() == 3_600_000, "the bound of --timeout");

pub(super) fn run(arguments: &Arguments) -> Result {
    let topic = Topic::parse(&arguments.topic).map_err(|_| {
        let topic = &arguments.topic;
        usage(format!("{topic:?} is no topic: SERVICE.ACTION, each a letter then letters, digits, - and _"))
    })?;
    let payload = read_payload(arguments.payload.as_deref().unwrap_or_default())?;
    let payload = if arguments.binary {
        Payload::Binary(&payload)
    } else if payload.is_empty() {
        Payload::Json("")
    } else {
        let hint = "; quote it for the shell, or use --binary for bytes";
        Payload::Json(json::check(&payload).map_err(|e| usage(format!("the payload is {e}{hint}")))?)
    };
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = Request {
        topic,
        version: arguments.version,
        request_id: &request_id,
        timeout: Duration::from_millis(arguments.timeout),
        payload,
    };
    let unreachable = |error: ClientError| (Exit::Unreachable, error.to_string());
    let mut client = Client::connect(&arguments.server, CONNECT_TIMEOUT).map_err(unreachable)?;
    match client.call(&request).map_err(unreachable)? {
        Answer::Json(text) => print(&[text.as_bytes(), b"\n"]),
        Answer::Binary(bytes) => print(&[&bytes]),
        Answer::Error(refusal) => {
            complain!("{}: {}", printable(&refusal.code), printable(&refusal.message));
            if let Some(details) = refusal.details {
                complain!("{details}");
            }
            Ok(Exit::Failure)
        }
    }
}

fn read_payload(argument: &str) -> std::result::Result<Vec<u8>, (Exit, String)> {
    let mut payload = Vec::new();
    match argument.strip_prefix('@') {
        Some(file) => payload = fs::read(file).map_err(|e| usage(format!("can't read {file}: {e}")))?,
        None if argument == "-" => {
            io::stdin().read_to_end(&mut payload).map_err(|e| usage(format!("can't read standard input: {e}")))?;
        }
        None => payload.extend_from_slice(argument.as_bytes()),
    }
    Ok(payload)
}

/// A reader that has seen enough is no failure.
fn print(parts: &[&[u8]]) -> Result {
    let mut out = io::stdout().lock();
    for part in parts {
        match out.write_all(part) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Exit::Success),
            result => result.map_err(failure)?,
        }
    }
    out.flush().map_err(failure)?;
    Ok(Exit::Success)
}
