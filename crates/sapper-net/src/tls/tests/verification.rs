//! Certificates that are accepted and refused, by both engines: who signed, for whom, when, pins,
//! mutual TLS, a verifier of the user's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::*;
use crate::buffer::Buffer;
use crate::error::ErrorKind;
use crate::tls::failure::{CertificateReason, Rejection, alert};
use crate::tls::options::ClientAuth;
use crate::tls::verify::{PeerCertificates, PeerVerifier, public_key_pin};

/// A small PKI that can make wrong certificates too.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn intermediate(&self, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.0).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> DevIdentity {
        let mut params = CertificateParams::new(vec![NAME.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        DevIdentity { chain: certificate.pem(), key: Secret::new(key.serialize_pem()) }
    }
}

fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> DevIdentity {
    let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    DevIdentity { chain: certificate.pem(), key: Secret::new(key.serialize_pem()) }
}

fn with(credentials: &DevIdentity) -> TlsOptions {
    TlsOptions { credentials: certificate(credentials), ..TlsOptions::default() }
}

fn trusting(roots: &str) -> TlsOptions {
    TlsOptions { roots: Roots::Own(roots.as_bytes().to_vec().into()), ..TlsOptions::default() }
}

fn pin(identity: &DevIdentity) -> [u8; 32] {
    let certificates = openssl::x509::X509::stack_from_pem(identity.chain.as_bytes()).unwrap();
    public_key_pin(&certificates[0].to_der().unwrap()).unwrap()
}

/// The same with each engine and version. The legacy switch moves certificates to OpenSSL.
fn each_kind(mut test: impl FnMut(&str, &dyn Fn(TlsOptions) -> TlsOptions)) {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        for legacy in [false, true] {
            let what = format!("{} {}", if legacy { "openssl" } else { "rustls" }, version.as_str());
            test(&what, &|options| TlsOptions { danger_security_level_0: legacy, ..only(version, options) });
        }
    }
}

/// The client's error, and the server's after it has seen the alert.
fn client_refuses(client: &TlsOptions, server: &TlsOptions) -> (Error, Error) {
    let mut pair = engines(client, server);
    let (is_client, error) = pair.shake_hands().unwrap_err();
    assert!(is_client, "{error}");
    assert_eq!(error.kind(), ErrorKind::Certificate, "{error}");
    let told = hears_of_it(&mut pair.server);
    (error, told)
}

/// What an end is told by the alert that waits for it, in the handshake or after.
fn hears_of_it(end: &mut EngineEnd) -> Error {
    match end.step() {
        Err(error) if error.alert_received() => error,
        _ => open_all(end).unwrap_err(),
    }
}

/// webpki looks for a root behind six authorities at most, which is not the same as that there is none.
#[test]
fn a_chain_that_is_too_long_is_called_so() {
    let root = Authority::new("the root");
    let mut chain = Vec::new();
    let mut issuer = root.intermediate("authority 1");
    let pem = root.pem();
    for number in 2..=8 {
        chain.insert(0, issuer.pem());
        let next = issuer.intermediate(&format!("authority {number}"));
        let identity = issuer.issue(|_| ());
        let whole = DevIdentity { chain: identity.chain + &chain.concat(), key: identity.key };
        each_kind(|what, kind| {
            let (client, server) = (kind(trusting(&pem)), kind(with(&whole)));
            if chain.len() <= 6 {
                connected(&client, &server);
                return;
            }
            let (error, _) = client_refuses(&client, &server);
            assert!(error.message().contains("6 certificates of authorities"), "{what}: {error}");
            assert!(!error.message().contains("has signed"), "{what}: {error}");
        });
        issuer = next;
    }
}

#[test]
fn certificates_are_refused_for_the_right_reason() {
    let authority = Authority::new("the authority");
    let wrong: Vec<(CertificateReason, DevIdentity)> = vec![
        (CertificateReason::Expired, authority.issue(|p| p.not_after = date_time_ymd(2020, 1, 1))),
        (CertificateReason::NotYetValid, authority.issue(|p| p.not_before = date_time_ymd(2090, 1, 1))),
        (CertificateReason::WrongName, authority.issue(|p| p.subject_alt_names.clear())),
        (CertificateReason::UnknownIssuer, Authority::new("somebody else").issue(|_| ())),
        (CertificateReason::BadSignature, Authority::new("the authority").issue(|_| ())),
        (CertificateReason::SelfSigned, self_signed(|_| ())),
        (CertificateReason::SelfSigned, self_signed(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        (
            CertificateReason::UnsuitablePurpose,
            authority.issue(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
        ),
    ];
    each_kind(|what, kind| {
        for (reason, identity) in &wrong {
            let (error, told) = client_refuses(&kind(trusting(&authority.pem())), &kind(with(identity)));
            assert_eq!(error.reason(), Some(reason.as_str()), "{what}: {error}");
            assert_eq!(error.alert(), Some(reason.alert()), "{what}: {error}");
            assert!(!error.alert_received());
            assert_eq!(told.alert(), Some(reason.alert()), "{what}: {told}");
            assert!(told.alert_received(), "{what}: {told}");
        }
    });
}

#[test]
fn names_are_dns_names_and_addresses() {
    let (client, server) = (client_options(), server_options());
    let config = TlsConfig::new(&client).unwrap();
    let server = TlsConfig::new(&server).unwrap();
    let reach = |name: &str| {
        let role = Role::Client { server_name: Some(name.to_owned()) };
        let mut pair = EnginePair::new(config.engine(&role).unwrap(), server.engine(&Role::Server).unwrap());
        pair.shake_hands().map(|()| pair.server.info.unwrap().server_name).map_err(|(_, error)| error)
    };
    assert_eq!(reach("localhost").unwrap().as_deref(), Some("localhost"));
    assert_eq!(reach("localhost.").unwrap().as_deref(), Some("localhost"));
    // Addresses are not sent as names.
    assert_eq!(reach("127.0.0.1").unwrap(), None);
    assert_eq!(reach("127.0.0.2").unwrap_err().reason(), Some("wrong_name"));
    assert_eq!(reach("[::1]").unwrap_err().reason(), Some("wrong_name"));
    for name in ["", "two words", "-", "a..b", "*.localhost", "http://localhost"] {
        let role = Role::Client { server_name: Some(name.to_owned()) };
        let error = config.engine(&role).err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("server_hostname")), "{name:?}");
    }
    let error = config.engine(&Role::Client { server_name: None }).err().unwrap();
    assert_eq!(error.field(), Some("server_hostname"));
}

/// What a foreign client says first, with this name of a server in it.
fn hello_for(name: &str) -> Vec<u8> {
    #[derive(Debug)]
    struct Caught(Vec<u8>);
    impl std::io::Read for Caught {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::WouldBlock.into())
        }
    }
    impl std::io::Write for Caught {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let context = openssl::ssl::SslContext::builder(openssl::ssl::SslMethod::tls_client()).unwrap().build();
    let mut ssl = openssl::ssl::Ssl::new(&context).unwrap();
    ssl.set_hostname(name).unwrap();
    match ssl.connect(Caught(Vec::new())) {
        Err(openssl::ssl::HandshakeError::WouldBlock(waiting)) => waiting.get_ref().0.clone(),
        other => panic!("{:?}", other.map(drop)),
    }
}

#[test]
fn what_is_no_host_name_is_refused_in_the_hello() {
    let hear = |server: &TlsOptions, name: &str| {
        let mut server = TlsConfig::new(server).unwrap().engine(&Role::Server).unwrap();
        let (mut incoming, mut outgoing) = (Buffer::default(), Buffer::default());
        incoming.extend(&hello_for(name));
        server.handshake(&mut incoming, &mut outgoing).map(drop)
    };
    for (kind, server) in [
        ("rustls", server_options()),
        ("openssl", TlsOptions { danger_security_level_0: true, ..server_options() }),
        ("psk", psk_options(b"x", &[7; 32])),
    ] {
        for name in
            ["x\nerror: forged", "\u{1b}[2J", "two words", "a\u{202e}b", "bücher.test", "*.test", "a..b"]
        {
            let error = hear(&server, name).unwrap_err();
            assert_eq!(
                (error.kind(), error.alert()),
                (ErrorKind::RemoteProtocol, Some(47)),
                "{kind} {name:?}: {error}"
            );
            assert!(error.message().contains("not the name of one host"), "{kind} {name:?}: {error}");
        }
        for name in ["localhost", "LOCALHOST.", "under_score.test", "192.0.2.1"] {
            // Nothing else fits between this client and a server with a pre-shared key.
            let said = hear(&server, name).err().map(|error| error.message().to_owned());
            assert!(said.is_none_or(|text| kind == "psk" && text.contains("in common")), "{kind} {name:?}");
        }
    }
}

#[test]
fn a_name_need_not_match_where_the_user_says_so() {
    let authority = Authority::new("the authority");
    let elsewhere = authority.issue(|p| p.subject_alt_names.clear());
    each_kind(|_, kind| {
        let client = TlsOptions { danger_ignore_server_name: true, ..trusting(&authority.pem()) };
        let server = TlsConfig::new(&kind(with(&elsewhere))).unwrap();
        let config = TlsConfig::new(&kind(client)).unwrap();
        for server_name in [None, Some("anything".to_owned())] {
            let client = config.engine(&Role::Client { server_name }).unwrap();
            let mut pair = EnginePair::new(client, server.engine(&Role::Server).unwrap());
            pair.shake_hands().unwrap();
            exchange(&mut pair, b"data").unwrap();
        }
        // The chain still counts.
        let other = TlsOptions { danger_ignore_server_name: true, ..trusting(&other_authority()) };
        client_refuses(&kind(other), &kind(with(&elsewhere)));
    });
}

#[test]
fn anybody_is_welcome_without_roots_and_never_without_saying_so() {
    let stranger = self_signed(|p| p.not_after = date_time_ymd(2020, 1, 1));
    each_kind(|_, kind| {
        let client = TlsOptions { roots: Roots::DangerNone, ..TlsOptions::default() };
        let pair = connected(&kind(client), &kind(with(&stranger)));
        let chain = &pair.client.info.as_ref().unwrap().peer_certificates;
        assert_eq!(public_key_pin(&chain[0]).unwrap(), pin(&stranger));
    });
}

#[test]
fn a_self_signed_certificate_can_be_a_root_itself() {
    for ca in [IsCa::NoCa, IsCa::Ca(BasicConstraints::Unconstrained)] {
        let own = self_signed(|p| p.is_ca = ca);
        let old = self_signed(|p| {
            p.is_ca = ca;
            p.not_after = date_time_ymd(2020, 1, 1);
        });
        each_kind(|what, kind| {
            connected(&kind(trusting(&own.chain)), &kind(with(&own)));
            let (error, _) = client_refuses(&kind(trusting(&old.chain)), &kind(with(&old)));
            assert_eq!(error.reason(), Some("expired"), "{what}");
            let other_name = Role::Client { server_name: Some("elsewhere".to_owned()) };
            let client = TlsConfig::new(&kind(trusting(&own.chain))).unwrap().engine(&other_name).unwrap();
            let server = TlsConfig::new(&kind(with(&own))).unwrap().engine(&Role::Server).unwrap();
            let (_, error) = EnginePair::new(client, server).shake_hands().unwrap_err();
            assert_eq!(error.reason(), Some("wrong_name"), "{what}");
        });
    }
}

#[test]
fn a_pin_alone_is_enough_and_a_wrong_one_is_not() {
    let stranger = self_signed(|_| ());
    let other = self_signed(|_| ());
    each_kind(|what, kind| {
        let pinned = |pins: Vec<[u8; 32]>| kind(TlsOptions { pins, ..TlsOptions::default() });
        connected(&pinned(vec![pin(&stranger)]), &kind(with(&stranger)));
        connected(&pinned(vec![pin(&other), pin(&stranger)]), &kind(with(&stranger)));
        let (error, told) = client_refuses(&pinned(vec![pin(&other)]), &kind(with(&stranger)));
        assert_eq!(error.reason(), Some("pin_mismatch"), "{what}");
        assert!(error.message().contains(&format!("{:02x}", pin(&stranger)[0])), "it says which key it saw");
        assert_eq!(told.kind(), ErrorKind::CredentialsRejected, "{what}");
    });
}

#[test]
fn a_pinned_authority_must_have_signed_the_leaf() {
    let root = Authority::new("root");
    let middle = root.intermediate("middle");
    let leaf = middle.issue(|_| ());
    let full = DevIdentity { chain: format!("{}{}", leaf.chain, middle.pem()), key: leaf.key };
    let middle_pin = pin(&DevIdentity { chain: middle.pem(), key: Secret::default() });
    let root_pin = pin(&DevIdentity { chain: root.pem(), key: Secret::default() });
    // An impostor that appends the pinned certificate to a chain of its own.
    let impostor = Authority::new("impostor").issue(|_| ());
    let forged = DevIdentity { chain: format!("{}{}", impostor.chain, middle.pem()), key: impostor.key };
    each_kind(|what, kind| {
        let pinned = |pin, roots| kind(TlsOptions { pins: vec![pin], roots, ..TlsOptions::default() });
        let own = || Roots::Own(root.pem().into_bytes().into());
        connected(&pinned(middle_pin, Roots::Default), &kind(with(&full)));
        connected(&pinned(middle_pin, own()), &kind(with(&full)));
        // The root is not sent, but it is among our own.
        connected(&pinned(root_pin, own()), &kind(with(&full)));
        let (error, _) = client_refuses(&pinned(middle_pin, Roots::Default), &kind(with(&forged)));
        assert_eq!(error.reason(), Some("pin_mismatch"), "{what}");
        let (error, _) = client_refuses(&pinned(root_pin, Roots::Default), &kind(with(&full)));
        assert_eq!(error.reason(), Some("pin_mismatch"), "{what}");
        // A certificate of the pinned authority for somebody else.
        let elsewhere = middle.issue(|p| p.subject_alt_names.clear());
        let elsewhere =
            DevIdentity { chain: format!("{}{}", elsewhere.chain, middle.pem()), key: elsewhere.key };
        let (error, _) = client_refuses(&pinned(middle_pin, Roots::Default), &kind(with(&elsewhere)));
        assert_eq!(error.reason(), Some("wrong_name"), "{what}");
    });
}

#[test]
fn mutual_tls_asks_insists_and_checks() {
    let own = &certificates().client;
    let stranger = self_signed(|_| ());
    each_kind(|what, kind| {
        let asking = |client_auth| {
            let roots = Roots::Own(certificates().authority.clone().into_bytes().into());
            kind(TlsOptions { client_auth, roots, ..server_options() })
        };
        let showing = |identity: &DevIdentity| {
            kind(TlsOptions { credentials: certificate(identity), ..client_options() })
        };
        for client_auth in [ClientAuth::Optional, ClientAuth::Required] {
            let pair = connected(&showing(own), &asking(client_auth));
            let info = pair.server.info.as_ref().unwrap();
            assert_eq!(public_key_pin(&info.peer_certificates[0]).unwrap(), pin(own), "{what}");
            assert_eq!(info.peer_certificates.len(), 2, "{what}: the authority's is sent along");
            // A wrong one is worse than none.
            let mut pair = engines(&showing(&stranger), &asking(client_auth));
            let (is_client, error) = pair.shake_hands().unwrap_err();
            assert!(!is_client);
            assert_eq!(
                (error.kind(), error.reason()),
                (ErrorKind::Certificate, Some("self_signed")),
                "{what}"
            );
            let told = hears_of_it(&mut pair.client);
            assert_eq!(told.kind(), ErrorKind::CredentialsRejected, "{what}: {told}");
            assert_eq!(told.reason(), Some("unknown_issuer"), "{what}");
        }
        let pair = connected(&kind(client_options()), &asking(ClientAuth::Optional));
        assert!(pair.server.info.as_ref().unwrap().peer_certificates.is_empty());
        let mut pair = engines(&kind(client_options()), &asking(ClientAuth::Required));
        let (is_client, error) = pair.shake_hands().unwrap_err();
        assert!(!is_client);
        assert_eq!(
            (error.kind(), error.reason()),
            (ErrorKind::Certificate, Some("missing")),
            "{what}: {error}"
        );
        let told = hears_of_it(&mut pair.client);
        assert!(told.alert_received(), "{what}");
        assert_eq!(told.alert(), error.alert(), "{what}");
        // A server that does not ask gets none.
        let pair = connected(&showing(own), &kind(server_options()));
        assert!(pair.server.info.as_ref().unwrap().peer_certificates.is_empty());
    });
}

#[derive(Debug, Default)]
struct Counting {
    calls: AtomicUsize,
    refuses: bool,
}

impl PeerVerifier for Counting {
    fn verify(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        assert!(!peer.chain.is_empty());
        assert_eq!(peer.server_name, (!peer.peer_is_client).then_some(NAME));
        if self.refuses {
            return Err(Rejection::new(CertificateReason::Rejected, "not on the list"));
        }
        Ok(())
    }
}

#[test]
fn a_verifier_of_the_users_own_decides() {
    let stranger = self_signed(|_| ());
    each_kind(|what, kind| {
        let verifying = |verifier: &Arc<Counting>| {
            let verifier: Arc<dyn PeerVerifier> = Arc::clone(verifier) as _;
            kind(TlsOptions { verifier: Some(verifier), ..TlsOptions::default() })
        };
        let kind_one = Arc::new(Counting::default());
        connected(&verifying(&kind_one), &kind(with(&stranger)));
        assert_eq!(kind_one.calls.load(Ordering::Relaxed), 1, "{what}");
        let strict = Arc::new(Counting { refuses: true, ..Counting::default() });
        let (error, told) = client_refuses(&verifying(&strict), &kind(with(&stranger)));
        assert_eq!((error.reason(), error.message()), (Some("rejected"), "not on the list"), "{what}");
        assert!(told.alert_received());
        // Servers have theirs too, and pins count beside it.
        let server = TlsOptions {
            client_auth: ClientAuth::Required,
            verifier: Some(Arc::new(Counting::default())),
            ..server_options()
        };
        let client = TlsOptions { credentials: certificate(&stranger), ..client_options() };
        connected(&kind(client.clone()), &kind(server.clone()));
        let pinned = TlsOptions { pins: vec![[0; 32]], ..server };
        let (_, error) = engines(&kind(client), &kind(pinned)).shake_hands().unwrap_err();
        assert_eq!(error.reason(), Some("pin_mismatch"), "{what}");
    });
}

#[test]
fn the_systems_roots_refuse_a_stranger() {
    let config = TlsConfig::new(&TlsOptions::default()).unwrap();
    let engine = match config.engine(&role()) {
        Ok(engine) => engine,
        Err(error) => {
            // A machine without certificates says so before anything is sent.
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("roots")));
            return;
        }
    };
    let server = TlsConfig::new(&server_options()).unwrap().engine(&Role::Server).unwrap();
    let (is_client, error) = EnginePair::new(engine, server).shake_hands().unwrap_err();
    assert!(is_client);
    assert_eq!((error.reason(), error.alert()), (Some("unknown_issuer"), Some(alert::UNKNOWN_CA)));
}
