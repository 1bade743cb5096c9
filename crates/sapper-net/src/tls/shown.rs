//! Which certificate a server shows: by the name that the client asks for, with a staple while that is
//! fresh.
//!
//! What is not here: how certificates are read ([`super::credentials`]), and rustls' own types beyond
//! the key ([`super::rustls_config`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::SignatureScheme;
use rustls::sign::CertifiedKey;

use super::credentials::CertifiedCredentials;
use super::options::OwnCertificate;
use super::{openssl_ffi, revocation, rustls_config};
use crate::error::{Error, Result};

/// One certificate with its key, ready to be shown.
pub(crate) struct Shown {
    bare: Arc<CertifiedKey>,
    /// The same with its staple, and until when that is fresh.
    stapled: Option<(Arc<CertifiedKey>, SystemTime)>,
    /// For the channel binding `tls-server-end-point`.
    pub(crate) end_point: Option<Arc<[u8]>>,
}

impl Shown {
    pub(crate) fn new(certified: &CertifiedCredentials, own: &OwnCertificate) -> Result<Self> {
        let bare = rustls_config::certified_key(certified)?;
        let stapled = match &own.ocsp_response {
            None => None,
            Some(response) => {
                let until = revocation::check_own_staple(response.expose(), &certified.chain_der()?)?;
                let stapled = CertifiedKey { ocsp: Some(response.expose().to_vec()), ..(*bare).clone() };
                Some((Arc::new(stapled), until))
            }
        };
        let end_point = openssl_ffi::end_point_hash(&certified.chain[0]).map(Arc::from);
        Ok(Self { bare, stapled, end_point })
    }

    /// What rustls is given now. A staple that is too old would be worse than none.
    pub(crate) fn key(&self) -> &Arc<CertifiedKey> {
        match &self.stapled {
            Some((stapled, until)) if SystemTime::now() < *until => stapled,
            _ => &self.bare,
        }
    }

    fn fits(&self, schemes: &[SignatureScheme]) -> bool {
        self.bare.key.choose_scheme(schemes).is_some()
    }
}

/// All of a server's certificates.
pub(crate) struct ShownCertificates {
    /// Where no name fits. Also what a client shows.
    default: Arc<Shown>,
    exact: HashMap<String, Vec<Arc<Shown>>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Vec<Arc<Shown>>>,
}

impl ShownCertificates {
    pub(crate) fn new(default: &CertifiedCredentials, own: &OwnCertificate) -> Result<Self> {
        let shown = Arc::new(Shown::new(default, own)?);
        let mut all = Self { default: Arc::clone(&shown), exact: HashMap::new(), wildcard: HashMap::new() };
        all.name(&shown, &names(default, own)?);
        Ok(all)
    }

    /// Adds one for its own names. Of several for a name, the first that the client can verify is shown:
    /// an ECDSA certificate beside an RSA one for old clients.
    pub(crate) fn add(&mut self, certified: &CertifiedCredentials, own: &OwnCertificate) -> Result<()> {
        let names = names(certified, own)?;
        if names.is_empty() {
            return Err(Error::config("names", "the certificate has no DNS name: say for which it is shown"));
        }
        self.name(&Arc::new(Shown::new(certified, own)?), &names);
        Ok(())
    }

    fn name(&mut self, shown: &Arc<Shown>, names: &[String]) {
        for name in names {
            let (table, name) = match name.strip_prefix("*.") {
                Some(suffix) => (&mut self.wildcard, suffix),
                None => (&mut self.exact, name.as_str()),
            };
            table.entry(name.to_owned()).or_default().push(Arc::clone(shown));
        }
    }

    pub(crate) fn default(&self) -> &Arc<Shown> {
        &self.default
    }

    /// The one for a name (lower case) that a client can verify; the default's, where none has the name.
    pub(crate) fn choose(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<&Arc<Shown>> {
        let named =
            name.and_then(|name| self.exact.get(name).or_else(|| self.wildcard.get(name.split_once('.')?.1)));
        let fits = |shown: &&Arc<Shown>| shown.fits(schemes);
        match named {
            Some(list) => list.iter().find(fits),
            None => None,
        }
        .or_else(|| Some(&self.default).filter(fits))
    }
}

/// The names for which a certificate is shown.
fn names(certified: &CertifiedCredentials, own: &OwnCertificate) -> Result<Vec<String>> {
    if own.names.is_empty() {
        return Ok(certified.dns_names());
    }
    own.names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let lower = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            let bare = lower.strip_prefix("*.").unwrap_or(&lower);
            let wrong = bare.contains('*') || rustls::pki_types::DnsName::try_from(bare).is_err();
            if wrong {
                return Err(Error::config(format!("names.{index}"), format!("{name:?} is no DNS name")));
            }
            Ok(lower)
        })
        .collect()
}
