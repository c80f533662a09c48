//! A header that is read can be written, and means the same when read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mb_server::wire::Header;

fuzz_target!(|data: &[u8]| {
    if let Ok((header, payload)) = Header::parse(data) {
        let again = [header.to_string().as_bytes(), b"\n", payload].concat();
        assert_eq!(Header::parse(&again), Ok((header, payload)));
    }
});
