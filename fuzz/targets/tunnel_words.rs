//! What both ends of a tunnel say of themselves in their hellos: what was believed can be said again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::words::{ClientWords, LONGEST_NAME, MOST_SERVICES, ServerWords, is_name};

fuzz_target!(|bytes: &[u8]| {
    match ClientWords::parse(bytes) {
        Ok(words) => {
            assert!((1..=MOST_SERVICES).contains(&words.services.len()));
            assert_eq!(ClientWords::parse(&words.encode()), Ok(words));
        }
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
    for services in [1, 3] {
        let _ = ServerWords::parse(bytes, services);
    }
    if let Ok(name) = std::str::from_utf8(bytes) {
        assert!(!is_name(name) || name.len() <= LONGEST_NAME);
    }
});
