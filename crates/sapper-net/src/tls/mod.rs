//! TLS: configuration, two engines behind one trait, and the stream over a stream.
//!
//! - [`config`]: credentials, verification, versions, suites; parsed once, shared by connections.
//! - [`TlsEngine`]: rustls for certificates, OpenSSL for pre-shared keys and the few legacy modes
//!   that rustls refuses on purpose. The credentials choose; a user never does.
//! - [`stream`]: a [`crate::stream::Stream`] that seals and opens records over another one.

pub mod bench;
mod blocking;
mod capture;
pub mod certificate;
pub mod config;
mod credentials;
pub mod dev_cert;
pub mod early_data;
pub mod failure;
mod fruitless;
#[cfg(any(test, fuzzing))]
pub mod fuzzed;
pub(crate) mod greeting;
mod key_log;
mod key_schedule;
mod material;
mod openssl_config;
mod openssl_engine;
mod openssl_ffi;
pub mod options;
mod peer_rules;
mod plain;
mod record;
pub mod reload;
mod revocation;
mod rustls_config;
mod rustls_engine;
mod scene;
mod server_configs;
mod session_end;
mod settings;
mod shown;
pub mod stream;
mod suites;
mod traffic;
pub mod verify;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::Result;
use crate::stream::RecordMarks;

/// Largest plaintext of one record (RFC 8446, section 5.1).
pub const MAX_RECORD: usize = 16_384;

/// One TLS connection without I/O: ciphertext in one buffer, ciphertext out into another.
///
/// Order of calls: [`handshake`](Self::handshake) until it is done, then [`open`](Self::open) and
/// [`seal`](Self::seal) in any order, [`close_notify`](Self::close_notify) last. After an error
/// only what is already in `outgoing` (the alert) is still to be sent.
pub trait TlsEngine: Send {
    /// Goes on with the handshake: takes from `incoming`, appends to `outgoing`. Flush `outgoing`
    /// after each call whatever it returned, an error included.
    fn handshake(&mut self, incoming: &mut Buffer, outgoing: &mut Buffer) -> Result<HandshakeProgress>;

    /// Opens as many records of `incoming` as are whole and fit `plain`. Alerts, tickets and key
    /// updates are handled on the way; what they answer goes to `outgoing`.
    ///
    /// No progress (`produced == 0`, `Open::NeedMore`) means that `incoming` holds no whole record.
    fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened>;

    /// Seals `plain` as one record (several, where it is larger than [`MAX_RECORD`]).
    fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()>;

    /// Ends our sending direction. Repeated calls append nothing.
    fn close_notify(&mut self, outgoing: &mut Buffer) -> Result<()>;

    /// Appends a fatal alert (a policy said no, the peer sent data where none is allowed).
    fn fatal_alert(&mut self, description: u8, outgoing: &mut Buffer);

    /// New keys for our direction (TLS 1.3). In TLS 1.2 an error of kind `ApiMisuse`.
    fn update_keys(&mut self, outgoing: &mut Buffer) -> Result<()>;

    /// Keying material for a purpose (RFC 5705; RFC 8446, section 7.5).
    fn export_keying_material(&mut self, label: &str, context: Option<&[u8]>, out: &mut [u8]) -> Result<()>;

    /// Frees what an idle connection does not need.
    fn release_idle(&mut self);

    /// Whether the peer's part of the handshake is whole. A server that has taken early data is done with its
    /// own part before; until then neither keys nor keying material can be asked for.
    fn is_confirmed(&self) -> bool {
        true
    }

    /// Which engine this is: `"rustls"` or `"openssl"`.
    fn name(&self) -> &'static str;
}

/// How far a handshake is.
#[derive(Debug)]
pub enum HandshakeProgress {
    /// It waits for the peer.
    NeedMore,
    /// It is done. `incoming` may already hold records of application data.
    Done(Box<HandshakeInfo>),
}

/// What one [`TlsEngine::open`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Bytes written to `plain`.
    pub produced: usize,
    /// Application-data records opened.
    pub records: usize,
    /// Why it stopped.
    pub state: OpenState,
}

/// Why [`TlsEngine::open`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenState {
    /// `incoming` holds no further whole record.
    NeedMore,
    /// Another call does more: the next record may not fit what is left of `plain`, or it is an
    /// error that waits behind the data.
    Full,
    /// The peer ended its direction (close_notify); what follows in `incoming` is not TLS.
    Closed,
}

/// What the handshake agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HandshakeInfo {
    /// `"TLSv1.2"` or `"TLSv1.3"`.
    pub version: &'static str,
    /// IANA name: `TLS_AES_256_GCM_SHA384`, `TLS_PSK_WITH_AES_256_GCM_SHA384`.
    pub cipher_suite: String,
    /// Key exchange group (`X25519MLKEM768`), where there is one.
    pub group: Option<String>,
    /// Application protocol.
    pub alpn: Option<Vec<u8>>,
    /// The peer's chain in DER, its own certificate first.
    pub peer_certificates: Vec<Vec<u8>>,
    /// Pre-shared key identity, where one was used (servers).
    pub psk_identity: Option<String>,
    /// Name that the client asked for (servers).
    pub server_name: Option<String>,
    /// Whether we were the client.
    pub is_client: bool,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
    /// What became of early data, where there was some.
    pub early_data: Option<early_data::EarlyOutcome>,
    /// The channel binding `tls-server-end-point` (RFC 5929) of our own certificate (servers).
    pub own_end_point: Option<Arc<[u8]>>,
    /// Which engine did it.
    pub engine: &'static str,
}

impl HandshakeInfo {
    /// The channel binding `tls-server-end-point` (RFC 5929): a hash of the server's certificate. There is
    /// none without a certificate, and none for one whose signature has no hash of its own (Ed25519).
    pub fn server_end_point(&self) -> Option<Vec<u8>> {
        if let Some(own) = &self.own_end_point {
            return Some(own.to_vec());
        }
        // On servers the peer's certificate is a client's, and is no server's end point.
        self.peer_certificates.first().filter(|_| self.is_client).and_then(|der| server_end_point(der))
    }
}

/// The channel binding `tls-server-end-point` of a server's certificate (DER).
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    openssl_ffi::end_point_hash(openssl::x509::X509::from_der(certificate).ok()?.as_ref())
}

/// Which end of a handshake we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// We speak first. The name is checked against the certificate and sent as SNI where it is a
    /// DNS name; `None` needs a configuration that does not check names.
    Client {
        /// DNS name or IP address of the server.
        server_name: Option<String>,
    },
    /// We answer.
    Server,
}

/// An engine for one connection.
pub type BoxEngine = Box<dyn TlsEngine>;

/// Shared stand-in for what is parsed once.
pub type SharedTlsConfig = Arc<config::TlsConfig>;
