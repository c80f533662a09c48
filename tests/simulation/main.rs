//! The server's connections, poller and workers, the files themselves, over a
//! simulated machine: a clock that stands until it is moved, sockets that split,
//! delay, reset and half-close, an epoll that tells each arrival once, and
//! threads that a seeded scheduler runs one at a time, another one at each lock,
//! atomic and system call. Guests are quick or slow, they wait, fail and panic.
//! Peers speak frames, WebSocket or HTTP (kept connections, pipelined requests,
//! chunked bodies, some that are refused). They, the operator and the drain do
//! what the seed says.
//!
//!     cargo test --release --test simulation
//!     MB_SEEDS=1000000 cargo test --release --test simulation
//!     MB_SEED=4711 cargo test --release --test simulation -- --nocapture
//!
//! Held at each rest (nobody has anything to do until the clock moves): what has
//! arrived was read, unless the peer takes no answers; no deadline has passed
//! that nobody has seen. For each peer: each request has one answer at most, and
//! exactly one if the peer stayed; quick ones, and all of HTTP, in their order;
//! nothing behind the ERROR or response that closes, and no connection of HTTP
//! that was asked something is closed without one. At the end: nobody is left,
//! and all permits, memory and threads are back.
//!
//! Some seeds are also those of calls that take turns; see `turns`.

#![allow(
    dead_code,
    unused_imports,
    missing_docs,
    unreachable_pub,
    reason = "what is simulated is the server's, which has all of it"
)]

use mb_server::{
    access, budget, config, dispatch, host, http, log, metrics, scheduler, transport, websocket,
    wire,
};

mod client;
mod guests;
mod http_peer;
mod machine;
#[path = "../../src/server/mod.rs"]
mod server;
mod system;
mod turns;

use std::env;

/// One of so many seeds is also one of calls that take turns, which take as long
/// as all the rest.
const TURNS_EVERY: u64 = 4;

/// Seeds of a plain run.
const SEEDS: u64 = 10_000;

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

fn main() {
    let seeds = match number("MB_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MB_SEEDS").unwrap_or(SEEDS),
    };
    let begun = std::time::Instant::now();
    let count = seeds.end - seeds.start;
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let run = || loop {
        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if seed >= seeds.end {
            return;
        }
        if let Err(panic) = std::panic::catch_unwind(|| {
            machine::run(seed);
            if seed.is_multiple_of(TURNS_EVERY) {
                turns::run(seed);
            }
        }) {
            // The others begin no further one.
            next.store(seeds.end, std::sync::atomic::Ordering::Relaxed);
            eprintln!("seed {seed} fails; MB_SEED={seed} runs it again");
            std::panic::resume_unwind(panic);
        }
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        for one in all {
            if let Err(panic) = one.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    println!("{count} seeds in {:.1} s", begun.elapsed().as_secs_f64());
}
