//! Rules on the peer: after its chain was verified, before any data, on both sides and both engines.

use std::net::IpAddr;

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};

use super::*;
use crate::error::ErrorKind;
use crate::tls::options::{ClientAuth, PeerRule};

struct Made {
    authority: String,
    peer: DevIdentity,
}

/// One peer with a name of each kind.
fn made() -> Made {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec![NAME.to_owned(), "device.example".to_owned()]).unwrap();
    let text = |text: &str| Ia5String::try_from(text).unwrap();
    params.subject_alt_names.extend([
        SanType::URI(text("spiffe://example/ns/one")),
        SanType::Rfc822Name(text("me@example.com")),
        SanType::IpAddress(IpAddr::from([10, 1, 2, 3])),
    ]);
    params.distinguished_name.push(DnType::CommonName, "the device");
    params.distinguished_name.push(DnType::OrganizationalUnitName, "lab");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let peer = DevIdentity { chain: certificate.pem(), key: Secret::new(key.serialize_pem()) };
    Made { authority: authority.pem(), peer }
}

fn list(entries: &[&str]) -> Vec<String> {
    entries.iter().map(|&entry| entry.to_owned()).collect()
}

#[test]
fn each_kind_of_name_lets_in_and_keeps_out() {
    let made = made();
    let pin = crate::tls::verify::public_key_pin(
        &openssl::x509::X509::from_pem(made.peer.chain.as_bytes()).unwrap().to_der().unwrap(),
    )
    .unwrap();
    let rule = PeerRule::default;
    let welcome = [
        vec![PeerRule { dns: list(&["elsewhere", "*.example"]), ..rule() }],
        vec![PeerRule { uri: list(&["spiffe://example/ns/*"]), ..rule() }],
        vec![PeerRule { email: list(&["me@EXAMPLE.com"]), ..rule() }],
        vec![PeerRule { ip: vec!["10.0.0.0/8".parse().unwrap()], ..rule() }],
        vec![PeerRule { cn: list(&["the device"]), ou: list(&["lab"]), ..rule() }],
        vec![PeerRule { ou: list(&["office", "lab"]), ..rule() }],
        vec![PeerRule { pin: vec![pin], ..rule() }],
        vec![PeerRule { cn: list(&["another"]), ..rule() }, PeerRule { ou: list(&["lab"]), ..rule() }],
    ];
    let unwelcome = [
        vec![PeerRule { dns: list(&["example", "*.device.example"]), ..rule() }],
        vec![PeerRule { uri: list(&["spiffe://example/ns"]), ..rule() }],
        vec![PeerRule { email: list(&["you@example.com"]), ..rule() }],
        vec![PeerRule { ip: vec!["10.1.2.4".parse().unwrap()], ..rule() }],
        vec![PeerRule { cn: list(&["the device"]), ou: list(&["office"]), ..rule() }],
        vec![PeerRule { pin: vec![[0; 32]], ..rule() }],
    ];
    let roots = || Roots::Own(made.authority.clone().into_bytes().into());
    let credentials = || TlsOptions { credentials: certificate(&made.peer), ..TlsOptions::default() };
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        for legacy in [false, true] {
            let set = |options| TlsOptions { danger_security_level_0: legacy, ..only(version, options) };
            let asking = |rules: &Vec<PeerRule>| TlsOptions {
                roots: roots(),
                client_auth: ClientAuth::Required,
                peer_rules: rules.clone(),
                ..credentials()
            };
            let plain = TlsOptions { roots: roots(), ..credentials() };
            for rules in &welcome {
                connected(&set(plain.clone()), &set(asking(rules)));
                connected(&set(asking(rules)), &set(plain.clone()));
            }
            for rules in &unwelcome {
                let what = format!("legacy {legacy}, {}, {rules:?}", version.as_str());
                let mut pair = engines(&set(plain.clone()), &set(asking(rules)));
                let error = first_error(&mut pair, false);
                assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{what}: {error}");
                assert_eq!((error.reason(), error.alert()), (Some("not_allowed"), Some(49)), "{what}");
                assert!(error.message().contains("the device"), "{error}");
                let mut pair = engines(&set(asking(rules)), &set(plain.clone()));
                let error = first_error(&mut pair, true);
                assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{what}: {error}");
            }
        }
    }
}

/// The error of the end that asks, and the other's, which got the alert.
fn first_error(pair: &mut EnginePair, client_asks: bool) -> Error {
    let (is_client, error) = pair.shake_hands().unwrap_err();
    assert_eq!(is_client, client_asks, "{error}");
    pair.deliver();
    let peer = if client_asks { &mut pair.server } else { &mut pair.client };
    let told = match peer.step() {
        Err(error) if error.alert_received() => error,
        _ => open_all(peer).unwrap_err(),
    };
    assert_eq!((told.kind(), told.alert()), (ErrorKind::CredentialsRejected, Some(49)), "{told}");
    error
}

#[test]
fn a_client_without_a_certificate_is_welcome_only_where_it_is_optional() {
    let server = TlsOptions {
        roots: Roots::Own(made().authority.clone().into_bytes().into()),
        client_auth: ClientAuth::Optional,
        ..server_options()
    };
    connected(&client_options(), &server);
    let server = TlsOptions { client_auth: ClientAuth::Required, ..server };
    let mut pair = engines(&client_options(), &server);
    // In TLS 1.3 the client is done before the server says no.
    assert!(pair.shake_hands().is_err());
}

#[test]
fn a_server_has_no_rules_that_a_client_without_a_certificate_gets_past() {
    let server = |client_auth| TlsOptions {
        roots: Roots::Own(made().authority.clone().into_bytes().into()),
        client_auth,
        peer_rules: vec![PeerRule { cn: list(&["the device"]), ..PeerRule::default() }],
        ..server_options()
    };
    for client_auth in [ClientAuth::Optional, ClientAuth::Off] {
        let error = TlsConfig::new(&server(client_auth)).unwrap().engine(&Role::Server).err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("peer_rules")));
    }
    let client = TlsOptions { credentials: certificate(&certificates().client), ..client_options() };
    for client in [client, client_options()] {
        assert!(engines(&client, &server(ClientAuth::Required)).shake_hands().is_err());
    }
}

#[test]
fn rules_without_a_verified_name_mean_nothing() {
    let rules = vec![PeerRule { cn: list(&["x"]), ..PeerRule::default() }];
    let with = |options| TlsOptions { peer_rules: rules.clone(), ..options };
    for (options, field) in [
        (with(TlsOptions { roots: Roots::DangerNone, ..TlsOptions::default() }), "peer_rules"),
        (with(psk_options(b"x", &[7; 32])), "peer_rules"),
        (TlsOptions { peer_rules: vec![PeerRule::default()], ..client_options() }, "peer_rules.0"),
    ] {
        assert_eq!(TlsConfig::new(&options).unwrap_err().field(), Some(field));
    }
}
