//! rustls' configurations, made from our settings: our verifier, key log and resolver behind rustls'
//! traits.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openssl::pkey::{Id, PKeyRef, Private};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::crypto::aws_lc_rs::{ALL_CIPHER_SUITES, ALL_KX_GROUPS, Ticketer, default_provider};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoClientAuth, NoServerSessionStorage, ProducesTickets, ResolvesServerCert,
};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, NamedGroup, OtherError,
    ServerConfig, SignatureScheme, SupportedProtocolVersion, TicketRotator,
};

use super::credentials::CertifiedCredentials;
use super::early_data::Sessions;
use super::failure::{CertificateReason, Rejection};
use super::key_log::KeyLogSink;
use super::options::{ClientAuth, TlsVersion};
use super::scene::{SessionSecrets, on_stage};
use super::server_configs::ServerConfigs;
use super::session_end;
use super::settings::Settings;
use super::shown::ShownCertificates;
use super::suites::{Group, Suite};
use super::verify::{PeerCertificates, PeerVerifier};
use crate::error::{Error, ErrorKind, Result};

/// Servers whose tickets a client keeps, eight each: bounded, and enough for a process that talks to
/// a fleet.
const REMEMBERED_SESSIONS: usize = 256;

fn failed(what: &'static str) -> impl Fn(rustls::Error) -> Error {
    move |e| Error::new(ErrorKind::LocalProtocol, format!("rustls does not take {what}: {e}"))
}

fn versions(settings: &Settings) -> Vec<&'static SupportedProtocolVersion> {
    let mut versions = Vec::new();
    if settings.max_version == TlsVersion::V1_3 {
        versions.push(&rustls::version::TLS13);
    }
    if settings.min_version == TlsVersion::V1_2 {
        versions.push(&rustls::version::TLS12);
    }
    versions
}

fn provider(settings: &Settings) -> Arc<CryptoProvider> {
    let suites = settings
        .suites
        .iter()
        .filter_map(|wanted| ALL_CIPHER_SUITES.iter().find(|s| u16::from(s.suite()) == wanted.id))
        .copied()
        .collect();
    let groups = settings.groups.iter().filter_map(|group| kx_group(group)).collect();
    Arc::new(CryptoProvider { cipher_suites: suites, kx_groups: groups, ..default_provider() })
}

fn kx_group(group: &Group) -> Option<&'static dyn SupportedKxGroup> {
    ALL_KX_GROUPS.iter().find(|g| group_name(g.name()) == Some(group.name)).copied()
}

/// Our name of rustls' group.
pub(crate) fn group_name(group: NamedGroup) -> Option<&'static str> {
    Group::by_name(group.as_str()?).map(|g| g.name)
}

/// A certificate with its key in rustls' form. It knows fewer kinds of keys than OpenSSL.
pub(crate) fn certified_key(own: &CertifiedCredentials) -> Result<Arc<CertifiedKey>> {
    let chain = own.chain_der()?.into_iter().map(CertificateDer::from).collect();
    let pkcs8 = own.key_pkcs8()?;
    // Borrowed, so that no copy is left behind in memory.
    let key = any_supported_type(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.as_slice())))
        .map_err(|_| Error::config("key", unusable_key(&own.key)))?;
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}

/// What the key is, and which ones can be used.
fn unusable_key(key: &PKeyRef<Private>) -> String {
    let what = match key.id() {
        Id::RSA => format!("an RSA key of {} bits", key.bits()),
        Id::RSA_PSS => "an RSA key for PSS alone".to_owned(),
        Id::EC => {
            let curve = key.ec_key().ok().and_then(|key| key.group().curve_name()?.short_name().ok());
            format!("a key of the curve {}", curve.unwrap_or("that has no name"))
        }
        Id::ED448 => "an Ed448 key".to_owned(),
        _ => "a key of this kind".to_owned(),
    };
    let mut text = format!(
        "{what} cannot be used here: RSA of 2048 to 8192 bits, ECDSA with P-256, P-384 or P-521, and Ed25519 can"
    );
    if key.id() == Id::RSA && key.bits() < 2048 {
        text += " (danger_security_level_0 allows smaller RSA keys)";
    }
    text
}

/// The configuration of clients.
pub(crate) fn client(settings: &Settings) -> Result<Arc<ClientConfig>> {
    let provider = provider(settings);
    let verifier =
        ServerAdapter(Adapter { verifier: Arc::clone(&settings.verifier), provider: Arc::clone(&provider) });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(settings))
        .map_err(failed("these versions and suites"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &settings.shown {
        Some(own) => {
            let key = Arc::clone(own.default().key());
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols.clone_from(&settings.alpn);
    config.resumption = if settings.resumption {
        Resumption::in_memory_sessions(REMEMBERED_SESSIONS)
    } else {
        Resumption::disabled()
    };
    config.key_log = Arc::new(SceneKeyLog(settings.key_log.clone()));
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// The configurations of servers.
pub(crate) fn server(settings: &Settings) -> Result<Arc<ServerConfigs>> {
    let usual = server_with(settings, provider(settings))?;
    let hashes = || settings.suites_of(TlsVersion::V1_3).map(Suite::is_sha384);
    let of_hash = |sha384| {
        let mut provider = CryptoProvider::clone(usual.crypto_provider());
        provider.cipher_suites.retain(|suite| {
            let id = u16::from(suite.suite());
            suite.tls13().is_none() || Suite::by_id(id).is_some_and(|suite| suite.is_sha384() == sha384)
        });
        // The same tickets, whichever a client meets.
        let mut config = server_with(settings, Arc::new(provider))?;
        config.ticketer = Arc::clone(&usual.ticketer);
        config.session_storage = Arc::clone(&usual.session_storage);
        Ok::<_, Error>(Arc::new(config))
    };
    let both = hashes().any(|sha384| sha384) && hashes().any(|sha384| !sha384);
    let by_hash = if both { Some([of_hash(false)?, of_hash(true)?]) } else { None };
    Ok(Arc::new(ServerConfigs::new(Arc::new(usual), by_hash)))
}

fn server_with(settings: &Settings, provider: Arc<CryptoProvider>) -> Result<ServerConfig> {
    let shown = settings
        .shown
        .clone()
        .ok_or_else(|| Error::config("credentials", "a server needs a certificate or a pre-shared key"))?;
    let verifier: Arc<dyn ClientCertVerifier> = match settings.client_auth {
        ClientAuth::Off => Arc::new(NoClientAuth),
        wanted => Arc::new(ClientAdapter {
            adapter: Adapter { verifier: Arc::clone(&settings.verifier), provider: Arc::clone(&provider) },
            required: wanted == ClientAuth::Required,
            hints: settings.own_roots.as_ref().map(|roots| roots.subjects()).unwrap_or_default(),
        }),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(settings))
        .map_err(failed("these versions and suites"))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Resolver(shown)));
    config.alpn_protocols.clone_from(&settings.alpn);
    // Tickets carry the session themselves: a server keeps nothing per client.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    if settings.early_data > 0 {
        // Each ticket is good for once, so it has to be remembered.
        config.session_storage = Arc::new(Sessions::new(settings.ticket_lifetime));
        config.max_early_data_size = settings.early_data.try_into().unwrap_or(u32::MAX);
        config.send_half_rtt_data = true;
    } else if settings.resumption {
        config.ticketer = ticketer(settings.ticket_lifetime)?;
    } else {
        config.send_tls13_tickets = 0;
    }
    config.key_log = Arc::new(SceneKeyLog(settings.key_log.clone()));
    config.enable_secret_extraction = true;
    Ok(config)
}

/// Seals and opens tickets; each key is used for `lifetime`, and its tickets are accepted for twice that.
fn ticketer(lifetime: Duration) -> Result<Arc<dyn ProducesTickets>> {
    /// rustls gives its own ticketer shared and wants it owned.
    #[derive(Debug)]
    struct Shared(Arc<dyn ProducesTickets>);

    impl ProducesTickets for Shared {
        fn enabled(&self) -> bool {
            self.0.enabled()
        }
        fn lifetime(&self) -> u32 {
            self.0.lifetime()
        }
        fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
            self.0.encrypt(&session_end::stamped(plain))
        }
        fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
            self.0.decrypt(cipher).and_then(|stamped| session_end::unstamped(&stamped))
        }
    }

    let seconds = lifetime.as_secs().max(1).try_into().unwrap_or(u32::MAX);
    let rotator = TicketRotator::new(seconds, || match Ticketer::new() {
        Ok(shared) => Ok(Box::new(Shared(shared))),
        Err(_) => Err(rustls::crypto::GetRandomFailed),
    });
    Ok(Arc::new(rotator.map_err(failed("tickets"))?))
}

/// Gives the certificate for the name that the client asked for, and notes both.
struct Resolver(Arc<ShownCertificates>);

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let shown = self.0.choose(name.as_deref(), hello.signature_schemes());
        on_stage(|scene| {
            scene.server_name = name;
            scene.no_common_signature = shown.is_none();
            scene.end_point = shown.and_then(|shown| shown.end_point.clone());
        });
        shown.map(|shown| Arc::clone(shown.key()))
    }
}

/// Secrets for our record layer, and for the user's key log.
struct SceneKeyLog(Option<Arc<KeyLogSink>>);

impl fmt::Debug for SceneKeyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SceneKeyLog")
    }
}

impl rustls::KeyLog for SceneKeyLog {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        on_stage(|scene| scene.secrets.keep(label, client_random, secret));
        if let Some(sink) = &self.0 {
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
            let line = zeroize::Zeroizing::new(format!("{label} {} {}", hex(client_random), hex(secret)));
            sink.write(&line);
        }
    }

    fn will_log(&self, label: &str) -> bool {
        self.0.is_some() || SessionSecrets::wants(label)
    }
}

/// Our verifier, with the provider that checks signatures.
#[derive(Debug)]
struct Adapter {
    verifier: Arc<dyn PeerVerifier>,
    provider: Arc<CryptoProvider>,
}

impl Adapter {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        peer_is_client: bool,
        ocsp: &[u8],
    ) -> Result<(), rustls::Error> {
        let chain: Vec<&[u8]> = std::iter::once(leaf).chain(rest).map(AsRef::as_ref).collect();
        // rustls wants a name even where the user has none; the scene knows.
        let name = on_stage(|scene| scene.server_name.clone()).flatten().filter(|_| !peer_is_client);
        let peer = PeerCertificates { chain: &chain, peer_is_client, server_name: name.as_deref(), ocsp };
        self.verifier.verify(&peer).map_err(|rejection| {
            let error = certificate_error(&rejection);
            on_stage(|scene| scene.rejection = Some(rejection));
            rustls::Error::InvalidCertificate(error)
        })?;
        if peer_is_client {
            session_end::note_chain(&chain);
        }
        Ok(())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// rustls chooses the alert by this; it is the one of [`CertificateReason::alert`].
fn certificate_error(rejection: &Rejection) -> CertificateError {
    match rejection.reason {
        CertificateReason::Expired => CertificateError::Expired,
        CertificateReason::NotYetValid => CertificateError::NotValidYet,
        CertificateReason::WrongName => CertificateError::NotValidForName,
        CertificateReason::UnknownIssuer | CertificateReason::SelfSigned => CertificateError::UnknownIssuer,
        CertificateReason::Revoked => CertificateError::Revoked,
        CertificateReason::RevocationUnknown => CertificateError::UnknownRevocationStatus,
        CertificateReason::BadStaple => CertificateError::InvalidOcspResponse,
        CertificateReason::BadSignature => CertificateError::BadSignature,
        CertificateReason::UnsuitablePurpose => CertificateError::InvalidPurpose,
        CertificateReason::Malformed | CertificateReason::Missing => CertificateError::BadEncoding,
        CertificateReason::PinMismatch | CertificateReason::Rejected | CertificateReason::NotAllowed => {
            CertificateError::ApplicationVerificationFailure
        }
        CertificateReason::UnsupportedAlgorithm => {
            CertificateError::Other(OtherError(Arc::new(rejection.clone())))
        }
    }
}

#[derive(Debug)]
struct ServerAdapter(Adapter);

impl ServerCertVerifier for ServerAdapter {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify(leaf, rest, false, ocsp).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.schemes()
    }
}

#[derive(Debug)]
struct ClientAdapter {
    adapter: Adapter,
    required: bool,
    hints: Vec<DistinguishedName>,
}

impl ClientCertVerifier for ClientAdapter {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.adapter.verify(leaf, rest, true, &[]).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.adapter.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.adapter.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.adapter.schemes()
    }
}
