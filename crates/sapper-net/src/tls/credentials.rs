//! Reading certificates and keys: PEM or DER, told apart by their first bytes. OpenSSL reads the
//! keys, because it knows all the old formats and their encryption; both engines get the result.

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use zeroize::Zeroizing;

use super::options::{PskHash, PskIdentity, Secret};
use crate::error::{Error, Result};

/// OpenSSL's own limits (PSK_MAX_IDENTITY_LEN, PSK_MAX_PSK_LEN).
const MAX_IDENTITY: usize = 256;
const MAX_PSK: usize = 512;
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
    pub(crate) fn load(chain: &[u8], key: &Secret, password: Option<&Secret>) -> Result<Self> {
        let chain = read_certificates(chain, "chain")?
            .into_iter()
            .enumerate()
            .map(|(index, der)| {
                X509::from_der(&der)
                    .map_err(|_| Error::config("chain", format!("certificate {} cannot be read", index + 1)))
            })
            .collect::<Result<Vec<_>>>()?;
        let key = read_key(key, password)?;
        let public = chain[0]
            .public_key()
            .map_err(|_| Error::config("chain", "the certificate's public key is of an unknown kind"))?;
        if !public.public_eq(&key) {
            // public_eq leaves a message behind when the kinds of the keys differ.
            let _ = ErrorStack::get();
            return Err(Error::config(
                "key",
                "the key does not belong to the first certificate of the chain",
            ));
        }
        Ok(Self { chain, key })
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
            if psk.identity.contains(&0) {
                return Err(Error::config("identity", "an identity cannot contain a zero byte"));
            }
            if psk.identity.len() > MAX_IDENTITY {
                return Err(Error::config(
                    "identity",
                    format!("an identity has at most {MAX_IDENTITY} bytes, not {}", psk.identity.len()),
                ));
            }
            if psk.identity.is_empty() && tls13_only {
                return Err(Error::config(
                    "identity",
                    "TLS 1.3 forbids an empty identity; set max_version to TLSv1.2 or name the key",
                ));
            }
            if identities[..index].iter().any(|other| other.identity == psk.identity) {
                return Err(Error::config("identity", "the same identity was given twice"));
            }
            let len = psk.key.expose().len();
            if len == 0 || len > MAX_PSK {
                return Err(Error::config(
                    "key",
                    format!("a pre-shared key has 1 to {MAX_PSK} bytes, not {len}"),
                ));
            }
            if len < MIN_PSK && !short_keys {
                return Err(Error::config(
                    "key",
                    format!(
                        "a pre-shared key of {len} bytes can be guessed; use at least {MIN_PSK} random \
                         bytes, or allow it by danger_short_psk"
                    ),
                ));
            }
        }
        Ok(Self { identities: identities.to_vec(), hash })
    }

    /// The key of an identity.
    pub(crate) fn find(&self, identity: &[u8]) -> Option<&PskIdentity> {
        self.identities.iter().find(|psk| psk.identity == identity)
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

fn read_key(key: &Secret, password: Option<&Secret>) -> Result<PKey<Private>> {
    let bytes = key.expose();
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
