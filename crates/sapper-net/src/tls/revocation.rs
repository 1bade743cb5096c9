//! Certificates that were taken back: revocation lists, and stapled OCSP responses.
//!
//! rustls hands a staple over and looks no further, so it is checked here, with OpenSSL's parser: whose it
//! is, who signed it, whether its time is now. Nothing is fetched: a server staples what it was given.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::ocsp::{OcspCertId, OcspCertStatus, OcspFlag, OcspResponse, OcspResponseStatus};
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509VerifyResult};
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::failure::{CertificateReason, Rejection};
use super::material::Material;
use super::openssl_ffi;
use super::options::OcspCheck;
use super::verify::PeerCertificates;
use crate::error::{Error, Result};

/// Clocks of two machines differ.
const CLOCK_SKEW: u32 = 300;
/// A response that does not say how long it is valid is not believed for longer.
const WITHOUT_END: u32 = 24 * 60 * 60;
/// Bytes of a list's number, at most (RFC 5280, section 5.2.3).
const LONGEST_NUMBER: usize = 20;
/// id-pe-tlsfeature (RFC 7633) and, within it, status_request.
const TLS_FEATURE: &str = "1.3.6.1.5.5.7.1.24";
const STATUS_REQUEST: [u8; 3] = [2, 1, 5];

/// Lists of PEM text (all of them) or DER (one), the newest first.
pub(crate) fn read_crls(materials: &[Material]) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let mut lists = Vec::new();
    for (index, material) in materials.iter().enumerate() {
        let field = || format!("crls.{index}");
        let bytes = material.expose();
        let before = lists.len();
        if bytes.first() == Some(&0x30) {
            lists.push(CertificateRevocationListDer::from(bytes.to_vec()));
        } else {
            for list in CertificateRevocationListDer::pem_slice_iter(bytes) {
                let broken =
                    |e| material.blame(Error::config(field(), format!("the PEM text is broken: {e}")));
                let list = list.map_err(broken)?;
                lists.push(list);
            }
        }
        if lists.len() == before {
            let text = "no list was found: neither PEM (-----BEGIN X509 CRL-----) nor DER";
            return Err(material.blame(Error::config(field(), text)));
        }
    }
    // Of several lists of one authority webpki asks the first.
    lists.sort_by_cached_key(|list| Reverse(issued(list)));
    Ok(lists)
}

/// When a list was issued, and its number among those of that moment. What cannot be read is refused later.
fn issued(list: &[u8]) -> Option<(i64, Vec<u8>)> {
    let (_, list) = CertificateRevocationList::from_der(list).ok()?;
    let number = list.crl_number().map_or_else(Vec::new, |number| number.to_bytes_be());
    // Numbers of fewer bytes are smaller.
    let padded = [vec![0; LONGEST_NUMBER.saturating_sub(number.len())], number].concat();
    Some((list.last_update().timestamp(), padded))
}

/// What a client wants of its server's staple.
#[derive(Debug)]
pub(crate) struct StapleCheck {
    wanted: OcspCheck,
    /// Where the issuer may be, if the server does not send it (DER).
    roots: Vec<Vec<u8>>,
}

impl StapleCheck {
    pub(crate) fn new(wanted: OcspCheck, roots: Vec<Vec<u8>>) -> Self {
        Self { wanted, roots }
    }

    /// To be asked after the chain was verified.
    pub(crate) fn check(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        if self.wanted == OcspCheck::Off || peer.peer_is_client {
            return Ok(());
        }
        if peer.ocsp.is_empty() {
            return match self.wanted {
                OcspCheck::Required => Err(bad("the server stapled no OCSP response, and one is required")),
                _ if must_staple(peer.chain[0]) => {
                    Err(bad("the server's certificate announces a stapled OCSP response, and there is none"))
                }
                _ => Ok(()),
            };
        }
        let roots = self.roots.iter().map(Vec::as_slice);
        check_response(peer.ocsp, peer.chain[0], peer.chain[1..].iter().copied().chain(roots)).map(drop)
    }
}

/// Our own staple: it must be for our certificate, and valid now. Until when it is.
pub(crate) fn check_own_staple(response: &[u8], chain: &[Vec<u8>]) -> Result<SystemTime> {
    if chain.len() < 2 {
        return Err(Error::config(
            "ocsp_response",
            "the chain must hold the issuer's certificate, without which the response cannot be checked",
        ));
    }
    check_response(response, &chain[0], chain[1..].iter().map(Vec::as_slice))
        .map_err(|rejection| Error::config("ocsp_response", rejection.message))
}

fn bad(message: impl Into<String>) -> Rejection {
    Rejection::new(CertificateReason::BadStaple, message)
}

/// Whether `response` says that `leaf` is good, and until when.
fn check_response<'a>(
    response: &[u8],
    leaf: &[u8],
    issuers: impl Iterator<Item = &'a [u8]>,
) -> Result<SystemTime, Rejection> {
    let result = judge(response, leaf, issuers);
    // What OpenSSL left behind would be taken for the next call's.
    let _ = ErrorStack::get();
    result
}

fn judge<'a>(
    response: &[u8],
    leaf: &[u8],
    issuers: impl Iterator<Item = &'a [u8]>,
) -> Result<SystemTime, Rejection> {
    let unreadable = |_: ErrorStack| bad("the OCSP response cannot be read");
    let response = OcspResponse::from_der(response).map_err(unreadable)?;
    if response.status() != OcspResponseStatus::SUCCESSFUL {
        return Err(bad("the OCSP response is an error of the authority's"));
    }
    let basic = response.basic().map_err(unreadable)?;
    let leaf = X509::from_der(leaf).map_err(unreadable)?;
    let issuer = issuer_of(&leaf, issuers)
        .ok_or_else(|| bad("the issuer that the OCSP response is about is not in the server's chain"))?;
    let verified = (|| {
        let mut store = X509StoreBuilder::new()?;
        store.add_cert(issuer.clone())?;
        // The issuer is the anchor, whoever signed it: its own chain was verified before.
        store.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
        let mut certificates = Stack::new()?;
        certificates.push(issuer.clone())?;
        basic.verify(&certificates, &store.build(), OcspFlag::empty())
    })();
    verified.map_err(|_: ErrorStack| bad("nobody who may has signed the OCSP response"))?;
    // The authority chose the hash; OpenSSL compares it too.
    let hashes =
        [MessageDigest::sha1(), MessageDigest::sha256(), MessageDigest::sha384(), MessageDigest::sha512()];
    let ids: Vec<OcspCertId> =
        hashes.into_iter().filter_map(|hash| OcspCertId::from_cert(hash, &leaf, &issuer).ok()).collect();
    let status = ids
        .iter()
        .find_map(|id| basic.find_status(id))
        .ok_or_else(|| bad("the OCSP response is about another certificate"))?;
    let longest = status.next_update().is_none().then_some(WITHOUT_END);
    status
        .check_validity(CLOCK_SKEW, longest)
        .map_err(|_| bad("the OCSP response is out of its time: too old, or from the future"))?;
    if status.status == OcspCertStatus::REVOKED {
        let text = "the OCSP response says that the certificate is revoked";
        return Err(Rejection::new(CertificateReason::Revoked, text));
    }
    if status.status != OcspCertStatus::GOOD {
        return Err(bad("the authority does not know the certificate that the OCSP response is about"));
    }
    let until = status.next_update().and_then(openssl_ffi::unix_seconds);
    Ok(match until.and_then(|seconds| u64::try_from(seconds).ok()) {
        Some(seconds) => UNIX_EPOCH + Duration::from_secs(seconds),
        None => SystemTime::now() + Duration::from_secs(WITHOUT_END.into()),
    })
}

/// Names alone prove nothing: a forged certificate of the issuer's name could vouch for a revoked one.
fn issuer_of<'a>(leaf: &X509, candidates: impl Iterator<Item = &'a [u8]>) -> Option<X509> {
    candidates.filter_map(|der| X509::from_der(der).ok()).find(|issuer| {
        issuer.issued(leaf) == X509VerifyResult::OK
            && issuer.public_key().is_ok_and(|key| leaf.verify(&key).unwrap_or(false))
    })
}

fn must_staple(certificate: &[u8]) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
    parsed.extensions().iter().any(|extension| {
        extension.oid.to_id_string() == TLS_FEATURE
            && extension.value.windows(STATUS_REQUEST.len()).any(|bytes| bytes == STATUS_REQUEST)
    })
}
