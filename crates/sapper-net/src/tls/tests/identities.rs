//! Our own certificates: PKCS#12, several of them chosen by name, staples that belong to them.

use openssl::pkcs12::Pkcs12;
use openssl::pkey::PKey;
use openssl::stack::Stack;
use openssl::x509::X509;
use rcgen::{CertificateParams, KeyPair};

use super::*;
use crate::tls::options::CertificateSource;

fn server(own: OwnCertificate) -> TlsOptions {
    TlsOptions { credentials: Credentials::Certificate(own), ..TlsOptions::default() }
}

fn pkcs12(password: &str, with_authority: bool) -> Vec<u8> {
    let made = certificates();
    let chain = X509::stack_from_pem(made.server.chain.as_bytes()).unwrap();
    let key = PKey::private_key_from_pem(made.server.key.expose()).unwrap();
    let mut above = Stack::new().unwrap();
    if with_authority {
        above.push(chain[1].clone()).unwrap();
    }
    Pkcs12::builder().pkey(&key).cert(&chain[0]).ca(above).build2(password).unwrap().to_der().unwrap()
}

fn from_pkcs12(file: impl Into<Vec<u8>>, password: Option<&str>) -> TlsOptions {
    server(OwnCertificate {
        source: CertificateSource::Pkcs12(file.into().into()),
        password: password.map(|p| Secret::new(p.as_bytes())),
        ..OwnCertificate::default()
    })
}

#[test]
fn a_pkcs12_file_is_a_chain_and_its_key() {
    for (file, password, certificates) in [
        (pkcs12("right", true), Some("right"), 2),
        (pkcs12("right", false), Some("right"), 1),
        (pkcs12("", true), None, 2),
        (pkcs12("", true), Some(""), 2),
    ] {
        let pair = connected(&client_options(), &from_pkcs12(file, password));
        assert_eq!(pair.client.info.as_ref().unwrap().peer_certificates.len(), certificates);
    }
}

#[test]
fn a_pkcs12_file_that_does_not_open_is_named() {
    let chain = certificates().server.chain.clone();
    for (file, password, field) in [
        (pkcs12("right", true), None, "credentials.password"),
        (pkcs12("right", true), Some("wrong"), "credentials.password"),
        (pkcs12("right", true), Some("with\0zero"), "credentials.password"),
        (chain.into_bytes(), None, "credentials.file"),
        (Vec::new(), None, "credentials.file"),
        (pkcs12("right", true)[..200].to_vec(), Some("right"), "credentials.file"),
    ] {
        let error = TlsConfig::new(&from_pkcs12(file, password)).unwrap_err();
        assert_eq!(error.field(), Some(field), "{password:?}: {error}");
    }
    // Without a MAC what comes out may also just be nonsense.
    let made = certificates();
    let chain = X509::stack_from_pem(made.server.chain.as_bytes()).unwrap();
    let key = PKey::private_key_from_pem(made.server.key.expose()).unwrap();
    let mut builder = Pkcs12::builder();
    let file =
        builder.pkey(&key).cert(&chain[0]).mac_iter(u32::MAX).build2("right").unwrap().to_der().unwrap();
    connected(&client_options(), &from_pkcs12(file.clone(), Some("right")));
    for password in [None, Some("wrong"), Some("another")] {
        let error = TlsConfig::new(&from_pkcs12(file.clone(), password)).unwrap_err();
        assert!(error.message().contains("password"), "{password:?}: {error}");
    }
}

/// A certificate that signs itself, for `names`.
fn identity(names: &[&str]) -> OwnCertificate {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    OwnCertificate::pair(certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
}

fn leaf(own: &OwnCertificate) -> Vec<u8> {
    let CertificateSource::Pair { chain, .. } = &own.source else { panic!("no pair") };
    X509::from_pem(chain.expose()).unwrap().to_der().unwrap()
}

fn shown(server: &TlsConfig, name: Option<&str>) -> Vec<u8> {
    let client = TlsOptions { roots: Roots::DangerNone, ..TlsOptions::default() };
    let role = Role::Client { server_name: name.map(str::to_owned) };
    let client = TlsConfig::new(&client).unwrap().engine(&role).unwrap();
    let mut pair = EnginePair::new(client, server.engine(&Role::Server).unwrap());
    pair.shake_hands().map_err(|(_, error)| error).unwrap();
    assert_eq!(pair.server.info.as_ref().unwrap().server_name.as_deref(), name.filter(|n| !n.contains(':')));
    let (client, server) = (pair.client.info.as_ref().unwrap(), pair.server.info.as_ref().unwrap());
    assert_eq!(client.server_end_point().unwrap(), server.server_end_point().unwrap());
    client.peer_certificates[0].clone()
}

#[test]
fn the_name_that_is_asked_for_chooses_the_certificate() {
    let default = identity(&["default.example"]);
    let one = identity(&["one.example", "*.one.example"]);
    let two = OwnCertificate { names: vec!["*.Two.example.".to_owned()], ..identity(&[]) };
    let config = TlsConfig::new(&TlsOptions {
        more_certificates: vec![one.clone(), two.clone()],
        ..server(default.clone())
    })
    .unwrap();
    for (name, expected) in [
        (Some("one.example"), &one),
        (Some("a.one.example"), &one),
        (Some("a.b.one.example"), &default),
        (Some("x.two.example"), &two),
        (Some("two.example"), &default),
        (Some("default.example"), &default),
        (Some("unknown.example"), &default),
        (Some("::1"), &default),
        (None, &default),
    ] {
        assert!(shown(&config, name) == leaf(expected), "{name:?}");
    }
}

#[test]
fn of_two_kinds_of_key_the_client_gets_what_it_can_verify() {
    let made = openssl::rsa::Rsa::generate(2048).unwrap();
    let rsa_key = PKey::from_rsa(made).unwrap();
    let rsa = KeyPair::try_from(&rsa_key.private_key_to_pkcs8().unwrap()[..]).unwrap();
    let certificate = CertificateParams::new(vec![NAME.to_owned()]).unwrap().self_signed(&rsa).unwrap();
    let rsa = OwnCertificate::pair(certificate.pem().into_bytes(), rsa.serialize_pem().into_bytes());
    let elliptic = identity(&[NAME]);
    let options = TlsOptions { more_certificates: vec![rsa.clone()], ..server(elliptic.clone()) };
    let config = TlsConfig::new(&options).unwrap();
    for (suite, expected) in
        [("ECDHE-RSA-AES128-GCM-SHA256", &rsa), ("ECDHE-ECDSA-AES128-GCM-SHA256", &elliptic)]
    {
        let client = TlsOptions {
            roots: Roots::DangerNone,
            cipher_suites: vec![suite.to_owned()],
            danger_security_level_0: true,
            ..TlsOptions::default()
        };
        let client = TlsConfig::new(&client).unwrap().engine(&role()).unwrap();
        let mut pair = EnginePair::new(client, config.engine(&Role::Server).unwrap());
        match pair.shake_hands() {
            Ok(()) => {
                assert!(pair.client.info.as_ref().unwrap().peer_certificates[0] == leaf(expected), "{suite}")
            }
            Err((_, error)) => panic!("{suite}: {error}"),
        }
    }
}

#[test]
fn certificates_that_cannot_be_chosen_are_refused() {
    let named = |names: &[&str]| OwnCertificate {
        names: names.iter().map(|&n| n.to_owned()).collect(),
        ..identity(&["x.example"])
    };
    let with = |more: Vec<OwnCertificate>| TlsOptions { more_certificates: more, ..server_options() };
    for (options, field) in [
        (with(vec![identity(&[])]), "more_credentials.0.names"),
        (with(vec![named(&["x.example"]), named(&["x.example", "*"])]), "more_credentials.1.names.1"),
        (with(vec![named(&["a.*.example"])]), "more_credentials.0.names.0"),
        (with(vec![OwnCertificate::default()]), "more_credentials.0.chain"),
        (TlsOptions { danger_security_level_0: true, ..with(vec![named(&[])]) }, "more_credentials"),
        (TlsOptions { more_certificates: vec![named(&[])], ..client_options() }, "more_credentials"),
    ] {
        let error = TlsConfig::new(&options).unwrap_err();
        assert_eq!(error.field(), Some(field), "{error}");
    }
}

#[test]
fn both_ends_know_the_servers_end_point() {
    for legacy in [false, true] {
        let set = |options| TlsOptions { danger_security_level_0: legacy, ..options };
        let pair = connected(&set(client_options()), &set(server_options()));
        let (client, server) = (pair.client.info.as_ref().unwrap(), pair.server.info.as_ref().unwrap());
        let expected = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &client.peer_certificates[0]);
        assert_eq!(client.server_end_point().unwrap(), expected.as_ref());
        assert_eq!(server.server_end_point().unwrap(), expected.as_ref());
    }
    let key = psk_options(b"x", &[7; 32]);
    let pair = connected(&key, &key);
    assert_eq!(pair.client.info.as_ref().unwrap().server_end_point(), None);
    assert_eq!(pair.server.info.as_ref().unwrap().server_end_point(), None);
}
