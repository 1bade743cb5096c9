//! TLS configuration: a dictionary of plain options becomes a parsed, shared [`config::TlsConfig`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use sapper_net::bridge::{ControlMailbox, Event};
use sapper_net::tls::Role;
use sapper_net::tls::config;
use sapper_net::tls::dev_cert::DevAuthority;
use sapper_net::tls::options::{
    CertificateSource, ClientAuth, Credentials, FindPsk, KeyLog, Material, OcspCheck, OwnCertificate,
    PeerRule, PskHash, PskIdentity, PskLookup, Roots, Secret, TlsOptions, TlsVersion,
};
use sapper_net::tls::reload;
use sapper_net::{Error, Result};

use crate::errors::OrRaise;
use crate::mailbox::Mailbox;
use crate::process::Local;
use crate::values::seconds;

/// Parsed once, shared by any number of connections.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TlsConfig {
    pub(crate) inner: Arc<config::TlsConfig>,
}

/// The configuration, whether we are the server, and the name to check (clients).
pub(crate) type TlsSide = (Py<TlsConfig>, bool, Option<String>);

/// The role that a [`TlsSide`] speaks of.
pub(crate) fn role(server_side: bool, server_name: Option<String>) -> Role {
    if server_side { Role::Server } else { Role::Client { server_name } }
}

/// Options as `sapper.tls.config` gives them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct TlsValues {
    own: Option<OwnValues>,
    more: Vec<OwnValues>,
    psks: Option<Vec<(PyBackedBytes, PyBackedBytes)>>,
    psk_lookup: Option<(Py<Mailbox>, u64, f64)>,
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
    fn read(self) -> Result<PeerRule> {
        Ok(PeerRule {
            dns: self.dns,
            uri: self.uri,
            email: self.email,
            ip: self.ip.iter().map(|text| text.parse()).collect::<Result<_>>()?,
            cn: self.cn,
            ou: self.ou,
            pin: pins("peer_rules", &self.pin)?,
        })
    }
}

#[pymethods]
impl TlsConfig {
    #[new]
    fn new(py: Python<'_>, options: TlsValues) -> PyResult<Self> {
        let lookup = match &options.psk_lookup {
            Some((mailbox, key, deadline)) => Some(MailboxLookup {
                mailbox: mailbox.get().shared(py)?,
                key: *key,
                deadline: seconds("timeout")(*deadline).or_raise(py)?,
            }),
            None => None,
        };
        let options = options.read(lookup).or_raise(py)?;
        // Key parsing and roots take milliseconds: nobody else has to wait for that.
        let config = py.detach(|| config::TlsConfig::new(&options)).or_raise(py)?;
        Ok(Self { inner: Arc::new(config) })
    }

    /// Which library does the handshakes: `"rustls"` or `"openssl"`.
    #[getter]
    fn engine(&self) -> &'static str {
        self.inner.engine_name()
    }

    /// The same with these application protocols, reloaded with this one.
    fn with_alpn(&self, py: Python<'_>, alpn: Vec<PyBackedBytes>) -> PyResult<Self> {
        let alpn: Vec<_> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let inner = py.detach(|| self.inner.with_alpn(&alpn)).or_raise(py)?;
        Ok(Self { inner })
    }

    /// Reads the files again; whether anything has changed.
    fn reload(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.reload()).or_raise(py)
    }
}

/// Asks a listener for the keys of clients, and tells it when it is not needed any more.
struct MailboxLookup {
    mailbox: Arc<ControlMailbox>,
    key: u64,
    deadline: Duration,
}

impl FindPsk for MailboxLookup {
    fn find(&self, identity: &[u8]) -> Option<Secret> {
        self.mailbox.ask_for_key(self.key, identity, self.deadline)
    }
}

impl Drop for MailboxLookup {
    fn drop(&mut self) {
        self.mailbox.last(self.key, Event::Released, []);
    }
}

/// The channel binding `tls-server-end-point` of a server's certificate (DER).
#[pyfunction]
pub(crate) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    sapper_net::tls::server_end_point(certificate)
}

/// Certificate and key, in PEM.
type Pair<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Makes an authority for development that is valid for so many seconds.
#[pyfunction]
pub(crate) fn dev_authority(py: Python<'_>, valid: f64) -> PyResult<Pair<'_>> {
    let valid = seconds("valid")(valid).or_raise(py)?;
    let made = py.detach(|| DevAuthority::make(valid)).or_raise(py)?;
    Ok((PyBytes::new(py, made.certificate.as_bytes()), PyBytes::new(py, made.key.expose())))
}

/// A certificate of such an authority: chain and key, its names, and when it ends (seconds since the epoch).
#[pyfunction]
pub(crate) fn dev_issue<'py>(
    py: Python<'py>,
    authority: (PyBackedBytes, PyBackedBytes),
    names: Vec<String>,
    valid: f64,
) -> PyResult<(Pair<'py>, Vec<String>, u64)> {
    let valid = seconds("valid")(valid).or_raise(py)?;
    let work = || DevAuthority::read(&authority.0, &authority.1)?.issue(&names, valid);
    let made = py.detach(work).or_raise(py)?;
    let chain = PyBytes::new(py, made.identity.chain.as_bytes());
    Ok(((chain, PyBytes::new(py, made.identity.key.expose())), made.names, made.expires))
}

/// Reloads a configuration when its files change, and tells of it: `"reloaded"` with `None` or an error.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TlsWatch {
    inner: Local<Mutex<Option<reload::Watch>>>,
}

#[pymethods]
impl TlsWatch {
    #[new]
    fn new(py: Python<'_>, config: &TlsConfig, mailbox: &Mailbox, key: u64) -> PyResult<Self> {
        let mailbox = mailbox.shared(py)?;
        let tell = move |result: Result<()>| mailbox.event(key, Event::Reloaded(result.err()));
        let watch = reload::Watch::start(Arc::clone(&config.inner), tell).or_raise(py)?;
        Ok(Self { inner: Local::new(Mutex::new(Some(watch))) })
    }

    /// Ends it; nothing is told afterwards.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let watch = self.inner.get(py)?.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(watch));
        Ok(())
    }
}

impl TlsValues {
    fn read(self, lookup: Option<MailboxLookup>) -> Result<TlsOptions> {
        let hashes = [("sha256", PskHash::Sha256), ("sha384", PskHash::Sha384)];
        let credentials = match (self.own, self.psks) {
            (Some(own), _) => Credentials::Certificate(own.read()),
            (None, Some(psks)) => Credentials::Psk {
                identities: psks
                    .into_iter()
                    .map(|(identity, key)| PskIdentity {
                        identity: identity.to_vec(),
                        key: Secret::new(&*key),
                    })
                    .collect(),
                hash: word("hash", &self.psk_hash, &hashes)?,
            },
            (None, None) => match lookup {
                Some(lookup) => Credentials::PskLookup {
                    lookup: PskLookup(Arc::new(lookup)),
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
            peer_rules: self.peer_rules.into_iter().map(RuleValues::read).collect::<Result<_>>()?,
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

/// The value of a word; an error names the field and the words.
pub(crate) fn word<T: Clone>(field: &'static str, text: &str, words: &[(&str, T)]) -> Result<T> {
    words.iter().find(|(known, _)| *known == text).map(|(_, value)| value.clone()).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
        Error::config(field, format!("{text:?} is none of {}", known.join(", ")))
    })
}
