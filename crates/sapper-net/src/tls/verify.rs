//! Whether a peer's certificate is acceptable: one verifier for both engines.
//!
//! What is not here: the signature over the handshake, which proves that the peer has the key. The
//! engines always check that, whatever a verifier says.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{
    VerifierBuilderError, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, RootCertStore};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::failure::{CertificateReason, Rejection};
use super::peer_rules::PeerRules;
use super::plain;
use super::revocation::StapleCheck;
use crate::error::{Error, Result};

/// What a peer showed in a handshake.
#[derive(Clone, Copy, Debug)]
pub struct PeerCertificates<'a> {
    /// Its chain in DER, its own certificate first. Never empty, never parsed yet.
    pub chain: &'a [&'a [u8]],
    /// Whether the peer is the client.
    pub peer_is_client: bool,
    /// The name that we asked for, where the peer is a server and we asked for one.
    pub server_name: Option<&'a str>,
    /// Its stapled OCSP response; empty where there is none (and always in legacy modes).
    pub ocsp: &'a [u8],
}

/// Decides about a peer's certificate, within the handshake. It must not block. A session that is
/// resumed was decided about before, by the same configuration, and does not come here again.
pub trait PeerVerifier: fmt::Debug + Send + Sync {
    /// `Ok` lets the peer in.
    fn verify(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection>;
}

/// SHA-256 of a certificate's public key, as pins have it.
pub fn public_key_pin(certificate: &[u8]) -> Result<[u8; 32], Rejection> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| malformed())?;
    Ok(pin_of(&parsed))
}

fn pin_of(certificate: &X509Certificate<'_>) -> [u8; 32] {
    let hash = digest::digest(&digest::SHA256, certificate.tbs_certificate.subject_pki.raw);
    hash.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn malformed() -> Rejection {
    Rejection::new(CertificateReason::Malformed, "the peer's certificate cannot be read")
}

/// Own roots: as anchors for chains, and as certificates that a peer may show itself.
pub(crate) struct OwnRoots {
    store: Arc<RootCertStore>,
    certificates: Vec<Vec<u8>>,
    /// Made once: they parse the revocation lists.
    clients: Arc<dyn ClientCertVerifier>,
    /// Only where there are revocation lists; without them rustls' function does it.
    servers: Option<Arc<WebPkiServerVerifier>>,
}

impl OwnRoots {
    /// Anchors of these certificates (DER). Where there are revocation lists, they must cover each
    /// certificate below an anchor.
    pub(crate) fn new(
        certificates: Vec<Vec<u8>>,
        crls: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self> {
        let mut store = RootCertStore::empty();
        for (index, certificate) in certificates.iter().enumerate() {
            store.add(CertificateDer::from(certificate.as_slice())).map_err(|e| {
                let why = plain::said(&e);
                Error::config("roots", format!("certificate {} cannot be a root: {why}", index + 1))
            })?;
        }
        let store = Arc::new(store);
        let unreadable = |e: VerifierBuilderError| {
            let why = match &e {
                VerifierBuilderError::InvalidCrl(why) => plain::revocation_list(why),
                other => other.to_string().into(),
            };
            let text =
                format!("a list cannot be used: {why}; it must be of version 2, with a number (RFC 5280)");
            Error::config("crls", text)
        };
        let servers = match crls.is_empty() {
            true => None,
            false => Some(
                WebPkiServerVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(provider))
                    .with_crls(crls.clone())
                    .enforce_revocation_expiration()
                    .build()
                    .map_err(unreadable)?,
            ),
        };
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(provider))
            .with_crls(crls)
            .enforce_revocation_expiration()
            .build()
            .map_err(unreadable)?;
        Ok(Self { store, certificates, clients, servers })
    }

    /// Names of these roots, as a server tells its clients.
    pub(crate) fn subjects(&self) -> Vec<rustls::DistinguishedName> {
        self.store.subjects()
    }

    /// The certificates in DER.
    pub(crate) fn certificates(&self) -> &[Vec<u8>] {
        &self.certificates
    }
}

/// Where trust comes from.
pub(crate) enum Trust {
    /// The system's roots, read at the first use.
    System(OnceLock<Result<rustls_platform_verifier::Verifier, String>>),
    /// These roots.
    Own(Arc<OwnRoots>),
    /// Nobody: pins only, or everybody is welcome.
    Nobody,
}

/// The verifier that is used unless it is replaced: roots, name, pins.
pub(crate) struct ChainVerifier {
    pub(crate) trust: Trust,
    pub(crate) pins: Vec<[u8; 32]>,
    pub(crate) check_name: bool,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl fmt::Debug for ChainVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trust = match &self.trust {
            Trust::System(_) => "system".to_owned(),
            Trust::Own(roots) => format!("{} roots", roots.certificates.len()),
            Trust::Nobody => "nobody".to_owned(),
        };
        f.debug_struct("ChainVerifier")
            .field("trust", &trust)
            .field("pins", &self.pins.len())
            .field("check_name", &self.check_name)
            .finish()
    }
}

impl PeerVerifier for ChainVerifier {
    fn verify(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        match &self.trust {
            Trust::Nobody => {}
            Trust::Own(roots) => self.verify_with_own_roots(peer, roots)?,
            Trust::System(verifier) => self.verify_with_system(peer, verifier)?,
        }
        if self.pins.is_empty() { Ok(()) } else { self.verify_pins(peer) }
    }
}

impl ChainVerifier {
    fn verify_with_own_roots(&self, peer: &PeerCertificates<'_>, roots: &OwnRoots) -> Result<(), Rejection> {
        // A certificate that is itself among the roots is what a user of a self-signed one means.
        if roots.certificates.iter().any(|root| root == peer.chain[0]) {
            check_dates(peer.chain[0])?;
            return self.verify_name(peer);
        }
        let (leaf, rest) = owned(peer);
        let result = match &roots.servers {
            _ if peer.peer_is_client => {
                roots.clients.verify_client_cert(&leaf, &rest, UnixTime::now()).map(drop)
            }
            Some(servers) => {
                // It compares the name last, when all else is good; the name is checked below.
                let nobody = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
                match servers.verify_server_cert(&leaf, &rest, &nobody, &[], UnixTime::now()) {
                    Err(rustls::Error::InvalidCertificate(
                        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                    )) => Ok(()),
                    other => other.map(drop),
                }
            }
            None => self.verify_server_chain(&leaf, &rest, &roots.store),
        };
        result.map_err(|e| rejection(&e, peer.chain[0]))?;
        self.verify_name(peer)
    }

    /// The chain up to one of `anchors`, without the name.
    fn verify_chain(
        &self,
        peer: &PeerCertificates<'_>,
        anchors: &Arc<RootCertStore>,
    ) -> Result<(), Rejection> {
        let (leaf, rest) = owned(peer);
        let result = if peer.peer_is_client {
            WebPkiClientVerifier::builder_with_provider(Arc::clone(anchors), Arc::clone(&self.provider))
                .build()
                .map_err(|e| Rejection::new(CertificateReason::UnknownIssuer, e.to_string()))?
                .verify_client_cert(&leaf, &rest, UnixTime::now())
                .map(drop)
        } else {
            self.verify_server_chain(&leaf, &rest, anchors)
        };
        result.map_err(|e| rejection(&e, peer.chain[0]))
    }

    fn verify_server_chain(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        anchors: &RootCertStore,
    ) -> Result<(), rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let leaf = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, anchors, rest, UnixTime::now(), algorithms)
    }

    fn verify_name(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        if !self.check_name || peer.peer_is_client {
            return Ok(());
        }
        let name = expected_name(peer)?;
        let leaf = CertificateDer::from(peer.chain[0]);
        ParsedCertificate::try_from(&leaf)
            .and_then(|leaf| verify_server_name(&leaf, &name))
            .map_err(|e| rejection(&e, peer.chain[0]))
    }

    fn verify_with_system(
        &self,
        peer: &PeerCertificates<'_>,
        verifier: &OnceLock<Result<rustls_platform_verifier::Verifier, String>>,
    ) -> Result<(), Rejection> {
        let verifier = verifier.get_or_init(|| self.load_system()).as_ref().map_err(|message| {
            Rejection::new(CertificateReason::UnknownIssuer, format!("the system's roots: {message}"))
        })?;
        // The platform always compares a name. Where the user does not want that, it gets one that
        // the certificate has.
        let name = if self.check_name { expected_name(peer)? } else { any_name_of(peer.chain[0])? };
        let (leaf, rest) = owned(peer);
        verifier
            .verify_server_cert(&leaf, &rest, &name, peer.ocsp, UnixTime::now())
            .map(|_| ())
            .map_err(|e| rejection(&e, peer.chain[0]))
    }

    fn load_system(&self) -> Result<rustls_platform_verifier::Verifier, String> {
        rustls_platform_verifier::Verifier::new(Arc::clone(&self.provider)).map_err(|e| e.to_string())
    }

    /// Says at configuration time that the system has no roots, and not at the first handshake.
    pub(crate) fn check_system(&self) -> Result<()> {
        let Trust::System(verifier) = &self.trust else { return Ok(()) };
        match verifier.get_or_init(|| self.load_system()) {
            Ok(_) => Ok(()),
            Err(message) => Err(Error::config(
                "roots",
                format!(
                    "the system's roots cannot be used ({message}); install them or give roots of your own"
                ),
            )),
        }
    }

    /// The leaf's key is pinned, or the chain leads to a pinned one. A pinned certificate that is
    /// merely sent along proves nothing: anybody may append it.
    fn verify_pins(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        let is_pinned = |der: &[u8]| public_key_pin(der).is_ok_and(|pin| self.pins.contains(&pin));
        if is_pinned(peer.chain[0]) {
            return Ok(());
        }
        let own: &[Vec<u8>] = match &self.trust {
            Trust::Own(roots) => &roots.certificates,
            _ => &[],
        };
        let mut anchors = RootCertStore::empty();
        for der in peer.chain[1..].iter().copied().chain(own.iter().map(Vec::as_slice)) {
            if is_pinned(der) {
                // One that cannot be an anchor cannot have signed the leaf either.
                let _ = anchors.add(CertificateDer::from(der));
            }
        }
        let mismatch = || {
            let found =
                public_key_pin(peer.chain[0]).map_or_else(|_| "unreadable".to_owned(), |pin| hex(&pin));
            Rejection::new(
                CertificateReason::PinMismatch,
                format!("no pin matches the peer's certificate, whose public key has the SHA-256 {found}"),
            )
        };
        if anchors.is_empty() {
            return Err(mismatch());
        }
        self.verify_chain(peer, &Arc::new(anchors)).map_err(|rejection| match rejection.reason {
            CertificateReason::UnknownIssuer | CertificateReason::SelfSigned => mismatch(),
            _ => rejection,
        })?;
        // Whoever holds a certificate of a pinned authority is not yet the one we wanted.
        self.verify_name(peer)
    }
}

/// A verifier of the user's, with the pins that still count.
#[derive(Debug)]
pub(crate) struct ReplacedVerifier {
    pub(crate) verifier: Arc<dyn PeerVerifier>,
    pub(crate) pins: Option<Arc<ChainVerifier>>,
}

impl PeerVerifier for ReplacedVerifier {
    fn verify(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        self.verifier.verify(peer)?;
        self.pins.as_ref().map_or(Ok(()), |pins| pins.verify(peer))
    }
}

/// What comes after the question who signed it, whoever answered that: the staple, then the rules.
#[derive(Debug)]
pub(crate) struct GuardedVerifier {
    pub(crate) verifier: Arc<dyn PeerVerifier>,
    pub(crate) staple: StapleCheck,
    pub(crate) rules: Arc<PeerRules>,
}

impl PeerVerifier for GuardedVerifier {
    fn verify(&self, peer: &PeerCertificates<'_>) -> Result<(), Rejection> {
        self.verifier.verify(peer)?;
        self.staple.check(peer)?;
        self.rules.check(peer.chain[0])
    }
}

/// The chain in rustls' form.
fn owned<'a>(peer: &PeerCertificates<'a>) -> (CertificateDer<'a>, Vec<CertificateDer<'a>>) {
    let rest = peer.chain[1..].iter().map(|der| CertificateDer::from(*der)).collect();
    (CertificateDer::from(peer.chain[0]), rest)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn expected_name(peer: &PeerCertificates<'_>) -> Result<ServerName<'static>, Rejection> {
    let Some(name) = peer.server_name else {
        return Err(Rejection::new(
            CertificateReason::WrongName,
            "the server's name is to be checked, but none was given",
        ));
    };
    ServerName::try_from(name.to_owned()).map_err(|_| {
        Rejection::new(
            CertificateReason::WrongName,
            format!("{name:?} is neither a DNS name nor an IP address"),
        )
    })
}

fn any_name_of(certificate: &[u8]) -> Result<ServerName<'static>, Rejection> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| malformed())?;
    let names = parsed.subject_alternative_name().ok().flatten();
    names
        .iter()
        .flat_map(|extension| extension.value.general_names.iter())
        .find_map(|name| match name {
            GeneralName::DNSName(name) => ServerName::try_from(name.replace('*', "any")).ok(),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|b| ServerName::from(std::net::IpAddr::from(b))),
                16 => <[u8; 16]>::try_from(*bytes).ok().map(|b| ServerName::from(std::net::IpAddr::from(b))),
                _ => None,
            },
            _ => None,
        })
        .ok_or_else(|| Rejection::new(CertificateReason::WrongName, "the peer's certificate has no name"))
}

fn check_dates(certificate: &[u8]) -> Result<(), Rejection> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| malformed())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let validity = parsed.validity();
    if now < validity.not_before.timestamp() {
        return Err(Rejection::new(
            CertificateReason::NotYetValid,
            format!("the peer's certificate is valid from {} only", validity.not_before),
        ));
    }
    if now > validity.not_after.timestamp() {
        return Err(Rejection::new(
            CertificateReason::Expired,
            format!("the peer's certificate was valid until {}", validity.not_after),
        ));
    }
    Ok(())
}

fn is_self_issued(certificate: &[u8]) -> bool {
    X509Certificate::from_der(certificate)
        .is_ok_and(|(_, c)| c.tbs_certificate.issuer.as_raw() == c.tbs_certificate.subject.as_raw())
}

/// Our word for what rustls found.
pub(crate) fn rejection(error: &rustls::Error, leaf: &[u8]) -> Rejection {
    use CertificateReason as Reason;
    let reason = match error {
        rustls::Error::InvalidCertificate(error) => match error {
            CertificateError::BadEncoding | CertificateError::UnhandledCriticalExtension => Reason::Malformed,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Reason::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Reason::NotYetValid
            }
            CertificateError::Revoked => Reason::Revoked,
            CertificateError::UnknownIssuer if is_self_issued(leaf) => Reason::SelfSigned,
            CertificateError::UnknownIssuer => Reason::UnknownIssuer,
            CertificateError::UnknownRevocationStatus
            | CertificateError::ExpiredRevocationList
            | CertificateError::ExpiredRevocationListContext { .. } => Reason::RevocationUnknown,
            CertificateError::BadSignature => Reason::BadSignature,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Reason::WrongName
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Reason::UnsuitablePurpose
            }
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                Reason::UnsupportedAlgorithm
            }
            CertificateError::ApplicationVerificationFailure | CertificateError::InvalidOcspResponse => {
                Reason::Rejected
            }
            #[allow(deprecated)] // rustls still makes one of an error that webpki no longer makes
            CertificateError::UnsupportedSignatureAlgorithm => Reason::UnsupportedAlgorithm,
            CertificateError::Other(other) => {
                other.0.downcast_ref().map_or(Reason::Malformed, |e| in_chain(e, leaf))
            }
            _ => Reason::Malformed,
        },
        rustls::Error::NoCertificatesPresented => Reason::Missing,
        rustls::Error::InvalidCertRevocationList(_) => Reason::RevocationUnknown,
        _ => Reason::Rejected,
    };
    let text = plain::said(error);
    let message = match reason {
        Reason::SelfSigned => {
            "the peer's certificate is self-signed and not among the roots; add it to roots or pin it"
                .to_owned()
        }
        Reason::RevocationUnknown => format!(
            "no revocation list that is valid now covers the peer's certificate and those that signed it ({text})"
        ),
        // A chain that was not followed to its end is another matter.
        Reason::UnknownIssuer
            if matches!(error, rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) =>
        {
            "nobody among the roots has signed the peer's certificate".to_owned()
        }
        _ => format!("the peer's certificate is not acceptable: {text}"),
    };
    Rejection::new(reason, message)
}

/// webpki's own errors, those that rustls has no word for.
fn in_chain(error: &webpki::Error, leaf: &[u8]) -> CertificateReason {
    use CertificateReason as Reason;
    use webpki::Error as E;
    match error {
        E::CaUsedAsEndEntity if is_self_issued(leaf) => Reason::SelfSigned,
        E::CaUsedAsEndEntity | E::EndEntityUsedAsCa | E::EmptyEkuExtension | E::PathLenConstraintViolated => {
            Reason::UnsuitablePurpose
        }
        E::NameConstraintViolation => Reason::WrongName,
        E::MaximumNameConstraintComparisonsExceeded
        | E::MaximumPathBuildCallsExceeded
        | E::MaximumPathDepthExceeded
        | E::MaximumSignatureChecksExceeded => Reason::UnknownIssuer,
        _ => Reason::Malformed,
    }
}
