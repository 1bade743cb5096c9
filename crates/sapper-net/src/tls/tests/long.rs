//! Ignored by name, because they take seconds: a TLS 1.2 connection beyond 2^24 records, and what a
//! record and a handshake cost.
//!
//! `cargo test --release -p sapper-net --lib -- --ignored long_` runs the first,
//! `... -- --ignored --nocapture speed_` prints the second.

use std::io::Write as _;
use std::time::Instant;

use super::foreign::{Mixed, openssl_psk};
use super::*;
use crate::buffer::Buffer;
use crate::tls::bench::bench_handshake_pair;

const CROSSING: u64 = (1 << 24) + 10_000;
const BATCH: usize = 4096;

/// Packet-size records of both engines, and the records that OpenSSL keeps.
fn subjects() -> Vec<(String, TlsOptions, TlsOptions)> {
    let mut subjects = kinds();
    let library = |options: TlsOptions| TlsOptions {
        danger_legacy_renegotiation: true,
        cipher_suites: vec!["PSK-AES256-GCM-SHA384".to_owned()],
        ..only(TlsVersion::V1_2, options)
    };
    let key = library(psk_options(b"x", &[7; 32]));
    // A server has no use for it, and leaves its records to us.
    let server = TlsOptions { danger_legacy_renegotiation: false, ..key.clone() };
    subjects.push(("openssl TLSv1.2, its own records".to_owned(), key, server));
    subjects
}

#[test]
#[ignore = "takes about half a minute"]
fn long_tls12_goes_on_beyond_two_to_the_24_records() {
    for (kind, client, server) in subjects() {
        // The pre-shared keys of OpenSSL's handshakes have a test of their own below.
        if kind != "rustls TLSv1.2" && !kind.contains("its own records") {
            continue;
        }
        let mut pair = connected(&client, &server);
        let mut plain = vec![0; 64 * 1024];
        let mut sent = 0;
        while sent < CROSSING {
            for _ in 0..BATCH {
                pair.client.engine.seal(b"1", &mut pair.client.outgoing).unwrap();
            }
            pair.deliver();
            let end = &mut pair.server;
            let opened = end
                .engine
                .open(&mut end.incoming, &mut plain, &mut RecordMarks::ignored(), &mut end.outgoing)
                .unwrap();
            assert_eq!(opened.records, BATCH, "{kind} after {sent}");
            sent += BATCH as u64;
        }
        exchange(&mut pair, b"and on").unwrap();
    }
}

#[test]
#[ignore = "takes about half a minute"]
fn long_openssl_reads_beyond_two_to_the_24_records() {
    let options = only(TlsVersion::V1_2, psk_options(b"x", &[7; 32]));
    let mut mixed = Mixed::connect(&options, true, openssl_psk(false));
    let mut sent = 0;
    while sent < CROSSING {
        for _ in 0..BATCH {
            mixed.ours.engine.seal(b"1", &mut mixed.ours.outgoing).unwrap();
        }
        assert_eq!(mixed.settle(&[]).1.len(), BATCH, "after {sent}");
        sent += BATCH as u64;
    }
    mixed.exchange(b"and on");
}

fn report(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[test]
#[ignore = "prints timings, and tests nothing"]
fn speed_of_records_and_handshakes() {
    const LEN: usize = 1280;
    const ROUNDS: usize = 2000;
    const RECORDS: usize = 128;
    for (kind, client, server) in subjects() {
        let mut pair = connected(&client, &server);
        let packet = vec![1; LEN];
        let mut plain = vec![0; 256 * 1024];
        let (mut sealing, mut opening) = (0.0, 0.0);
        let mut wire = Buffer::new();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for _ in 0..RECORDS {
                pair.client.engine.seal(&packet, &mut wire).unwrap();
            }
            sealing += start.elapsed().as_secs_f64();
            let start = Instant::now();
            let end = &mut pair.server;
            let mut marks = RecordMarks::ignored();
            let opened = end.engine.open(&mut wire, &mut plain, &mut marks, &mut end.outgoing).unwrap();
            opening += start.elapsed().as_secs_f64();
            assert_eq!(opened.records, RECORDS);
        }
        let each = |seconds: f64| seconds * 1e9 / (ROUNDS * RECORDS) as f64;
        let suite = &pair.client.info.as_ref().unwrap().cipher_suite;
        report(&format!(
            "{kind} ({suite}), {LEN} bytes: seal {:.0} ns, open {:.0} ns",
            each(sealing),
            each(opening)
        ));
    }
    let new = |options| TlsOptions { resumption: false, ..options };
    for (kind, client, server) in kinds() {
        let options = new(server.clone());
        let (client, server) = (TlsConfig::new(&new(client)).unwrap(), TlsConfig::new(&new(server)).unwrap());
        bench_handshake_pair(&client, &server).unwrap();
        let start = Instant::now();
        for _ in 0..500 {
            bench_handshake_pair(&client, &server).unwrap();
        }
        let each = start.elapsed().as_secs_f64() * 1e6 / 500.0;
        let start = Instant::now();
        for _ in 0..50 {
            TlsConfig::new(&options).unwrap().engine(&Role::Server).unwrap();
        }
        let config = start.elapsed().as_secs_f64() * 1e6 / 50.0;
        report(&format!(
            "{kind}: {each:.0} µs a handshake of both ends; {config:.0} µs a server's configuration and engine"
        ));
    }
}
