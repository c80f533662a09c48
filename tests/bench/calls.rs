//! What a call costs in each isolation mode, beside the same work in native
//! code, without network; on one thread, and on two that call at the same
//! time. The service is `echo`; native code copies the payload as it does.
//! Both JSON checks of the server are left out, since either would have them.

use std::{
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

use mb_server::config::Isolation;

use super::echo::Echo;

const CALLS: usize = 20_000;

#[derive(clap::Args)]
pub struct Arguments {
    /// Bytes of the payload
    #[arg(default_values_t = [64, 4096, 65_536])]
    sizes: Vec<usize>,
}

pub fn run(Arguments { sizes }: &Arguments) -> ExitCode {
    println!(
        "{:>8} {:>7}  {:>16}  {:>16}  {:>16}",
        "bytes", "threads", "request", "shared", "native"
    );
    for (size, threads) in sizes.iter().flat_map(|size| [(*size, 1), (*size, 2)]) {
        let payload = format!("\"{}\"", "x".repeat(size.saturating_sub(2)));
        let guest = |isolation| {
            let echo = Echo::load(isolation, None, None);
            times(threads, || drop(black_box(echo.say(&payload))))
        };
        let row = [
            guest(Isolation::Request),
            guest(Isolation::Shared),
            times(threads, || {
                drop(black_box(String::from(black_box(&*payload))));
            }),
        ];
        let text = row.map(|(p50, p99)| format!("{:>7.2} {:>5.1} µs", micros(p50), micros(p99)));
        println!(
            "{size:>8} {threads:>7}  {}  (median and p99)",
            text.join("  ")
        );
    }
    ExitCode::SUCCESS
}

/// Median and 99th percentile of all threads' calls, after as many to warm up.
fn times(threads: usize, work: impl Fn() + Sync) -> (Duration, Duration) {
    let timed = || {
        (0..CALLS).for_each(|_| work());
        let timed = |_| {
            let begun = Instant::now();
            work();
            begun.elapsed()
        };
        (0..CALLS).map(timed).collect::<Vec<_>>()
    };
    let mut times: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(timed)).collect();
        running
            .into_iter()
            .flat_map(|thread| thread.join().expect("no call fails"))
            .collect()
    });
    times.sort();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
