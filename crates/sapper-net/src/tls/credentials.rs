//! Reading certificates and keys: PEM or DER, told apart by their first bytes, and PKCS#12. OpenSSL reads
//! the keys, because it knows all the old formats and their encryption; both engines get the result.

use openssl::error::ErrorStack;
use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::x509::{X509, X509VerifyResult};
use zeroize::Zeroizing;

use super::options::{CertificateSource, OwnCertificate, PskHash, PskIdentity, PskLookup, Secret};
use crate::error::{Error, Result};

/// OpenSSL's own limits (PSK_MAX_IDENTITY_LEN, PSK_MAX_PSK_LEN).
const MAX_IDENTITY: usize = 256;
const MAX_PSK: usize = 512;
/// Where they are in the public API.
const IDENTITIES: &str = "credentials.identities";
/// Shorter keys can be guessed (RFC 9257, section 6 asks for 128 bits).
const MIN_PSK: usize = 16;

/// A certificate with its key, checked to belong together.
pub(crate) struct CertifiedCredentials {
    /// Our own certificate first.
    pub(crate) chain: Vec<X509>,
    pub(crate) key: PKey<Private>,
}

impl CertifiedCredentials {
    /// Reads and checks both; an error names the field.
    pub(crate) fn load(own: &OwnCertificate) -> Result<Self> {
        let password = own.password.as_ref();
        let (chain, key, field) = match &own.source {
            CertificateSource::Pair { chain, key } => {
                let certificates = read_chain(chain.expose()).map_err(|error| chain.blame(error))?;
                let key = read_key(key.expose(), password).map_err(|error| key.blame(error))?;
                (certificates, key, "chain")
            }
            CertificateSource::Pkcs12(file) => {
                let both = read_pkcs12(file.expose(), password).map_err(|error| file.blame(error));
                let (chain, key) = both?;
                (chain, key, "file")
            }
        };
        let public = chain[0]
            .public_key()
            .map_err(|_| Error::config(field, "the certificate's public key is of an unknown kind"))?;
        if !public.public_eq(&key) {
            // public_eq leaves a message behind when the kinds of the keys differ.
            let _ = ErrorStack::get();
            let text = "the key does not belong to the first certificate of the chain";
            return Err(match &own.source {
                CertificateSource::Pair { chain, key } => {
                    let of = chain.file().map(|file| format!(", {}", file.display()));
                    key.blame(Error::config("key", format!("{text}{}", of.unwrap_or_default())))
                }
                CertificateSource::Pkcs12(file) => file.blame(Error::config("file", text)),
            });
        }
        Ok(Self { chain, key })
    }

    /// The DNS names in the certificate (its subject alternative names), lower case.
    pub(crate) fn dns_names(&self) -> Vec<String> {
        let names = self.chain[0].subject_alt_names();
        names.iter().flatten().filter_map(|name| name.dnsname().map(str::to_ascii_lowercase)).collect()
    }

    /// The chain in DER.
    pub(crate) fn chain_der(&self) -> Result<Vec<Vec<u8>>> {
        self.chain
            .iter()
            .map(|c| c.to_der().map_err(|_| Error::config("chain", "a certificate cannot be encoded")))
            .collect()
    }

    /// The key as PKCS#8.
    pub(crate) fn key_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>> {
        self.key
            .private_key_to_pkcs8()
            .map(Zeroizing::new)
            .map_err(|_| Error::config("key", "the key cannot be encoded as PKCS#8"))
    }
}

/// Pre-shared keys, checked.
pub(crate) struct PskCredentials {
    pub(crate) identities: Vec<PskIdentity>,
    pub(crate) hash: PskHash,
    /// Who is asked for the keys of clients, in place of the list.
    pub(crate) lookup: Option<PskLookup>,
    short_keys: bool,
}

impl PskCredentials {
    /// Checks them; `speaks_tls13_only` allows nothing less but forbids the empty identity.
    pub(crate) fn check(
        identities: &[PskIdentity],
        hash: PskHash,
        tls13_only: bool,
        short_keys: bool,
    ) -> Result<Self> {
        if identities.is_empty() {
            return Err(Error::config("credentials", "a pre-shared key is missing"));
        }
        for (index, psk) in identities.iter().enumerate() {
            let field = || match identities {
                [_] => IDENTITIES.to_owned(),
                _ => psk.field(),
            };
            if psk.identity.contains(&0) {
                return Err(Error::config(field(), "an identity cannot contain a zero byte"));
            }
            if psk.identity.len() > MAX_IDENTITY {
                return Err(Error::config(
                    field(),
                    format!("an identity has at most {MAX_IDENTITY} bytes, not {}", psk.identity.len()),
                ));
            }
            if psk.identity.is_empty() && tls13_only {
                return Err(Error::config(
                    field(),
                    "TLS 1.3 forbids an empty identity; set max_version to TLSv1.2 or name the key",
                ));
            }
            if identities[..index].iter().any(|other| other.identity == psk.identity) {
                return Err(Error::config(field(), "the same identity was given twice"));
            }
            // Which one: identities are no secret, they are sent in clear.
            let whose = match identities {
                [_] => String::new(),
                _ => format!(" of {}", psk.identity.escape_ascii()),
            };
            let len = psk.key.expose().len();
            if len == 0 || len > MAX_PSK {
                return Err(psk.key.blame(Error::config(
                    psk.field(),
                    format!("the pre-shared key{whose} has {len} bytes: it must have 1 to {MAX_PSK}"),
                )));
            }
            if len < MIN_PSK && !short_keys {
                return Err(psk.key.blame(Error::config(
                    psk.field(),
                    format!(
                        "the pre-shared key{whose} has {len} bytes and can be guessed; use at least {MIN_PSK} \
                         random bytes, or allow it by danger_short_psk"
                    ),
                )));
            }
        }
        Ok(Self { identities: identities.to_vec(), hash, lookup: None, short_keys })
    }

    /// Keys that somebody is asked for.
    pub(crate) fn looked_up(lookup: PskLookup, hash: PskHash, short_keys: bool) -> Self {
        Self { identities: Vec::new(), hash, lookup: Some(lookup), short_keys }
    }

    /// The key of an identity. It may block where there is a look-up.
    pub(crate) fn find(&self, identity: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let found = match &self.lookup {
            None => {
                let known = self.identities.iter().find(|psk| psk.identity == identity);
                known.map(|psk| Secret::new(psk.key.expose()))
            }
            Some(_) if identity.len() > MAX_IDENTITY => None,
            Some(lookup) => lookup.0.find(identity).filter(|key| {
                let shortest = if self.short_keys { 1 } else { MIN_PSK };
                let fits = (shortest..=MAX_PSK).contains(&key.expose().len());
                if !fits {
                    tracing::warn!("a look-up gave a pre-shared key of a length that is not allowed");
                }
                fits
            }),
        };
        found.map(|key| Zeroizing::new(key.expose().to_vec()))
    }
}

/// Certificates of PEM text (all of them) or DER (one), in DER.
pub(crate) fn read_certificates(bytes: &[u8], field: &'static str) -> Result<Vec<Vec<u8>>> {
    if bytes.is_empty() {
        return Err(Error::config(field, "no certificate was given"));
    }
    if is_der(bytes) {
        let certificate = X509::from_der(bytes)
            .map_err(|_| Error::config(field, "this is neither PEM nor a certificate in DER"))?;
        let der =
            certificate.to_der().map_err(|_| Error::config(field, "the certificate cannot be encoded"))?;
        // What follows the certificate would otherwise be ignored without a word.
        if der.len() != bytes.len() {
            return Err(Error::config(field, "DER holds one certificate; use PEM for a chain"));
        }
        return Ok(vec![der]);
    }
    let certificates = X509::stack_from_pem(bytes)
        .map_err(|_| Error::config(field, "the PEM text holds a certificate that cannot be read"))?;
    if certificates.is_empty() {
        return Err(Error::config(
            field,
            "no certificate was found: neither PEM (-----BEGIN CERTIFICATE-----) nor DER",
        ));
    }
    certificates
        .iter()
        .map(|c| c.to_der().map_err(|_| Error::config(field, "a certificate cannot be encoded")))
        .collect()
}

fn is_der(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0x30)
}

fn read_chain(bytes: &[u8]) -> Result<Vec<X509>> {
    read_certificates(bytes, "chain")?
        .into_iter()
        .enumerate()
        .map(|(index, der)| {
            X509::from_der(&der)
                .map_err(|_| Error::config("chain", format!("certificate {} cannot be read", index + 1)))
        })
        .collect()
}

/// A certificate with its key, and those above it in the order in which they signed each other.
pub(super) fn read_pkcs12(bytes: &[u8], password: Option<&Secret>) -> Result<(Vec<X509>, PKey<Private>)> {
    let wrong = |what: &str| Error::config("file", what);
    let file = Pkcs12::from_der(bytes).map_err(|_| wrong("this is no PKCS#12 file"))?;
    let given = password.map_or(&[][..], Secret::expose);
    let text = std::str::from_utf8(given)
        .ok()
        .filter(|text| !text.contains('\0'))
        .ok_or_else(|| Error::config("password", "a PKCS#12 file's password is text without a zero byte"))?;
    let parsed = file.parse2(text).map_err(|stack| {
        let says = |word: &str| stack.errors().iter().any(|e| e.reason().is_some_and(|r| r.contains(word)));
        match (says("mac verify"), password) {
            (true, None) => Error::config("password", "the PKCS#12 file needs a password"),
            (true, Some(_)) => Error::config("password", "the password does not open the PKCS#12 file"),
            (false, _) if says("unsupported") => wrong(
                "it is encrypted with an algorithm that is not known here (an old one such as RC2); write it \
                 again with AES-256",
            ),
            // Without a MAC a wrong password shows only in what comes out.
            (false, None) if says("cipherfinal") => {
                Error::config("password", "the PKCS#12 file needs a password")
            }
            (false, Some(_)) if says("cipherfinal") => {
                Error::config("password", "the password does not open the PKCS#12 file")
            }
            (false, _) => {
                wrong("the PKCS#12 file cannot be read: it is damaged, or its password is another one")
            }
        }
    })?;
    let key = parsed.pkey.ok_or_else(|| wrong("the file holds no key"))?;
    let leaf = parsed.cert.ok_or_else(|| wrong("the file holds no certificate for its key"))?;
    let mut others: Vec<X509> = parsed.ca.into_iter().flatten().collect();
    let mut chain = vec![leaf];
    let mut last = 0;
    while let Some(index) = others.iter().position(|above| above.issued(&chain[last]) == X509VerifyResult::OK)
    {
        chain.push(others.remove(index));
        last += 1;
    }
    Ok((chain, key))
}

pub(super) fn read_key(bytes: &[u8], password: Option<&Secret>) -> Result<PKey<Private>> {
    if bytes.is_empty() {
        return Err(Error::config("key", "no key was given"));
    }
    let mut asked = false;
    // Without a call-back OpenSSL would ask for the password on the terminal.
    let give_password = |buffer: &mut [u8]| {
        asked = true;
        let password = password.map_or(&[][..], Secret::expose);
        let n = password.len().min(buffer.len());
        buffer[..n].copy_from_slice(&password[..n]);
        Ok(n)
    };
    let result = if !is_der(bytes) {
        PKey::private_key_from_pem_callback(bytes, give_password)
    } else {
        match PKey::private_key_from_der(bytes) {
            Ok(key) => Ok(key),
            Err(_) => PKey::private_key_from_pkcs8_callback(bytes, give_password),
        }
    };
    result.map_err(|_| match (asked, password) {
        (true, None) => Error::config("password", "the key is encrypted and needs a password"),
        (true, Some(_)) => Error::config("password", "the password does not open the key"),
        (false, _) => Error::config("key", "the key cannot be read: neither PEM nor DER of a known kind"),
    })
}
