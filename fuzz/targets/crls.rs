//! Revocation lists that a user gives, and a verifier that has them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::given::crls(bytes));
