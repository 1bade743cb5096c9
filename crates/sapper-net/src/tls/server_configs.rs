//! Which of rustls' configurations serves a client: the suite is chosen with regard to the session that it offers.
//!
//! A client that holds a session of another hash than that of the suite that we choose cannot resume it. Where we
//! ask it for another hello as well (for a key share), it leaves the session out there, as RFC 8446, section 4.1.2,
//! lets it; and rustls' server takes that for misbehaviour. So whoever offers a session gets a suite of its hash,
//! where there is one. The session may be of a server that was here before us: its ticket need not be ours.

use std::sync::Arc;

use rustls::ServerConfig;
use sapper_proto::client_hello::{ClientHello, Parsed, Peek};

use super::options::TlsVersion;
use super::suites::Suite;

/// Bytes of a binder, for each hash of TLS 1.3.
const SHA256: usize = 32;
const SHA384: usize = 48;

/// The configurations of one server, which share everything but suites.
pub(crate) struct ServerConfigs {
    usual: Arc<ServerConfig>,
    /// With the suites of TLS 1.3 that have SHA-256, or SHA-384; where `usual` has both.
    by_hash: Option<[Arc<ServerConfig>; 2]>,
}

impl ServerConfigs {
    pub(crate) fn new(usual: Arc<ServerConfig>, by_hash: Option<[Arc<ServerConfig>; 2]>) -> Self {
        Self { usual, by_hash }
    }

    /// What most clients are served by.
    pub(crate) fn usual(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.usual)
    }

    /// What serves the client that begins with this record, where that is not the usual one. A hello in several
    /// records is not looked at; what is wrong with one, rustls says.
    pub(crate) fn other_for(&self, record: &[u8]) -> Option<Arc<ServerConfig>> {
        let by_hash = self.by_hash.as_ref()?;
        let Ok(Parsed::Done { value: ClientHello { cipher_suites, binder, .. }, .. }) =
            Peek::new().peek(record)
        else {
            return None;
        };
        let sha384 = match binder? {
            SHA256 => false,
            SHA384 => true,
            _ => return None,
        };
        let ours = &self.usual.crypto_provider().cipher_suites;
        let hashes: Vec<bool> = cipher_suites
            .iter()
            .filter(|id| ours.iter().any(|suite| u16::from(suite.suite()) == **id))
            .filter_map(|id| Suite::by_id(*id).filter(|suite| suite.version == TlsVersion::V1_3))
            .map(Suite::is_sha384)
            .collect();
        // The client's favourite is what rustls takes.
        let unlike = hashes.first() == Some(&!sha384) && hashes.contains(&sha384);
        unlike.then(|| Arc::clone(&by_hash[usize::from(sha384)]))
    }
}
