//! TLS options: a dictionary of plain values, as `sapper.tls.config` gives it, becomes [`TlsOptions`].

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use sapper_net::tls::options::{
    CertificateSource, ClientAuth, Credentials, FindPsk, KeyLog, Material, OcspCheck, OwnCertificate,
    PeerRule, PskHash, PskIdentity, PskLookup, Roots, Secret, TlsOptions, TlsVersion,
};
use sapper_net::{Error, Result};

use crate::values::{seconds, word};

/// Options as `sapper.tls.config` gives them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct TlsValues {
    own: Option<OwnValues>,
    more: Vec<OwnValues>,
    psks: Option<Vec<(PyBackedBytes, PyBackedBytes, Option<PathBuf>)>>,
    /// Who is asked for the keys of clients: what that is, only the binding knows whose it is.
    pub psk_lookup: Option<Py<PyAny>>,
    psk_hash: String,
    roots: Option<RootsValue>,
    pins: Vec<PyBackedBytes>,
    client_auth: String,
    peer_rules: Vec<RuleValues>,
    crls: Vec<MaterialValue>,
    ocsp: Option<String>,
    min_version: String,
    max_version: String,
    cipher_suites: Vec<String>,
    groups: Vec<String>,
    alpn: Vec<PyBackedBytes>,
    resumption: bool,
    ticket_lifetime: f64,
    key_log_file: Option<PathBuf>,
    capture_file: Option<PathBuf>,
    danger_ignore_server_name: bool,
    danger_legacy_renegotiation: bool,
    danger_security_level_0: bool,
    danger_legacy_suites: bool,
    danger_short_psk: bool,
    danger_ignore_truncation: bool,
    danger_early_data: usize,
}

/// Bytes, and the file that they came from.
type MaterialValue = (PyBackedBytes, Option<PathBuf>);

/// A certificate of our own: a chain and a key, or PKCS#12.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct OwnValues {
    chain: Option<MaterialValue>,
    key: Option<MaterialValue>,
    pkcs12: Option<MaterialValue>,
    password: Option<PyBackedBytes>,
    ocsp_response: Option<MaterialValue>,
    names: Vec<String>,
}

/// A rule on the peer.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct RuleValues {
    dns: Vec<String>,
    uri: Vec<String>,
    email: Vec<String>,
    ip: Vec<String>,
    cn: Vec<String>,
    ou: Vec<String>,
    pin: Vec<PyBackedBytes>,
}

/// Roots: bytes of our own, or a word.
#[derive(FromPyObject)]
enum RootsValue {
    Own(MaterialValue),
    Word(String),
}

fn material((bytes, file): MaterialValue) -> Material {
    match file {
        Some(file) => Material::of_file(&*bytes, file),
        None => Material::from(bytes.to_vec()),
    }
}

fn pins(field: &'static str, pins: &[PyBackedBytes]) -> Result<Vec<[u8; 32]>> {
    pins.iter()
        .map(|pin| <[u8; 32]>::try_from(&**pin))
        .collect::<Result<_, _>>()
        .map_err(|_| Error::config(field, "a pin is a SHA-256: 32 bytes"))
}

impl OwnValues {
    fn read(self) -> OwnCertificate {
        let source = match self.pkcs12 {
            Some(file) => CertificateSource::Pkcs12(material(file)),
            None => CertificateSource::Pair {
                chain: self.chain.map(material).unwrap_or_default(),
                key: self.key.map(material).unwrap_or_default(),
            },
        };
        OwnCertificate {
            source,
            password: self.password.map(|password| Secret::new(&*password)),
            ocsp_response: self.ocsp_response.map(material),
            names: self.names,
        }
    }
}

impl RuleValues {
    fn read((index, this): (usize, Self)) -> Result<PeerRule> {
        let wrong = |at: usize| {
            move |error: Error| Error::config(format!("peer_rules.{index}.ip.{at}"), error.message())
        };
        let range = |(at, text): (usize, &String)| text.parse().map_err(wrong(at));
        Ok(PeerRule {
            dns: this.dns,
            uri: this.uri,
            email: this.email,
            ip: this.ip.iter().enumerate().map(range).collect::<Result<_>>()?,
            cn: this.cn,
            ou: this.ou,
            pin: pins("peer_rules", &this.pin)?,
        })
    }
}

impl TlsValues {
    /// The options; `lookup` is who answers for `psk_lookup`.
    pub fn read(self, lookup: Option<Arc<dyn FindPsk>>) -> Result<TlsOptions> {
        let hashes = [("sha256", PskHash::Sha256), ("sha384", PskHash::Sha384)];
        let credentials = match (self.own, self.psks) {
            (Some(own), _) => Credentials::Certificate(own.read()),
            (None, Some(psks)) => Credentials::Psk {
                identities: psks
                    .into_iter()
                    .map(|(identity, key, file)| PskIdentity {
                        identity: identity.to_vec(),
                        key: material((key, file)),
                    })
                    .collect(),
                hash: word("hash", &self.psk_hash, &hashes)?,
            },
            (None, None) => match lookup {
                Some(lookup) => Credentials::PskLookup {
                    lookup: PskLookup(lookup),
                    hash: word("hash", &self.psk_hash, &hashes)?,
                },
                None => Credentials::None,
            },
        };
        let roots = match self.roots {
            None => Roots::Default,
            Some(RootsValue::Own(own)) => Roots::Own(material(own)),
            Some(RootsValue::Word(text)) => {
                word("roots", &text, &[("system", Roots::System), ("none", Roots::DangerNone)])?
            }
        };
        let versions = [("TLSv1.2", TlsVersion::V1_2), ("TLSv1.3", TlsVersion::V1_3)];
        let ocsp = self.ocsp.as_deref().map(|text| {
            let words =
                [("off", OcspCheck::Off), ("check", OcspCheck::IfStapled), ("require", OcspCheck::Required)];
            word("ocsp", text, &words)
        });
        Ok(TlsOptions {
            credentials,
            more_certificates: self.more.into_iter().map(OwnValues::read).collect(),
            roots,
            pins: pins("pins", &self.pins)?,
            client_auth: word(
                "client_auth",
                &self.client_auth,
                &[
                    ("off", ClientAuth::Off),
                    ("optional", ClientAuth::Optional),
                    ("required", ClientAuth::Required),
                ],
            )?,
            peer_rules: self
                .peer_rules
                .into_iter()
                .enumerate()
                .map(RuleValues::read)
                .collect::<Result<_>>()?,
            crls: self.crls.into_iter().map(material).collect(),
            ocsp: ocsp.transpose()?,
            verifier: None,
            min_version: word("min_version", &self.min_version, &versions)?,
            max_version: word("max_version", &self.max_version, &versions)?,
            cipher_suites: self.cipher_suites,
            groups: self.groups,
            alpn: self.alpn.iter().map(|protocol| protocol.to_vec()).collect(),
            resumption: self.resumption,
            ticket_lifetime: seconds("ticket_lifetime")(self.ticket_lifetime)?,
            key_log: self.key_log_file.map_or(KeyLog::None, KeyLog::File),
            capture: self.capture_file,
            danger_ignore_server_name: self.danger_ignore_server_name,
            danger_legacy_renegotiation: self.danger_legacy_renegotiation,
            danger_security_level_0: self.danger_security_level_0,
            danger_legacy_suites: self.danger_legacy_suites,
            danger_short_psk: self.danger_short_psk,
            danger_ignore_truncation: self.danger_ignore_truncation,
            danger_early_data: self.danger_early_data,
        })
    }
}
