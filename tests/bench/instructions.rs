//! The same work so many times, for whoever counts instructions:
//!
//! ```text
//! python3 tests/bench/instructions.py
//! ```

use std::{hint::black_box, path::Path, time::Duration, time::Instant};

use mb_server::{
    budget::Budget,
    catalog::{LoadSettings, Policy, load_file},
    config::{Config, Isolation, MemoryPlan, services::Overlay},
    host::{Context, Unwatched},
    sandbox::{Call, CompilerConfig, Sandbox, SandboxConfig},
    wire::{FrameHeader, Header, Kind, Payload, Reassembly, Taken, json, message::write_message},
};

const PAYLOAD: &str = "\"0123456789012345678901234567890123456789012345678901234567890123\"";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (what, count) = (arguments.next().unwrap_or_default(), arguments.next());
    let count: usize = count
        .and_then(|count| count.parse().ok())
        .expect("wire, shared or request, and how often");
    match &*what {
        "wire" => wire(count),
        "shared" => calls(count, Isolation::Shared),
        "request" => calls(count, Isolation::Request),
        other => panic!("{other}? wire, shared or request"),
    }
}

/// A message from its bytes to the bytes of its answer.
fn wire(count: usize) {
    let body = format!("REQUEST:echo.say:1.0.0:some-id\n{PAYLOAD}");
    let header = FrameHeader {
        length: body.len() as u32,
        keep_alive: false,
        binary: false,
        more: false,
    };
    let message = [&header.encode(), body.as_bytes()].concat();
    let mut buffer = Reassembly::new(1 << 20, 8192);
    let mut out = Vec::with_capacity(1024);
    for _ in 0..count {
        let spare = buffer.spare();
        spare[..message.len()].copy_from_slice(&message);
        buffer.advance(message.len());
        let Ok(Some(Taken::Message {
            body,
            binary: false,
        })) = buffer.take()
        else {
            panic!("it is whole")
        };
        let (header, payload) = Header::parse(buffer.message(body)).expect("it is in order");
        let text = json::check(payload).expect("it is JSON");
        out.clear();
        write_message(
            &mut out,
            &Header {
                kind: Kind::Response,
                ..header
            },
            Payload::Json(text),
        );
        black_box(&out);
    }
}

fn calls(count: usize, isolation: Isolation) {
    let mut config = Config::default();
    config.services.insert(
        "echo".into(),
        Overlay {
            isolation: Some(isolation),
            ..Overlay::default()
        },
    );
    let policy = Policy::new(&config, None);
    let sandbox = Sandbox::new(SandboxConfig {
        largest_instance: policy.largest_instance(),
        largest_table: policy.largest_table(),
        stack: config.sandbox.stack.0,
        // As many as fit where address space is short, as under valgrind.
        instances: 4,
        call_depth: 1,
        memory: Budget::new(MemoryPlan::of(&config).shared),
        // Compiling would be most of it, and is not the same each time.
        compiler: CompilerConfig {
            cache_dir: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/instructions")),
            ..CompilerConfig::default()
        },
    })
    .expect("an engine");
    let settings = LoadSettings {
        dir: "services/dist".into(),
        max_size: config.sandbox.max_component_size.0,
        describe_timeout: Duration::from_secs(300),
        policy,
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("services/dist/echo.wasm");
    let service = load_file(&sandbox, &settings, &file).expect("echo loads");
    for _ in 0..count {
        let context = Context::of_loading(Instant::now() + Duration::from_secs(60));
        let call = Call {
            action: "say",
            payload: Payload::Json(PAYLOAD),
            context,
            watch: std::sync::Arc::new(Unwatched),
        };
        black_box(service.component.call(call).result.expect("an answer"));
    }
}
