//! Lists of addresses as users write them: what was read prints as something that says the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::ip_list::IpList;

fuzz_target!(|text: &str| {
    match IpList::parse(text.split(',')) {
        Ok(list) => {
            let printed = list.to_string();
            assert_eq!(IpList::parse(printed.split(", ")), Ok(list));
        }
        Err(error) => assert!(error.to_string().len() < 1_000),
    }
});
