//! Any stream, in any chunks, gives what it gives at once, in bounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mb_server::wire::{FrameError, Incoming, Reassembly, frame::FRAME_HEADER_SIZE};

const LIMIT: usize = 512;
const READ: usize = 16;

type Out = (Vec<Option<(Vec<u8>, bool)>>, Option<FrameError>);

fn feed(stream: &[u8], chunk: usize) -> Out {
    let mut buffer = Reassembly::new(LIMIT, READ);
    let (mut out, mut rest) = (Vec::new(), stream);
    while !rest.is_empty() {
        let spare = buffer.spare();
        let size = chunk.min(spare.len()).min(rest.len());
        spare[..size].copy_from_slice(&rest[..size]);
        rest = &rest[size..];
        buffer.advance(size);
        assert!(buffer.buffer().capacity() <= 2 * (LIMIT + FRAME_HEADER_SIZE + READ));
        loop {
            match buffer.next() {
                Ok(Some(Incoming::KeepAlive)) => out.push(None),
                Ok(Some(Incoming::Message { body, binary })) => {
                    assert!(body.len() <= LIMIT);
                    out.push(Some((body.to_vec(), binary)));
                }
                Ok(None) => break,
                Err(error) => return (out, Some(error)),
            }
        }
    }
    (out, None)
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
