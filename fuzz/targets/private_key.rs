//! Private keys that a user gives, encrypted ones too.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::given::private_key(bytes));
