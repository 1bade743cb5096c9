//! Options that are right and wrong: encodings, passwords, names of suites, what an error says, and
//! what never shows.

use std::sync::{Arc, Mutex};

use openssl::pkey::PKey;
use openssl::rsa::Rsa;
use openssl::symm::Cipher;
use openssl::x509::X509;

use super::*;
use crate::error::ErrorKind;
use crate::tls::options::{ClientAuth, KeyLog};

fn refused(options: &TlsOptions) -> Error {
    let error = TlsConfig::new(options).expect_err("these options are wrong");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    error
}

fn credentials(chain: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>, password: Option<&str>) -> TlsOptions {
    TlsOptions {
        credentials: Credentials::Certificate(OwnCertificate {
            password: password.map(|p| Secret::new(p.as_bytes())),
            ..OwnCertificate::pair(chain.into(), key.into())
        }),
        ..TlsOptions::default()
    }
}

fn server_key() -> PKey<openssl::pkey::Private> {
    PKey::private_key_from_pem(certificates().server.key.expose()).unwrap()
}

fn works(options: &TlsOptions) {
    connected(&client_options(), options);
}

#[test]
fn keys_and_chains_are_pem_or_der_in_any_dress() {
    let chain = &certificates().server.chain;
    let leaf = X509::from_pem(chain.as_bytes()).unwrap().to_der().unwrap();
    let key = server_key();
    let old_pem = key.ec_key().unwrap().private_key_to_pem().unwrap();
    let old_der = key.ec_key().unwrap().private_key_to_der().unwrap();
    for key in
        [key.private_key_to_pem_pkcs8().unwrap(), key.private_key_to_pkcs8().unwrap(), old_pem, old_der]
    {
        works(&credentials(chain.as_bytes(), key.clone(), None));
        works(&credentials(leaf.clone(), key, None));
    }
    let (text, key) = (format!("words before\n{chain}\nwords after"), key.private_key_to_pkcs8().unwrap());
    works(&credentials(text, key, None));
    let roots = X509::from_pem(certificates().authority.as_bytes()).unwrap().to_der().unwrap();
    let client = TlsOptions { roots: Roots::Own(roots.into()), ..TlsOptions::default() };
    connected(&client, &server_options());
}

#[test]
fn encrypted_keys_need_their_password_and_nobody_is_asked_on_the_terminal() {
    let chain = &certificates().server.chain;
    let key = server_key();
    let aes = Cipher::aes_256_cbc();
    for encrypted in [
        key.private_key_to_pem_pkcs8_passphrase(aes, b"right").unwrap(),
        key.private_key_to_pkcs8_passphrase(aes, b"right").unwrap(),
        key.ec_key().unwrap().private_key_to_pem_passphrase(aes, b"right").unwrap(),
    ] {
        works(&credentials(chain.as_bytes(), encrypted.clone(), Some("right")));
        for password in [None, Some("wrong"), Some(""), Some("with\0zero")] {
            let error = refused(&credentials(chain.as_bytes(), encrypted.clone(), password));
            assert_eq!(error.field(), Some("credentials.password"), "{password:?}: {error}");
        }
    }
    // A password for a key that needs none does no harm.
    works(&credentials(chain.as_bytes(), key.private_key_to_pem_pkcs8().unwrap(), Some("unused")));
}

/// A certificate for [`NAME`] that the key signs itself, in PEM.
fn self_signed(key: &PKey<openssl::pkey::Private>) -> Vec<u8> {
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&openssl::asn1::Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&openssl::asn1::Asn1Time::days_from_now(1).unwrap()).unwrap();
    let name = openssl::x509::extension::SubjectAlternativeName::new()
        .dns(NAME)
        .build(&builder.x509v3_context(None, None))
        .unwrap();
    builder.append_extension(name).unwrap();
    let digest = match key.id() {
        openssl::pkey::Id::ED25519 => openssl::hash::MessageDigest::null(),
        _ => openssl::hash::MessageDigest::sha256(),
    };
    builder.sign(key, digest).unwrap();
    builder.build().to_pem().unwrap()
}

#[test]
fn rsa_and_edwards_keys_work_with_both_engines() {
    for key in [PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap(), PKey::generate_ed25519().unwrap()] {
        let chain = self_signed(&key);
        let client = TlsOptions { roots: Roots::Own(chain.clone().into()), ..TlsOptions::default() };
        for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
            for legacy in [false, true] {
                let set = |options| TlsOptions { danger_security_level_0: legacy, ..only(version, options) };
                let server = credentials(chain.clone(), key.private_key_to_pem_pkcs8().unwrap(), None);
                let mut pair = connected(&set(client.clone()), &set(server));
                exchange(&mut pair, b"data").unwrap();
            }
        }
    }
}

/// The longest list that is taken goes through a handshake with all that a hello can have besides.
#[test]
fn a_long_list_of_protocols_fits_into_a_hello() {
    let longest = |last: &[u8]| [vec![vec![b'a'; 255]; 239], vec![last.to_vec()]].concat();
    for (_, client, server) in kinds() {
        let client = TlsOptions { alpn: longest(b"h2"), ..client };
        let server = TlsOptions { alpn: vec![b"h2".to_vec()], ..server };
        let pair = connected(&client, &server);
        assert_eq!(pair.client.info.as_ref().unwrap().alpn.as_deref(), Some(&b"h2"[..]));
    }
}

#[test]
fn keys_that_an_engine_refuses_are_named() {
    let group = openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::SECP256K1).unwrap();
    let strange = PKey::from_ec_key(openssl::ec::EcKey::generate(&group).unwrap()).unwrap();
    let error = refused(&credentials(self_signed(&strange), strange.private_key_to_pkcs8().unwrap(), None));
    assert_eq!(error.field(), Some("credentials.key"), "{error}");
    assert!(error.message().contains("secp256k1 cannot be used here: RSA of 2048"), "{error}");
    let weak = PKey::from_rsa(Rsa::generate(1024).unwrap()).unwrap();
    let error = refused(&credentials(self_signed(&weak), weak.private_key_to_pkcs8().unwrap(), None));
    assert_eq!(error.field(), Some("credentials.key"), "{error}");
    assert!(error.message().contains("an RSA key of 1024 bits"), "{error}");
    assert!(error.message().contains("danger_security_level_0"), "{error}");
    // OpenSSL's security level allows no such key, unless that is lowered.
    let small = PKey::from_rsa(Rsa::generate(1024).unwrap()).unwrap();
    let options = TlsOptions {
        danger_legacy_suites: true,
        ..credentials(self_signed(&small), small.private_key_to_pkcs8().unwrap(), None)
    };
    let error = TlsConfig::new(&options).unwrap().engine(&Role::Server).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("credentials.chain")), "{error}");
    assert!(error.message().contains("too small"), "{error}");
    let options = TlsOptions { danger_security_level_0: true, ..options };
    TlsConfig::new(&options).unwrap().engine(&Role::Server).unwrap();
}

#[test]
fn what_cannot_be_read_is_named() {
    let (chain, key) = (certificates().server.chain.clone(), certificates().server.key.expose().to_vec());
    let other = certificates().client.key.expose().to_vec();
    let rsa = Rsa::generate(2048).unwrap().private_key_to_pem().unwrap();
    for (options, field) in [
        (credentials("", key.clone(), None), "credentials.chain"),
        (credentials("no certificate", key.clone(), None), "credentials.chain"),
        (credentials([0x30, 0x03, 1, 2, 3], key.clone(), None), "credentials.chain"),
        (credentials(chain.replace("MII", "XXX"), key.clone(), None), "credentials.chain"),
        (credentials(chain.clone(), "", None), "credentials.key"),
        (credentials(chain.clone(), "no key", None), "credentials.key"),
        (credentials(chain.clone(), chain.clone(), None), "credentials.key"),
        (credentials(chain.clone(), [0x30, 0x03, 1, 2, 3], None), "credentials.key"),
        (credentials(chain.clone(), other, None), "credentials.key"),
        (credentials(chain.clone(), rsa, None), "credentials.key"),
        (TlsOptions { roots: Roots::Own(Vec::new().into()), ..TlsOptions::default() }, "roots"),
        (TlsOptions { roots: Roots::Own(b"none".to_vec().into()), ..TlsOptions::default() }, "roots"),
        (
            TlsOptions {
                min_version: TlsVersion::V1_3,
                max_version: TlsVersion::V1_2,
                ..TlsOptions::default()
            },
            "min_version",
        ),
        (TlsOptions { alpn: vec![Vec::new()], ..TlsOptions::default() }, "alpn.0"),
        (TlsOptions { alpn: vec![b"h2".to_vec(), vec![b'a'; 256]], ..TlsOptions::default() }, "alpn.1"),
        (TlsOptions { groups: vec!["X25520".to_owned()], ..TlsOptions::default() }, "groups.0"),
        (TlsOptions { alpn: vec![vec![b'a'; 255]; 241], ..TlsOptions::default() }, "alpn"),
        (TlsOptions { client_auth: ClientAuth::Required, ..server_options() }, "roots"),
        (
            TlsOptions { key_log: KeyLog::File("/nonexistent/keys".into()), ..TlsOptions::default() },
            "key_log_file",
        ),
    ] {
        let error = refused(&options);
        assert_eq!(error.field(), Some(field), "{error}");
    }
}

#[test]
fn suites_are_known_by_both_names_and_dangers_are_asked_for() {
    let suites = |names: &[&str], options: TlsOptions| TlsOptions {
        cipher_suites: names.iter().map(|&n| n.to_owned()).collect(),
        ..options
    };
    let key = psk_options(b"x", &[7; 32]);
    for (options, words) in [
        (suites(&["AES_256_GCM"], client_options()), "TLS_AES_256_GCM_SHA384"),
        (suites(&["ECDHE-RSA-AES128-SHA"], client_options()), "danger_legacy_suites"),
        (suites(&["PSK-AES128-GCM-SHA256"], client_options()), "needs a pre-shared key"),
        (suites(&["ECDHE-RSA-AES128-GCM-SHA256"], key.clone()), "needs a certificate"),
        (suites(&["TLS_AES_256_GCM_SHA384"], key.clone()), "SHA-384"),
        (suites(&["TLS_AES_128_GCM_SHA256"], only(TlsVersion::V1_2, key.clone())), "is not spoken"),
    ] {
        let error = refused(&options);
        assert_eq!(error.field(), Some("cipher_suites.0"));
        assert!(error.message().contains(words), "{error}");
    }
    // A version without a suite is not spoken.
    let server = suites(&["ECDHE-ECDSA-AES128-GCM-SHA256"], server_options());
    let pair = connected(&client_options(), &server);
    assert_eq!(pair.client.info.as_ref().unwrap().version, "TLSv1.2");
    let pair = connected(&suites(&["PSK-AES128-GCM-SHA256"], key.clone()), &key);
    assert_eq!(pair.client.info.as_ref().unwrap().version, "TLSv1.2");
}

#[test]
fn groups_and_protocols_are_agreed_on() {
    for legacy in [false, true] {
        let with = |groups: &[&str], alpn: &[&[u8]], options: TlsOptions| TlsOptions {
            groups: groups.iter().map(|&n| n.to_owned()).collect(),
            alpn: alpn.iter().map(|p| p.to_vec()).collect(),
            danger_security_level_0: legacy,
            ..options
        };
        let client = with(&["P-384", "X25519"], &[b"one", b"two"], client_options());
        let server = with(&["x25519", "secp384r1"], &[b"two", b"three"], server_options());
        let pair = connected(&client, &server);
        let info = pair.server.info.as_ref().unwrap();
        assert_eq!(info.alpn.as_deref(), Some(&b"two"[..]));
        assert!(["X25519", "secp384r1"].contains(&info.group.as_deref().unwrap()));
        let (is_client, error) =
            engines(&client, &with(&[], &[b"four"], server_options())).shake_hands().unwrap_err();
        assert!(!is_client);
        assert_eq!((error.kind(), error.alert()), (ErrorKind::IncompatiblePeer, Some(120)), "{error}");
        // Nothing in common at all.
        let (_, error) =
            engines(&client, &with(&["prime256v1"], &[], server_options())).shake_hands().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::IncompatiblePeer, "{error}");
        let new = only(TlsVersion::V1_3, client.clone());
        let (_, error) = engines(&new, &only(TlsVersion::V1_2, server.clone())).shake_hands().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::IncompatiblePeer, "{error}");
    }
}

#[test]
fn a_server_without_credentials_and_a_client_with_many_keys_are_refused() {
    let nothing = TlsConfig::new(&client_options()).unwrap();
    let error = nothing.engine(&Role::Server).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("credentials")));
    let many = TlsOptions {
        credentials: Credentials::Psk {
            identities: vec![psk(b"a", &[1; 32]), psk(b"b", &[2; 32])],
            hash: PskHash::Sha256,
        },
        ..TlsOptions::default()
    };
    let error = TlsConfig::new(&many).unwrap().engine(&role()).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("credentials")));
}

#[test]
fn secrets_do_not_show() {
    let mut options = server_options();
    let secret = String::from_utf8(certificates().server.key.expose().to_vec()).unwrap();
    let line = secret.lines().nth(1).unwrap();
    if let Credentials::Certificate(OwnCertificate { password, .. }) = &mut options.credentials {
        *password = Some(Secret::new("open sesame"));
    }
    let psk = psk_options(b"x", b"the pre-shared key of the tests!");
    let texts = [
        format!("{options:?} {:?}", TlsConfig::new(&options).unwrap()),
        format!("{psk:?} {:?}", TlsConfig::new(&psk).unwrap()),
        format!("{:?} {:?}", certificates(), certificates().server),
        format!("{:?}", Secret::new("open sesame")),
    ];
    for text in texts {
        for hidden in [line, "open sesame", "the pre-shared key", "111, 112, 101, 110"] {
            assert!(!text.contains(hidden), "{text}");
        }
    }
}

#[test]
fn the_key_log_has_every_secret_in_both_engines() {
    for (kind, client, server) in kinds() {
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let sink = Arc::clone(&lines);
        let key_log = KeyLog::Callback(Arc::new(move |line| sink.lock().unwrap().push(line.to_owned())));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        connected(
            &TlsOptions { key_log, ..client },
            &TlsOptions { key_log: KeyLog::File(path.clone()), ..server },
        );
        let file = std::fs::read_to_string(&path).unwrap();
        let lines = lines.lock().unwrap();
        let wanted: &[&str] = if kind.ends_with("1.2") {
            &["CLIENT_RANDOM"]
        } else {
            &[
                "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
                "SERVER_HANDSHAKE_TRAFFIC_SECRET",
                "CLIENT_TRAFFIC_SECRET_0",
                "SERVER_TRAFFIC_SECRET_0",
                "EXPORTER_SECRET",
            ]
        };
        for label in wanted {
            let line = lines.iter().find(|line| line.split(' ').next() == Some(label)).expect(label);
            assert!(file.lines().any(|other| other == line), "{kind} {label}");
        }
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn sessions_are_resumed_unless_that_is_off() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        for resumption in [true, false] {
            let set = |options| TlsOptions { resumption, ..only(version, options) };
            let client = TlsConfig::new(&set(client_options())).unwrap();
            let server = TlsConfig::new(&set(server_options())).unwrap();
            for round in 0..3 {
                let ends = (client.engine(&role()).unwrap(), server.engine(&Role::Server).unwrap());
                let mut pair = EnginePair::new(ends.0, ends.1);
                pair.shake_hands().unwrap();
                // Tickets of TLS 1.3 come after the handshake.
                exchange(&mut pair, b"data").unwrap();
                let (c, s) = (pair.client.info.as_ref().unwrap(), pair.server.info.as_ref().unwrap());
                assert_eq!((c.resumed, s.resumed), (resumption && round > 0, resumption && round > 0));
                assert!(!c.peer_certificates.is_empty(), "a resumed session knows its peer too");
                let mut keys = [[0; 32]; 2];
                pair.client.engine.export_keying_material("EXPORTER-x", None, &mut keys[0]).unwrap();
                pair.server.engine.export_keying_material("EXPORTER-x", None, &mut keys[1]).unwrap();
                assert_eq!(keys[0], keys[1]);
            }
        }
    }
}

#[test]
fn sessions_of_another_server_are_no_hindrance() {
    // All that a client learnt from the one that was here before: a session of SHA-384 (it likes SHA-256
    // better), and to begin with a group that we ask it to leave.
    let client = TlsConfig::new(&client_options()).unwrap();
    let before = TlsOptions {
        cipher_suites: vec!["TLS_AES_256_GCM_SHA384".into()],
        groups: vec!["X25519".into()],
        ..server_options()
    };
    let connect = |server: &TlsConfig| {
        let ends = (client.engine(&role()).unwrap(), server.engine(&Role::Server).unwrap());
        let mut pair = EnginePair::new(ends.0, ends.1);
        pair.shake_hands().unwrap();
        exchange(&mut pair, b"data").unwrap();
        let info = pair.server.info.as_ref().unwrap();
        (info.cipher_suite.clone(), info.group.clone().unwrap(), info.resumed)
    };
    let sha384 = "TLS_AES_256_GCM_SHA384".to_owned();
    assert_eq!(connect(&TlsConfig::new(&before).unwrap()), (sha384.clone(), "X25519".into(), false));
    let server = TlsConfig::new(&server_options()).unwrap();
    let new = || "X25519MLKEM768".to_owned();
    assert_eq!(connect(&server), (sha384.clone(), new(), false));
    // Tickets are good for each suite of their hash.
    assert_eq!(connect(&server), (sha384, new(), true));
}
