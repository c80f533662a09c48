//! `mb-server bench`: how many requests a server answers, and how fast.

use std::{
    io::{self, IsTerminal as _, Write as _},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    Exit, Result,
    call::{as_payload, read_payload},
    connect::Connect,
    failure, printable, usage,
};
use crate::{
    load::{self, Frames, Http, Length, LoadPlan, Measured, Pace, Progress, Protocol},
    wire::{Topic, Version},
};

/// Bytes of all requests that wait for answers at the same time.
const MAX_HELD: u64 = 4 * 1024 * 1024 * 1024;

/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Of the times, these are shown: quantiles, and what they are called.
const QUANTILES: [(f64, &str); 6] = [
    (0.5, "p50"),
    (0.9, "p90"),
    (0.99, "p99"),
    (0.999, "p99.9"),
    (0.9999, "p99.99"),
    (1.0, "max"),
];

/// Send load to a server and measure how fast it answers
///
/// Without --rate in a closed loop: each answer is followed by the next
/// request. With --rate in an open loop: requests are due at that rate
/// whatever the server does, and times count from when a request was due.
/// Where answers stopped coming, what waits counts with the time until the end.
/// Exit codes: 0 all answered, 1 a connection or some requests were refused or
/// answers stopped coming, 2 wrong usage, 3 the server could not be reached or a
/// connection broke.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  mb-server bench\n  \
                        mb-server bench calc.add '{\"a\":2,\"b\":40}' --connections 8 --pipeline 16\n  \
                        mb-server bench --size 65536 --binary --rate 500 --duration 30 --json")]
pub struct Arguments {
    /// Service and action
    #[arg(default_value = "echo.say")]
    topic: String,
    /// JSON to send, or - to read it from standard input, or @FILE [default: a text of --size bytes]
    #[arg(allow_hyphen_values = true)]
    payload: Option<String>,
    /// Bytes of the generated payload
    #[arg(long, value_name = "BYTES", default_value_t = 64, conflicts_with = "payload",
          value_parser = clap::value_parser!(u32).range(2..=67_000_000))]
    size: u32,
    /// Call over HTTP, POST /call/TOPIC@VERSION, not in frames
    #[arg(long)]
    http: bool,
    /// Send opaque bytes, not JSON
    #[arg(long)]
    binary: bool,
    /// Connections
    #[arg(long, short = 'c', value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    connections: u32,
    /// Requests of one connection that wait for their answers at the same time
    #[arg(long, short = 'p', value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pipeline: u32,
    /// Requests a second, an open loop [default: a closed loop]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    rate: Option<u32>,
    /// How long, in seconds
    #[arg(long, short = 'd', value_name = "S", default_value_t = 5, conflicts_with = "count",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    duration: u64,
    /// How many answers, instead of how long
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Seconds before anything counts [default: 1, with --count 0]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=3_600))]
    warm_up: Option<u64>,
    /// Threads that create the load
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// The version of the service that is asked for
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    version: Version,
    #[command(flatten)]
    connect: Connect,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let topic = Topic::parse(&arguments.topic)
        .map_err(|_| usage(format!("{:?} is no topic, as echo.say is", arguments.topic)))?;
    let payload = payload(arguments)?;
    let payload = as_payload(&payload, arguments.binary)?;
    // Each connection has a copy of each of its requests.
    let copies = u64::from(arguments.connections) * u64::from(arguments.pipeline);
    if payload.as_bytes().len() as u64 * copies > MAX_HELD {
        return Err(usage(format!(
            "{copies} requests of {} bytes at a time are more than {MAX_HELD} bytes; take fewer of --connections or \
             --pipeline",
            payload.as_bytes().len()
        )));
    }
    let plan = LoadPlan {
        depth: arguments.pipeline as usize,
        pace: arguments
            .rate
            .map_or(Pace::Closed, |rate| Pace::Open(f64::from(rate))),
        warm_up: Duration::from_secs(
            arguments
                .warm_up
                .unwrap_or(u64::from(arguments.count.is_none())),
        ),
        length: arguments.count.map_or(
            Length::Time(Duration::from_secs(arguments.duration)),
            Length::Count,
        ),
        threads: arguments.threads as usize,
    };
    let measured = if arguments.http {
        let (host, token) = (arguments.connect.server(), arguments.connect.token()?);
        let path = format!("/call/{}@{}", arguments.topic, arguments.version);
        let http = Http::post(host, &path, token.as_deref(), payload);
        measure(arguments, &plan, &http)?
    } else {
        let frames = Frames::new(topic, arguments.version, payload, plan.depth);
        measure(arguments, &plan, &frames)?
    };
    if measured.answers == 0 {
        let why = "no answer came in time; is it stopped, or busy with others?";
        return Err((Exit::Unreachable, why.into()));
    }
    if arguments.json {
        say!("{}", as_json(arguments, &measured));
    } else {
        print(&measured);
    }
    if measured.stalled() {
        complain!(
            "{} requests had no answer at the end, the oldest for {}",
            measured.unanswered,
            duration(Duration::from_nanos(measured.oldest_ns))
        );
    }
    Ok(if measured.refused.is_empty() && !measured.stalled() {
        Exit::Success
    } else {
        Exit::Failure
    })
}

fn measure<P: Protocol + Clone>(
    arguments: &Arguments,
    plan: &LoadPlan,
    protocol: &P,
) -> Result<Measured> {
    crate::system::raise_open_files();
    let load_streams = arguments.connect.load_streams(
        arguments.connections as usize,
        Duration::from_secs(5),
        arguments.http,
    )?;
    let load_streams = load_streams
        .into_iter()
        .map(|stream| (stream, protocol.clone()))
        .collect();
    let progress = Arc::new(Progress::default());
    let shown = show_progress(&progress, plan);
    let measured = load::run(load_streams, plan, &progress);
    progress.stop.store(true, Relaxed);
    if let Some(shown) = shown {
        shown.thread().unpark();
        let _ = shown.join();
    }
    measured.map_err(|error| (Exit::Unreachable, printable(&error.to_string())))
}

fn payload(arguments: &Arguments) -> Result<Vec<u8>> {
    match arguments.payload.as_deref() {
        Some(text) => read_payload(text),
        None if arguments.binary => Ok(vec![b'x'; arguments.size as usize]),
        None => Ok(format!("\"{}\"", "x".repeat(arguments.size as usize - 2)).into_bytes()),
    }
}

/// A line that is written over, for a person who waits.
fn show_progress(progress: &Arc<Progress>, plan: &LoadPlan) -> Option<thread::JoinHandle<()>> {
    let all = plan.length;
    let warm_up = plan.warm_up;
    let progress = Arc::clone(progress);
    let show = move || {
        let begun = Instant::now();
        let mut last = (begun, 0);
        while !progress.stop.load(Relaxed) {
            thread::park_timeout(PROGRESS_EVERY);
            let (now, answers) = (Instant::now(), progress.answers.load(Relaxed));
            #[allow(clippy::cast_precision_loss)]
            let rate = (answers - last.1) as f64 / (now - last.0).as_secs_f64();
            last = (now, answers);
            let of = match all {
                Length::Time(length) => {
                    format!(
                        "{} s of {} s",
                        begun.elapsed().as_secs(),
                        (warm_up + length).as_secs()
                    )
                }
                Length::Count(count) => format!("{answers} of {count}"),
            };
            let _ = write!(io::stderr(), "\r{of}, {rate:.0} answers/s \x1b[K");
        }
        let _ = write!(io::stderr(), "\r\x1b[K");
    };
    let terminal = io::stderr().is_terminal();
    terminal
        .then(|| thread::Builder::new().spawn(show).map_err(failure).ok())
        .flatten()
}

fn print(measured: &Measured) {
    let megabytes = measured.bytes as f64 / 1e6 / measured.elapsed.as_secs_f64().max(1e-9);
    say!(
        "{} answers in {:.2} s: {:.0}/s, {megabytes:.1} MB/s of answers",
        measured.answers,
        measured.elapsed.as_secs_f64(),
        measured.rate()
    );
    let times: Vec<_> = QUANTILES
        .iter()
        .map(|(share, name)| format!("{name} {}", duration(measured.quantile(*share))))
        .collect();
    say!("{}", times.join(", "));
    for (code, count) in &measured.refused {
        complain!("refused {count} times: {}", printable(code));
    }
}

fn as_json(arguments: &Arguments, measured: &Measured) -> serde_json::Value {
    let times: serde_json::Map<_, _> = QUANTILES
        .iter()
        .map(|(share, name)| {
            (
                (*name).to_owned(),
                json!(measured.quantile(*share).as_nanos() as f64 / 1e3),
            )
        })
        .collect();
    json!({
        "topic": arguments.topic,
        "protocol": if arguments.http { "http" } else { "frames" },
        "connections": arguments.connections,
        "pipeline": arguments.pipeline,
        "rate": arguments.rate,
        "answers": measured.answers,
        "refused": measured.refused,
        "unanswered": measured.unanswered,
        "seconds": measured.elapsed.as_secs_f64(),
        "answersPerSecond": measured.rate(),
        "bytes": measured.bytes,
        "meanMicros": measured.times.mean() / 1e3,
        "micros": times,
    })
}

fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds @ 1.0.. => format!("{seconds:.2} s"),
        seconds @ 0.001.. => format!("{:.2} ms", seconds * 1e3),
        seconds => format!("{:.0} µs", seconds * 1e6),
    }
}
