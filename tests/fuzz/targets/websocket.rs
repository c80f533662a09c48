//! Frames of WebSocket in any chunks give what they give at once, in bounded
//! memory; a text is UTF-8.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mb_server::{
    websocket::{Fault, Incoming, MAX_HEAD_SIZE, Taken},
    wire::Buffer,
};

const LIMIT: usize = 512;
const READ: usize = 16;

#[derive(Debug, PartialEq, Eq)]
enum Out {
    Message(Vec<u8>, bool),
    Ping(Vec<u8>),
    Pong,
    Close(Option<u16>),
}

fn feed(stream: &[u8], chunk: usize) -> (Vec<Out>, Option<Fault>) {
    let mut incoming = Incoming::new(Buffer::new(0, READ), LIMIT);
    let (mut out, mut rest) = (Vec::new(), stream);
    loop {
        let bytes = |incoming: &Incoming, at| incoming.buffer().message(at).to_vec();
        match incoming.take() {
            Ok(Some(Taken::Message { body, binary })) => {
                let body = bytes(&incoming, body);
                assert!(body.len() <= LIMIT && (binary || std::str::from_utf8(&body).is_ok()));
                out.push(Out::Message(body, binary));
            }
            Ok(Some(Taken::Ping(payload))) => out.push(Out::Ping(bytes(&incoming, payload))),
            Ok(Some(Taken::Pong)) => out.push(Out::Pong),
            Ok(Some(Taken::Close(code))) => {
                out.push(Out::Close(code));
                return (out, None);
            }
            Ok(None) if rest.is_empty() => return (out, None),
            Ok(None) => {
                let spare = incoming.buffer_mut().spare();
                let size = chunk.min(spare.len()).min(rest.len());
                spare[..size].copy_from_slice(&rest[..size]);
                rest = &rest[size..];
                incoming.buffer_mut().advance(size);
                assert!(incoming.buffer().capacity() <= 2 * (LIMIT + MAX_HEAD_SIZE + READ));
            }
            Err(fault) => return (out, Some(fault)),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, stream)) = data.split_first() else {
        return;
    };
    assert_eq!(
        feed(stream, usize::from(chunk) + 1),
        feed(stream, usize::MAX)
    );
});
