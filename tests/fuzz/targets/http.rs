//! Requests in any chunks give what they give at once, in bounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mb_server::{
    http::{Framing, Incoming, MAX_HEAD_SIZE, Taken},
    wire::{Buffer, Header},
};

const LIMIT: usize = 512;
const READ: usize = 64;
/// The line of a message may be longer than its head.
const BOUND: usize = LIMIT + MAX_HEAD_SIZE + READ + 1024;

/// Messages, and the status that ended it.
type Out = (Vec<(Vec<u8>, bool)>, Option<u16>);

fn feed(stream: &[u8], chunk: usize) -> Out {
    let mut incoming = Incoming::new(Buffer::new(0, READ), LIMIT);
    let (mut out, mut rest) = (Vec::new(), stream);
    loop {
        match incoming.take() {
            Ok(Some(Taken::Head(head))) if head.asked.is_ok() => {
                if let Err(refusal) = incoming.admit(&head, "id") {
                    return (out, Some(refusal.status));
                }
            }
            Ok(Some(Taken::Head(head))) if head.framing == Framing::Length(0) => incoming.skip(),
            Ok(Some(Taken::Head(_))) => return (out, None),
            Ok(Some(Taken::Message { body, binary })) => {
                let message = incoming.buffer().message(body).to_vec();
                let (_, payload) = Header::parse(&message).expect("what is admitted has a header");
                assert!(payload.len() <= LIMIT);
                out.push((message, binary));
            }
            Ok(None) if rest.is_empty() => return (out, None),
            Ok(None) => {
                let spare = incoming.buffer_mut().spare();
                let size = chunk.min(spare.len()).min(rest.len());
                spare[..size].copy_from_slice(&rest[..size]);
                rest = &rest[size..];
                incoming.buffer_mut().advance(size);
                assert!(incoming.buffer().capacity() <= BOUND);
            }
            Err(refusal) => return (out, Some(refusal.status)),
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
