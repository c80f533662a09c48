//! Takes more of the host than it should: what `hostile` is for processor and
//! memory, this is for capabilities.

use std::time::Duration;

use mb_service::{
    Failure, Payload, calls,
    keyvalue::{Bucket, Error},
    log, service,
};
use serde::Deserialize;
use serde_json::{Value, json};
use wasi::{
    cli::{exit::exit, stdout::get_stdout},
    clocks::{monotonic_clock, wall_clock},
    io::poll::poll,
    random::random::get_random_bytes,
};

wit_bindgen::generate!({
    path: "../../wit",
    world: "wasi",
    generate_all,
});

const HOUR: u64 = 3_600_000_000_000;

fn host_loop(_: Payload) {
    loop {
        let _ = monotonic_clock::now();
    }
}

fn wasi_sleep(_: Payload) {
    monotonic_clock::subscribe_duration(HOUR).block();
}

fn wasi_poll(_: Payload) {
    let (one, other) = (
        monotonic_clock::subscribe_duration(HOUR),
        monotonic_clock::subscribe_duration(HOUR / 2),
    );
    poll(&[&one, &other]);
}

#[derive(Deserialize)]
struct Delay {
    ms: u64,
}

/// Sleeps as it is told, and answers by the clocks.
fn nap(delay: Delay) -> Value {
    let begun = monotonic_clock::now();
    monotonic_clock::subscribe_duration(delay.ms * 1_000_000).block();
    json!({ "ms": (monotonic_clock::now() - begun) / 1_000_000, "year": 1970 + wall_clock::now().seconds / 31_556_952 })
}

fn random(_: Payload) -> Value {
    json!({ "different": get_random_bytes(16) != get_random_bytes(16) })
}

fn random_bomb(_: Payload) {
    get_random_bytes(1 << 30);
}

fn stdout(text: String) {
    get_stdout()
        .blocking_write_and_flush(text.as_bytes())
        .unwrap();
}

fn exits(_: Payload) {
    exit(Err(()));
}

fn log_string(_: Payload) {
    log::info("x".repeat(40 << 20));
}

fn kv_list(_: Payload) -> Value {
    let bucket = Bucket::open("b").unwrap();
    asked(bucket.set("k", &vec![1; 40 << 20]))
}

fn handles(_: Payload) {
    for _ in 0..1_000_000 {
        std::mem::forget(monotonic_clock::subscribe_duration(HOUR));
    }
}

#[derive(Deserialize)]
struct Handles {
    #[serde(default)]
    keep: bool,
    count: usize,
}

/// Takes handles, and answers their numbers; gives them back, or does not.
fn numbers(handles: Handles) -> Value {
    let taken: Vec<_> = (0..handles.count)
        .map(|_| monotonic_clock::subscribe_duration(HOUR))
        .collect();
    let numbers: Vec<_> = taken.iter().map(|pollable| pollable.handle()).collect();
    if handles.keep {
        std::mem::forget(taken);
    }
    json!(numbers)
}

fn log_flood(_: Payload) -> Value {
    let line = "x".repeat(1024);
    for _ in 0..1 << 20 {
        log::info(&line);
    }
    json!("flooded")
}

fn log_control(_: Payload) {
    log::info("one\nFAKE two\r\x1b[2J\u{202e}three\0");
}

fn log_long(_: Payload) {
    log::info("y".repeat(1 << 20));
}

fn asked<T>(result: Result<T, Error>) -> Value {
    match result {
        Ok(_) => json!("fine"),
        Err(error) => json!(Failure::from(error).message),
    }
}

fn kv_quota(_: Payload) -> Result<Value, Failure> {
    let bucket = Bucket::open("flood")?;
    let value = vec![7; 100_000];
    for count in 0..1000 {
        if let Err(error) = bucket.set(&format!("k{count}"), &value) {
            return Ok(json!({ "count": count, "error": Failure::from(error).message }));
        }
    }
    Ok(json!("no end"))
}

fn kv_keys(_: Payload) -> Result<Value, Failure> {
    let bucket = Bucket::open("")?;
    let long = "k".repeat(1 << 20);
    Ok(json!([
        asked(bucket.set("", b"v")),
        asked(bucket.set(&long, b"v")),
        asked(Bucket::open("no such/name"))
    ]))
}

/// Everything that a bucket does, once.
fn kv_tour(_: Payload) -> Result<Value, Failure> {
    let bucket = Bucket::open("tour")?;
    bucket.set("a", b"1")?;
    bucket.set_many(&[("b".into(), b"2".to_vec()), ("c".into(), b"3".to_vec())])?;
    bucket.update("a", |old| [old.unwrap_or_default(), b"!".to_vec()].concat())?;
    let number = bucket.increment("n", 41)? + bucket.increment("n", 1)?;
    bucket.delete("b")?;
    let keys: Vec<String> = bucket.keys().collect::<Result<_, _>>()?;
    let value = String::from_utf8(bucket.get("a")?.unwrap_or_default()).unwrap_or_default();
    bucket.delete_many(&keys)?;
    Ok(json!({ "keys": keys, "value": value, "number": number, "left": bucket.exists("a")? }))
}

/// What is newer than the contract's first version.
fn kv_newer(_: Payload) -> Result<Value, Failure> {
    let bucket = Bucket::open("newer")?;
    bucket.set_for("b/1", b"1", Duration::from_secs(3600))?;
    bucket.set_for("b/2", b"2", Duration::from_millis(1))?;
    bucket.set("c", b"3")?;
    let begun = mb_service::now();
    while bucket.exists("b/2")? {}
    let keys: Vec<String> = bucket.keys_from("b/").collect::<Result<_, _>>()?;
    let refused = bucket.try_update("c", |_| Err(Failure::new("NO", "not now")));
    let value = String::from_utf8(bucket.get("c")?.unwrap_or_default()).unwrap_or_default();
    let never = asked(bucket.set_for("d", b"4", Duration::ZERO));
    Ok(json!({
        "keys": keys,
        "refused": refused.map_err(|failure| failure.code),
        "value": value,
        "never": never,
        "went": mb_service::now() > begun,
    }))
}

#[derive(Deserialize)]
struct Call {
    topic: String,
    #[serde(default)]
    payload: Value,
    timeout: Option<u64>,
}

/// Makes a call and answers what came of it.
fn call(
    Call {
        topic,
        payload,
        timeout,
    }: Call,
) -> Value {
    let payload = Payload::Json(payload.to_string());
    match calls::call_raw(
        &topic,
        "1.0.0",
        &payload,
        timeout.map(Duration::from_millis),
    ) {
        Ok(Payload::Json(text)) => {
            json!({ "answer": serde_json::from_str::<Value>(&text).unwrap() })
        }
        Ok(Payload::Binary(bytes)) => json!({ "bytes": bytes.len() }),
        Err(error) => json!({ "code": error.code, "message": error.message,
            "origin": format!("{:?}", error.origin), "details": error.details }),
    }
}

service! {
    name: "greedy",
    description: "Takes more of the host than it should",
    /// Calls the host without end.
    "host-loop" => host_loop,
    /// Sleeps for an hour.
    "wasi-sleep" => wasi_sleep,
    /// Polls for half an hour.
    "wasi-poll" => wasi_poll,
    /// Sleeps {"ms"} and answers how long it took.
    "nap" => nap,
    /// Answers whether random bytes differ.
    "random" => random,
    /// Asks for 1 GiB of random bytes.
    "random-bomb" => random_bomb,
    /// Prints its argument.
    "stdout" => stdout,
    /// Exits.
    "exit" => exits,
    /// Hands a string of 40 MiB to the log.
    "log-string" => log_string,
    /// Hands a list of 40 MiB to the store.
    "kv-list" => kv_list,
    /// Holds a million handles.
    "handles" => handles,
    /// Takes {"count"} handles, answers their numbers, and may {"keep"} them.
    "numbers" => numbers,
    /// Writes 1 GiB to the log.
    "log-flood" => log_flood,
    /// Writes control characters to the log.
    "log-control" => log_control,
    /// Writes a line of 1 MiB to the log.
    "log-long" => log_long,
    /// Fills the store until it is refused.
    "kv-quota" => kv_quota,
    /// Uses keys and names out of bounds.
    "kv-keys" => kv_keys,
    /// Does everything that a bucket does.
    "kv-tour" => kv_tour,
    /// Uses values that end, and keys by prefix.
    "kv-newer" => kv_newer,
    /// Calls {"topic","payload"} and answers what came of it.
    "call" => call,
}
