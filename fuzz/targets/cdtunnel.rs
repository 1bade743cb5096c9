//! Both messages of the CDTunnel handshake.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::cdtunnel::{Parsed, Request, Response};

fuzz_target!(|bytes: &[u8]| {
    match Request::parse(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            assert!(consumed <= bytes.len());
            let wire = value.encode();
            assert_eq!(Request::parse(&wire), Ok(Parsed::Done { consumed: wire.len(), value }));
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(at_least > bytes.len()),
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
    match Response::parse(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            assert!(consumed <= bytes.len() && value.prefix_len > 0);
            let wire = value.encode();
            assert_eq!(Response::parse(&wire), Ok(Parsed::Done { consumed: wire.len(), value }));
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(at_least > bytes.len()),
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
});
