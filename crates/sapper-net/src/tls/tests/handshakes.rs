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

/// Delivers one byte at a time, whoever sends.
fn shake_hands_by_bytes(pair: &mut EnginePair) -> Result<usize> {
    let mut steps = 0;
    pair.client.step()?;
    loop {
        let (from, to) = if pair.client.outgoing.is_empty() {
            (&mut pair.server, &mut pair.client)
        } else {
            (&mut pair.client, &mut pair.server)
        };
        let Some(&byte) = from.outgoing.data().first() else { break };
        from.outgoing.consume(1);
        to.incoming.extend(&[byte]);
        steps += 1;
        if to.info.is_none() {
            to.step()?;
        }
    }
    assert!(pair.client.info.is_some() && pair.server.info.is_some());
    Ok(steps)
}

#[test]
fn a_handshake_may_come_byte_by_byte() {
    for (kind, client, server) in kinds() {
        let mut pair = engines(&client, &server);
        let steps = shake_hands_by_bytes(&mut pair).unwrap();
        assert!(steps > 300, "{kind}: {steps}");
        exchange(&mut pair, b"data").unwrap();
    }
}

#[test]
fn data_behind_the_last_flight_waits_for_its_turn() {
    for (kind, client, server) in kinds() {
        // The client is done first in TLS 1.3, the server in TLS 1.2; whoever is done sends at once.
        let mut pair = engines(&client, &server);
        loop {
            for end in [&mut pair.client, &mut pair.server] {
                if end.info.is_none() {
                    end.step().unwrap();
                    if end.info.is_some() {
                        end.engine.seal(b"early", &mut end.outgoing).unwrap();
                    }
                }
            }
            if pair.client.info.is_some() && pair.server.info.is_some() {
                break;
            }
            pair.deliver();
        }
        pair.deliver();
        assert_eq!(open_all(&mut pair.client).unwrap().0, b"early", "{kind}");
        assert_eq!(open_all(&mut pair.server).unwrap().0, b"early", "{kind}");
    }
}

/// What each end sends in a whole handshake, flight by flight.
fn flights(client: &TlsOptions, server: &TlsOptions) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let mut pair = engines(client, server);
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    while pair.client.info.is_none() || pair.server.info.is_none() {
        if pair.client.info.is_none() {
            pair.client.step().unwrap();
        }
        to_server.push(pair.client.outgoing.data().to_vec());
        pair.deliver();
        if pair.server.info.is_none() {
            pair.server.step().unwrap();
        }
        to_client.push(pair.server.outgoing.data().to_vec());
        pair.deliver();
    }
    (to_server, to_client)
}

#[test]
fn a_flight_with_any_byte_changed_never_panics_nor_succeeds_wrongly() {
    for (kind, client, server) in kinds() {
        let server_config = TlsConfig::new(&server).unwrap();
        let (to_server, _) = flights(&client, &server);
        let hello = &to_server[0];
        for index in 0..hello.len() {
            let mut changed = hello.clone();
            changed[index] ^= 0x41;
            let mut end = EngineEnd::new(server_config.engine(&Role::Server).unwrap());
            end.incoming.extend(&changed);
            // It may look like another valid hello, and then the server waits for more; the Finished
            // of a client that sent something else would not fit.
            let result = end.step();
            assert!(end.info.is_none(), "{kind} byte {index}: {result:?}");
            if let Err(error) = result {
                let expected = [
                    crate::error::ErrorKind::RemoteProtocol,
                    crate::error::ErrorKind::IncompatiblePeer,
                    crate::error::ErrorKind::Tls,
                    crate::error::ErrorKind::UnknownPeer,
                    crate::error::ErrorKind::CredentialsRejected,
                ];
                assert!(expected.contains(&error.kind()), "{kind} byte {index}: {:?} {error}", error.kind());
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(200))]

    /// Garbage instead of a handshake, or in the middle of one: an error or a wait.
    #[test]
    fn garbage_in_a_handshake_is_an_error_or_a_wait(
        which in 0..4_usize,
        is_client: bool,
        framed: bool,
        flights_before in 0..2_usize,
        garbage: Vec<u8>,
    ) {
        let (_, client, server) = kinds().swap_remove(which);
        let mut pair = engines(&client, &server);
        pair.client.step().unwrap();
        if flights_before > 0 {
            pair.deliver();
            pair.server.step().unwrap();
            pair.deliver();
        }
        let end = if is_client { &mut pair.client } else { &mut pair.server };
        if framed {
            end.incoming.extend(&[22, 3, 3, (garbage.len() >> 8) as u8, garbage.len() as u8]);
        }
        end.incoming.extend(&garbage);
        let _ = end.step();
        if end.info.is_none() {
            let _ = end.step();
        }
    }
}

#[test]
fn a_failed_engine_says_so_and_does_nothing_more() {
    for (kind, _, server) in kinds() {
        let mut end = EngineEnd::new(TlsConfig::new(&server).unwrap().engine(&Role::Server).unwrap());
        end.incoming.extend(b"\x16\x03\x01\x00\x05hello");
        let first = end.step().unwrap_err();
        assert_eq!(first.kind(), crate::error::ErrorKind::RemoteProtocol, "{kind}: {first}");
        assert!(!end.outgoing.is_empty(), "{kind}: the alert");
        let sent = end.outgoing.len();
        assert_eq!(end.step().unwrap_err().kind(), crate::error::ErrorKind::ApiMisuse, "{kind}");
        assert!(end.engine.seal(b"x", &mut end.outgoing).is_err(), "{kind}");
        assert!(open_all(&mut end).is_err(), "{kind}");
        end.engine.release_idle();
        let _ = end.engine.close_notify(&mut end.outgoing);
        assert_eq!(end.outgoing.len(), sent, "{kind}: nothing after the alert");
    }
}
