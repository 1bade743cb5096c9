//! PROXY headers of both versions: what was read can be written again and says the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::proxy_protocol::{Header, LONGEST_V1, LONGEST_V2, Parsed, Version};

fuzz_target!(|bytes: &[u8]| {
    match Header::parse(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            let longest = if value.version == Version::V1 { LONGEST_V1 } else { LONGEST_V2 };
            assert!(consumed <= bytes.len() && consumed <= longest);
            let wire = value.encode().expect("it was short enough once");
            assert_eq!(Header::parse(&wire), Ok(Parsed::Done { consumed: wire.len(), value }));
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(at_least > bytes.len() && at_least <= LONGEST_V2),
        Err(error) => assert!(error.to_string().len() < 200),
    }
});
