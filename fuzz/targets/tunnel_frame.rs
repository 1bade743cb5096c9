//! A frame's header and the payloads of our own frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::frame::{HEADER, Header, Hello, LONGEST_BODY, OpenInfo, Parsed};

fuzz_target!(|bytes: &[u8]| {
    match Header::parse(bytes) {
        Ok(Parsed::Done { consumed, value }) => {
            assert_eq!((consumed, &value.encode()[..]), (HEADER, &bytes[..HEADER]));
            assert!(value.payload <= LONGEST_BODY - 5);
        }
        Ok(Parsed::NeedMore { at_least }) => assert!(at_least == HEADER && bytes.len() < HEADER),
        Err(error) => assert!(error.to_string().len() < 200),
    }
    if let Ok(hello) = Hello::parse(bytes) {
        let wire = hello.encode();
        assert_eq!(Hello::parse(&wire[HEADER..]), Ok(hello));
    }
    if let Ok(info) = OpenInfo::parse(bytes) {
        assert_eq!(OpenInfo::parse(&info.encode()), Ok(info));
    }
});
