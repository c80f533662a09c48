//! The same work so many times, for whoever counts instructions:
//!
//! ```text
//! python3 tests/bench/instructions.py
//! ```

use std::{hint::black_box, path::Path, process::ExitCode};

use mb_server::{
    config::Isolation,
    wire::{FrameHeader, Header, Kind, Payload, Reassembly, Taken, json, message::write_message},
};

use super::echo::Echo;

const PAYLOAD: &str = "\"0123456789012345678901234567890123456789012345678901234567890123\"";

#[derive(Clone, Copy, clap::ValueEnum)]
enum Work {
    /// A message, to its answer, without a call
    Wire,
    /// A call in a shared instance
    Shared,
    /// A call in an instance of its own
    Request,
}

#[derive(clap::Args)]
pub struct Arguments {
    work: Work,
    count: usize,
}

pub fn run(Arguments { work, count }: &Arguments) -> ExitCode {
    match work {
        Work::Wire => wire(*count),
        Work::Shared => calls(*count, Isolation::Shared),
        Work::Request => calls(*count, Isolation::Request),
    }
    ExitCode::SUCCESS
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
        let (header, payload) =
            Header::parse(buffer.buffer().message(body)).expect("it is in order");
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
    // As many instances as fit where address space is short, as under
    // valgrind; and a cache, because compiling would be most of it, and is not
    // the same each time.
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/instructions");
    let echo = Echo::load(isolation, Some(4), Some(cache));
    for _ in 0..count {
        black_box(echo.say(PAYLOAD));
    }
}
