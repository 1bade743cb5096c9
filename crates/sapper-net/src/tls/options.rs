//! What a user says about TLS: plain data, no parsing, no I/O. [`super::config::TlsConfig::new`]
//! validates it once.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

pub use super::material::Material;
pub use super::peer_rules::{IpRange, PeerRule};
use super::verify::PeerVerifier;
use crate::error::Result;

/// Bytes that show neither in `Debug` nor in memory after use (private keys, passwords).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes over the bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Zeroizing::new(bytes.into()))
    }

    /// The bytes. Do not copy them into anything that lives longer.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} secret bytes]", self.0.len())
    }
}

/// What we prove to the peer with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing: a client that only checks its server.
    #[default]
    None,
    /// A certificate and its key.
    Certificate(OwnCertificate),
    /// Keys that both ends have already.
    Psk {
        /// One for a client; as many as there are peers for a server.
        identities: Vec<PskIdentity>,
        /// The hash the keys belong to in TLS 1.3, where it decides which suites can be used.
        hash: PskHash,
    },
    /// Keys of clients that somebody is asked for (servers).
    PskLookup {
        /// Who is asked.
        lookup: PskLookup,
        /// The hash the keys belong to in TLS 1.3.
        hash: PskHash,
    },
}

/// A certificate of our own with its key, and what belongs to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnCertificate {
    /// Where both are.
    pub source: CertificateSource,
    /// Password of an encrypted key, or of the PKCS#12 file.
    pub password: Option<Secret>,
    /// An OCSP response (DER) that a server staples to it.
    pub ocsp_response: Option<Material>,
    /// Names (SNI) for which a server shows it, `*.` in front for any one label; empty for those that
    /// the certificate itself has.
    pub names: Vec<String>,
}

/// Where a certificate and its key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateSource {
    /// One beside the other.
    Pair {
        /// The chain, our own certificate first: PEM, or DER of one certificate.
        chain: Material,
        /// The key: PEM or DER; PKCS#8 (also encrypted), PKCS#1 or SEC1.
        key: Material,
    },
    /// Both in one PKCS#12 file.
    Pkcs12(Material),
}

impl Default for CertificateSource {
    fn default() -> Self {
        Self::Pair { chain: Material::default(), key: Material::default() }
    }
}

impl OwnCertificate {
    /// A chain and its key, and nothing else.
    pub fn pair(chain: impl Into<Material>, key: impl Into<Material>) -> Self {
        let source = CertificateSource::Pair { chain: chain.into(), key: key.into() };
        Self { source, ..Self::default() }
    }
}

/// Finds the keys of clients.
pub trait FindPsk: Send + Sync {
    /// The key of an identity, or `None` where there is no such client. It may block: it is called on a
    /// thread for such calls. It must come back; a deadline is its own matter.
    fn find(&self, identity: &[u8]) -> Option<Secret>;
}

/// A [`FindPsk`], shared.
#[derive(Clone)]
pub struct PskLookup(pub Arc<dyn FindPsk>);

impl fmt::Debug for PskLookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PskLookup")
    }
}

impl PartialEq for PskLookup {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for PskLookup {}

/// A pre-shared key and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PskIdentity {
    /// Its name, sent in clear. TLS 1.2 allows an empty one; zero bytes cannot be used.
    pub identity: Vec<u8>,
    /// The key; of a file in hexadecimal, what that says.
    pub key: Material,
}

impl PskIdentity {
    /// What the public API calls its key.
    pub(crate) fn field(&self) -> String {
        format!("credentials.identities.{}", String::from_utf8_lossy(&self.identity))
    }
}

/// Hash that a pre-shared key was made for (RFC 8446, section 4.2.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PskHash {
    /// The default of TLS 1.3 where nothing else was agreed.
    #[default]
    Sha256,
    /// For `TLS_AES_256_GCM_SHA384`.
    Sha384,
}

/// Whom we believe about the peer's certificate.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Roots {
    /// The system's roots; the pins alone where there are pins; the verifier alone where there is one.
    #[default]
    Default,
    /// The system's roots.
    System,
    /// Only these: PEM, or DER of one certificate.
    Own(Material),
    /// Nobody is asked: any certificate is accepted (pins still count).
    DangerNone,
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("Default"),
            Self::System => f.write_str("System"),
            Self::Own(material) => write!(f, "Own({material:?})"),
            Self::DangerNone => f.write_str("DangerNone"),
        }
    }
}

/// Whether a server asks its clients for a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientAuth {
    /// It does not ask.
    #[default]
    Off,
    /// It asks; a client without one is welcome, one with a bad one is not.
    Optional,
    /// It insists.
    Required,
}

/// Whether a client looks at its server's stapled OCSP response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OcspCheck {
    /// It does not.
    Off,
    /// Where there is one it must say that the certificate is good; where the certificate itself
    /// announces one (RFC 7633) there must be one.
    IfStapled,
    /// There must be one.
    Required,
}

/// Protocol versions. Older ones are not spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// RFC 5246.
    V1_2,
    /// RFC 8446.
    V1_3,
}

impl TlsVersion {
    /// The name in results and errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1_2 => "TLSv1.2",
            Self::V1_3 => "TLSv1.3",
        }
    }
}

/// Where session secrets are written for a packet analyser (NSS key log format).
#[derive(Clone, Default)]
pub enum KeyLog {
    /// Nowhere.
    #[default]
    None,
    /// Appended to a file, which is made readable for its owner only.
    File(PathBuf),
    /// Given to a function, a line at a time without the newline. It runs within the handshake and
    /// must not block.
    Callback(Arc<dyn Fn(&str) + Send + Sync>),
}

impl fmt::Debug for KeyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Callback(_) => f.write_str("Callback"),
        }
    }
}

/// The default of [`TlsOptions::ticket_lifetime`], and the longest: rustls' own keys are no older.
pub const LONGEST_TICKET_LIFETIME: Duration = Duration::from_secs(6 * 60 * 60);

/// All options of TLS, for clients and servers alike. The names are those of the public API.
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// What we prove to the peer with.
    pub credentials: Credentials,
    /// Further certificates of a server, chosen by the name that the client asks for; `credentials` is
    /// shown where none fits.
    pub more_certificates: Vec<OwnCertificate>,
    /// Whom we believe about the peer's certificate.
    pub roots: Roots,
    /// SHA-256 of the public key (SubjectPublicKeyInfo) of the peer's certificate, or of one that
    /// signed it; one of them must match.
    pub pins: Vec<[u8; 32]>,
    /// Whether a server asks for certificates.
    pub client_auth: ClientAuth,
    /// Who is welcome among those whose certificate is good: whoever fits one of these. Empty for all.
    pub peer_rules: Vec<PeerRule>,
    /// Certificate revocation lists, PEM or DER. Where there are any, each certificate of a chain must
    /// be covered by one whose next update is still to come.
    pub crls: Vec<Material>,
    /// Whether a client looks at a stapled OCSP response. `None` is [`OcspCheck::IfStapled`], in legacy
    /// modes (which know no staples) [`OcspCheck::Off`].
    pub ocsp: Option<OcspCheck>,
    /// Replaces the check of the chain and of the name. Pins still count.
    pub verifier: Option<Arc<dyn PeerVerifier>>,
    /// Oldest version to speak.
    pub min_version: TlsVersion,
    /// Newest version to speak.
    pub max_version: TlsVersion,
    /// Suites by their IANA or OpenSSL names, best first; empty for the default.
    pub cipher_suites: Vec<String>,
    /// Key exchange groups, best first; empty for the default.
    pub groups: Vec<String>,
    /// Application protocols, best first.
    pub alpn: Vec<Vec<u8>>,
    /// Whether sessions of certificates may be resumed.
    pub resumption: bool,
    /// After how long a server encrypts its tickets with a new key. They are accepted for twice as long.
    pub ticket_lifetime: Duration,
    /// Where session secrets are written.
    pub key_log: KeyLog,
    /// A pcapng file of all ciphertext with its secrets; an existing one is replaced at the first
    /// connection. Whoever reads it reads the traffic.
    pub capture: Option<PathBuf>,
    /// A client does not compare its server's name with the certificate.
    pub danger_ignore_server_name: bool,
    /// TLS 1.2 with a peer that knows only the insecure renegotiation.
    pub danger_legacy_renegotiation: bool,
    /// OpenSSL's security level 0: small keys, SHA-1 signatures.
    pub danger_security_level_0: bool,
    /// Suites with CBC or without forward secrecy: added to the default, allowed in `cipher_suites`.
    pub danger_legacy_suites: bool,
    /// Pre-shared keys below 16 bytes.
    pub danger_short_psk: bool,
    /// An end without close_notify counts as an orderly one.
    pub danger_ignore_truncation: bool,
    /// Bytes that a client may say before the handshake (0-RTT): what a server takes, and the most that a
    /// client sends. 0 is off.
    pub danger_early_data: usize,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self {
            credentials: Credentials::None,
            more_certificates: Vec::new(),
            roots: Roots::Default,
            pins: Vec::new(),
            client_auth: ClientAuth::Off,
            peer_rules: Vec::new(),
            crls: Vec::new(),
            ocsp: None,
            verifier: None,
            min_version: TlsVersion::V1_2,
            max_version: TlsVersion::V1_3,
            cipher_suites: Vec::new(),
            groups: Vec::new(),
            alpn: Vec::new(),
            resumption: true,
            ticket_lifetime: LONGEST_TICKET_LIFETIME,
            key_log: KeyLog::None,
            capture: None,
            danger_ignore_server_name: false,
            danger_legacy_renegotiation: false,
            danger_security_level_0: false,
            danger_legacy_suites: false,
            danger_short_psk: false,
            danger_ignore_truncation: false,
            danger_early_data: 0,
        }
    }
}

impl TlsOptions {
    /// The same options with every file read again; an error names the field.
    pub(crate) fn read_again(&self) -> Result<Self> {
        let mut fresh = self.clone();
        fresh.each_material(|material, field| {
            *material = material.again(field)?;
            Ok(())
        })?;
        for psk in fresh.psks() {
            psk.key = psk.key.key_again(&psk.field())?;
        }
        Ok(fresh)
    }

    /// The files that anything was read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let (mut all, mut files) = (self.clone(), Vec::new());
        // Nothing here can fail.
        let _ = all.each_material(|material, _| {
            files.extend(material.file().map(Into::into));
            Ok(())
        });
        files.extend(all.psks().iter().filter_map(|psk| psk.key.file().map(Into::into)));
        files
    }

    fn psks(&mut self) -> &mut [PskIdentity] {
        match &mut self.credentials {
            Credentials::Psk { identities, .. } => identities,
            _ => &mut [],
        }
    }

    fn each_material(&mut self, mut act: impl FnMut(&mut Material, String) -> Result<()>) -> Result<()> {
        if let Roots::Own(roots) = &mut self.roots {
            act(roots, "roots".to_owned())?;
        }
        for (index, crl) in self.crls.iter_mut().enumerate() {
            act(crl, format!("crls.{index}"))?;
        }
        let own = match &mut self.credentials {
            Credentials::Certificate(own) => Some(("credentials".to_owned(), own)),
            _ => None,
        };
        let more = self.more_certificates.iter_mut().enumerate();
        let more = more.map(|(index, own)| (format!("more_credentials.{index}"), own));
        for (table, own) in own.into_iter().chain(more) {
            match &mut own.source {
                CertificateSource::Pair { chain, key } => {
                    act(chain, format!("{table}.chain"))?;
                    act(key, format!("{table}.key"))?;
                }
                CertificateSource::Pkcs12(file) => act(file, format!("{table}.file"))?,
            }
            if let Some(response) = &mut own.ocsp_response {
                act(response, format!("{table}.ocsp_response"))?;
            }
        }
        Ok(())
    }
}
