//! Both halves of the W3PTUNL handshake, and what our own ends say of services in the hellos behind it.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::w3p::{
    Acknowledgement, ClientHandshake, LONGEST_HANDSHAKE, PREFIX, Parsed, ServerHandshake,
};
use sapper_proto::tunnel::words::{ClientWords, MOST_SERVICES, ServerWords};

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
    if let Ok(words) = ClientWords::parse(bytes) {
        assert!(!words.services.is_empty() && words.services.len() <= MOST_SERVICES);
        assert_eq!(ClientWords::parse(&words.encode()), Ok(words));
    }
    for services in 1..3 {
        if let Some(words) = ServerWords::parse(bytes, services) {
            assert!(ServerWords::parse(&words.encode(), services).is_some());
        }
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
