//! Ours beside what users would take instead, in one run on one machine:
//!
//! ```text
//! cargo build --release && tests/bench/guests/build
//! cargo run --release --example measure -- compare
//! ```
//!
//! All do the same with 64 bytes of JSON: parse, wrap, serialise. `echo` (a
//! bare blocking echo of frames) and `nginx` (a fixed answer) do not even
//! that: they are limits. Everybody takes turns, some rounds of it, and what
//! counts are the ratios within a round. Whoever is not installed is named.

mod plot;
mod protocols;
mod stand_ins;
mod subjects;

use std::{
    collections::BTreeMap,
    net::TcpStream,
    process::{Command, ExitCode},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use mb_server::load::{self, Length, LoadPlan, LoadStream, Measured, Pace, Progress};
use protocols::{InOrder, Named};
use subjects::{Starter, Subject};

const CONNECTIONS: usize = 32;
const DEPTH: usize = 16;
/// Before anything counts: as long as ours may take to find out where
/// connections wait best, and the system to put their threads.
const WARM_UP: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Arguments {
    /// Rounds; all take their turn in each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Only these, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Bytes of the payload
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Turns of a loop in every call; 300000 take about a millisecond in WebAssembly
    #[arg(long, default_value_t = 0)]
    spin: u64,
    /// Everything on one core, and 512 MiB of data for each server, as on a small host
    #[arg(long)]
    one_core: bool,
    /// Threads that create the load: 1 is cheapest, 32 is as many clients that
    /// block
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Leave out the open loop
    #[arg(long)]
    closed_only: bool,
    /// The server to compare, as another profile made it [default: the one beside this program]
    #[arg(long)]
    server: Option<std::path::PathBuf>,
    /// Draw the result into this file
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
    #[arg(long, hide = true)]
    serve_echo: Option<u16>,
    #[arg(long, hide = true)]
    serve_native: Option<u16>,
    #[arg(long, hide = true)]
    serve_parrot: Option<u16>,
}

/// What was measured of one subject, by round.
#[derive(Default)]
pub struct Row {
    single: Vec<f64>,
    single_p99: Vec<Duration>,
    single_cpu: Vec<f64>,
    piped: Vec<f64>,
    piped_cpu: Vec<f64>,
    /// Processor time of a request with two busy connections, to one.
    two_to_one: Vec<f64>,
    open_p999: Vec<Duration>,
}

pub fn run(arguments: &Arguments) -> ExitCode {
    if let Some(port) = arguments.serve_echo {
        stand_ins::echo(port);
    }
    if let Some(port) = arguments.serve_native {
        stand_ins::native(port);
    }
    if let Some(port) = arguments.serve_parrot {
        stand_ins::parrot(port);
    }
    match compare(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("compare: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments) -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let server = match &arguments.server {
        Some(server) => server.canonicalize(),
        None => std::env::current_exe().map(|own| own.with_file_name("../mb-server")),
    };
    let server = server.map_err(|error| format!("the server: {error}"))?;
    let mut starter = Starter {
        dir: dir.path().into(),
        server,
        before: Vec::new(),
    };
    if arguments.one_core {
        // What is started from here on stays on the same core as we do.
        let own = std::process::id().to_string();
        let pinned = Command::new("taskset")
            .args(["-a", "-p", "-c", "0", &own])
            .output();
        if !pinned.is_ok_and(|output| output.status.success()) {
            return Err("taskset is needed for --one-core".into());
        }
        starter.before = ["prlimit", "--data=536870912", "--"]
            .map(str::to_owned)
            .to_vec();
    }
    let mut running = Vec::new();
    for (name, start) in starter.all() {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
            continue;
        }
        match start() {
            Ok(subject) => running.push(subject),
            Err(problem) => println!("missing: {name}: {}", problem.trim()),
        }
    }
    let payload = payload(arguments);
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    for round in 1..=arguments.rounds {
        for subject in &running {
            eprintln!("round {round}: {}", subject.name);
            let row = rows.entry(subject.name).or_default();
            if let Err(problem) = measure(subject, &payload, arguments, row) {
                println!("failed: {}: {problem}", subject.name);
            }
        }
    }
    print(&running, &rows);
    if let Some(file) = &arguments.svg {
        let bars = running.iter().map(|subject| {
            let row = &rows[subject.name];
            (subject.name, median(&row.single), median(&row.piped))
        });
        std::fs::write(file, plot::svg(&bars.collect::<Vec<_>>()))
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn payload(arguments: &Arguments) -> String {
    let begin = match arguments.spin {
        0 => "{\"text\":\"".to_owned(),
        spin => format!("{{\"spin\":{spin},\"text\":\""),
    };
    let filler = arguments.size.saturating_sub(begin.len() + 2);
    format!("{begin}{}\"}}", "x".repeat(filler))
}

fn measure(
    subject: &Subject,
    payload: &str,
    arguments: &Arguments,
    row: &mut Row,
) -> std::io::Result<()> {
    let seconds = Duration::from_secs(arguments.seconds);
    let threads = arguments.threads;
    let closed = |connections, depth| {
        load_on(
            subject,
            payload,
            (connections, depth, threads),
            Pace::Closed,
            seconds,
        )
    };
    let (single, cpu) = closed(CONNECTIONS, 1)?;
    row.single.push(single.rate());
    row.single_p99.push(single.quantile(0.99));
    row.single_cpu.push(cpu);
    let mut peak = single.rate();
    if subject.pipelines() {
        let (piped, cpu) = closed(CONNECTIONS, DEPTH)?;
        row.piped.push(piped.rate());
        row.piped_cpu.push(cpu);
        peak = piped.rate();
        let (one, two) = (closed(1, DEPTH)?.1, closed(2, DEPTH)?.1);
        row.two_to_one.push(two / one);
    }
    if !arguments.closed_only {
        let depth = if subject.pipelines() { DEPTH } else { 1 };
        let (open, _) = load_on(
            subject,
            payload,
            (CONNECTIONS, depth, threads),
            Pace::Open(peak * 0.7),
            seconds,
        )?;
        row.open_p999.push(open.quantile(0.999));
    }
    Ok(())
}

/// Also the time of the processor that the subject took, in µs a request.
fn load_on(
    subject: &Subject,
    payload: &str,
    (connections, depth, threads): (usize, usize, usize),
    pace: Pace,
    length: Duration,
) -> std::io::Result<(Measured, f64)> {
    let plan = LoadPlan {
        depth,
        pace,
        warm_up: WARM_UP,
        length: Length::Time(length),
        threads,
    };
    let mut links = Vec::new();
    for number in 0..connections {
        let stream = TcpStream::connect(subject.address)?;
        stream.set_nodelay(true)?;
        if let protocols::Any::Nats { .. } = subject.protocol(payload, depth, number) {
            greet_nats(&stream)?;
        }
        links.push((
            LoadStream::Plain(stream),
            subject.protocol(payload, depth, number),
        ));
    }
    let progress = Progress::default();
    let before = subject.cpu_micros();
    let measured = if subject.answers_in_turn() {
        load::run(
            links
                .into_iter()
                .map(|(link, any)| (link, InOrder(any)))
                .collect(),
            &plan,
            &progress,
        )
    } else {
        load::run(
            links
                .into_iter()
                .map(|(link, any)| (link, Named(any)))
                .collect(),
            &plan,
            &progress,
        )
    }?;
    let cpu = (subject.cpu_micros() - before) as f64 / progress.answers.load(Relaxed).max(1) as f64;
    match measured.refused.first_key_value() {
        Some((code, count)) => Err(std::io::Error::other(format!(
            "refused {count} times: {code}"
        ))),
        None => Ok((measured, cpu)),
    }
}

/// NATS speaks first, a line that is no answer.
fn greet_nats(mut stream: &TcpStream) -> std::io::Result<()> {
    use std::io::{Read, Write};
    stream.write_all(b"CONNECT {\"verbose\":false}\r\n")?;
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median of the ratios within each round, and their spread.
fn ratio(ours: &[f64], theirs: Option<&Vec<f64>>) -> String {
    let Some(theirs) = theirs else {
        return "-".into();
    };
    let ratios: Vec<_> = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| ours / theirs)
        .collect();
    if ratios.is_empty() {
        return "-".into();
    }
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    format!("{:.2} ({least:.2}-{most:.2})", median(&ratios))
}

fn print(running: &[Subject], rows: &BTreeMap<&str, Row>) {
    let of = |name: &str, pick: fn(&Row) -> &Vec<f64>| rows.get(name).map(pick);
    for (title, pick, cpu) in [
        (
            "one at a time",
            (|row: &Row| &row.single) as fn(&Row) -> &Vec<f64>,
            (|row: &Row| &row.single_cpu) as fn(&Row) -> &Vec<f64>,
        ),
        (
            "16 pipelined",
            |row: &Row| &row.piped,
            |row: &Row| &row.piped_cpu,
        ),
    ] {
        println!("\n{CONNECTIONS} connections, {title}");
        println!(
            "{:<14} {:>10} {:>18} {:>18} {:>18} {:>12}",
            "", "answers/s", "to echo", "to redis", "to wasmtime", "CPU µs each"
        );
        for subject in running {
            let row = &rows[subject.name];
            let rates = pick(row);
            if rates.is_empty() {
                continue;
            }
            let (echo, redis) = (of("echo", pick), of("redis", pick));
            // It has nothing but one at a time.
            let wasmtime = of("wasmtime", pick).filter(|rates| !rates.is_empty());
            println!(
                "{:<14} {:>10.0} {:>18} {:>18} {:>18} {:>12.2}",
                subject.name,
                median(rates),
                ratio(rates, echo),
                ratio(rates, redis),
                ratio(rates, wasmtime),
                median(cpu(row)),
            );
        }
    }
    println!(
        "\n{:<14} {:>12} {:>16} {:>22} {:>14}",
        "", "p99 single", "p99.9 at 70 %", "CPU of 2 to 1 busy", "resident MiB"
    );
    for subject in running {
        let row = &rows[subject.name];
        let micros = |times: &[Duration]| {
            let micros: Vec<_> = times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
            if micros.is_empty() {
                "-".into()
            } else {
                format!("{:.0} µs", median(&micros))
            }
        };
        let two = if row.two_to_one.is_empty() {
            "-".into()
        } else {
            format!("{:.2}", median(&row.two_to_one))
        };
        println!(
            "{:<14} {:>12} {:>16} {:>22} {:>14.1}",
            subject.name,
            micros(&row.single_p99),
            micros(&row.open_p999),
            two,
            subject.resident_kib() as f64 / 1024.0
        );
    }
}
