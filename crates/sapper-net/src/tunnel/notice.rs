//! What a tunnel tells its owner: which event, of which tunnel and stream, and what belongs to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::bridge::{ControlMailbox, Event};
use crate::error::Error;

/// Something happened. Names are those of W3PTUNL's events; docs/tunnel.md has their order.
#[derive(Debug, Default)]
pub struct Notice {
    /// The event's name.
    pub name: &'static str,
    /// Which client's tunnel, at a server.
    pub tunnel: Option<Arc<TunnelInfo>>,
    /// Which connection of its client goes on with a session.
    pub connection: Option<u64>,
    /// Which tunnel the connection carried that ended.
    pub session: Option<u64>,
    /// Which stream.
    pub stream: Option<StreamInfo>,
    /// Bytes since the last such event of the stream.
    pub bytes: u64,
    /// The first of them, where they are wanted.
    pub payload: Option<Copied>,
    /// The main port, or the public one.
    pub port: Option<u16>,
    /// A client's services with their public ports.
    pub services: Vec<ServiceInfo>,
    /// Whether TLS is spoken there.
    pub secure: bool,
    /// Seconds until the next try.
    pub seconds: Option<f64>,
    /// What went wrong.
    pub error: Option<Error>,
}

/// A visitor, or the connection to a service that serves one.
#[derive(Clone, Debug, Default)]
pub struct StreamInfo {
    /// Counted from 1 in each tunnel.
    pub number: u64,
    /// The visitor's address, where it is known.
    pub visitor: String,
    /// Which service, by its name.
    pub service: String,
}

/// A service and where its visitors come in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceInfo {
    /// Empty for the one that was not given a name.
    pub name: String,
    /// Its public port.
    pub port: u16,
    /// Where that is, where it is not the host at which the client found the server.
    pub host: Option<String>,
}

/// One client's tunnel.
#[derive(Clone, Debug, Default)]
pub struct TunnelInfo {
    /// The connection's, counted from 1 at each server; a tunnel has that of the connection that made it.
    pub id: u64,
    /// Where the client comes from.
    pub client: String,
    /// What it said of itself, a JSON object.
    pub credentials: String,
    /// The name whose ports it wants, where it says one.
    pub lease: Option<String>,
    /// The public port of its first service.
    pub port: u16,
    /// Whether the two ends are of our own kind.
    pub negotiated: bool,
    /// All of its services, once they have their ports.
    pub services: Vec<ServiceInfo>,
}

/// Events of visitors are wanted.
pub const VISITORS: u8 = 1;
/// Events of payload are wanted: how many bytes.
pub const DATA: u8 = 2;
/// Events of payload are to carry the bytes, as far as they fit.
pub const PAYLOAD: u8 = 4;

/// The most that one event carries: what a stream moves in a tenth of a second at 5 Mbit/s.
const MOST_COPIED: usize = 64 * 1024;
/// The most that all events of one server or client carry which nobody has taken yet.
const MOST_HELD: usize = 4 * 1024 * 1024;

/// A bounded copy of payload: the first bytes of what an event is about.
#[derive(Debug)]
pub struct Copied {
    bytes: Vec<u8>,
    /// What came after it was left out: what follows is no continuation.
    ended: bool,
    held: Arc<AtomicUsize>,
}

impl Copied {
    fn add(&mut self, data: &[u8]) {
        if self.ended {
            return;
        }
        let room = data.len().min(MOST_COPIED - self.bytes.len());
        let before = self.held.fetch_add(room, Ordering::Relaxed);
        let taken = room.min(MOST_HELD.saturating_sub(before));
        self.held.fetch_sub(room - taken, Ordering::Relaxed);
        self.bytes.extend_from_slice(&data[..taken]);
        self.ended = taken < data.len();
    }
}

impl std::ops::Deref for Copied {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// Tells.
pub(super) struct Teller {
    mailbox: Arc<ControlMailbox>,
    key: u64,
    wanted: AtomicU8,
    /// Bytes in copies that nobody has taken.
    held: Arc<AtomicUsize>,
}

impl Teller {
    pub(super) fn new(mailbox: Arc<ControlMailbox>, key: u64) -> Self {
        Self { mailbox, key, wanted: AtomicU8::new(0), held: Arc::default() }
    }

    /// Adds to the copy of a stream's payload, where one is wanted.
    pub(super) fn copy(&self, copied: &mut Option<Copied>, data: &[u8]) {
        if self.wants(PAYLOAD) {
            let new = || Copied { bytes: Vec::new(), ended: false, held: Arc::clone(&self.held) };
            copied.get_or_insert_with(new).add(data);
        }
    }

    /// Sets which of the frequent events are wanted.
    pub(super) fn watch(&self, wanted: u8) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    pub(super) fn wants(&self, what: u8) -> bool {
        self.wanted.load(Ordering::Relaxed) & what != 0
    }

    pub(super) fn tell(&self, notice: Notice) {
        tracing::debug!(
            event = notice.name,
            port = notice.port,
            error = notice.error.as_ref().map(Error::message)
        );
        self.mailbox.event(self.key, Event::Tunnel(Box::new(notice)));
    }

    pub(super) fn mailbox(&self) -> (&Arc<ControlMailbox>, u64) {
        (&self.mailbox, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(held: &Arc<AtomicUsize>) -> Copied {
        Copied { bytes: Vec::new(), ended: false, held: Arc::clone(held) }
    }

    #[test]
    fn a_copy_is_the_first_bytes_and_no_more_than_its_bound() {
        let held = Arc::default();
        let mut one = copied(&held);
        one.add(&[1; MOST_COPIED - 1]);
        one.add(&[2; 2]);
        one.add(&[3]);
        assert_eq!((one.len(), one.last()), (MOST_COPIED, Some(&2)), "nothing behind a gap");
        drop(one);
        assert_eq!(held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn all_copies_together_are_bounded() {
        let held = Arc::default();
        let mut all: Vec<_> = (0..=MOST_HELD / MOST_COPIED).map(|_| copied(&held)).collect();
        for one in &mut all {
            one.add(&[0; MOST_COPIED]);
        }
        assert_eq!(all.pop().map(|last| last.len()), Some(0));
        assert_eq!(held.load(Ordering::Relaxed), MOST_HELD);
        all.pop();
        let mut next = copied(&held);
        next.add(b"room again");
        assert_eq!(&*next, b"room again");
    }
}
