//! `mb-server call`: one request and its answer, or many of them as lines.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, IsTerminal as _, Read, Write as _},
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{json, value::RawValue};

use super::{Exit, Result, connect::Connect, failure, output, printable, printable_lines, usage};
use crate::{
    client::{Answer, Client, ClientError, Pending, Request, ServerError},
    files,
    wire::{
        Code, DEFAULT_TIMEOUT, Payload, Topic, Version,
        codes::{BUILDING, COMPILING},
        header::{MAX_TIMEOUT, is_request_id},
        json,
        message::{MAX_MESSAGE_SIZE, MAX_PAYLOAD_SIZE},
    },
};

/// Longest line of `--requests`, in bytes: a message of the greatest size
/// that a server may be set to take, and what stands around it.
const MAX_LINE: u64 = MAX_MESSAGE_SIZE as u64;

/// How long a call waits for a service that is being built or compiled: as
/// long as a first build may take.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// How often a call that waits for that says so.
const WAITING_EVERY: Duration = Duration::from_secs(5);

/// Between two tries of such a call, at least.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Send a request and print its answer, or many of them as lines of JSON
///
/// The payload of the answer goes to standard output, an error as
/// CODE: message to standard error, with the request id, which mb-server why
/// takes. Waits for a service that is being built or compiled, 10 minutes at
/// most, and says so. Connecting may take --timeout, 1 s at least and 5 s at
/// most.
/// Exit codes: 0 answered, 1 the service or
/// the server answered an error, 2 wrong usage, 3 the server could not be
/// reached or did not answer.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  mb-server call calc.add '{\"a\":2,\"b\":40}'\n  \
                        mb-server call echo.say --binary @picture.png > same.png\n  \
                        mb-server call calc.add '{}' --server host:8444 --ca ca.crt --token-file token\n  \
                        echo '{\"topic\":\"calc.add\",\"payload\":{\"a\":1,\"b\":2}}' | mb-server call --requests -"
)]
pub(super) struct Arguments {
    /// Service and action, such as calc.add
    #[arg(required_unless_present = "requests", conflicts_with = "requests")]
    topic: Option<String>,
    /// JSON, or - to read it from standard input, or @FILE [default: none, which counts as null]
    #[arg(allow_hyphen_values = true, conflicts_with = "requests")]
    payload: Option<String>,
    /// Many requests, one a line, as {"topic":"calc.add","payload":{},"version":"1.0.0","timeout":5000,"id":"a1"},
    /// of which only topic is needed; - for standard input. Answers are printed as lines in the same order
    #[arg(long, value_name = "FILE")]
    requests: Option<String>,
    /// Requests of --requests that wait for their answers at the same time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    #[command(flatten)]
    connect: Connect,
    /// The version of the service that you write for
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    version: Version,
    /// How long the service may take
    #[arg(long, value_name = "MS", default_value_t = u64::try_from(DEFAULT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
          value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    timeout: u64,
    /// Id of the request, 1 to 64 letters, digits, dots, dashes and underscores [default: a random one]
    #[arg(long, value_name = "ID", conflicts_with = "requests", value_parser = parse_request_id)]
    request_id: Option<String>,
    /// Send the payload as opaque bytes, not as JSON
    #[arg(long, conflicts_with = "requests")]
    binary: bool,
}

const _: () = assert!(
    MAX_TIMEOUT.as_millis() == 3_600_000,
    "the bound of --timeout"
);

pub(super) fn run(arguments: &Arguments) -> Result {
    match &arguments.requests {
        Some(file) => run_many(arguments, file),
        None => run_one(arguments, arguments.topic.as_deref().unwrap_or_default()),
    }
}

pub(super) fn parse_request_id(id: &str) -> Result<String, String> {
    if is_request_id(id) {
        Ok(id.to_owned())
    } else {
        Err("a request id is 1 to 64 letters, digits, dots, dashes and underscores".into())
    }
}

fn parse_topic(topic: &str) -> Result<Topic<'_>, String> {
    Topic::parse(topic).map_err(|_| {
        format!(
            "{topic:?} is no topic: SERVICE.ACTION, each a letter then letters, digits, - and _"
        )
    })
}

fn run_one(arguments: &Arguments, topic: &str) -> Result {
    let topic = parse_topic(topic).map_err(usage)?;
    let payload = read_payload(arguments.payload.as_deref().unwrap_or_default())?;
    let payload = as_payload(&payload, arguments.binary)?;
    let timeout = Duration::from_millis(arguments.timeout);
    let (version, idempotent) = (arguments.version, arguments.connect.retry > 0);
    let request = Request {
        version,
        request_id: arguments.request_id.as_deref(),
        timeout,
        idempotent,
        ..Request::new(topic, payload)
    };
    let client = arguments.connect.open(timeout)?;
    let unanswered = |error: ClientError| (Exit::Unreachable, error.to_string());
    let (id, answer) = call_once_ready(&client, &request).map_err(unanswered)?;
    match answer {
        Ok(Answer::Json(text)) => print(text.as_bytes(), b"\n"),
        Ok(Answer::Binary(bytes)) => print(&bytes, b""),
        Err(ClientError::Answered(ServerError {
            code,
            message,
            origin: _,
            details,
        })) => {
            complain!("{}: {}", printable(&code), printable(&message));
            if let Some(details) = details {
                complain!("{}", printable(details.get()));
                for line in printed(&details) {
                    complain!("  {}", printable(&line));
                }
            }
            complain!("request id: {id}");
            Ok(Exit::Failure)
        }
        Err(error) => {
            complain!("request id: {id}");
            Err(unanswered(error))
        }
    }
}

/// Calls, again and again while the service is being built or compiled; the
/// request id of the last time, and its answer.
fn call_once_ready(
    client: &Client,
    request: &Request<'_>,
) -> Result<(String, Result<Answer, ClientError>), ClientError> {
    let begun = Instant::now();
    let mut last_notice: Option<Instant> = None;
    loop {
        let pending = client.send(request)?;
        let id = pending.request_id().to_owned();
        let refusal = match pending.wait() {
            Err(ClientError::Answered(refusal)) if is_preparing(&refusal) => refusal,
            done => return Ok((id, done)),
        };
        if begun.elapsed() >= LONGEST_WAIT {
            return Ok((id, Err(ClientError::Answered(refusal))));
        }
        if last_notice.is_none_or(|last_notice| last_notice.elapsed() >= WAITING_EVERY) {
            let message = printable(&refusal.message);
            match last_notice {
                None => complain!("mb-server: {message}; waiting for it"),
                Some(_) => complain!(
                    "mb-server: {message}, {} s so far",
                    begun.elapsed().as_secs()
                ),
            }
            last_notice = Some(Instant::now());
        }
        let pause = Duration::from_millis(refusal.retry_after_ms().unwrap_or_default());
        std::thread::sleep(pause.clamp(SHORTEST_PAUSE, WAITING_EVERY));
    }
}

/// Whether the server will have the service without anybody's doing.
fn is_preparing(refusal: &ServerError) -> bool {
    #[derive(Deserialize)]
    struct Details {
        state: String,
    }
    let details = refusal.details.as_ref();
    refusal.code == Code::ServiceUnavailable.as_str()
        && refusal.nothing_ran()
        && details
            .and_then(|details| serde_json::from_str::<Details>(details.get()).ok())
            .is_some_and(|Details { state }| [COMPILING, BUILDING].contains(&&*state))
}

/// What the service printed to standard error before it failed, if the server
/// tells it.
fn printed(details: &RawValue) -> Vec<String> {
    #[derive(Deserialize)]
    struct Details {
        stderr: Vec<String>,
    }
    serde_json::from_str(details.get()).map_or_else(|_| Vec::new(), |Details { stderr }| stderr)
}

/// A line of `--requests`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    topic: String,
    #[serde(borrow, default)]
    payload: Option<&'a RawValue>,
    version: Option<String>,
    timeout: Option<u64>,
    id: Option<String>,
}

/// What became of the lines so far.
#[derive(Default)]
struct Tally {
    answered: u64,
    errors: u64,
    lost: u64,
}

fn run_many(arguments: &Arguments, file: &str) -> Result {
    let mut input: Box<dyn BufRead> = match file {
        "-" => Box::new(io::stdin().lock()),
        file => Box::new(BufReader::new(
            File::open(file).map_err(|e| usage(format!("can't read {file}: {e}")))?,
        )),
    };
    let client = arguments
        .connect
        .open(Duration::from_millis(arguments.timeout))?;
    let mut waiting = VecDeque::new();
    let mut tally = Tally::default();
    let mut shown = Instant::now();
    let mut number = 0_u64;
    let mut next = || -> Result<Option<(u64, Sent)>> {
        loop {
            let mut text = String::new();
            number += 1;
            let read = (&mut input).take(MAX_LINE).read_line(&mut text);
            read.map_err(|error| failure(format!("can't read line {number} of {file}: {error}")))?;
            if text.is_empty() {
                return Ok(None);
            }
            if !text.trim().is_empty() {
                let sent = send(&client, arguments, &text);
                let sent = sent.map_err(|problem| usage(format!("line {number}: {problem}")))?;
                return Ok(Some((number, sent)));
            }
        }
    };
    // What is wrong with a line is said behind the answers to those before it.
    let mut end = None;
    while !output::is_over() && (end.is_none() || !waiting.is_empty()) {
        if end.is_none() && waiting.len() < arguments.concurrency as usize {
            match next() {
                Ok(Some(sent)) => waiting.push_back(sent),
                Ok(None) => end = Some(Ok(())),
                Err(problem) => end = Some(Err(problem)),
            }
        } else {
            take(&mut waiting, &mut tally)?;
        }
        tally.show(&mut shown, false);
    }
    tally.show(&mut shown, true);
    end.unwrap_or(Ok(()))?;
    Ok(match tally {
        Tally { lost: 1.., .. } => Exit::Unreachable,
        Tally { errors: 1.., .. } => Exit::Failure,
        Tally { .. } => Exit::Success,
    })
}

type Sent = Result<Pending, ClientError>;

fn send(client: &Client, arguments: &Arguments, text: &str) -> Result<Sent, String> {
    let Line {
        topic,
        payload,
        version,
        timeout,
        id,
    } = serde_json::from_str(text.trim_end()).map_err(|error| {
        format!("{error}; a line is as {{\"topic\":\"calc.add\",\"payload\":{{}}}}")
    })?;
    let topic = parse_topic(&topic)?;
    let version = match version {
        Some(version) => version
            .parse()
            .map_err(|_| format!("{version:?} is no version, as 1.2.0 is"))?,
        None => arguments.version,
    };
    let timeout = Duration::from_millis(timeout.unwrap_or(arguments.timeout).clamp(1, 3_600_000));
    let payload = Payload::Json(payload.map_or("", RawValue::get));
    let (request_id, idempotent) = (id.as_deref(), arguments.connect.retry > 0);
    Ok(client.send(&Request {
        topic,
        version,
        request_id,
        timeout,
        payload,
        idempotent,
    }))
}

/// Waits for the oldest and prints what came of it.
fn take(waiting: &mut VecDeque<(u64, Sent)>, tally: &mut Tally) -> Result<()> {
    let Some((number, sent)) = waiting.pop_front() else {
        return Ok(());
    };
    let id = sent.as_ref().ok().map(|sent| sent.request_id().to_owned());
    let line = match sent.and_then(Pending::wait) {
        Ok(Answer::Json(text)) => {
            tally.answered += 1;
            format!("{{\"line\":{number},\"answer\":{text}}}")
        }
        Ok(Answer::Binary(bytes)) => {
            tally.answered += 1;
            json!({"line": number, "bytes": bytes.len()}).to_string()
        }
        Err(ClientError::Answered(ServerError {
            code,
            message,
            origin,
            details,
        })) => {
            tally.errors += 1;
            let details = details.as_deref().map(json::tree);
            let error =
                json!({"code": code, "message": message, "origin": origin, "details": details});
            json!({"line": number, "requestId": id, "error": error}).to_string()
        }
        Err(error) => {
            tally.lost += 1;
            let lost = json!({"message": error.to_string(), "mayHaveRun": error.may_have_run()});
            json!({"line": number, "requestId": id, "lost": lost}).to_string()
        }
    };
    print(line.as_bytes(), b"\n").map(drop)
}

impl Tally {
    /// Progress for a person who waits, in one line that is written over.
    fn show(&self, shown: &mut Instant, last: bool) {
        if !io::stderr().is_terminal() || !last && shown.elapsed() < PROGRESS_EVERY {
            return;
        }
        *shown = Instant::now();
        let Self {
            answered,
            errors,
            lost,
        } = self;
        let end = if last { "\n" } else { "" };
        let _ = write!(
            io::stderr(),
            "\r{answered} answered, {errors} errors, {lost} lost{end}"
        );
    }
}

/// A payload of the command line: itself, `-` for standard input, or `@FILE`.
pub(super) fn read_payload(argument: &str) -> Result<Vec<u8>> {
    let read = |input: &mut dyn Read| files::read_bounded(input, MAX_PAYLOAD_SIZE as u64);
    match argument.strip_prefix('@') {
        Some(file) => std::fs::File::open(file)
            .and_then(|mut opened| read(&mut opened))
            .map_err(|e| usage(format!("can't read {file}: {e}"))),
        None if argument == "-" => {
            read(&mut io::stdin()).map_err(|e| usage(format!("can't read standard input: {e}")))
        }
        None => Ok(argument.into()),
    }
}

/// The same as it is sent; nothing counts as null.
pub(super) fn as_payload(bytes: &[u8], binary: bool) -> Result<Payload<'_>> {
    if binary {
        return Ok(Payload::Binary(bytes));
    }
    if bytes.is_empty() {
        return Ok(Payload::Json(""));
    }
    let hint = "; quote it for the shell, or use --binary for bytes";
    let text = json::check(bytes);
    text.map(Payload::Json)
        .map_err(|error| usage(format!("the payload is {error}{hint}")))
}

/// Prints an answer, as it is to a file or another program, and harmless to a
/// terminal. A reader that has seen enough is no failure.
pub(super) fn print(answer: &[u8], end: &[u8]) -> Result {
    let terminal = io::stdout().is_terminal();
    let shown = if terminal {
        for_terminal(answer)
    } else {
        answer.into()
    };
    let mut out = io::stdout().lock();
    let end = if terminal { b"\n" } else { end };
    let written = out
        .write_all(&shown)
        .and_then(|()| out.write_all(end))
        .and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => output::note(&error),
        result => result.map_err(failure)?,
    }
    Ok(Exit::Success)
}

/// An answer without what a terminal would obey.
fn for_terminal(answer: &[u8]) -> Cow<'_, [u8]> {
    match str::from_utf8(answer) {
        Ok(text) => printable_lines(text.trim_end()).into_bytes().into(),
        Err(_) => format!(
            "{} bytes that are no text; redirect them into a file",
            answer.len()
        )
        .into_bytes()
        .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_is_shown() {
        assert_eq!(
            &*for_terminal("{\"a\":\"ä\"}\n".as_bytes()),
            "{\"a\":\"ä\"}".as_bytes()
        );
        assert_eq!(
            &*for_terminal("\x1b]0;x\x07\u{9b}2J".as_bytes()),
            br"\u{1b}]0;x\u{7}\u{9b}2J"
        );
        assert!(for_terminal(b"\x9b2J").starts_with(b"3 bytes that are no text"));
    }
}
