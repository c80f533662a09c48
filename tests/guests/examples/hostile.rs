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

/// Of all that it remembers, this call's own part included.
fn digest(_: Payload) -> Value {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let end = core::arch::wasm32::memory_size::<0>() * 65_536 / 8;
    for word in 0..end {
        // SAFETY: all of it is memory of this instance. Nothing is said at
        // address zero, so the first word is left out.
        let value = if word == 0 {
            0
        } else {
            unsafe { std::ptr::read_volatile((word * 8) as *const u64) }
        };
        digest = (digest ^ value).wrapping_mul(0x0100_0000_01b3);
    }
    json!({ "digest": format!("{digest:016x}"), "pages": core::arch::wasm32::memory_size::<0>() })
}

#[derive(Deserialize)]
struct Leak {
    bytes: usize,
}

/// Leaves something behind in the heap, on the stack and in a static.
fn leave(leak: Leak) -> Value {
    CALLS.fetch_add(1000, Relaxed);
    let leaked = vec![0xa5_u8; leak.bytes].leak();
    let mut deep = [0x5a_u8; 4096];
    black_box(&mut deep);
    json!({ "at": leaked.as_ptr() as usize })
}

service! {
    name: "hostile",
    description: "Misbehaves in the way that the action says",
    /// Never returns.
    "spin" => spin { input: r#"{"type":"object"}"# },
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
    /// Answers {"digest","pages"} of its whole memory.
    "digest" => digest,
    /// Leaves {"bytes"} behind, and answers where.
    "leave" => leave,
    /// Answers {"pages"}, the size of the memory in 64 KiB.
    "pages" => pages,
}
