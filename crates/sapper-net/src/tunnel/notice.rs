//! What a tunnel tells its owner: which event, of which tunnel and stream, and what belongs to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bridge::{ControlMailbox, Event};
use crate::error::Error;

/// Something happened. Names are those of W3PTUNL's events; docs/tunnel.md has their order.
#[derive(Debug, Default)]
pub struct Notice {
    /// The event's name.
    pub name: &'static str,
    /// Which client's tunnel, at a server.
    pub tunnel: Option<Arc<TunnelInfo>>,
    /// Which stream, counted from 1 in each tunnel, and the address of its visitor.
    pub stream: Option<(u64, String)>,
    /// Bytes since the last such event of the stream.
    pub bytes: u64,
    /// The main port, or the public one.
    pub port: Option<u16>,
    /// Whether TLS is spoken there.
    pub secure: bool,
    /// Seconds until the next try.
    pub seconds: Option<f64>,
    /// What went wrong.
    pub error: Option<Error>,
}

/// One client's tunnel.
#[derive(Debug, Default)]
pub struct TunnelInfo {
    /// Counted from 1 at each server.
    pub id: u64,
    /// Where the client comes from.
    pub client: String,
    /// What it said of itself, a JSON object.
    pub credentials: String,
    /// Its public port.
    pub port: u16,
    /// Whether the two ends are of our own kind.
    pub negotiated: bool,
}

/// Events of visitors are wanted.
pub const VISITORS: u8 = 1;
/// Events of payload are wanted: how many bytes.
pub const DATA: u8 = 2;

/// Tells.
pub(super) struct Teller {
    mailbox: Arc<ControlMailbox>,
    key: u64,
    wanted: AtomicU8,
}

impl Teller {
    pub(super) fn new(mailbox: Arc<ControlMailbox>, key: u64) -> Self {
        Self { mailbox, key, wanted: AtomicU8::new(0) }
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
