//! How many requests a running server answers, and how fast:
//!
//! ```text
//! mb-server serve & cargo run --release --example throughput -- [HOST:PORT [HOST:TLS_PORT CA_FILE]]
//! ```
//!
//! `echo.say` with 64 bytes of JSON over 32 connections, one at a time and 16
//! pipelined, plain and where it is named over TLS, three times in turns, 3 s
//! each after 1 s of warm-up. A closed loop on the machine of the server: both
//! share its cores.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use mb_server::transport::{ClientTls, client_config};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

const CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(3);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let plain = arguments.next().unwrap_or_else(|| "127.0.0.1:8081".into());
    let tls = arguments.next().zip(arguments.next()).map(|(server, ca)| {
        let tls = ClientTls {
            ca: Some(ca.into()),
            ..ClientTls::default()
        };
        (server, client_config(&tls).expect("the file of the CA"))
    });
    for round in 1..=3 {
        for depth in [1, 16] {
            run(round, "plain", depth, &plain, None);
            if let Some((server, config)) = &tls {
                run(round, "TLS  ", depth, server, Some(config));
            }
        }
    }
}

fn run(round: usize, kind: &str, depth: usize, server: &str, tls: Option<&Arc<ClientConfig>>) {
    let start = |_| {
        let stream =
            TcpStream::connect(server).expect("a running server; mb-server serve starts one");
        stream.set_nodelay(true).unwrap();
        match tls.map(|config| {
            ClientConnection::new(Arc::clone(config), "localhost".try_into().unwrap()).unwrap()
        }) {
            None => thread::spawn(move || measure(stream, depth)),
            Some(session) => {
                thread::spawn(move || measure(StreamOwned::new(session, stream), depth))
            }
        }
    };
    let threads: Vec<_> = (0..CONNECTIONS).map(start).collect();
    let mut all: Vec<Duration> = threads
        .into_iter()
        .flat_map(|thread| thread.join().unwrap())
        .collect();
    all.sort_unstable();
    let rate = (all.len() * depth) as f64 / MEASURED.as_secs_f64();
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    let (p50, p99) = (at(0.5), at(0.99));
    println!(
        "round {round}, {kind} {depth:2} pipelined: {rate:8.0} requests/s, p50 {p50:6.0} µs, p99 {p99:6.0} µs a batch"
    );
}

/// Time of each batch, from its write to its last answer.
fn measure(mut stream: impl Read + Write, depth: usize) -> Vec<Duration> {
    let payload = format!("{{\"text\":\"{}\"}}", "x".repeat(53));
    let body = format!("REQUEST:echo.say:1.0.0:1\n{payload}");
    let request = [
        &u32::try_from(body.len()).unwrap().to_be_bytes(),
        &[0; 4],
        body.as_bytes(),
    ]
    .concat()
    .repeat(depth);
    let answer = 8 + "RESPONSE:echo.say:1.0.0:1\n".len() + payload.len();
    let mut answers = vec![0; answer * depth];
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < WARM_UP + MEASURED {
        let sent = Instant::now();
        stream.write_all(&request).unwrap();
        stream.read_exact(&mut answers).unwrap();
        if sent.duration_since(begun) >= WARM_UP {
            times.push(sent.elapsed());
        }
    }
    assert!(
        answers.ends_with(payload.as_bytes()),
        "the last answer is the right one"
    );
    times
}
