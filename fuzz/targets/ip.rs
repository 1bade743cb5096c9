//! IP headers and checksums of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::packet::Ecn;
use sapper_proto::packet::checksum::{self, Verdict};
use sapper_proto::packet::ip::{self, Fragment, IpHeader};

fuzz_target!(|bytes: &[u8]| {
    // What the first bytes say does not change when more of them come.
    let whole = ip::stated_len(bytes);
    for len in 0..bytes.len().min(8) {
        match ip::stated_len(&bytes[..len]) {
            Ok(None) => {}
            early => assert_eq!(early, whole),
        }
    }
    let exact = IpHeader::parse_exact(bytes);
    assert_eq!(exact.is_ok(), ip::check_len(bytes).is_ok() && IpHeader::parse(bytes).is_ok());
    if let Ok(header) = IpHeader::parse(bytes) {
        assert!(header.header_len <= bytes.len());
        assert!(ip::addresses(bytes).is_some() && ip::ecn(bytes).is_some());
    }
    if checksum::verify(bytes) != Verdict::Nothing {
        assert_eq!(exact.unwrap().fragment, Fragment::Whole);
    }
    let mut copy = bytes.to_vec();
    if ip::set_ecn(&mut copy, Ecn::Ce) {
        assert_eq!(ip::ecn(&copy), Some(Ecn::Ce));
        ip::set_ecn(&mut copy, ip::ecn(bytes).unwrap_or_default());
        // The two forms of zero may have changed places in the IPv4 checksum.
        assert!(copy.iter().zip(bytes).enumerate().all(|(at, (a, b))| a == b || at == 10 || at == 11));
    }
});
