//! Certificates that a peer shows.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::given::peer_certificates(bytes));
