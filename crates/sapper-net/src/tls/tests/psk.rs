//! Pre-shared keys: who is known and who is not, and the TLS 1.2 connections that stay with OpenSSL.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use super::pipe::pipe;
use super::*;
use crate::error::ErrorKind;
use crate::tls::failure::alert;
use crate::tls::options::{FindPsk, PskLookup};
use crate::tls::stream::TlsStream;

const KEY: &[u8] = &[7; 32];

fn with(identities: Vec<PskIdentity>) -> TlsOptions {
    TlsOptions {
        credentials: Credentials::Psk { identities, hash: PskHash::Sha256 },
        ..TlsOptions::default()
    }
}

/// The first error, whose it is, and what the other end is told.
fn fails(client: &TlsOptions, server: &TlsOptions) -> (bool, Error, Error) {
    let mut pair = engines(client, server);
    let (is_client, error) = pair.shake_hands().unwrap_err();
    let other = if is_client { &mut pair.server } else { &mut pair.client };
    let told = match other.step() {
        Err(error) => error,
        Ok(()) => open_all(other).unwrap_err(),
    };
    (is_client, error, told)
}

#[test]
fn a_client_without_a_key_is_told_from_one_with_another() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let client = only(version, TlsOptions::default());
        let (is_client, error, _) = fails(&client, &only(version, psk_options(b"known", KEY)));
        assert!(!is_client);
        assert_eq!(error.kind(), ErrorKind::IncompatiblePeer, "{error}");
        assert!(error.message().contains("it offers no pre-shared key"), "{version:?}: {error}");
    }
}

#[test]
fn a_server_finds_the_key_by_its_identity() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let server =
            only(version, with(vec![psk(b"a", &[1; 32]), psk(b"b", &[2; 48]), psk("ü".as_bytes(), KEY)]));
        for (identity, key) in [(&b"a"[..], &[1; 32][..]), (b"b", &[2; 48]), ("ü".as_bytes(), KEY)] {
            let mut pair = connected(&only(version, psk_options(identity, key)), &server);
            exchange(&mut pair, b"data").unwrap();
            let info = pair.server.info.as_ref().unwrap();
            assert_eq!(info.psk_identity.as_deref().map(str::as_bytes), Some(identity));
            assert!(info.peer_certificates.is_empty());
            assert_eq!(info.group.is_some(), version == TlsVersion::V1_3, "TLS 1.3 agrees on a group too");
        }
    }
}

#[test]
fn an_empty_identity_speaks_tls_12() {
    let pair = connected(&psk_options(b"", KEY), &psk_options(b"", KEY));
    let info = pair.server.info.as_ref().unwrap();
    assert_eq!((info.version, info.psk_identity.as_deref()), ("TLSv1.2", Some("")));
    assert_eq!(info.cipher_suite, "TLS_PSK_WITH_AES_256_GCM_SHA384");
    let error = TlsConfig::new(&only(TlsVersion::V1_3, psk_options(b"", KEY))).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("credentials.identities")));
}

#[test]
fn a_key_for_sha384_uses_its_suite() {
    let options = TlsOptions {
        credentials: Credentials::Psk { identities: vec![psk(b"x", &[7; 48])], hash: PskHash::Sha384 },
        ..TlsOptions::default()
    };
    let mut pair = connected(&options, &options);
    assert_eq!(pair.client.info.as_ref().unwrap().cipher_suite, "TLS_AES_256_GCM_SHA384");
    exchange(&mut pair, b"data").unwrap();
    // The same bytes for another hash are another key.
    let sha256 = only(TlsVersion::V1_3, psk_options(b"x", &[7; 48]));
    assert!(engines(&sha256, &only(TlsVersion::V1_3, options)).shake_hands().is_err());
}

#[test]
fn a_wrong_key_is_rejected_credentials_on_both_sides() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let (is_client, error, told) =
            fails(&only(version, psk_options(b"x", &[1; 32])), &only(version, psk_options(b"x", &[2; 32])));
        assert!(!is_client);
        assert_eq!(error.kind(), ErrorKind::CredentialsRejected, "{version:?}: {error}");
        assert!(error.alert().is_some() && !error.alert_received());
        assert_eq!(told.kind(), ErrorKind::CredentialsRejected, "{version:?}: {told}");
        assert_eq!(told.alert(), error.alert());
        assert!(told.alert_received());
    }
}

#[test]
fn an_unknown_identity_is_an_unknown_peer() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let (is_client, error, told) =
            fails(&only(version, psk_options(b"stranger", KEY)), &only(version, psk_options(b"x", KEY)));
        assert!(!is_client);
        assert_eq!(error.kind(), ErrorKind::UnknownPeer, "{version:?}: {error}");
        assert_eq!(told.kind(), ErrorKind::CredentialsRejected, "{version:?}: {told}");
        if version == TlsVersion::V1_2 {
            assert_eq!(told.alert(), Some(alert::UNKNOWN_PSK_IDENTITY));
        }
    }
}

#[test]
fn identities_and_keys_are_checked_before_anything_is_sent() {
    for (options, field) in [
        (with(Vec::new()), "credentials"),
        (with(vec![psk(b"a\0b", KEY)]), "credentials.identities"),
        (with(vec![psk(&[b'a'; 257], KEY)]), "credentials.identities"),
        (with(vec![psk(b"a", KEY), psk(b"a", &[1; 32])]), "credentials.identities.a"),
        (with(vec![psk(b"a", &[])]), "credentials.identities.a"),
        (with(vec![psk(b"a", &[1; 15])]), "credentials.identities.a"),
        (with(vec![psk(b"a", &[1; 513])]), "credentials.identities.a"),
        (TlsOptions { roots: Roots::System, ..psk_options(b"a", KEY) }, "roots"),
        (TlsOptions { pins: vec![[0; 32]], ..psk_options(b"a", KEY) }, "pins"),
    ] {
        let error = TlsConfig::new(&options).err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some(field)), "{error}");
    }
    let short = TlsOptions { danger_short_psk: true, ..psk_options(b"a", b"guess") };
    connected(&short, &short);
}

/// TLS 1.2 with CBC, where OpenSSL keeps the records.
fn cbc() -> TlsOptions {
    TlsOptions {
        cipher_suites: vec!["PSK-AES256-CBC-SHA384".to_owned()],
        danger_legacy_suites: true,
        ..psk_options(b"", KEY)
    }
}

#[test]
fn legacy_suites_are_behind_the_others_and_in_the_order_of_packet_tunnels() {
    let options = TlsOptions { danger_legacy_suites: true, ..psk_options(b"", KEY) };
    let pair = connected(&options, &options);
    assert_eq!(pair.client.info.as_ref().unwrap().cipher_suite, "TLS_PSK_WITH_AES_256_GCM_SHA384");
    let pair = connected(&options, &cbc());
    assert_eq!(pair.client.info.as_ref().unwrap().cipher_suite, "TLS_PSK_WITH_AES_256_CBC_SHA384");
}

#[test]
fn records_of_openssl_behave_like_ours() {
    let mut pair = connected(&cbc(), &cbc());
    for data in [&b"one"[..], b"two two", b"three"] {
        pair.client.engine.seal(data, &mut pair.client.outgoing).unwrap();
    }
    pair.deliver();
    let (plain, marks, state) = open_all(&mut pair.server).unwrap();
    assert_eq!(
        (&plain[..], &marks[..], state),
        (&b"onetwo twothree"[..], &[3, 10, 15][..], OpenState::NeedMore)
    );

    // Bytes arrive one by one; nothing is kept by the library.
    pair.client.engine.seal(&[9; 500], &mut pair.client.outgoing).unwrap();
    let bytes = pair.client.outgoing.data().to_vec();
    pair.client.outgoing.consume(bytes.len());
    for (index, byte) in bytes.iter().enumerate() {
        pair.server.incoming.extend(&[*byte]);
        let (plain, _, _) = open_all(&mut pair.server).unwrap();
        assert_eq!(plain.len(), if index + 1 == bytes.len() { 500 } else { 0 });
    }

    let mut keys = [[0; 20]; 2];
    pair.client.engine.export_keying_material("EXPORTER-x", Some(b"c"), &mut keys[0]).unwrap();
    pair.server.engine.export_keying_material("EXPORTER-x", Some(b"c"), &mut keys[1]).unwrap();
    assert_eq!(keys[0], keys[1]);
    pair.server.engine.release_idle();

    // Close, with something behind it.
    pair.client.engine.close_notify(&mut pair.client.outgoing).unwrap();
    pair.client.outgoing.extend(b"behind");
    pair.deliver();
    assert_eq!(open_all(&mut pair.server).unwrap().2, OpenState::Closed);
    assert_eq!(pair.server.incoming.data(), b"behind");
    assert!(pair.client.engine.seal(b"x", &mut pair.client.outgoing).is_err());
    // The other direction goes on.
    pair.server.engine.seal(b"still", &mut pair.server.outgoing).unwrap();
    pair.deliver();
    assert_eq!(open_all(&mut pair.client).unwrap().0, b"still");
}

#[test]
fn a_changed_record_of_openssl_is_an_error_after_the_data_before_it() {
    let mut pair = connected(&cbc(), &cbc());
    pair.client.engine.seal(b"good", &mut pair.client.outgoing).unwrap();
    let first = pair.client.outgoing.len();
    pair.client.engine.seal(b"bad", &mut pair.client.outgoing).unwrap();
    pair.client.outgoing.data_mut()[first + 30] ^= 1;
    pair.deliver();
    assert_eq!(open_all(&mut pair.server).unwrap().0, b"good");
    let error = open_all(&mut pair.server).unwrap_err();
    assert_eq!((error.kind(), error.alert()), (ErrorKind::Tls, Some(alert::BAD_RECORD_MAC)), "{error}");
    pair.deliver();
    let told = open_all(&mut pair.client).unwrap_err();
    assert!(told.alert_received());
    assert!(open_all(&mut pair.server).is_err());
}

#[test]
fn a_connection_that_may_renegotiate_stays_with_openssl() {
    let options =
        |options| TlsOptions { danger_legacy_renegotiation: true, ..only(TlsVersion::V1_2, options) };
    for (client, server) in
        [(client_options(), server_options()), (psk_options(b"x", KEY), psk_options(b"x", KEY))]
    {
        let mut pair = connected(&options(client), &only(TlsVersion::V1_2, server));
        exchange(&mut pair, &[1; 40_000]).unwrap();
        let error = pair.client.engine.update_keys(&mut pair.client.outgoing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
    }
}

#[test]
fn a_sealed_record_that_is_too_short_is_the_peers_fault() {
    let options = only(TlsVersion::V1_2, psk_options(b"x", KEY));
    let mut pair = engines(&options, &options);
    pair.client.step().unwrap();
    pair.deliver();
    pair.server.step().unwrap();
    pair.deliver();
    pair.client.step().unwrap();
    // Key exchange, change of cipher, and the first record under the keys, of which one byte is left.
    let flight = pair.client.outgoing.data().to_vec();
    let mut sealed = 0;
    for _ in 0..2 {
        sealed += 5 + usize::from(u16::from_be_bytes([flight[sealed + 3], flight[sealed + 4]]));
    }
    assert_eq!(flight[sealed], 22);
    pair.server.incoming.extend(&flight[..sealed]);
    pair.server.incoming.extend(&[22, 3, 3, 0, 1, 0]);
    let error = pair.server.step().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RemoteProtocol, "{error}");
    assert!(error.message().contains("too short"), "{error}");
}

/// Knows one client, and counts who is asked for.
struct Finder {
    key: Vec<u8>,
    asked: AtomicUsize,
}

impl FindPsk for Finder {
    fn find(&self, identity: &[u8]) -> Option<Secret> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        (identity == b"known").then(|| Secret::new(self.key.clone()))
    }
}

fn finder(key: &[u8]) -> Arc<Finder> {
    Arc::new(Finder { key: key.to_vec(), asked: AtomicUsize::new(0) })
}

fn asking(finder: Arc<dyn FindPsk>) -> TlsOptions {
    let credentials = Credentials::PskLookup { lookup: PskLookup(finder), hash: PskHash::Sha256 };
    TlsOptions { credentials, ..TlsOptions::default() }
}

#[test]
fn a_server_asks_for_the_key_of_each_client() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let knows = finder(KEY);
        let server = only(version, asking(Arc::clone(&knows) as Arc<dyn FindPsk>));
        let mut pair = connected(&only(version, psk_options(b"known", KEY)), &server);
        exchange(&mut pair, b"data").unwrap();
        assert_eq!(pair.server.info.as_ref().unwrap().psk_identity.as_deref(), Some("known"));
        assert_eq!(knows.asked.load(Ordering::Relaxed), 1, "{version:?}");
        let (is_client, error, _) = fails(&only(version, psk_options(b"stranger", KEY)), &server);
        assert!(!is_client);
        assert_eq!(error.kind(), ErrorKind::UnknownPeer, "{error}");
        let (_, error, _) = fails(&only(version, psk_options(b"known", &[8; 32])), &server);
        assert_eq!(error.kind(), ErrorKind::CredentialsRejected, "{error}");
        // A key that can be guessed lets nobody in, whoever gave it.
        let weak = only(version, asking(finder(b"short")));
        let client = only(version, TlsOptions { danger_short_psk: true, ..psk_options(b"known", b"short") });
        let (_, error, _) = fails(&client, &weak);
        assert_eq!(error.kind(), ErrorKind::UnknownPeer, "{error}");
        connected(&client, &TlsOptions { danger_short_psk: true, ..weak });
    }
    let error = TlsConfig::new(&asking(finder(KEY))).unwrap().engine(&role()).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("credentials")));
}

/// Waits for somebody outside to let it go on.
struct Slow {
    go: Mutex<mpsc::Receiver<()>>,
    asked: mpsc::Sender<()>,
}

impl FindPsk for Slow {
    fn find(&self, _: &[u8]) -> Option<Secret> {
        self.asked.send(()).unwrap();
        self.go.lock().unwrap().recv_timeout(Duration::from_secs(20)).ok()?;
        Some(Secret::new(KEY))
    }
}

#[tokio::test]
async fn a_look_up_that_takes_long_does_not_hold_up_its_event_loop() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let ((let_go, go), (asked, was_asked)) = (mpsc::channel(), mpsc::channel());
        let server = only(version, asking(Arc::new(Slow { go: Mutex::new(go), asked })));
        let server = TlsConfig::new(&server).unwrap();
        let client = TlsConfig::new(&only(version, psk_options(b"known", KEY))).unwrap();
        let (near, far) = pipe(1 << 20);
        let (role, role_of_server) = (role(), Role::Server);
        let both = async {
            tokio::join!(
                TlsStream::handshake(Box::new(near), &client, &role, &[]),
                TlsStream::handshake(Box::new(far), &server, &role_of_server, &[]),
            )
        };
        let meanwhile = async {
            // This runs on the event loop that does the handshake, while the look-up blocks.
            let mut turns = 0_u64;
            while was_asked.try_recv().is_err() {
                tokio::task::yield_now().await;
                turns += 1;
            }
            let_go.send(()).unwrap();
            turns
        };
        let ((client, server), turns) = tokio::join!(both, meanwhile);
        assert_eq!(server.unwrap().1.psk_identity.as_deref(), Some("known"));
        client.unwrap();
        assert!(turns > 0);
    }
}

#[tokio::test]
async fn a_look_up_that_does_not_come_back_ends_with_the_handshakes_deadline() {
    let ((let_go, go), (asked, was_asked)) = (mpsc::channel(), mpsc::channel());
    let server = TlsConfig::new(&asking(Arc::new(Slow { go: Mutex::new(go), asked }))).unwrap();
    let client = TlsConfig::new(&psk_options(b"known", KEY)).unwrap();
    let (near, far) = pipe(1 << 20);
    let role = role();
    let answering = TlsStream::handshake(Box::new(far), &server, &Role::Server, &[]);
    let calling = TlsStream::handshake(Box::new(near), &client, &role, &[]);
    let (late, told) = tokio::join!(tokio::time::timeout(Duration::from_millis(200), answering), calling);
    assert!(late.is_err());
    assert_eq!(told.err().unwrap().kind(), ErrorKind::ConnectionLost);
    was_asked.recv_timeout(Duration::from_secs(20)).unwrap();
    let_go.send(()).unwrap();
}
