//! Handshakes that succeed: versions, suites, groups, roles, byte by byte.

use super::*;
use crate::tls::suites::{Auth, SUITES};

#[test]
fn both_engines_speak_both_versions() {
    for (kind, client, server) in kinds() {
        let mut pair = connected(&client, &server);
        let (c, s) = (pair.client.info.clone().unwrap(), pair.server.info.clone().unwrap());
        assert!(kind.starts_with(c.engine), "{kind}: {c:?}");
        assert!(kind.ends_with(c.version), "{kind}: {c:?}");
        assert_eq!((c.version, &c.cipher_suite, &c.group), (s.version, &s.cipher_suite, &s.group));
        if c.version == "TLSv1.3" {
            assert_eq!(c.group.as_deref(), Some("X25519MLKEM768"), "{kind}");
        }
        assert_eq!(s.server_name.as_deref(), Some(NAME), "{kind}");
        exchange(&mut pair, b"a packet").unwrap();
        exchange(&mut pair, &vec![3; 100_000]).unwrap();
    }
}

#[test]
fn every_suite_carries_data() {
    for suite in SUITES {
        let (client, server) = match suite.auth {
            Auth::Psk => (psk_options(b"x", &[7; 32]), psk_options(b"x", &[7; 32])),
            // The certificates of the tests are ECDSA.
            Auth::Certificate if !suite.iana.contains("ECDSA") => continue,
            _ => (client_options(), server_options()),
        };
        let with_suite = |options: TlsOptions| TlsOptions {
            cipher_suites: vec![suite.openssl.to_owned()],
            danger_legacy_suites: suite.legacy,
            ..options
        };
        let mut pair = connected(&with_suite(client), &with_suite(server));
        assert_eq!(pair.client.info.as_ref().unwrap().cipher_suite, suite.iana);
        for len in [1, 1280, 16_384, 16_385, 70_000] {
            exchange(&mut pair, &vec![len as u8; len]).unwrap();
        }
    }
}
