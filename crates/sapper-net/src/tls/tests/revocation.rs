//! Revocation lists, on both sides and both engines. Staples are checked against OpenSSL's responder in
//! `tests/interop`.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SerialNumber, date_time_ymd,
};

use super::*;
use crate::error::ErrorKind;
use crate::tls::options::{ClientAuth, OcspCheck};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, serial: u64) -> DevIdentity {
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        DevIdentity { chain: certificate.pem(), key: Secret::new(key.serialize_pem()) }
    }

    fn list(&self, revoked: &[u64], until: i32) -> String {
        self.list_of(revoked, 2024, until)
    }

    fn list_of(&self, revoked: &[u64], from: i32, until: i32) -> String {
        let revoked = revoked.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        });
        CertificateRevocationListParams {
            this_update: date_time_ymd(from, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.0)
        .unwrap()
        .pem()
        .unwrap()
    }

    fn roots(&self) -> Roots {
        Roots::Own(self.0.pem().into_bytes().into())
    }
}

#[test]
fn revoked_certificates_are_refused_and_so_are_those_that_no_list_covers() {
    let (authority, stranger) = (Authority::new("one"), Authority::new("another"));
    let (good, revoked) = (authority.issue(1), authority.issue(2));
    let list = authority.list(&[2], 2100);
    let der = openssl::x509::X509Crl::from_pem(list.as_bytes()).unwrap().to_der().unwrap();
    type Kind<'a> = (Vec<Vec<u8>>, &'a DevIdentity, Option<&'a str>);
    // Of several lists the newest counts, in whichever order they stand.
    let lists_of = |years: [(i32, &[u64], i32); 2]| {
        let [one, other] = years.map(|(from, gone, until)| authority.list_of(gone, from, until).into_bytes());
        [vec![one.clone(), other.clone()], vec![[other, one].concat()]]
    };
    let [newer_last, newer_first] = lists_of([(2024, &[], 2100), (2025, &[2], 2100)]);
    let [late_last, late_first] = lists_of([(2024, &[1], 2025), (2025, &[2], 2100)]);
    let kinds: [Kind<'_>; 14] = [
        (newer_last.clone(), &revoked, Some("revoked")),
        (newer_first, &revoked, Some("revoked")),
        (newer_last, &good, None),
        (late_last, &good, None),
        (late_first, &good, None),
        (vec![list.clone().into_bytes()], &good, None),
        (vec![der], &good, None),
        (vec![(stranger.list(&[1], 2100) + &list).into_bytes()], &good, None),
        (vec![stranger.list(&[], 2100).into_bytes(), list.clone().into_bytes()], &good, None),
        (vec![list.into_bytes()], &revoked, Some("revoked")),
        (vec![stranger.list(&[], 2100).into_bytes()], &good, Some("revocation_unknown")),
        (vec![authority.list(&[], 2025).into_bytes()], &good, Some("revocation_unknown")),
        // One that is newer than our clock counts.
        (vec![authority.list_of(&[2], 2099, 2100).into_bytes()], &good, None),
        (vec![authority.list_of(&[2], 2099, 2100).into_bytes()], &revoked, Some("revoked")),
    ];
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        for legacy in [false, true] {
            let set = |options| TlsOptions { danger_security_level_0: legacy, ..only(version, options) };
            for (index, (lists, identity, reason)) in kinds.iter().enumerate() {
                let asking = TlsOptions {
                    roots: authority.roots(),
                    crls: lists.iter().cloned().map(Into::into).collect(),
                    client_auth: ClientAuth::Required,
                    credentials: certificate(&good),
                    ..TlsOptions::default()
                };
                let asked = TlsOptions {
                    roots: authority.roots(),
                    credentials: certificate(identity),
                    ..TlsOptions::default()
                };
                for client_asks in [true, false] {
                    let (client, server) = if client_asks { (&asking, &asked) } else { (&asked, &asking) };
                    let server = TlsOptions {
                        client_auth: if client_asks { ClientAuth::Off } else { ClientAuth::Required },
                        ..server.clone()
                    };
                    let result = engines(&set(client.clone()), &set(server)).shake_hands();
                    let what = format!("{index}, legacy {legacy}, client asks {client_asks}");
                    match (result, reason) {
                        (Ok(()), None) => {}
                        (Err((is_client, error)), Some(reason)) => {
                            assert_eq!(is_client, client_asks, "{what}: {error}");
                            assert_eq!(error.kind(), ErrorKind::Certificate, "{what}: {error}");
                            assert_eq!(error.reason(), Some(*reason), "{what}: {error}");
                        }
                        (result, _) => panic!("{what}: {:?}", result.map_err(|(_, e)| e)),
                    }
                }
            }
        }
    }
}

#[test]
fn a_name_that_is_wrong_or_not_checked_is_no_matter_of_the_list() {
    let authority = Authority::new("one");
    let server = TlsOptions { credentials: certificate(&authority.issue(1)), ..TlsOptions::default() };
    let client = TlsOptions {
        roots: authority.roots(),
        crls: vec![authority.list(&[], 2100).into_bytes().into()],
        ..TlsOptions::default()
    };
    let connect = |client: &TlsOptions, name: &str| {
        let role = Role::Client { server_name: Some(name.to_owned()) };
        let client = TlsConfig::new(client).unwrap().engine(&role).unwrap();
        let server = TlsConfig::new(&server).unwrap().engine(&Role::Server).unwrap();
        EnginePair::new(client, server).shake_hands().map_err(|(_, error)| error)
    };
    connect(&client, NAME).unwrap();
    assert_eq!(connect(&client, "elsewhere").unwrap_err().reason(), Some("wrong_name"));
    connect(&TlsOptions { danger_ignore_server_name: true, ..client }, "elsewhere").unwrap();
}

#[test]
fn what_cannot_be_checked_is_named() {
    let authority = Authority::new("one");
    let list = || vec![authority.list(&[], 2100).into_bytes().into()];
    let own = || TlsOptions { roots: authority.roots(), ..TlsOptions::default() };
    let stapling = |response: &[u8]| {
        let identity = &certificates().server;
        let own = OwnCertificate::pair(identity.chain.clone().into_bytes(), identity.key.clone());
        let own = OwnCertificate { ocsp_response: Some(response.to_vec().into()), ..own };
        TlsOptions { credentials: Credentials::Certificate(own), ..TlsOptions::default() }
    };
    for (options, field) in [
        (TlsOptions { crls: list(), ..TlsOptions::default() }, "crls"),
        (TlsOptions { crls: list(), roots: Roots::DangerNone, ..own() }, "crls"),
        (TlsOptions { crls: vec![b"garbage".to_vec().into()], ..own() }, "crls.0"),
        (TlsOptions { crls: [list(), vec![vec![0x30, 0x03, 1, 2, 3].into()]].concat(), ..own() }, "crls.1"),
        (TlsOptions { crls: vec![Vec::new().into()], ..own() }, "crls.0"),
        (TlsOptions { crls: list(), ..psk_options(b"x", &[7; 32]) }, "crls"),
        (TlsOptions { ocsp: Some(OcspCheck::Required), danger_security_level_0: true, ..own() }, "ocsp"),
        (TlsOptions { ocsp: Some(OcspCheck::IfStapled), roots: Roots::DangerNone, ..own() }, "ocsp"),
        (stapling(b"garbage"), "credentials.ocsp_response"),
        (TlsOptions { danger_security_level_0: true, ..stapling(b"garbage") }, "credentials.ocsp_response"),
    ] {
        let error = TlsConfig::new(&options).unwrap_err();
        assert_eq!(error.field(), Some(field), "{error}");
    }
}

#[test]
fn a_staple_that_is_required_must_be_there() {
    let client = TlsOptions { ocsp: Some(OcspCheck::Required), ..client_options() };
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let mut pair = engines(&only(version, client.clone()), &only(version, server_options()));
        let (is_client, error) = pair.shake_hands().unwrap_err();
        assert!(is_client);
        assert_eq!((error.reason(), error.alert()), (Some("bad_staple"), Some(113)), "{error}");
    }
}
