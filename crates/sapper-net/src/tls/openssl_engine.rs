//! The engine whose handshakes OpenSSL does: pre-shared keys and legacy modes.
//!
//! After a handshake with an AEAD suite our own record layer takes over ([`super::traffic`]) and
//! OpenSSL's connection is freed. CBC suites and connections that may renegotiate stay with OpenSSL;
//! both are TLS 1.2.

use std::ffi::c_int;
use std::sync::Arc;

use foreign_types::ForeignTypeRef;
use openssl::error::ErrorStack;
use openssl::ssl::{Ssl, SslContext, SslSessionRef};
use openssl_sys as ffi;
use rustls::PeerMisbehaved;
use rustls::pki_types::ServerName;
use zeroize::Zeroizing;

use super::failure::{self, CertificateReason, Rejection, alert, misuse};
use super::key_schedule::{Exporter, Hash, key_block};
use super::openssl_ffi::{self, Wire};
use super::options::TlsVersion;
use super::peer_rules::PeerRules;
use super::plain;
use super::record::{Aead, DirectionKeys, HANDSHAKE, HEADER};
use super::scene::{Scene, SessionSecrets, with_scene};
use super::settings::{OurCredentials, Settings};
use super::suites::{Group, Suite};
use super::traffic::{Traffic, TrafficParts, TrafficSecrets, max_fragment};
use super::{BoxEngine, HandshakeInfo, HandshakeProgress, MAX_RECORD, OpenState, Opened, TlsEngine};
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::stream::RecordMarks;

const NAME: &str = "openssl";

/// OpenSSL's reason codes that get words of their own (sslerr.h).
mod reason {
    pub(super) const BINDER_DOES_NOT_VERIFY: i32 = 253;
    pub(super) const CERTIFICATE_VERIFY_FAILED: i32 = 134;
    pub(super) const PEER_DID_NOT_RETURN_A_CERTIFICATE: i32 = 199;
    pub(super) const NO_SHARED_CIPHER: i32 = 193;
    pub(super) const NO_SUITABLE_SIGNATURE_ALGORITHM: i32 = 118;
    pub(super) const PSK_IDENTITY_NOT_FOUND: i32 = 223;
    pub(super) const UNSAFE_LEGACY_RENEGOTIATION_DISABLED: i32 = 338;
    pub(super) const WRONG_VERSION_NUMBER: i32 = 267;
    /// No suite, version, group, signature or protocol in common.
    pub(super) const NOTHING_IN_COMMON: &[i32] =
        &[101, 118, 191, 193, 235, 252, 258, 259, 266, 267, 295, 376, 396, 410];
    /// Alerts received come as this plus their number.
    pub(super) const ALERT: i32 = 1000;
    /// Library and reason of a record that has no room for a nonce and a tag.
    pub(super) const INVALID_AAD: (i32, i32) = (57, 108);
}

/// A connection's engine.
struct OpensslEngine {
    state: State,
    failed: bool,
}

enum State {
    /// Handshaking, or moving data in TLS 1.2 with a suite of OpenSSL's own.
    Library(Box<Library>),
    /// Moving data through our record layer.
    Traffic(Box<Traffic>),
}

struct Library {
    // Before the wire: its BIO points there.
    ssl: Ssl,
    wire: Wire,
    scene: Option<Box<Scene>>,
    is_client: bool,
    psk: bool,
    /// Asked when the handshake is done.
    rules: Arc<PeerRules>,
    /// The channel binding `tls-server-end-point` of our own certificate.
    end_point: Option<Arc<[u8]>>,
    may_renegotiate: bool,
    done: bool,
    write_closed: bool,
    read_closed: bool,
    /// An error that came behind data; the next call gets it.
    pending: Option<Error>,
    /// First 8 bytes of the payload of the last handshake record that we sent: in TLS 1.2 with GCM
    /// that is the explicit nonce of our Finished.
    last_sent: [u8; 8],
}

/// An engine for one connection.
pub(crate) fn engine(
    context: &SslContext,
    settings: &Settings,
    is_client: bool,
    name: Option<ServerName<'static>>,
) -> Result<BoxEngine> {
    let failed = |stack: ErrorStack| {
        Error::new(ErrorKind::ResourceLimit, format!("OpenSSL cannot make a connection: {stack}"))
    };
    let mut ssl = Ssl::new(context).map_err(failed)?;
    let mut scene = Box::new(Scene { peer_is_client: !is_client, ..Scene::default() });
    match &settings.credentials {
        OurCredentials::Psk(psk) => scene.psk = Some(Arc::clone(psk)),
        _ => scene.verifier = Some(Arc::clone(&settings.verifier)),
    }
    if is_client {
        if let Some(ServerName::DnsName(dns)) = &name {
            ssl.set_hostname(dns.as_ref()).map_err(failed)?;
        }
        scene.server_name = name.map(|name| name.to_str().into_owned());
        ssl.set_connect_state();
    } else {
        ssl.set_accept_state();
    }
    let wire = Wire::attach(&mut ssl)?;
    Ok(Box::new(OpensslEngine {
        state: State::Library(Box::new(Library {
            ssl,
            wire,
            psk: scene.psk.is_some(),
            scene: Some(scene),
            is_client,
            rules: Arc::clone(&settings.later_rules),
            end_point: match &settings.credentials {
                OurCredentials::Certificate(own) if !is_client => {
                    openssl_ffi::end_point_hash(&own.chain[0]).map(Arc::from)
                }
                _ => None,
            },
            may_renegotiate: settings.legacy_renegotiation,
            done: false,
            write_closed: false,
            read_closed: false,
            pending: None,
            last_sent: [0; 8],
        })),
        failed: false,
    }))
}

impl TlsEngine for OpensslEngine {
    fn handshake(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<HandshakeProgress> {
        let State::Library(library) = &mut self.state else {
            return Err(misuse("the handshake is done"));
        };
        if self.failed || library.done {
            return Err(misuse("the handshake is done or has failed"));
        }
        let finish = match library.handshake(incoming, outgoing) {
            Ok(false) => return Ok(HandshakeProgress::NeedMore),
            Ok(true) => library.finish(),
            Err(error) => Err(error),
        };
        let (info, traffic) = finish.inspect_err(|_| self.failed = true)?;
        let welcome = library.check_rules(&info);
        if let Some(traffic) = traffic {
            self.state = State::Traffic(Box::new(traffic));
        }
        if let Err(rejection) = welcome {
            // OpenSSL has no such alert within a handshake, so the first record after it tells the peer.
            self.fatal_alert(rejection.reason.alert(), outgoing);
            self.failed = true;
            return Err(rejection.into_error());
        }
        Ok(HandshakeProgress::Done(Box::new(info)))
    }

    fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened> {
        match &mut self.state {
            State::Traffic(traffic) => traffic.open(incoming, plain, marks, outgoing),
            State::Library(_) if self.failed => Err(misuse("the TLS connection failed before")),
            State::Library(library) => {
                library.open(incoming, plain, marks, outgoing).inspect_err(|_| self.failed = true)
            }
        }
    }

    fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        match &mut self.state {
            State::Traffic(traffic) => traffic.seal(plain, outgoing),
            State::Library(_) if self.failed => Err(misuse("the TLS connection failed before")),
            State::Library(library) => library.seal(plain, outgoing),
        }
    }

    fn close_notify(&mut self, outgoing: &mut Buffer) -> Result<()> {
        match &mut self.state {
            State::Traffic(traffic) => traffic.close_notify(outgoing),
            State::Library(library) => {
                library.close_notify(outgoing);
                Ok(())
            }
        }
    }

    fn fatal_alert(&mut self, description: u8, outgoing: &mut Buffer) {
        match &mut self.state {
            State::Traffic(traffic) => traffic.fatal_alert(description, outgoing),
            // OpenSSL has no call for an alert of ours; the end is said in the orderly way.
            State::Library(library) => library.close_notify(outgoing),
        }
    }

    fn update_keys(&mut self, outgoing: &mut Buffer) -> Result<()> {
        match &mut self.state {
            State::Traffic(traffic) => traffic.update_keys(outgoing),
            State::Library(_) => Err(misuse("keys are updated in TLS 1.3 only, after the handshake")),
        }
    }

    fn export_keying_material(&mut self, label: &str, context: Option<&[u8]>, out: &mut [u8]) -> Result<()> {
        match &mut self.state {
            State::Traffic(traffic) => traffic.export(label, context, out),
            State::Library(library) if library.done => library
                .ssl
                .export_keying_material(out, label, context)
                .map_err(|_| Error::new(ErrorKind::ApiMisuse, "the keying material cannot be exported")),
            State::Library(_) => Err(misuse("keying material exists after the handshake only")),
        }
    }

    fn release_idle(&mut self) {
        match &mut self.state {
            State::Traffic(traffic) => traffic.release_idle(),
            State::Library(library) => openssl_ffi::free_buffers(&library.ssl),
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

impl Library {
    fn check_rules(&self, info: &HandshakeInfo) -> Result<(), Rejection> {
        // A server's client may have come without a certificate, where that is allowed.
        info.peer_certificates.first().map_or(Ok(()), |certificate| self.rules.check(certificate))
    }

    /// One step; true when it is done.
    fn handshake(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<bool> {
        let before = outgoing.len();
        let ssl = self.ssl.as_ptr();
        let wire = &mut self.wire;
        let code = with_scene(&mut self.scene, || {
            wire.with(Some(incoming), outgoing, || {
                // SAFETY: `ssl` is alive, and the error queue belongs to this thread. What others left
                // in it would be taken for ours.
                unsafe {
                    ffi::ERR_clear_error();
                    let result = ffi::SSL_do_handshake(ssl);
                    if result == 1 { 0 } else { ffi::SSL_get_error(ssl, result) }
                }
            })
        });
        self.note_sent(&outgoing.data()[before..]);
        match code {
            0 => Ok(true),
            ffi::SSL_ERROR_WANT_READ => Ok(false),
            // A goodbye in the middle: no error to OpenSSL, the same as a closed connection to us.
            ffi::SSL_ERROR_ZERO_RETURN => Err(failure::closed_in_handshake()),
            code => Err(self.error(code)),
        }
    }

    fn note_sent(&mut self, mut sent: &[u8]) {
        while let Some((header, rest)) = sent.split_first_chunk::<HEADER>() {
            let len = usize::from(header[3]) << 8 | usize::from(header[4]);
            if let (HANDSHAKE, Some(start)) = (header[0], rest.first_chunk::<8>()) {
                self.last_sent = *start;
            }
            sent = rest.get(len..).unwrap_or_default();
        }
    }

    /// What was agreed on, and the record layer where it is ours from now on.
    fn finish(&mut self) -> Result<(HandshakeInfo, Option<Traffic>)> {
        self.done = true;
        let lost = || Error::new(ErrorKind::LocalProtocol, "OpenSSL does not say what was agreed on");
        let cipher = self.ssl.current_cipher().ok_or_else(lost)?;
        let suite = u16::from_be_bytes(cipher.protocol_id());
        let version = match self.ssl.version_str() {
            "TLSv1.3" => TlsVersion::V1_3,
            _ => TlsVersion::V1_2,
        };
        if self.psk && version == TlsVersion::V1_3 && !self.ssl.session_reused() {
            // An external key counts as a session. Its refused certificate has ended the handshake
            // before this; nothing else may ever get here.
            return Err(Error::new(ErrorKind::CredentialsRejected, "the pre-shared key was not used"));
        }
        let info = HandshakeInfo {
            version: version.as_str(),
            cipher_suite: Suite::by_id(suite)
                .map(|s| s.iana)
                .or_else(|| cipher.standard_name())
                .unwrap_or_else(|| cipher.name())
                .to_owned(),
            group: self.group(),
            alpn: self.ssl.selected_alpn_protocol().map(<[u8]>::to_vec),
            peer_certificates: self.peer_certificates(),
            psk_identity: self
                .scene
                .as_mut()
                .and_then(|scene| scene.psk_identity.take())
                .map(|identity| String::from_utf8_lossy(&identity).into_owned()),
            server_name: match self.is_client {
                true => None,
                false => self.scene.as_mut().and_then(|scene| scene.server_name.take()),
            },
            is_client: self.is_client,
            own_end_point: self.end_point.clone(),
            resumed: false,
            early_data: None,
            engine: NAME,
        };
        let traffic = match record_algorithms(suite) {
            // The peer may come back with a new handshake, which only OpenSSL can answer.
            _ if self.may_renegotiate && version == TlsVersion::V1_2 => None,
            Some((aead, hash)) => Some(self.traffic(version, aead, hash)?),
            None => None,
        };
        if let Some(scene) = &mut self.scene {
            // OpenSSL has its own copy.
            scene.secrets = SessionSecrets::default();
        }
        Ok((info, traffic))
    }

    fn traffic(&mut self, version: TlsVersion, aead: Aead, hash: Hash) -> Result<Traffic> {
        let lost = || Error::new(ErrorKind::LocalProtocol, "OpenSSL does not give the session's secrets");
        let session = self.ssl.session().ok_or_else(lost)?;
        let max_plain = max_fragment(openssl_ffi::max_fragment_code(session));
        let secrets = std::mem::take(&mut self.scene.as_mut().ok_or_else(lost)?.secrets);
        let (seal, open, secrets, exporter) = match version {
            TlsVersion::V1_3 => {
                let client = secrets.client_traffic.ok_or_else(lost)?;
                let server = secrets.server_traffic.ok_or_else(lost)?;
                let (seal, open) = if self.is_client { (client, server) } else { (server, client) };
                (
                    DirectionKeys::from_secret(aead, hash, &seal)?,
                    DirectionKeys::from_secret(aead, hash, &open)?,
                    Some(TrafficSecrets { seal, open }),
                    Exporter::Tls13 { secret: secrets.exporter.ok_or_else(lost)? },
                )
            }
            TlsVersion::V1_2 => {
                let (seal, open, exporter) = self.tls12_keys(session, aead, hash)?;
                (seal, open, None, exporter)
            }
        };
        Ok(Traffic::new(TrafficParts {
            version,
            is_client: self.is_client,
            aead,
            hash,
            seal,
            open,
            secrets,
            exporter,
            tickets: None,
            max_plain,
        }))
    }

    /// The keys that OpenSSL derived, derived again from what it lets out.
    fn tls12_keys(
        &self,
        session: &SslSessionRef,
        aead: Aead,
        hash: Hash,
    ) -> Result<(DirectionKeys, DirectionKeys, Exporter)> {
        let mut master = Zeroizing::new(vec![0; 48]);
        let mut randoms = [[0; 32]; 2];
        let complete = session.master_key(&mut master) == 48
            && self.ssl.client_random(&mut randoms[0]) == 32
            && self.ssl.server_random(&mut randoms[1]) == 32;
        if !complete {
            return Err(Error::new(ErrorKind::LocalProtocol, "OpenSSL does not give the session's secrets"));
        }
        let (key_len, iv_len) = (aead.key_len(), aead.tls12_iv_len());
        let block = key_block(hash, &master, &randoms[0], &randoms[1], 2 * (key_len + iv_len))?;
        let (keys, ivs) = block.split_at(2 * key_len);
        let keys = keys.split_at(key_len);
        let ivs = ivs.split_at(iv_len);
        let make = |key: &[u8], salt: &[u8], start: [u8; 8]| {
            let mut iv = [0; 12];
            // Our Finished had number 0 and this explicit nonce; the next ones differ from it because
            // their numbers do.
            iv[4..].copy_from_slice(&start);
            iv[..salt.len()].copy_from_slice(salt);
            // Each side has sent one record, its Finished.
            DirectionKeys::new(TlsVersion::V1_2, aead, key, iv, 1)
        };
        let client = |start| make(keys.0, ivs.0, start);
        let server = |start| make(keys.1, ivs.1, start);
        let (seal, open) = if self.is_client {
            (client(self.last_sent)?, server([0; 8])?)
        } else {
            (server(self.last_sent)?, client([0; 8])?)
        };
        Ok((seal, open, Exporter::Tls12 { master, randoms }))
    }

    fn group(&self) -> Option<String> {
        // SAFETY: `ssl` is alive; the name is static text or null.
        let name = unsafe {
            let name = ffi::SSL_get0_group_name(self.ssl.as_ptr());
            if name.is_null() {
                return None;
            }
            std::ffi::CStr::from_ptr(name).to_str().ok()?
        };
        Some(Group::by_name(name).map_or(name, |g| g.name).to_owned())
    }

    fn peer_certificates(&self) -> Vec<Vec<u8>> {
        let mut chain: Vec<Vec<u8>> = Vec::new();
        // On servers OpenSSL leaves the client's own certificate out of the chain.
        if !self.is_client {
            chain.extend(self.ssl.peer_certificate().and_then(|c| c.to_der().ok()));
        }
        if let Some(stack) = self.ssl.peer_cert_chain() {
            chain.extend(stack.iter().filter_map(|c| c.to_der().ok()));
        }
        chain
    }

    fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened> {
        if let Some(error) = self.pending.take() {
            return Err(error);
        }
        let mut opened = Opened { produced: 0, records: 0, state: OpenState::NeedMore };
        loop {
            if self.read_closed {
                opened.state = OpenState::Closed;
                return Ok(opened);
            }
            let room = &mut plain[opened.produced..];
            // A record may hide behind others that hold no data; so there is always room for any.
            if room.len() < MAX_RECORD {
                opened.state = OpenState::Full;
                return Ok(opened);
            }
            let ssl = self.ssl.as_ptr();
            let wire = &mut self.wire;
            let mut n = 0;
            let code: c_int = with_scene(&mut self.scene, || {
                wire.with(Some(incoming), outgoing, || {
                    // SAFETY: `ssl` is alive and `room` is as long as it says.
                    unsafe {
                        ffi::ERR_clear_error();
                        let result = ffi::SSL_read_ex(ssl, room.as_mut_ptr().cast(), room.len(), &mut n);
                        if result == 1 { 0 } else { ffi::SSL_get_error(ssl, result) }
                    }
                })
            });
            match code {
                0 => {
                    opened.produced += n;
                    opened.records += 1;
                    marks.push(opened.produced);
                }
                ffi::SSL_ERROR_WANT_READ => return Ok(opened),
                ffi::SSL_ERROR_ZERO_RETURN => self.read_closed = true,
                code => {
                    let error = self.error(code);
                    if opened.produced == 0 {
                        return Err(error);
                    }
                    self.pending = Some(error);
                    opened.state = OpenState::Full;
                    return Ok(opened);
                }
            }
        }
    }

    fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        if self.write_closed {
            return Err(misuse("the TLS connection's sending direction has ended"));
        }
        for part in plain.chunks(MAX_RECORD) {
            let ssl = self.ssl.as_ptr();
            let wire = &mut self.wire;
            let mut n = 0;
            let code = with_scene(&mut self.scene, || {
                wire.with(None, outgoing, || {
                    // SAFETY: `ssl` is alive and `part` is as long as it says.
                    unsafe {
                        ffi::ERR_clear_error();
                        let result = ffi::SSL_write_ex(ssl, part.as_ptr().cast(), part.len(), &mut n);
                        if result == 1 { 0 } else { ffi::SSL_get_error(ssl, result) }
                    }
                })
            });
            if code != 0 {
                return Err(self.error(code).with_direction(Direction::Encapsulate));
            }
        }
        Ok(())
    }

    fn close_notify(&mut self, outgoing: &mut Buffer) {
        if self.write_closed || !self.done {
            return;
        }
        self.write_closed = true;
        let ssl = self.ssl.as_ptr();
        self.wire.with(None, outgoing, || {
            // SAFETY: `ssl` is alive. The result says whether the peer has closed too, and an error
            // means that nothing can be said any more; what it left must not stay in the queue.
            unsafe {
                ffi::SSL_shutdown(ssl);
                ffi::ERR_clear_error();
            }
        });
    }

    /// What a failed call means.
    fn error(&mut self, code: c_int) -> Error {
        let stack = ErrorStack::get();
        let first = stack.errors().first();
        let reason = first.map_or(0, openssl::error::Error::reason_code);
        let text = first.and_then(openssl::error::Error::reason).unwrap_or("no reason given").to_owned();
        let scene = self.scene.get_or_insert_default();
        let sent = scene.alert_sent.take();
        if let Some(rejection) = scene.rejection.take() {
            let error = rejection.into_error();
            return match sent {
                Some(description) => error.with_alert(description),
                None => error,
            };
        }
        if let Some(received) = scene.alert_received.take() {
            return failure::alert_received(received, self.psk && !self.done);
        }
        if (reason::ALERT..reason::ALERT + 256).contains(&reason) {
            return failure::alert_received((reason - reason::ALERT) as u8, self.psk && !self.done);
        }
        let unknown_identity = scene.unknown_identity || reason == reason::PSK_IDENTITY_NOT_FOUND;
        let in_psk_handshake = self.psk && !self.done;
        let (kind, message) = match reason {
            _ if scene.no_host_name => (
                ErrorKind::RemoteProtocol,
                format!("the peer broke TLS: {}", plain::misbehaved(&PeerMisbehaved::ServerNameMustContainOneHostName)),
            ),
            _ if unknown_identity && in_psk_handshake => (
                ErrorKind::UnknownPeer,
                "the client's pre-shared key has an identity that is not known here".to_owned(),
            ),
            reason::BINDER_DOES_NOT_VERIFY if in_psk_handshake => {
                (ErrorKind::CredentialsRejected, "the peer's pre-shared key is another one".to_owned())
            }
            // The first record under keys that came from the pre-shared one.
            _ if in_psk_handshake && matches!(sent, Some(alert::BAD_RECORD_MAC | alert::DECRYPT_ERROR)) => {
                (ErrorKind::CredentialsRejected, "the peer's pre-shared key is another one".to_owned())
            }
            reason::PEER_DID_NOT_RETURN_A_CERTIFICATE | reason::CERTIFICATE_VERIFY_FAILED => {
                let error = Error::new(ErrorKind::Certificate, "the peer showed no certificate")
                    .with_reason(CertificateReason::Missing.as_str())
                    .with_direction(Direction::Decapsulate);
                return match sent {
                    Some(description) => error.with_alert(description),
                    None => error,
                };
            }
            reason::UNSAFE_LEGACY_RENEGOTIATION_DISABLED => (
                ErrorKind::IncompatiblePeer,
                "the peer knows only the insecure renegotiation; danger_legacy_renegotiation allows it"
                    .to_owned(),
            ),
            // A client with certificates alone: we have none, which is no fault of its suites or signatures.
            reason::NO_SHARED_CIPHER | reason::NO_SUITABLE_SIGNATURE_ALGORITHM if in_psk_handshake => (
                ErrorKind::IncompatiblePeer,
                "nothing in common with the peer: it offers no pre-shared key, or no suite for one that we take"
                    .to_owned(),
            ),
            // Whatever is no record of ours has a version that is none.
            reason::WRONG_VERSION_NUMBER if self.done => {
                (ErrorKind::RemoteProtocol, "what follows is no TLS record".to_owned())
            }
            reason if reason::NOTHING_IN_COMMON.contains(&reason) => {
                (ErrorKind::IncompatiblePeer, format!("nothing in common with the peer: {text}"))
            }
            // OpenSSL takes the blame upon itself; ours are never too short.
            _ if first.map(|error| (error.library_code(), reason)) == Some(reason::INVALID_AAD) => {
                (ErrorKind::RemoteProtocol, "a sealed record of the peer's is too short to be one".to_owned())
            }
            _ if sent == Some(alert::INTERNAL_ERROR) => {
                (ErrorKind::LocalProtocol, format!("OpenSSL failed: {text} (code {code})"))
            }
            _ if sent == Some(alert::BAD_RECORD_MAC) => return failure::bad_record(""),
            _ => (ErrorKind::RemoteProtocol, format!("the peer broke TLS: {text}")),
        };
        let error = Error::new(kind, message).with_direction(Direction::Decapsulate);
        match sent {
            Some(description) => error.with_alert(description),
            None => error,
        }
    }
}

/// The algorithms of a suite that our record layer speaks.
fn record_algorithms(suite: u16) -> Option<(Aead, Hash)> {
    let suite = Suite::by_id(suite)?;
    let name = suite.iana;
    let hash = if name.ends_with("SHA384") { Hash::Sha384 } else { Hash::Sha256 };
    if name.contains("AES_256_GCM") {
        Some((Aead::Aes256Gcm, hash))
    } else if name.contains("AES_128_GCM") {
        Some((Aead::Aes128Gcm, hash))
    } else if name.contains("CHACHA20_POLY1305") {
        Some((Aead::ChaCha20Poly1305, hash))
    } else {
        None
    }
}
