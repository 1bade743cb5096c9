//! TLS configuration: a dictionary of plain options becomes a parsed, shared [`config::TlsConfig`].

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use sapper_net::tls::Role;
use sapper_net::tls::config;
use sapper_net::tls::options::{
    ClientAuth, Credentials, KeyLog, PskHash, PskIdentity, Roots, Secret, TlsOptions, TlsVersion,
};
use sapper_net::{Error, Result};

use crate::errors::OrRaise;

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
    chain: Option<PyBackedBytes>,
    key: Option<PyBackedBytes>,
    password: Option<PyBackedBytes>,
    psks: Option<Vec<(PyBackedBytes, PyBackedBytes)>>,
    psk_hash: String,
    roots: Option<RootsValue>,
    pins: Vec<PyBackedBytes>,
    client_auth: String,
    min_version: String,
    max_version: String,
    cipher_suites: Vec<String>,
    groups: Vec<String>,
    alpn: Vec<PyBackedBytes>,
    resumption: bool,
    key_log_file: Option<PathBuf>,
    danger_ignore_server_name: bool,
    danger_legacy_renegotiation: bool,
    danger_security_level_0: bool,
    danger_legacy_suites: bool,
    danger_short_psk: bool,
    danger_ignore_truncation: bool,
}

/// Roots: bytes of our own, or a word.
#[derive(FromPyObject)]
enum RootsValue {
    Own(PyBackedBytes),
    Word(String),
}

#[pymethods]
impl TlsConfig {
    #[new]
    fn new(py: Python<'_>, options: TlsValues) -> PyResult<Self> {
        let options = options.read().or_raise(py)?;
        // Key parsing and roots take milliseconds: nobody else has to wait for that.
        let config = py.detach(|| config::TlsConfig::new(&options)).or_raise(py)?;
        Ok(Self { inner: Arc::new(config) })
    }

    /// Which library does the handshakes: `"rustls"` or `"openssl"`.
    #[getter]
    fn engine(&self) -> &'static str {
        self.inner.engine_name()
    }
}

impl TlsValues {
    fn read(self) -> Result<TlsOptions> {
        let credentials = match (self.chain, self.psks) {
            (Some(chain), _) => Credentials::Certificate {
                chain: chain.to_vec(),
                key: Secret::new(self.key.as_deref().unwrap_or_default()),
                password: self.password.map(|password| Secret::new(&*password)),
            },
            (None, Some(psks)) => Credentials::Psk {
                identities: psks
                    .into_iter()
                    .map(|(identity, key)| PskIdentity {
                        identity: identity.to_vec(),
                        key: Secret::new(&*key),
                    })
                    .collect(),
                hash: word(
                    "hash",
                    &self.psk_hash,
                    &[("sha256", PskHash::Sha256), ("sha384", PskHash::Sha384)],
                )?,
            },
            (None, None) => Credentials::None,
        };
        let roots = match self.roots {
            None => Roots::Default,
            Some(RootsValue::Own(bytes)) => Roots::Own(bytes.to_vec()),
            Some(RootsValue::Word(text)) => {
                word("roots", &text, &[("system", Roots::System), ("none", Roots::DangerNone)])?
            }
        };
        let versions = [("TLSv1.2", TlsVersion::V1_2), ("TLSv1.3", TlsVersion::V1_3)];
        let pins = self.pins.iter().map(|pin| {
            <[u8; 32]>::try_from(&**pin).map_err(|_| Error::config("pins", "a pin is a SHA-256: 32 bytes"))
        });
        Ok(TlsOptions {
            credentials,
            roots,
            pins: pins.collect::<Result<_>>()?,
            client_auth: word(
                "client_auth",
                &self.client_auth,
                &[
                    ("off", ClientAuth::Off),
                    ("optional", ClientAuth::Optional),
                    ("required", ClientAuth::Required),
                ],
            )?,
            verifier: None,
            min_version: word("min_version", &self.min_version, &versions)?,
            max_version: word("max_version", &self.max_version, &versions)?,
            cipher_suites: self.cipher_suites,
            groups: self.groups,
            alpn: self.alpn.iter().map(|protocol| protocol.to_vec()).collect(),
            resumption: self.resumption,
            key_log: self.key_log_file.map_or(KeyLog::None, KeyLog::File),
            danger_ignore_server_name: self.danger_ignore_server_name,
            danger_legacy_renegotiation: self.danger_legacy_renegotiation,
            danger_security_level_0: self.danger_security_level_0,
            danger_legacy_suites: self.danger_legacy_suites,
            danger_short_psk: self.danger_short_psk,
            danger_ignore_truncation: self.danger_ignore_truncation,
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
