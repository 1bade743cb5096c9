//! A stranger's words in a TLS handshake, and a real peer's, changed on their way; both engines.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::handshake(bytes));
