//! What a call costs in each isolation mode, beside the same work in native
//! code, without network; on one thread, and on two that call at the same time:
//!
//! ```text
//! cargo run --release --example calls -- [BYTES …]
//! ```
//!
//! The service is `echo`; its native twin copies the payload as it does. Both
//! JSON checks of the server are left out, since either would have them.

use std::{
    hint::black_box,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use mb_server::{
    budget::Budget,
    catalog::{LoadSettings, Policy, load_file},
    config::{Config, Isolation, MemoryPlan, services::Overlay},
    host::{Context, Unwatched},
    sandbox::{Call, CompilerConfig, Sandbox, SandboxConfig},
    wire::Payload,
};

const CALLS: usize = 20_000;

fn main() {
    println!(
        "{:>8} {:>7}  {:>16}  {:>16}  {:>16}",
        "bytes", "threads", "request", "shared", "native"
    );
    let named: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|size| size.parse().ok())
        .collect();
    let sizes = if named.is_empty() {
        vec![64, 4096, 65_536]
    } else {
        named
    };
    for (size, threads) in sizes.into_iter().flat_map(|size| [(size, 1), (size, 2)]) {
        let payload = format!("\"{}\"", "x".repeat(size - 2));
        let guest = |isolation| measure_guest(isolation, &payload, threads);
        let row = [
            guest(Isolation::Request),
            guest(Isolation::Shared),
            native(&payload, threads),
        ];
        let text = row.map(|(p50, p99)| format!("{:>7.2} {:>5.1} µs", micros(p50), micros(p99)));
        println!(
            "{size:>8} {threads:>7}  {}  (median and p99)",
            text.join("  ")
        );
    }
}

fn measure_guest(isolation: Isolation, payload: &str, threads: usize) -> (Duration, Duration) {
    let mut config = Config::default();
    config.services.insert(
        "echo".into(),
        Overlay {
            isolation: Some(isolation),
            ..Overlay::default()
        },
    );
    let policy = Policy::new(&config, None);
    let plan = MemoryPlan::of(&config);
    let sandbox = Sandbox::new(SandboxConfig {
        largest_instance: policy.largest_instance(),
        largest_table: policy.largest_table(),
        stack: config.sandbox.stack.0,
        instances: plan.instances,
        call_depth: config.sandbox.call_depth,
        memory: Budget::new(plan.shared),
        compiler: CompilerConfig::default(),
    });
    let settings = LoadSettings {
        dir: "services/dist".into(),
        max_size: config.sandbox.max_component_size.0,
        describe_timeout: config.sandbox.describe_timeout.0,
        policy,
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("services/dist/echo.wasm");
    let service = load_file(&sandbox.expect("an engine"), &settings, &file).expect("echo loads");
    times(threads, || {
        let context = Context::of_loading(Instant::now() + Duration::from_secs(5));
        let call = Call {
            action: "say",
            payload: Payload::Json(payload),
            context,
            watch: Arc::new(Unwatched),
        };
        black_box(service.component.call(call).result.expect("an answer"));
    })
}

fn native(payload: &str, threads: usize) -> (Duration, Duration) {
    times(threads, || {
        drop(black_box(String::from(black_box(payload))))
    })
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
