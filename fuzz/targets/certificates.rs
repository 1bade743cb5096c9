//! Certificates that a user gives.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::given::certificates(bytes));
