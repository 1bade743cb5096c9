//! The hello of superframes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::framing::superframe::{HELLO_LEN, Hello};
use sapper_proto::packet::Offloads;

fuzz_target!(|bytes: &[u8]| {
    let whole = Hello::parse(bytes);
    for len in 0..bytes.len().min(HELLO_LEN) {
        match Hello::parse(&bytes[..len]) {
            Ok(None) => {}
            early => assert_eq!(early, whole),
        }
    }
    let Ok(Some(peer)) = whole else { return };
    assert_eq!(Hello::parse(&peer.encode()), Ok(Some(peer)));
    let ours = Hello::new(Offloads::ALL, 65_535);
    if let Ok(agreement) = ours.agree(&peer) {
        assert!((peer.oldest..=peer.newest).contains(&agreement.version));
        assert!((ours.oldest..=ours.newest).contains(&agreement.version));
        assert!((1_280..=65_535).contains(&agreement.send_max));
    }
});
