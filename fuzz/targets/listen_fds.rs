//! What a service manager says about the descriptors it hands over: three texts, a zero between them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_net::stream::inherited::{Variables, parse};

fuzz_target!(|text: &str| {
    let mut parts = text.splitn(3, '\0');
    let variables = Variables { pid: parts.next(), fds: parts.next(), names: parts.next() };
    match parse(variables, 42) {
        Ok(names) => assert!(names.len() <= 1024 && names.iter().all(|name| !name.is_empty())),
        Err(error) => assert!(error.field().is_some_and(|field| field.starts_with("LISTEN_"))),
    }
});
