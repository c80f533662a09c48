//! Whether a file is the beginning of a WebAssembly file whose rest has not
//! been copied yet.

/// Walks over the section headers. True if one of them, or what it
/// announces, runs past the end; false for what is whole, and for what is no
/// WebAssembly at all.
pub(super) fn is_truncated(bytes: &[u8]) -> bool {
    const MAGIC: &[u8] = b"\0asm";
    const HEADER: usize = 8;
    if bytes.len() < HEADER {
        return MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]);
    }
    if !bytes.starts_with(MAGIC) {
        return false;
    }
    let mut rest = &bytes[HEADER..];
    while let Some((_id, behind)) = rest.split_first() {
        let Some((size, behind)) = leb128(behind) else {
            return behind.len() < 5;
        };
        let Some(next) = behind.get(size..) else {
            return true;
        };
        rest = next;
    }
    false
}

/// A number of up to 32 bits, seven at a time; none where it does not end.
fn leb128(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let end = bytes.iter().take(5).position(|byte| byte & 0x80 == 0)?;
    let number = bytes[..=end].iter().rev().fold(0_usize, |number, byte| {
        number << 7 | usize::from(byte & 0x7f)
    });
    Some((number, &bytes[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_beginning_of_a_file_is_truncated_but_for_whole_sections() {
        // Two sections: 3 bytes, and 200 with a length of two bytes.
        let whole = [
            b"\0asm\x01\0\0\0\x01\x03abc\x0a\xc8\x01".as_slice(),
            &[7; 200],
        ]
        .concat();
        for cut in 0..=whole.len() {
            let expected = ![8, 13, whole.len()].contains(&cut);
            assert_eq!(is_truncated(&whole[..cut]), expected, "{cut}");
        }
        assert!(!is_truncated(b"no WebAssembly, however short"));
        assert!(
            !is_truncated(b"\0asm\x01\0\0\0\x01\xff\xff\xff\xff\xff\xff"),
            "a length that does not end"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            is_truncated(&bytes);
            is_truncated(&[b"\0asm\x0d\0\x01\0".as_slice(), &bytes].concat());
        }
    }
}
