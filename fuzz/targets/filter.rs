//! A filter's text up to the first zero, then a packet that it is asked about.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::filter::Filter;
use sapper_proto::pcapng::LinkType;

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (text, packet) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Ok(text) = std::str::from_utf8(text) else { return };
    match Filter::parse(text) {
        Ok(filter) => {
            let negated = Filter::parse(&format!("not ({text})"));
            for link in [LinkType::Raw, LinkType::Ethernet] {
                let wanted = filter.matches(link, packet);
                if let Ok(negated) = &negated {
                    assert_ne!(negated.matches(link, packet), wanted);
                }
            }
        }
        Err(error) => {
            assert!(error.at <= text.len() && text.is_char_boundary(error.at));
            assert!(error.to_string().len() < 500);
        }
    }
});
