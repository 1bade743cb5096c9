//! Both halves of the W3PTUNL handshake.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::w3p::{
    Acknowledgement, ClientHandshake, LONGEST_HANDSHAKE, PREFIX, Parsed, ServerHandshake,
};

const LATER: Duration = Duration::from_secs(1);

fuzz_target!(|bytes: &[u8]| {
    match Acknowledgement::parse(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            assert!(consumed <= bytes.len());
            let wire = value.encode();
            assert!(
                matches!(Acknowledgement::parse(&wire), Ok(Parsed::Done { consumed, .. }) if consumed == wire.len())
            );
        }
        Ok(Parsed::NeedMore { at_least }) => {
            assert!(at_least > bytes.len() && at_least <= PREFIX + LONGEST_HANDSHAKE);
        }
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
    match ServerHandshake::new(LATER).handle_bytes(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            assert_eq!(consumed, bytes.len());
            // What a server takes, a client can say, byte by byte.
            assert_eq!(ClientHandshake::new(&value.text, LATER).unwrap().message(), bytes);
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(at_least > bytes.len()),
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
});
