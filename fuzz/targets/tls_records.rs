//! TLS records after the handshake: good, changed and strange ones.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::records(bytes));
