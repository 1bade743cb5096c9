//! A ClientHello: the same answer however it arrives.
//!
//! Input: a byte for the size of the pieces, then the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::client_hello::{LONGEST, Parsed, Peek};

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, stream)) = bytes.split_first() else { return };
    let whole = Peek::new().peek(stream);
    match &whole {
        Ok(Parsed::Done { consumed, value }) => {
            assert!(*consumed <= stream.len());
            assert!(value.server_name.as_ref().is_none_or(|name| !name.is_empty() && name.is_ascii()));
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(*at_least > stream.len() && *at_least <= LONGEST),
        Err(error) => assert!(error.to_string().len() < 200),
    }
    let mut slowly = Peek::new();
    for end in (0..=stream.len()).step_by(usize::from(piece).max(1)).chain([stream.len()]) {
        let answer = slowly.peek(&stream[..end]);
        if !matches!(answer, Ok(Parsed::NeedMore { .. })) || end == stream.len() {
            assert_eq!(answer, whole);
            break;
        }
    }
});
