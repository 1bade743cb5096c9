//! The engine whose handshakes rustls does: certificates, TLS 1.2 and 1.3.
//!
//! rustls gets one record at a time, so that it never opens one that belongs to our record layer.
//! When the handshake is done its secrets are taken out ([`rustls::kernel`]) and its state is dropped,
//! except what a client needs to keep tickets.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{
    AlertDescription, ClientConfig, CommonState, ConnectionTrafficSecrets, ExtractedSecrets, HandshakeKind,
    ProtocolVersion, ServerConfig, SupportedCipherSuite,
};

use super::failure::{self, CertificateReason, alert, misuse, peer_misbehaved};
use super::key_schedule::{Exporter, Hash};
use super::options::TlsVersion;
use super::record::{ALERT, APPLICATION_DATA, Aead, DirectionKeys, HANDSHAKE, HEADER, grant};
use super::rustls_config::group_name;
use super::scene::{Scene, with_scene};
use super::suites::Suite;
use super::traffic::{TicketSink, Traffic, TrafficParts, TrafficSecrets};
use super::{BoxEngine, HandshakeInfo, HandshakeProgress, MAX_RECORD, Opened, TlsEngine, verify};
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::stream::RecordMarks;

const NAME: &str = "rustls";

/// A connection's engine.
enum RustlsEngine {
    Handshake(Box<Handshake>),
    Traffic(Box<Traffic>),
    Failed,
}

struct Handshake {
    connection: Connection,
    scene: Option<Box<Scene>>,
    hello: ServerHello,
    /// Bytes at the front of `incoming` that rustls has seen and wants to see again: a handshake
    /// message in several records.
    seen: usize,
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// A client's engine. Without a name rustls still wants one; this one is never sent.
pub(crate) fn client(config: Arc<ClientConfig>, name: Option<ServerName<'static>>) -> Result<BoxEngine> {
    let scene =
        Scene { server_name: name.as_ref().map(|name| name.to_str().into_owned()), ..Scene::default() };
    let nobody = || ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let connection = UnbufferedClientConnection::new(config, name.unwrap_or_else(nobody))
        .map_err(|e| Error::new(ErrorKind::LocalProtocol, format!("rustls cannot start: {e}")))?;
    Ok(engine(Connection::Client(connection), scene))
}

/// A server's engine.
pub(crate) fn server(config: Arc<ServerConfig>) -> Result<BoxEngine> {
    let connection = UnbufferedServerConnection::new(config)
        .map_err(|e| Error::new(ErrorKind::LocalProtocol, format!("rustls cannot start: {e}")))?;
    Ok(engine(Connection::Server(connection), Scene { peer_is_client: true, ..Scene::default() }))
}

fn engine(connection: Connection, scene: Scene) -> BoxEngine {
    Box::new(RustlsEngine::Handshake(Box::new(Handshake {
        connection,
        scene: Some(Box::new(scene)),
        hello: ServerHello::default(),
        seen: 0,
    })))
}

impl RustlsEngine {
    fn traffic(&mut self) -> Result<&mut Traffic> {
        match self {
            Self::Traffic(traffic) => Ok(traffic),
            Self::Handshake(_) => Err(misuse("the handshake is not done")),
            Self::Failed => Err(misuse("the TLS connection failed before")),
        }
    }
}

impl TlsEngine for RustlsEngine {
    fn handshake(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<HandshakeProgress> {
        let Self::Handshake(handshake) = self else {
            return Err(misuse("the handshake is done or has failed"));
        };
        let done = match handshake.advance(incoming, outgoing) {
            Ok(done) => done,
            Err(error) => {
                *self = Self::Failed;
                return Err(error);
            }
        };
        if !done {
            return Ok(HandshakeProgress::NeedMore);
        }
        let Self::Handshake(handshake) = std::mem::replace(self, Self::Failed) else {
            return Err(misuse("the handshake is done or has failed"));
        };
        let (info, traffic) = handshake.finish()?;
        *self = Self::Traffic(Box::new(traffic));
        Ok(HandshakeProgress::Done(Box::new(info)))
    }

    fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened> {
        self.traffic()?.open(incoming, plain, marks, outgoing)
    }

    fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        self.traffic()?.seal(plain, outgoing)
    }

    fn close_notify(&mut self, outgoing: &mut Buffer) -> Result<()> {
        match self {
            Self::Traffic(traffic) => traffic.close_notify(outgoing),
            _ => Ok(()),
        }
    }

    fn fatal_alert(&mut self, description: u8, outgoing: &mut Buffer) {
        if let Self::Traffic(traffic) = self {
            traffic.fatal_alert(description, outgoing);
        }
    }

    fn update_keys(&mut self, outgoing: &mut Buffer) -> Result<()> {
        self.traffic()?.update_keys(outgoing)
    }

    fn export_keying_material(&mut self, label: &str, context: Option<&[u8]>, out: &mut [u8]) -> Result<()> {
        self.traffic()?.export(label, context, out)
    }

    fn release_idle(&mut self) {
        if let Self::Traffic(traffic) = self {
            traffic.release_idle();
        }
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

/// Whether a record of rustls's is an alert, in clear or sealed: no handshake message is as short.
fn is_alert(record: &[u8]) -> bool {
    const SEALED: usize = 2 + 1 + 16;
    match record {
        [ALERT, ..] => true,
        [APPLICATION_DATA, _, _, high, low, ..] => (usize::from(*high) << 8 | usize::from(*low)) == SEALED,
        _ => false,
    }
}

/// What one call into rustls led to.
enum Step {
    Again,
    Blocked,
    MaySend,
}

impl Handshake {
    /// Goes on until rustls is done or waits for the peer.
    fn advance(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<bool> {
        loop {
            let before = outgoing.len();
            let step = self.step(incoming, outgoing);
            if let Connection::Server(_) = self.connection {
                self.hello.watch_all(&outgoing.data()[before..]);
            }
            let waits = match &self.connection {
                Connection::Client(connection) => connection.is_handshaking(),
                Connection::Server(connection) => connection.is_handshaking(),
            };
            match step {
                Ok(Step::Again) => {}
                Ok(Step::MaySend) if !waits => return Ok(true),
                // A server may send before the client has finished; we do not.
                Ok(Step::MaySend | Step::Blocked) => {
                    let next = grant(&incoming.data()[self.seen..]);
                    if next == 0 {
                        return Ok(false);
                    }
                    if let Connection::Client(_) = self.connection {
                        self.hello.watch(&incoming.data()[self.seen..self.seen + next]);
                    }
                    self.seen += next;
                }
                Err(error) => {
                    let before = outgoing.len();
                    self.flush_alert(incoming, outgoing);
                    return Err(self.error(&error, before, outgoing));
                }
            }
        }
    }

    /// One call into rustls.
    fn step(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<Step, rustls::Error> {
        let data = &mut incoming.data_mut()[..self.seen];
        let connection = &mut self.connection;
        let (discard, step) = with_scene(&mut self.scene, || match connection {
            Connection::Client(connection) => step(connection.process_tls_records(data), outgoing),
            Connection::Server(connection) => step(connection.process_tls_records(data), outgoing),
        });
        incoming.consume(discard);
        self.seen -= discard;
        step
    }

    /// After an error rustls still has the alert to send. When it has nothing to send it looks at its
    /// input again, fails again and queues another alert; so this stops behind the first one.
    fn flush_alert(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) {
        loop {
            let before = outgoing.len();
            let step = self.step(incoming, outgoing);
            if !matches!(step, Ok(Step::Again)) || is_alert(&outgoing.data()[before..]) {
                return;
            }
        }
    }

    /// Our error, with the alert that was sent: `outgoing` has it from `before` on.
    fn error(&mut self, error: &rustls::Error, before: usize, outgoing: &mut Buffer) -> Error {
        let common: &CommonState = match &self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        };
        let tls13 = common.protocol_version() == Some(ProtocolVersion::TLSv1_3);
        let scene = self.scene.get_or_insert_default();
        let explained = match scene.rejection.take() {
            Some(rejection) => rejection.into_error(),
            None if scene.no_common_signature => Error::new(
                ErrorKind::IncompatiblePeer,
                "nothing in common with the peer: it accepts no signature of our certificate's kind",
            )
            .with_alert(alert::HANDSHAKE_FAILURE),
            None => explain(error, tls13),
        };
        if explained.alert_received() {
            return explained;
        }
        match (&outgoing.data()[before..], explained.alert()) {
            // Sent in clear, so there is no doubt which it was.
            (&[ALERT, 3, _, 0, 2, _, description], _) => explained.with_alert(description),
            // rustls says nothing about some broken messages; before keys exist we can.
            (&[], Some(description)) if self.hello.random().is_none() => {
                outgoing.extend(&[ALERT, 3, 3, 0, 2, 2, description]);
                explained
            }
            _ => explained,
        }
    }

    fn finish(self) -> Result<(HandshakeInfo, Traffic)> {
        let lost = || Error::new(ErrorKind::LocalProtocol, "rustls does not say what was agreed on");
        let mut scene = self.scene.unwrap_or_default();
        let common: &CommonState = match &self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        };
        let suite = common.negotiated_cipher_suite().ok_or_else(lost)?;
        let version = match common.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => TlsVersion::V1_3,
            Some(ProtocolVersion::TLSv1_2) => TlsVersion::V1_2,
            _ => return Err(lost()),
        };
        let is_client = matches!(self.connection, Connection::Client(_));
        let suite_name = Suite::by_id(suite.suite().into())
            .map(|s| s.iana.to_owned())
            .unwrap_or_else(|| format!("{:?}", suite.suite()));
        let info = HandshakeInfo {
            version: version.as_str(),
            cipher_suite: suite_name,
            group: common
                .negotiated_key_exchange_group()
                .and_then(|group| group_name(group.name()))
                .map(str::to_owned),
            alpn: common.alpn_protocol().map(<[u8]>::to_vec),
            peer_certificates: common
                .peer_certificates()
                .map(|chain| chain.iter().map(|c| c.to_vec()).collect())
                .unwrap_or_default(),
            psk_identity: None,
            server_name: scene.server_name.take().filter(|_| !is_client),
            is_client,
            own_end_point: scene.end_point.take(),
            resumed: common.handshake_kind() == Some(HandshakeKind::Resumed),
            engine: NAME,
        };
        let resumable = version == TlsVersion::V1_3;
        let failed =
            |e| Error::new(ErrorKind::LocalProtocol, format!("rustls does not hand its keys over: {e}"));
        let (keys, tickets): (ExtractedSecrets, Option<TicketSink>) = match self.connection {
            Connection::Client(connection) => {
                let (keys, kernel) = connection.dangerous_into_kernel_connection().map_err(failed)?;
                (keys, resumable.then(|| ticket_sink(kernel)))
            }
            Connection::Server(connection) => {
                (connection.dangerous_into_kernel_connection().map_err(failed)?.0, None)
            }
        };
        let secrets = std::mem::take(&mut scene.secrets);
        let hash = hash_of(suite);
        let (seal, aead) = direction(version, keys.tx)?;
        let (open, _) = direction(version, keys.rx)?;
        let (secrets, exporter) = match version {
            TlsVersion::V1_3 => {
                let client = secrets.client_traffic.ok_or_else(lost)?;
                let server = secrets.server_traffic.ok_or_else(lost)?;
                let (seal, open) = if is_client { (client, server) } else { (server, client) };
                (
                    Some(TrafficSecrets { seal, open }),
                    Exporter::Tls13 { secret: secrets.exporter.ok_or_else(lost)? },
                )
            }
            TlsVersion::V1_2 => {
                let client_random = secrets.client_random.ok_or_else(lost)?;
                let server_random = self.hello.random().ok_or_else(lost)?;
                (
                    None,
                    Exporter::Tls12 {
                        master: secrets.master.ok_or_else(lost)?,
                        randoms: [client_random, server_random],
                    },
                )
            }
        };
        let traffic = Traffic::new(TrafficParts {
            version,
            is_client,
            aead,
            hash,
            seal,
            open,
            secrets,
            exporter,
            tickets,
            max_plain: MAX_RECORD,
            psk: false,
        });
        Ok((info, traffic))
    }
}

fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Buffer,
) -> (usize, Result<Step, rustls::Error>) {
    let UnbufferedStatus { discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut state)) => {
            let mut room = 1024;
            loop {
                match state.encode(outgoing.reserve(room)) {
                    Ok(n) => {
                        outgoing.commit(n);
                        break Ok(Step::Again);
                    }
                    Err(EncodeError::InsufficientSize(needed)) => room = needed.required_size,
                    Err(EncodeError::AlreadyEncoded) => break Ok(Step::Again),
                }
            }
        }
        Ok(ConnectionState::TransmitTlsData(state)) => {
            state.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::MaySend),
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        // Early data is off, and records after the handshake are not given to rustls.
        Ok(_) => Err(rustls::Error::General("unexpected state in a handshake".to_owned())),
    };
    (discard, step)
}

fn ticket_sink(mut kernel: KernelConnection<rustls::client::ClientConnectionData>) -> TicketSink {
    Box::new(move |body| {
        kernel.handle_new_session_ticket(body).map_err(|e| {
            peer_misbehaved(alert::DECODE_ERROR, format!("a session ticket cannot be read: {e}"))
        })
    })
}

fn hash_of(suite: SupportedCipherSuite) -> Hash {
    let common = match suite {
        SupportedCipherSuite::Tls12(suite) => &suite.common,
        SupportedCipherSuite::Tls13(suite) => &suite.common,
    };
    if common.hash_provider.output_len() == 48 { Hash::Sha384 } else { Hash::Sha256 }
}

fn direction(version: TlsVersion, keys: (u64, ConnectionTrafficSecrets)) -> Result<(DirectionKeys, Aead)> {
    let (seq, secrets) = keys;
    let (aead, key, iv) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Aead::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Aead::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Aead::ChaCha20Poly1305, key, iv),
        _ => return Err(Error::new(ErrorKind::LocalProtocol, "rustls agreed on an unknown algorithm")),
    };
    let iv = iv
        .as_ref()
        .try_into()
        .map_err(|_| Error::new(ErrorKind::LocalProtocol, "rustls gave an IV of a strange length"))?;
    Ok((DirectionKeys::new(version, aead, key.as_ref(), iv, seq)?, aead))
}

/// Our error for rustls'.
fn explain(error: &rustls::Error, tls13: bool) -> Error {
    use rustls::Error as E;
    let peer = |description: u8, message: String| peer_misbehaved(description, message);
    match error {
        E::AlertReceived(description) => failure::alert_received((*description).into(), false),
        E::NoCertificatesPresented => Error::new(ErrorKind::Certificate, "the peer showed no certificate")
            .with_reason(CertificateReason::Missing.as_str())
            .with_alert(if tls13 { alert::CERTIFICATE_REQUIRED } else { alert::HANDSHAKE_FAILURE })
            .with_direction(Direction::Decapsulate),
        // A signature over the handshake that does not verify, or is of an unknown kind.
        E::InvalidCertificate(certificate) => {
            let description = AlertDescription::from(certificate.clone());
            verify::rejection(error, &[]).into_error().with_alert(description.into())
        }
        E::PeerIncompatible(why) => {
            Error::new(ErrorKind::IncompatiblePeer, format!("nothing in common with the peer: {why:?}"))
                .with_direction(Direction::Decapsulate)
        }
        E::NoApplicationProtocol => {
            Error::new(ErrorKind::IncompatiblePeer, "no application protocol (ALPN) in common")
                .with_alert(alert::NO_APPLICATION_PROTOCOL)
        }
        E::DecryptError => Error::new(
            ErrorKind::Tls,
            "a record does not verify: it was changed, repeated or lost on its way",
        )
        .with_alert(alert::BAD_RECORD_MAC)
        .with_reason("bad_record_mac")
        .with_direction(Direction::Decapsulate),
        E::PeerSentOversizedRecord => {
            peer(alert::RECORD_OVERFLOW, "a record is larger than any can be".to_owned())
        }
        E::InvalidMessage(why) => {
            peer(AlertDescription::from(*why).into(), format!("a message cannot be read: {why:?}"))
        }
        E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
            peer(alert::UNEXPECTED_MESSAGE, error.to_string())
        }
        E::PeerMisbehaved(why) => {
            Error::new(ErrorKind::RemoteProtocol, format!("the peer broke TLS: {why:?}"))
                .with_direction(Direction::Decapsulate)
        }
        other => Error::new(ErrorKind::LocalProtocol, format!("rustls failed: {other}")),
    }
}

/// Finds the server's random in the first bytes of its first handshake message, which may come in
/// records of any size. TLS 1.2's exporter needs it, and rustls keeps it to itself.
struct ServerHello {
    bytes: [u8; 38],
    len: usize,
}

impl Default for ServerHello {
    fn default() -> Self {
        Self { bytes: [0; 38], len: 0 }
    }
}

impl ServerHello {
    fn watch_all(&mut self, mut records: &[u8]) {
        while let Some(header) = records.first_chunk::<HEADER>() {
            let end = (HEADER + (usize::from(header[3]) << 8 | usize::from(header[4]))).min(records.len());
            let (record, rest) = records.split_at(end);
            self.watch(record);
            records = rest;
        }
    }

    fn watch(&mut self, record: &[u8]) {
        if let (Some(&HANDSHAKE), Some(payload)) = (record.first(), record.get(HEADER..)) {
            let n = payload.len().min(self.bytes.len() - self.len);
            self.bytes[self.len..self.len + n].copy_from_slice(&payload[..n]);
            self.len += n;
        }
    }

    /// Type, length (3 bytes), version (2 bytes), random.
    fn random(&self) -> Option<[u8; 32]> {
        if self.len == self.bytes.len() && self.bytes[0] == 2 {
            self.bytes[6..].try_into().ok()
        } else {
            None
        }
    }
}
