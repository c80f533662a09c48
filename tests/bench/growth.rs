//! How the server bears more of everything, each against the same server with
//! less of it, in turns.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::support::wat;
use hdrhistogram::Histogram;
use mb_server::{
    load::{
        self, Frames, Length, LoadPlan, LoadStream, Measured, Pace, ParsedReply, Progress, Protocol,
    },
    wire::{Payload, Topic, Version},
};

/// Pairs of measurements; what is said is their median.
const PAIRS: usize = 5;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// One connection, 16 pipelined, every tenth request sleeps 50 ms: times
    /// of the others
    Overtaking,
    /// Idle connections: memory of each, and what they cost 32 active ones
    Idle {
        /// How many; 100 are left of the greatest number
        #[arg(default_value_t = 9_900)]
        connections: usize,
    },
    /// Services loaded: time to start from the cache, and what they cost one
    /// of them
    Services {
        /// How many
        #[arg(default_value_t = 1_000)]
        services: usize,
    },
    /// Rates by payload, connections and pipelining
    Curves,
}

pub fn run(Arguments { what }: &Arguments) -> ExitCode {
    mb_server::system::raise_open_files();
    match what {
        What::Overtaking => overtaking(),
        What::Idle { connections } => idle(*connections),
        What::Services { services: count } => services(*count),
        What::Curves => curves(),
    }
    ExitCode::SUCCESS
}

/// A server of this run, ended when dropped.
struct Server {
    child: Child,
    address: SocketAddr,
    /// From its start until it said that it serves.
    started: Duration,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(services: &Path, settings: &str) -> Self {
        Self::start_with(services, settings, &[])
    }

    fn start_with(services: &Path, settings: &str, environment: &[(&str, &Path)]) -> Self {
        let dir = tempfile::tempdir().expect("a folder for temporary files");
        let config = dir.path().join("mb.toml");
        // Outside of this run nothing is read or left; `settings` may say another.
        let state = if settings.contains("state_dir") {
            String::new()
        } else {
            format!("state_dir = {:?}\n", dir.path())
        };
        fs::write(&config, state + settings).expect("room for settings");
        let binary = std::env::current_exe()
            .expect("it runs")
            .with_file_name("../mb-server");
        let begun = Instant::now();
        let mut child = Command::new(binary)
            .arg("serve")
            .args(["--port", "0", "--admin-port", "0", "--config"])
            .arg(&config)
            .arg("--services")
            .arg(services)
            .current_dir(dir.path())
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(dir.path().join("log")).expect("room for a log"))
            .spawn()
            .expect("cargo build --release builds mb-server");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let address = loop {
            let Some(Ok(line)) = lines.next() else {
                panic!(
                    "the server ended: {}",
                    fs::read_to_string(dir.path().join("log")).unwrap_or_default()
                );
            };
            let words = line.split_whitespace().collect::<Vec<_>>();
            let Some(at) = words
                .iter()
                .find_map(|word| word.trim_end_matches(',').parse::<SocketAddr>().ok())
            else {
                continue;
            };
            break at;
        };
        let started = begun.elapsed();
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            address,
            started,
            _dir: dir,
        }
    }

    fn resident_kib(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        resident
            .and_then(|kib| kib.trim().parse().ok())
            .expect("Linux says how much memory a process holds")
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server takes connections");
        stream.set_nodelay(true).expect("it is a TCP socket");
        stream
    }

    fn load(
        &self,
        topic: &str,
        payload: Payload<'_>,
        connections: usize,
        depth: usize,
    ) -> Measured {
        let topic = Topic::parse(topic).expect("a topic");
        let frames = Frames::new(topic, Version::new(1, 0, 0), payload, depth);
        let links = (0..connections)
            .map(|_| (LoadStream::Plain(self.connect()), frames.clone()))
            .collect();
        let measured =
            load::run(links, &plan(depth, 2), &Progress::default()).expect("all are answered");
        assert!(measured.refused.is_empty(), "{:?}", measured.refused);
        measured
    }
}

fn plan(depth: usize, seconds: u64) -> LoadPlan {
    let length = Length::Time(Duration::from_secs(seconds));
    LoadPlan {
        depth,
        pace: Pace::Closed,
        warm_up: Duration::from_millis(500),
        length,
        threads: 1,
    }
}

fn dist(folder: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One request in ten sleeps until its time of 50 ms is over.
#[derive(Clone)]
struct EveryTenth {
    quick: Frames,
    asked: Vec<(Instant, bool)>,
    count: usize,
    times: Arc<Mutex<Histogram<u64>>>,
}

impl Protocol for EveryTenth {
    const IN_ORDER: bool = false;

    fn write_request(&mut self, slot: usize, out: &mut Vec<u8>) {
        self.count += 1;
        let sleeps = self.count.is_multiple_of(10);
        self.asked[slot] = (Instant::now(), sleeps);
        if sleeps {
            let body = format!("REQUEST:greedy.wasi-sleep:1.0.0:{slot}::50\n");
            out.extend_from_slice(
                &[&(body.len() as u32).to_be_bytes(), &[0; 4], body.as_bytes()].concat(),
            );
        } else {
            self.quick.write_request(slot, out);
        }
    }

    fn parse_reply(&mut self, read: &[u8]) -> Result<Option<ParsedReply>, String> {
        let reply = self.quick.parse_reply(read)?;
        if let Some(slot) = reply.as_ref().and_then(|reply| reply.slot) {
            let (asked, sleeps) = self.asked[slot];
            if !sleeps {
                let mut times = self.times.lock().expect("nobody panics with it");
                times.saturating_record(asked.elapsed().as_nanos() as u64);
            }
        }
        Ok(reply)
    }
}

fn overtaking() {
    let dir = tempfile::tempdir().expect("a folder for temporary files");
    for (from, name) in [
        ("services/dist", "echo.wasm"),
        ("tests/guests/dist", "greedy.wasm"),
    ] {
        fs::copy(dist(from).join(name), dir.path().join(name)).expect("the components are there");
    }
    let grants =
        "services.greedy.grants = { keyvalue = true, log = \"info\", calls = [\"echo.*\"] }";
    let server = Server::start(dir.path(), grants);
    let topic = Topic::parse("echo.say").expect("a topic");
    for round in 1..=PAIRS {
        let times = Arc::new(Mutex::new(
            Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("three digits"),
        ));
        let protocol = EveryTenth {
            quick: Frames::new(topic, Version::new(1, 0, 0), Payload::Json("\"x\""), 16),
            asked: vec![(Instant::now(), false); 16],
            count: 0,
            times: Arc::clone(&times),
        };
        let links = vec![(LoadStream::Plain(server.connect()), protocol)];
        let all = load::run(links, &plan(16, 3), &Progress::default()).expect("all are answered");
        let times = times.lock().expect("it is over");
        let at = |share: f64| times.value_at_quantile(share) as f64 / 1e6;
        println!(
            "round {round}: {} answers, of the quick ones p50 {:.3} ms, p99 {:.3} ms, p99.9 {:.3} ms, most {:.3} ms",
            all.answers,
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
}

fn idle(count: usize) {
    let settings = format!(
        "memory = \"4GiB\"\nmax_connections = {}\nidle_timeout = 600000",
        count + 100
    );
    let settings = &*settings;
    let [alone, crowded] = [(); 2].map(|()| Server::start(&dist("services/dist"), settings));
    let payload = format!("\"{}\"", "x".repeat(62));
    let active = |server: &Server| server.load("echo.say", Payload::Json(&payload), 32, 1);
    // What the first connections and calls allocate for good is not theirs.
    active(&crowded);
    let before = crowded.resident_kib();
    let begun = Instant::now();
    let idle: Vec<_> = (0..count).map(|_| crowded.connect()).collect();
    // Each has been served, not only accepted, when the last one answers.
    let served = active(&crowded);
    let took = begun.elapsed();
    let each = (crowded.resident_kib() - before) as f64 / count as f64;
    println!(
        "{count} idle connections: {each:.1} KiB resident each, {:.0} µs each until served ({} answers came meanwhile)",
        (took.as_secs_f64() - 2.5).max(0.0) * 1e6 / count as f64,
        served.answers
    );
    let mut ratios = Vec::new();
    for pair in 1..=PAIRS {
        let (without, with) = (active(&alone), active(&crowded));
        let p99 = |measured: &Measured| measured.quantile(0.99).as_secs_f64() * 1e3;
        println!(
            "pair {pair}: p99 {:.3} ms without, {:.3} ms with; {:.0}/s and {:.0}/s",
            p99(&without),
            p99(&with),
            without.rate(),
            with.rate()
        );
        ratios.push(p99(&with) / p99(&without));
    }
    println!("median ratio of p99: {:.2}", median(ratios));
    drop(idle);
}

fn services(count: usize) {
    let [few, many] = [1, count].map(|count| {
        let dir = tempfile::tempdir().expect("a folder for temporary files");
        for number in 0..count {
            let name = format!("s{number}");
            fs::write(
                dir.path().join(format!("{name}.wasm")),
                wat::guest(&name, "", ""),
            )
            .expect("room");
        }
        dir
    });
    let cache = tempfile::tempdir().expect("a folder for temporary files");
    let (code, state) = (cache.path().join("code"), cache.path().join("state"));
    let settings = format!("state_dir = {state:?}\n");
    let start = || Server::start_with(many.path(), &settings, &[("XDG_CACHE_HOME", &code)]);
    let first = start();
    println!(
        "{count} services: started in {:.2} s, compiling",
        first.started.as_secs_f64()
    );
    drop(first);
    for _ in 0..3 {
        let again = start();
        println!(
            "{count} services: started in {:.2} s from the cache",
            again.started.as_secs_f64()
        );
    }
    let (one, all) = (
        Server::start(few.path(), &settings),
        Server::start(many.path(), &settings),
    );
    let mut ratios = Vec::new();
    for pair in 1..=PAIRS {
        let rate = |server: &Server| server.load("s0.run", Payload::Json("1"), 32, 16).rate();
        let (without, with) = (rate(&one), rate(&all));
        println!("pair {pair}: {without:.0}/s with 1 loaded, {with:.0}/s with {count}");
        ratios.push(with / without);
    }
    println!("median ratio: {:.3}", median(ratios));
}

fn curves() {
    let settings = "memory = \"3GiB\"\nmax_connections = 10000\nidle_timeout = 600000\nmax_message_size = \"2MiB\"\n";
    let shared = "services.echo.isolation = \"shared\"\n";
    let [request, shared] = ["", shared]
        .map(|more| Server::start(&dist("services/dist"), &(settings.to_owned() + more)));
    let row = |label: String, payload: Payload<'_>, connections: usize, depth: usize| {
        let [request, shared] =
            [&request, &shared].map(|server| server.load("echo.say", payload, connections, depth));
        let text = |measured: &Measured| {
            format!(
                "{:>9.0}/s p99 {:>9.3} ms",
                measured.rate(),
                measured.quantile(0.99).as_secs_f64() * 1e3
            )
        };
        println!("{label:<28} {}   {}", text(&request), text(&shared));
    };
    println!("{:<28} {:<27}   shared", "", "request");
    for size in [16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_000] {
        let json = format!("\"{}\"", "x".repeat(size - 2));
        row(format!("{size} B of JSON"), Payload::Json(&json), 32, 1);
        row(
            format!("{size} B of bytes"),
            Payload::Binary(json.as_bytes()),
            32,
            1,
        );
    }
    let json = format!("\"{}\"", "x".repeat(62));
    for connections in [1, 2, 4, 8, 32, 128, 512, 2048, 9_900] {
        row(
            format!("{connections} connections"),
            Payload::Json(&json),
            connections,
            1,
        );
    }
    for depth in [1, 2, 4, 8, 16, 32, 64, 256] {
        row(
            format!("{depth} pipelined"),
            Payload::Json(&json),
            32,
            depth,
        );
    }
}
