//! A service of a tunnel at work, the same at both ends: what it is called, and what it did.
//!
//! What is not here: where it listens ([`public`](super::public)) and how it is reached
//! ([`service`](super::service)).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::limit::Meter;
use super::notice::ServiceInfo;

/// What a service did and does, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceStats {
    /// Which.
    pub info: ServiceInfo,
    /// Visitors now.
    pub visitors: u64,
    /// Visitors since its tunnel began.
    pub visits: u64,
    /// Payload towards the other end of the tunnel.
    pub sent: u64,
    /// Payload from it.
    pub received: u64,
    /// Visitors that were sent away, for whatever reason.
    pub refused: u64,
    /// Times that a stream waited for a limit of bytes a second.
    pub paused: u64,
    /// Streams that were cut by a limit of bytes in all.
    pub cut: u64,
}

/// A service of a tunnel. One task writes, anybody reads.
#[derive(Debug, Default)]
pub(super) struct Served {
    info: ServiceInfo,
    /// Its limits, which a reload exchanges.
    meter: Mutex<Option<Arc<Meter>>>,
    visitors: AtomicU64,
    visits: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    refused: AtomicU64,
    paused: AtomicU64,
    cut: AtomicU64,
}

impl Served {
    pub(super) fn new(info: ServiceInfo, meter: Option<Arc<Meter>>) -> Self {
        Self { info, meter: Mutex::new(meter), ..Self::default() }
    }

    /// Its limits, where it has some.
    pub(super) fn meter(&self) -> Option<Arc<Meter>> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It has others from here on.
    pub(super) fn set_meter(&self, meter: Option<Arc<Meter>>) {
        *self.meter.lock().unwrap_or_else(PoisonError::into_inner) = meter;
    }

    pub(super) fn info(&self) -> &ServiceInfo {
        &self.info
    }

    pub(super) fn came(&self) {
        self.visitors.fetch_add(1, Relaxed);
        self.visits.fetch_add(1, Relaxed);
    }

    pub(super) fn left(&self) {
        self.visitors.fetch_sub(1, Relaxed);
    }

    pub(super) fn moved(&self, sent: u64, received: u64) {
        if sent > 0 {
            self.sent.fetch_add(sent, Relaxed);
        }
        if received > 0 {
            self.received.fetch_add(received, Relaxed);
        }
    }

    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    pub(super) fn paused(&self) {
        self.paused.fetch_add(1, Relaxed);
    }

    pub(super) fn cut(&self) {
        self.cut.fetch_add(1, Relaxed);
    }

    pub(super) fn stats(&self) -> ServiceStats {
        ServiceStats {
            info: self.info.clone(),
            visitors: self.visitors.load(Relaxed),
            visits: self.visits.load(Relaxed),
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
            refused: self.refused.load(Relaxed),
            paused: self.paused.load(Relaxed),
            cut: self.cut.load(Relaxed),
        }
    }
}
