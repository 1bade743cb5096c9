//! Engines and streams against each other and against the libraries themselves, in memory.

mod configuration;
mod early_data;
mod foreign;
mod handshakes;
mod identities;
mod long;
mod pipe;
mod psk;
mod reloading;
mod revocation;
mod rules;
mod streams;
mod traffic;
mod verification;

use std::time::Duration;

use super::bench::{EngineEnd, EnginePair};
use super::config::TlsConfig;
use super::dev_cert::{DevCertificates, DevIdentity, dev_certificates};
use super::options::{
    Credentials, OwnCertificate, PskHash, PskIdentity, Roots, Secret, TlsOptions, TlsVersion,
};
use super::{OpenState, Role};
use crate::error::{Error, Result};
use crate::stream::RecordMarks;

pub(super) const NAME: &str = "localhost";

/// One set for all tests: making keys takes time.
pub(super) fn certificates() -> &'static DevCertificates {
    static MADE: std::sync::OnceLock<DevCertificates> = std::sync::OnceLock::new();
    MADE.get_or_init(|| dev_certificates(&[NAME, "127.0.0.1"], Duration::from_secs(3600)).unwrap())
}

/// An authority that has signed nothing here.
pub(super) fn other_authority() -> String {
    dev_certificates(&["elsewhere"], Duration::from_secs(60)).unwrap().authority
}

pub(super) fn certificate(identity: &DevIdentity) -> Credentials {
    Credentials::Certificate(OwnCertificate::pair(identity.chain.clone().into_bytes(), identity.key.clone()))
}

pub(super) fn server_options() -> TlsOptions {
    TlsOptions { credentials: certificate(&certificates().server), ..TlsOptions::default() }
}

pub(super) fn client_options() -> TlsOptions {
    TlsOptions {
        roots: Roots::Own(certificates().authority.clone().into_bytes().into()),
        ..TlsOptions::default()
    }
}

pub(super) fn psk(identity: &[u8], key: &[u8]) -> PskIdentity {
    PskIdentity { identity: identity.to_vec(), key: Secret::new(key).into() }
}

pub(super) fn psk_options(identity: &[u8], key: &[u8]) -> TlsOptions {
    TlsOptions {
        credentials: Credentials::Psk { identities: vec![psk(identity, key)], hash: PskHash::Sha256 },
        ..TlsOptions::default()
    }
}

pub(super) fn only(version: TlsVersion, options: TlsOptions) -> TlsOptions {
    TlsOptions { min_version: version, max_version: version, ..options }
}

pub(super) fn role() -> Role {
    Role::Client { server_name: Some(NAME.to_owned()) }
}

pub(super) fn engines(client: &TlsOptions, server: &TlsOptions) -> EnginePair {
    let client = TlsConfig::new(client).unwrap().engine(&role()).unwrap();
    let server = TlsConfig::new(server).unwrap().engine(&Role::Server).unwrap();
    EnginePair::new(client, server)
}

/// A pair after its handshake.
pub(super) fn connected(client: &TlsOptions, server: &TlsOptions) -> EnginePair {
    let mut pair = engines(client, server);
    pair.shake_hands().map_err(|(is_client, error)| format!("client: {is_client}, {error}")).unwrap();
    pair
}

/// The four kinds of connection: both engines, both versions.
pub(super) fn kinds() -> Vec<(String, TlsOptions, TlsOptions)> {
    let mut kinds = Vec::new();
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let name = version.as_str();
        kinds.push((
            format!("rustls {name}"),
            only(version, client_options()),
            only(version, server_options()),
        ));
        let key = psk_options(b"x", &[7; 32]);
        kinds.push((format!("openssl {name}"), only(version, key.clone()), only(version, key)));
    }
    kinds
}

/// Opens all that has come to an end, and says how it stopped.
pub(super) fn open_all(end: &mut EngineEnd) -> Result<(Vec<u8>, Vec<u32>, OpenState)> {
    let mut plain = vec![0; 256 * 1024];
    let mut marks = RecordMarks::wanted();
    let opened = end.engine.open(&mut end.incoming, &mut plain, &mut marks, &mut end.outgoing)?;
    plain.truncate(opened.produced);
    assert_eq!(opened.records, marks.ends().len());
    Ok((plain, marks.ends().to_vec(), opened.state))
}

/// Sends `data` each way and expects it at the other end.
pub(super) fn exchange(pair: &mut EnginePair, data: &[u8]) -> Result<(), Error> {
    pair.client.engine.seal(data, &mut pair.client.outgoing)?;
    pair.server.engine.seal(data, &mut pair.server.outgoing)?;
    pair.deliver();
    assert_eq!(open_all(&mut pair.server)?.0, data);
    assert_eq!(open_all(&mut pair.client)?.0, data);
    pair.deliver();
    Ok(())
}
