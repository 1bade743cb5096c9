//! Keys from secrets: TLS 1.3's HKDF labels (RFC 8446, section 7), TLS 1.2's PRF (RFC 5246,
//! sections 5 and 6.3), and the exporters of both.

use aws_lc_rs::{digest, hkdf, tls_prf};
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};

/// The hash of a suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha256,
    Sha384,
}

impl Hash {
    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Sha256 => hkdf::HKDF_SHA256,
            Self::Sha384 => hkdf::HKDF_SHA384,
        }
    }

    fn prf(self) -> &'static tls_prf::Algorithm {
        match self {
            Self::Sha256 => &tls_prf::P_SHA256,
            Self::Sha384 => &tls_prf::P_SHA384,
        }
    }

    fn digest(self, data: &[u8]) -> digest::Digest {
        match self {
            Self::Sha256 => digest::digest(&digest::SHA256, data),
            Self::Sha384 => digest::digest(&digest::SHA384, data),
        }
    }

    /// Length of its output, and of TLS 1.3's secrets.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn internal(what: &str) -> Error {
    Error::new(ErrorKind::LocalProtocol, format!("deriving {what} failed"))
}

/// HKDF-Expand-Label of RFC 8446, section 7.1.
fn expand_label(hash: Hash, secret: &[u8], label: &[u8], context: &[u8], out: &mut [u8]) -> Result<()> {
    let length = u16::try_from(out.len())
        .map_err(|_| Error::new(ErrorKind::ApiMisuse, "at most 65,535 bytes can be derived at once"))?
        .to_be_bytes();
    let label_length = [(6 + label.len()) as u8];
    let context_length = [context.len() as u8];
    let info = [&length[..], &label_length, b"tls13 ", label, &context_length, context];
    hkdf::Prk::new_less_safe(hash.hkdf(), secret)
        .expand(&info, Length(out.len()))
        .and_then(|okm| okm.fill(out))
        .map_err(|_| Error::new(ErrorKind::ApiMisuse, "so many bytes cannot be derived at once"))
}

/// The traffic secret after the next key update.
pub(crate) fn next_traffic_secret(hash: Hash, secret: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let mut next = Zeroizing::new(vec![0; hash.len()]);
    expand_label(hash, secret, b"traffic upd", b"", &mut next)?;
    Ok(next)
}

/// Key and IV of a traffic secret.
pub(crate) fn traffic_keys(hash: Hash, secret: &[u8], key: &mut [u8], iv: &mut [u8; 12]) -> Result<()> {
    expand_label(hash, secret, b"key", b"", key)?;
    expand_label(hash, secret, b"iv", b"", iv)
}

/// TLS 1.2's pseudo-random function.
fn prf(hash: Hash, master: &[u8], label: &[u8], seed: &[u8], len: usize) -> Result<tls_prf::Secret> {
    tls_prf::Secret::new(hash.prf(), master)
        .and_then(|secret| secret.derive(label, seed, len))
        .map_err(|_| internal("keys of TLS 1.2"))
}

/// Keys and IVs of a TLS 1.2 AEAD suite: client key, server key, client IV, server IV.
pub(crate) fn key_block(
    hash: Hash,
    master: &[u8],
    client_random: &[u8; 32],
    server_random: &[u8; 32],
    len: usize,
) -> Result<Zeroizing<Vec<u8>>> {
    let seed = [&server_random[..], client_random].concat();
    let block = prf(hash, master, b"key expansion", &seed, len)?;
    Ok(Zeroizing::new(block.as_ref().to_vec()))
}

/// What an exporter needs after the handshake.
pub(crate) enum Exporter {
    /// RFC 8446, section 7.5.
    Tls13 {
        /// The exporter master secret.
        secret: Zeroizing<Vec<u8>>,
    },
    /// RFC 5705.
    Tls12 {
        /// The master secret.
        master: Zeroizing<Vec<u8>>,
        /// Randoms of the client and the server.
        randoms: [[u8; 32]; 2],
    },
}

impl Exporter {
    /// Keying material for `label`.
    pub(crate) fn export(
        &self,
        hash: Hash,
        label: &str,
        context: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<()> {
        let label = label.as_bytes();
        if out.is_empty() || label.is_empty() || label.len() > 249 {
            return Err(Error::new(
                ErrorKind::ApiMisuse,
                "an exporter needs a label of 1 to 249 bytes and at least one byte of output",
            ));
        }
        match self {
            Self::Tls13 { secret } => {
                let most = 255 * hash.len();
                if out.len() > most {
                    let text =
                        format!("at most {most} bytes with this suite's hash (TLS 1.3), not {}", out.len());
                    return Err(Error::config("length", text).with_reason("out_of_range"));
                }
                let mut derived = Zeroizing::new(vec![0; hash.len()]);
                expand_label(hash, secret, label, hash.digest(b"").as_ref(), &mut derived)?;
                let context = hash.digest(context.unwrap_or_default());
                expand_label(hash, &derived, b"exporter", context.as_ref(), out)
            }
            Self::Tls12 { master, randoms } => {
                let mut seed = randoms.concat();
                if let Some(context) = context {
                    let length = u16::try_from(context.len()).map_err(|_| {
                        Error::new(ErrorKind::ApiMisuse, "an exporter's context has at most 65,535 bytes")
                    })?;
                    seed.extend_from_slice(&length.to_be_bytes());
                    seed.extend_from_slice(context);
                }
                let material = prf(hash, master, label, &seed, out.len())?;
                out.copy_from_slice(material.as_ref());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8448, section 3: the server's application traffic keys of the simple handshake.
    #[test]
    fn traffic_keys_are_those_of_rfc_8448() {
        let secret = [
            0xa1, 0x1a, 0xf9, 0xf0, 0x55, 0x31, 0xf8, 0x56, 0xad, 0x47, 0x11, 0x6b, 0x45, 0xa9, 0x50, 0x32,
            0x82, 0x04, 0xb4, 0xf4, 0x4b, 0xfb, 0x6b, 0x3a, 0x4b, 0x4f, 0x1f, 0x3f, 0xcb, 0x63, 0x16, 0x43,
        ];
        let (mut key, mut iv) = ([0; 16], [0; 12]);
        traffic_keys(Hash::Sha256, &secret, &mut key, &mut iv).unwrap();
        assert_eq!(
            key,
            [0x9f, 0x02, 0x28, 0x3b, 0x6c, 0x9c, 0x07, 0xef, 0xc2, 0x6b, 0xb9, 0xf2, 0xac, 0x92, 0xe3, 0x56]
        );
        assert_eq!(iv, [0xcf, 0x78, 0x2b, 0x88, 0xdd, 0x83, 0x54, 0x9a, 0xad, 0xf1, 0xe9, 0x84]);
    }

    #[test]
    fn an_exporter_without_label_or_output_is_a_misuse() {
        let exporter = Exporter::Tls13 { secret: Zeroizing::new(vec![7; 32]) };
        assert!(exporter.export(Hash::Sha256, "", None, &mut [0; 8]).is_err());
        assert!(exporter.export(Hash::Sha256, "label", None, &mut []).is_err());
        exporter.export(Hash::Sha256, "label", None, &mut vec![0; 8_160]).unwrap();
        let error = exporter.export(Hash::Sha256, "label", None, &mut vec![0; 8_161]).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("length")));
        exporter.export(Hash::Sha256, "label", None, &mut [0; 8]).unwrap();
    }
}
