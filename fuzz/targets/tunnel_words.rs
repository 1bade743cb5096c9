//! What both ends of a tunnel say of themselves in their hellos.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tunnel::fuzzed::words(bytes));
