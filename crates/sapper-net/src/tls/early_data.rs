//! Early data (0-RTT, RFC 8446, section 2.3): what a client says behind its hello, and the time in which a
//! server talks to a client whose Finished has not come yet.
//!
//! A server accepts it only with tickets that it remembers, each good for once ([`Sessions`]): what somebody
//! recorded and sends again is not accepted a second time by the same configuration. rustls insists on that
//! too. Beyond one configuration (another process, a restart) nobody can tell; that is the danger.
//!
//! What is not here: rustls' handshake itself ([`super::rustls_engine`]), and who is told that the handshake
//! is whole by now ([`super::stream`]).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::{ClientConnectionData, EarlyDataError};
use rustls::server::StoresServerSessions;
use rustls::unbuffered::TransmitTlsData;
use zeroize::Zeroizing;

use super::MAX_RECORD;
use super::record::{APPLICATION_DATA, HEADER};
use super::session_end;
use crate::buffer::Buffer;

/// The most early data that can be asked for. It waits in memory on both sides, and goes out in one write.
pub const LARGEST: usize = 64 * 1024;

/// Sessions that a server with early data remembers: about 1.5 KB each where clients have certificates.
const REMEMBERED: usize = 4096;

/// What TLS 1.3 adds to a record's plaintext.
const OVERHEAD: usize = HEADER + 1 + 16;

/// What became of early data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlyOutcome {
    /// The server took it: so many bytes of ours (clients); of the client's some have come (servers).
    Accepted(usize),
    /// The server threw away what we had sent (clients).
    Rejected,
}

/// What a client wants to say before the handshake.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct EarlyData {
    /// The first bytes of the connection.
    pub bytes: Vec<u8>,
    /// Whether they are sent after the handshake where they could not be sent early, or were rejected.
    pub resend: bool,
}

impl fmt::Debug for EarlyData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EarlyData({} bytes, resend: {})", self.bytes.len(), self.resend)
    }
}

impl EarlyData {
    /// What is still to be sent after a handshake with this outcome.
    pub(crate) fn rest(&self, outcome: Option<EarlyOutcome>) -> &[u8] {
        match outcome {
            Some(EarlyOutcome::Accepted(sent)) => self.bytes.get(sent..).unwrap_or_default(),
            _ if self.resend => &self.bytes,
            _ => &[],
        }
    }
}

/// A client's early data on its way through rustls.
pub(super) struct Sending {
    bytes: Zeroizing<Vec<u8>>,
    /// Bytes that went out behind the hello; `None` before it has.
    sent: Option<usize>,
    /// EndOfEarlyData went out, which only a server that accepts hears.
    ended: bool,
}

impl Sending {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self { bytes: Zeroizing::new(bytes.to_vec()), sent: None, ended: false }
    }

    /// Whether the hello has gone out, with what could be said behind it.
    pub(super) fn begun(&self) -> bool {
        self.sent.is_some()
    }

    /// Behind the hello: as much as the ticket allows.
    pub(super) fn send(
        &mut self,
        state: &mut TransmitTlsData<'_, ClientConnectionData>,
        outgoing: &mut Buffer,
    ) -> Result<(), rustls::Error> {
        if self.sent.is_some() {
            return Ok(());
        }
        let mut sent = 0;
        if let Some(mut early) = state.may_encrypt_early_data() {
            for part in self.bytes.chunks(MAX_RECORD) {
                let written = match early.encrypt(part, outgoing.reserve(part.len() + OVERHEAD)) {
                    Ok(written) => written,
                    Err(EarlyDataError::ExceededAllowedEarlyData) => 0,
                    Err(EarlyDataError::Encrypt(_)) => {
                        return Err(rustls::Error::General("early data cannot be sealed".to_owned()));
                    }
                };
                outgoing.commit(written);
                let taken = written.saturating_sub(OVERHEAD);
                sent += taken;
                if taken < part.len() {
                    break;
                }
            }
        }
        self.sent = Some(sent);
        Ok(())
    }

    /// rustls does not say whether the server accepted; but only then does it send EndOfEarlyData, and no
    /// other message of a client's flight is as short.
    pub(super) fn watch(&mut self, mut records: &[u8]) {
        const EMPTY_MESSAGE: usize = 4 + 1 + 16;
        while let Some(&[kind, _, _, high, low]) = records.first_chunk::<HEADER>() {
            let len = usize::from(high) << 8 | usize::from(low);
            self.ended |= kind == APPLICATION_DATA && len == EMPTY_MESSAGE;
            records = records.get(HEADER + len..).unwrap_or_default();
        }
    }

    pub(super) fn outcome(&self) -> Option<EarlyOutcome> {
        match self.sent {
            Some(sent @ 1..) if self.ended => Some(EarlyOutcome::Accepted(sent)),
            Some(1..) => Some(EarlyOutcome::Rejected),
            _ => None,
        }
    }
}

/// Sessions that a server remembers, each of which is given out once in TLS 1.3.
pub(super) struct Sessions {
    kept: Mutex<Kept>,
    lifetime: Duration,
}

#[derive(Default)]
struct Kept {
    sessions: HashMap<Vec<u8>, (Instant, Zeroizing<Vec<u8>>)>,
    /// Oldest first; those taken meanwhile are skipped.
    order: VecDeque<Vec<u8>>,
}

impl Sessions {
    pub(super) fn new(lifetime: Duration) -> Self {
        Self { kept: Mutex::default(), lifetime }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_at(&self, now: Instant, key: Vec<u8>, value: Vec<u8>) {
        let mut kept = self.kept();
        // Names of sessions that were taken are left in the order; they leave it here.
        while kept.order.len() >= REMEMBERED {
            let Some(oldest) = kept.order.pop_front() else { break };
            kept.sessions.remove(&oldest);
        }
        kept.order.push_back(key.clone());
        kept.sessions.insert(key, (now, Zeroizing::new(value)));
    }

    fn take_at(&self, now: Instant, key: &[u8]) -> Option<Vec<u8>> {
        let (since, value) = self.kept().sessions.remove(key)?;
        (now.saturating_duration_since(since) <= self.lifetime).then(|| value.to_vec())
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sessions")
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.put_at(Instant::now(), key, session_end::stamped(&value));
        true
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let kept = self.kept();
        let (since, value) = kept.sessions.get(key)?;
        if since.elapsed() <= self.lifetime { session_end::unstamped(value) } else { None }
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.take_at(Instant::now(), key).and_then(|stamped| session_end::unstamped(&stamped))
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_given_out_once_and_not_when_it_is_old() {
        let sessions = Sessions::new(Duration::from_secs(60));
        let start = Instant::now();
        sessions.put_at(start, b"a".to_vec(), b"1".to_vec());
        sessions.put_at(start, b"b".to_vec(), b"2".to_vec());
        assert_eq!(sessions.take_at(start, b"a").as_deref(), Some(&b"1"[..]));
        assert_eq!(sessions.take_at(start, b"a"), None);
        assert_eq!(sessions.take_at(start + Duration::from_secs(61), b"b"), None);
    }

    #[test]
    fn the_oldest_sessions_make_room() {
        let sessions = Sessions::new(Duration::from_secs(60));
        let now = Instant::now();
        let name = |i: usize| i.to_be_bytes().to_vec();
        for i in 0..REMEMBERED + 10 {
            sessions.put_at(now, name(i), vec![1]);
            if i % 2 == 0 {
                sessions.take_at(now, &name(i));
            }
        }
        assert_eq!(sessions.take_at(now, &name(9)), None);
        assert!(sessions.take_at(now, &name(11)).is_some());
        let kept = sessions.kept();
        assert!(kept.order.len() <= REMEMBERED && kept.sessions.len() <= REMEMBERED);
    }

    #[test]
    fn what_is_sent_after_the_handshake() {
        let mut early = EarlyData { bytes: b"hello".to_vec(), resend: false };
        assert_eq!(early.rest(Some(EarlyOutcome::Accepted(2))), b"llo");
        assert_eq!(early.rest(Some(EarlyOutcome::Rejected)), b"");
        assert_eq!(early.rest(None), b"");
        early.resend = true;
        assert_eq!(early.rest(Some(EarlyOutcome::Rejected)), b"hello");
        assert_eq!(early.rest(None), b"hello");
    }
}
