//! Misbehaves in the way that the action says, so that the server's tests can
//! watch it being contained. A few actions behave, and tell what they see.

use std::hint::{black_box, spin_loop};
use std::process::abort;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use mb_service::{Failure, Payload, context, service};
use serde::Deserialize;
use serde_json::{Value, json};

fn spin(_: Payload) {
    loop {
        spin_loop();
    }
}

fn allocate(_: Payload) {
    loop {
        // Ones, because untouched pages would cost nothing.
        black_box(vec![1_u8; 1 << 20]).leak();
    }
}

fn trap(_: Payload) {
    abort();
}

fn panic(_: Payload) {
    panic!("as asked");
}

/// Keeps nothing in linear memory, so that it is the server's stack that runs
/// out and not the 64 KiB of the service's own.
fn recurse(_: Payload) -> u64 {
    fn descend(depth: u64) -> u64 {
        match CALLS.load(Relaxed) {
            // Never, and two calls so that neither becomes a loop.
            u64::MAX => depth,
            _ => descend(depth + 1) ^ descend(depth + 2),
        }
    }
    descend(0)
}

#[derive(Deserialize)]
struct Size {
    bytes: usize,
}

fn answer_too_large(size: Option<Size>) -> Payload {
    Payload::Binary(vec![1; size.map_or(8 << 20, |size| size.bytes)])
}

fn invalid_json(_: Payload) -> Payload {
    Payload::Json("{not JSON".into())
}

fn empty_json(_: Payload) -> Payload {
    Payload::Json(String::new())
}

fn bad_code(_: Payload) -> Result<(), Failure> {
    Err(Failure::new("not ok", "the code breaks its grammar"))
}

fn details(_: Payload) -> Result<(), Failure> {
    Err(Failure::new("CUSTOM", "refused as asked").with_details(json!({ "reason": "test" })))
}

fn ok(_: Payload) -> Value {
    json!({ "ok": true })
}

fn context(_: Payload) -> Value {
    json!({
        "requestId": context::request_id(),
        "parentRequestId": context::parent_request_id(),
        "requestedVersion": context::requested_version(),
        "principal": context::principal(),
        "connectionId": context::connection_id(),
        "encrypted": context::encrypted(),
        "remainingMs": context::remaining().as_millis() as u64,
    })
}

#[derive(Deserialize)]
struct Delay {
    ms: u64,
}

/// The deadline is the only clock that a service has.
fn sleep_spin(delay: Delay) -> Value {
    let start = context::remaining();
    let elapsed = || start - context::remaining();
    while elapsed() < Duration::from_millis(delay.ms) {}
    json!({ "ms": elapsed().as_millis() as u64 })
}

/// Counts the calls of this instance: what survives from one to the next.
static CALLS: AtomicU64 = AtomicU64::new(0);

fn remember(_: Payload) -> Value {
    json!({ "count": CALLS.fetch_add(1, Relaxed) + 1 })
}

fn pages(_: Payload) -> Value {
    json!({ "pages": core::arch::wasm32::memory_size::<0>() })
}

service! {
    name: "hostile",
    description: "Misbehaves in the way that the action says",
    /// Never returns.
    "spin" => spin,
    /// Takes memory until it is refused, and traps.
    "allocate" => allocate,
    /// Traps.
    "trap" => trap,
    /// Panics, which traps.
    "panic" => panic,
    /// Calls itself without end.
    "recurse" => recurse,
    /// Answers {"bytes"} bytes, or 8 MiB.
    "answer-too-large" => answer_too_large,
    /// Answers JSON that is none.
    "invalid-json" => invalid_json,
    /// Answers JSON of no characters.
    "empty-json" => empty_json,
    /// Fails with a code outside of the grammar.
    "bad-code" => bad_code,
    /// Fails properly: CUSTOM, with details.
    "details" => details,
    /// Answers {"ok":true}.
    "ok" => ok,
    /// Answers what the server says of the call.
    "context" => context,
    /// Spins until {"ms"} of the time that remains are gone, and answers how many.
    "sleep-spin" => sleep_spin,
    /// Answers {"count"}, the calls of it that this instance has served.
    "remember" => remember,
    /// Answers {"pages"}, the size of the memory in 64 KiB.
    "pages" => pages,
}
