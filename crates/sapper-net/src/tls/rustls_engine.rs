//! The engine whose handshakes rustls does: certificates, TLS 1.2 and 1.3.
//!
//! rustls gets one record at a time, so that it never opens one that belongs to our record layer.
//! When the handshake is done its secrets are taken out ([`rustls::kernel`]) and its state is dropped,
//! except what a client needs to keep tickets. Only a server that has taken early data talks to its client
//! before: its records are rustls' until the client's Finished has come ([`Early`]).

mod early;

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

use early::{Early, take_early};

use super::early_data::{EarlyOutcome, Sending};
use super::failure::{self, CertificateReason, alert, misuse, peer_misbehaved};
use super::key_schedule::{Exporter, Hash};
use super::options::TlsVersion;
use super::record::{ALERT, APPLICATION_DATA, Aead, DirectionKeys, HANDSHAKE, HEADER, grant};
use super::rustls_config::group_name;
use super::scene::{Scene, with_scene};
use super::server_configs::ServerConfigs;
use super::suites::Suite;
use super::traffic::{TicketSink, Traffic, TrafficParts, TrafficSecrets};
use super::{BoxEngine, HandshakeInfo, HandshakeProgress, MAX_RECORD, Opened, TlsEngine, plain, verify};
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::stream::RecordMarks;

const NAME: &str = "rustls";

/// A connection's engine.
enum RustlsEngine {
    Handshake(Box<Handshake>),
    Early(Box<Early>),
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
    /// A client's early data, where it has some.
    sending: Option<Sending>,
    /// What a server may still choose by the client's first record.
    configs: Option<Arc<ServerConfigs>>,
    /// A client's early data that has come, and nobody has taken.
    early: Vec<u8>,
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// A client's engine. Without a name rustls still wants one; this one is never sent. Early data needs a
/// configuration that has it on.
pub(crate) fn client(
    config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
    early: Option<&[u8]>,
) -> Result<BoxEngine> {
    let scene =
        Scene { server_name: name.as_ref().map(|name| name.to_str().into_owned()), ..Scene::default() };
    let nobody = || ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let connection = UnbufferedClientConnection::new(config, name.unwrap_or_else(nobody))
        .map_err(|e| Error::new(ErrorKind::LocalProtocol, format!("rustls cannot start: {e}")))?;
    Ok(engine(Connection::Client(connection), scene, early.map(Sending::new), None))
}

/// A server's engine.
pub(crate) fn server(configs: Arc<ServerConfigs>) -> Result<BoxEngine> {
    let connection = serving(configs.usual())?;
    let scene = Scene { peer_is_client: true, ..Scene::default() };
    Ok(engine(connection, scene, None, Some(configs)))
}

fn serving(config: Arc<ServerConfig>) -> Result<Connection> {
    let connection = UnbufferedServerConnection::new(config)
        .map_err(|e| Error::new(ErrorKind::LocalProtocol, format!("rustls cannot start: {e}")))?;
    Ok(Connection::Server(connection))
}

fn engine(
    connection: Connection,
    scene: Scene,
    sending: Option<Sending>,
    configs: Option<Arc<ServerConfigs>>,
) -> BoxEngine {
    Box::new(RustlsEngine::Handshake(Box::new(Handshake {
        connection,
        scene: Some(Box::new(scene)),
        hello: ServerHello::default(),
        seen: 0,
        sending,
        configs,
        early: Vec::new(),
    })))
}

impl RustlsEngine {
    fn traffic(&mut self) -> Result<&mut Traffic> {
        match self {
            Self::Traffic(traffic) => Ok(traffic),
            Self::Handshake(_) => Err(misuse("the handshake is not done")),
            Self::Early(_) => Err(Error::new(
                ErrorKind::NotStarted,
                "the client has not finished the handshake, only sent early data: wait until it is confirmed",
            )),
            Self::Failed => Err(misuse("the TLS connection failed before")),
        }
    }
}

impl TlsEngine for RustlsEngine {
    fn handshake(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<HandshakeProgress> {
        let Self::Handshake(handshake) = self else {
            return Err(misuse("the handshake is done or has failed"));
        };
        let advanced = match handshake.advance(incoming, outgoing) {
            Ok(Advance::Waits) => return Ok(HandshakeProgress::NeedMore),
            Ok(advanced) => advanced,
            Err(error) => {
                *self = Self::Failed;
                return Err(error);
            }
        };
        let Self::Handshake(mut handshake) = std::mem::replace(self, Self::Failed) else {
            return Err(misuse("the handshake is done or has failed"));
        };
        let info = handshake.info(matches!(advanced, Advance::Early))?;
        *self = match advanced {
            Advance::Early => Self::Early(Box::new(Early::new(*handshake))),
            _ => Self::Traffic(Box::new(handshake.finish()?)),
        };
        Ok(HandshakeProgress::Done(Box::new(info)))
    }

    fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened> {
        if let Self::Early(early) = self {
            match early.open(incoming, plain, marks, outgoing) {
                Ok(Some(opened)) => return Ok(opened),
                Ok(None) => self.confirm()?,
                Err(error) => {
                    *self = Self::Failed;
                    return Err(error);
                }
            }
        }
        self.traffic()?.open(incoming, plain, marks, outgoing)
    }

    fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        match self {
            Self::Early(early) => early.seal(plain, outgoing),
            _ => self.traffic()?.seal(plain, outgoing),
        }
    }

    fn close_notify(&mut self, outgoing: &mut Buffer) -> Result<()> {
        match self {
            Self::Traffic(traffic) => traffic.close_notify(outgoing),
            Self::Early(early) => early.say_last(&[1, alert::CLOSE_NOTIFY], outgoing),
            _ => Ok(()),
        }
    }

    fn fatal_alert(&mut self, description: u8, outgoing: &mut Buffer) {
        match self {
            Self::Traffic(traffic) => traffic.fatal_alert(description, outgoing),
            // It can fail for want of keys only, and then nothing can be said any more.
            Self::Early(early) => drop(early.say_last(&[2, description], outgoing)),
            _ => {}
        }
    }

    fn update_keys(&mut self, outgoing: &mut Buffer) -> Result<()> {
        self.traffic()?.update_keys(outgoing)
    }

    fn export_keying_material(&mut self, label: &str, context: Option<&[u8]>, out: &mut [u8]) -> Result<()> {
        self.traffic()?.export(label, context, out)
    }

    fn release_idle(&mut self) {
        match self {
            Self::Traffic(traffic) => traffic.release_idle(),
            Self::Early(early) => early.release_idle(),
            _ => {}
        }
    }

    fn is_confirmed(&self) -> bool {
        !matches!(self, Self::Early(_))
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

impl RustlsEngine {
    /// The client's Finished has come.
    fn confirm(&mut self) -> Result<()> {
        if let Self::Early(early) = std::mem::replace(self, Self::Failed) {
            *self = Self::Traffic(Box::new(early.finish()?));
        }
        Ok(())
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
    Early,
}

/// How far a handshake has come.
enum Advance {
    Waits,
    /// The client has said something before its Finished (servers).
    Early,
    Done,
}

impl Handshake {
    /// Goes on until rustls is done or waits for the peer.
    fn advance(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<Advance> {
        loop {
            let before = outgoing.len();
            let begun = self.sending.as_ref().is_some_and(Sending::begun);
            let step = self.step(incoming, outgoing);
            if let Connection::Server(_) = self.connection {
                self.hello.watch_all(&outgoing.data()[before..]);
            }
            if let (Some(sending), true) = (&mut self.sending, begun) {
                sending.watch(&outgoing.data()[before..]);
            }
            let waits = match &self.connection {
                Connection::Client(connection) => connection.is_handshaking(),
                Connection::Server(connection) => connection.is_handshaking(),
            };
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Early) => return Ok(Advance::Early),
                Ok(Step::MaySend) if !waits => return Ok(Advance::Done),
                // A server may send before the client has finished; we do not.
                Ok(Step::MaySend | Step::Blocked) => {
                    let next = grant(&incoming.data()[self.seen..]);
                    if next == 0 {
                        return Ok(Advance::Waits);
                    }
                    let record = &incoming.data()[self.seen..self.seen + next];
                    // rustls passes it over, as it does any warning before there are keys.
                    if let [ALERT, _, _, 0, 2, _, alert::CLOSE_NOTIFY] = record {
                        return Err(failure::closed_in_handshake());
                    }
                    if let Connection::Client(_) = self.connection {
                        self.hello.watch(record);
                    }
                    if let Some(config) = self.configs.take().and_then(|configs| configs.other_for(record)) {
                        self.connection = serving(config)?;
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
        let (connection, sending, early) = (&mut self.connection, &mut self.sending, &mut self.early);
        let (discard, step) = with_scene(&mut self.scene, || match connection {
            Connection::Client(connection) => {
                let mut status = connection.process_tls_records(data);
                if let (Some(sending), Ok(ConnectionState::TransmitTlsData(state))) =
                    (sending, &mut status.state)
                    && let Err(error) = sending.send(state, outgoing)
                {
                    return (status.discard, Err(error));
                }
                step(status, outgoing)
            }
            Connection::Server(connection) => {
                let mut status = connection.process_tls_records(data);
                if let Ok(ConnectionState::ReadEarlyData(state)) = &mut status.state {
                    return (status.discard, take_early(state, early));
                }
                step(status, outgoing)
            }
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

    fn common(&self) -> &CommonState {
        match &self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        }
    }

    fn agreed(&self) -> Result<(TlsVersion, SupportedCipherSuite)> {
        let suite = self.common().negotiated_cipher_suite().ok_or_else(lost)?;
        match self.common().protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => Ok((TlsVersion::V1_3, suite)),
            Some(ProtocolVersion::TLSv1_2) => Ok((TlsVersion::V1_2, suite)),
            _ => Err(lost()),
        }
    }

    /// What was agreed on; `early` where the client has sent early data that was accepted (servers).
    fn info(&mut self, early: bool) -> Result<HandshakeInfo> {
        let mut scene = self.scene.take().unwrap_or_default();
        let (version, suite) = self.agreed()?;
        let is_client = matches!(self.connection, Connection::Client(_));
        let common = self.common();
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
            early_data: match &self.sending {
                Some(sending) => sending.outcome(),
                None => early.then_some(EarlyOutcome::Accepted(0)),
            },
            engine: NAME,
        };
        self.scene = Some(scene);
        Ok(info)
    }

    fn finish(self) -> Result<Traffic> {
        let (version, suite) = self.agreed()?;
        let is_client = matches!(self.connection, Connection::Client(_));
        let mut scene = self.scene.unwrap_or_default();
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
        });
        Ok(traffic)
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::LocalProtocol, "rustls does not say what was agreed on")
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
        // Records after the handshake are not given to rustls.
        Ok(_) => Err(rustls::Error::General("unexpected state in a handshake".to_owned())),
    };
    (discard, step)
}

fn ticket_sink(mut kernel: KernelConnection<rustls::client::ClientConnectionData>) -> TicketSink {
    Box::new(move |body| {
        kernel.handle_new_session_ticket(body).map_err(|e| {
            peer_misbehaved(
                alert::DECODE_ERROR,
                format!("a session ticket cannot be read: {}", plain::said(&e)),
            )
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
        E::PeerIncompatible(why) => Error::new(
            ErrorKind::IncompatiblePeer,
            format!("nothing in common with the peer: {}", plain::incompatible(why)),
        )
        .with_direction(Direction::Decapsulate),
        E::NoApplicationProtocol => {
            Error::new(ErrorKind::IncompatiblePeer, "no application protocol (ALPN) in common")
                .with_alert(alert::NO_APPLICATION_PROTOCOL)
        }
        E::DecryptError => failure::bad_record(""),
        E::PeerSentOversizedRecord => {
            peer(alert::RECORD_OVERFLOW, "a record is larger than any can be".to_owned())
        }
        E::InvalidMessage(why) => peer(
            AlertDescription::from(*why).into(),
            format!("a message cannot be read: {}", plain::unreadable(why)),
        ),
        E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
            peer(alert::UNEXPECTED_MESSAGE, plain::said(error).into_owned())
        }
        E::PeerMisbehaved(why) => {
            Error::new(ErrorKind::RemoteProtocol, format!("the peer broke TLS: {}", plain::misbehaved(why)))
                .with_direction(Direction::Decapsulate)
        }
        other => Error::new(ErrorKind::LocalProtocol, format!("rustls failed: {}", plain::said(other))),
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
