//! OCSP responses: given to be stapled, and stapled by a server.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sapper_net::tls::fuzzed::given::ocsp_response(bytes));
