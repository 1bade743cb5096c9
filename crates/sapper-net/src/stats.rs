//! Counters that a pump writes and anybody reads. Relaxed atomics: one writer, approximate readers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. There is one writer, so a plain load and store do (no locked instruction).
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Why a packet was dropped. Each drop is counted under one of these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason { $($(#[$doc])* $name,)* }

        impl DropReason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];

            /// The word in stats and metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }
        }
    };
}

drop_reasons! {
    /// Larger than the other side takes.
    TooLarge = "too_large";
    /// Not a packet that the framing carries (bad header, other IP version).
    Malformed = "malformed";
    /// The receiver's queue was full and the port may drop.
    QueueFull = "queue_full";
    /// The device refused it (down, no memory).
    Refused = "refused";
    /// A large packet whose state could not be used.
    BadOffload = "bad_offload";
    /// That direction is paused and its port cannot wait.
    Paused = "paused";
    /// Nobody takes packets for that destination.
    NoRoute = "no_route";
    /// Skipped while looking for the next record boundary.
    Resync = "resync";
}

/// Drops by reason.
#[derive(Debug, Default)]
pub struct Drops([Counter; DropReason::ALL.len()]);

impl Drops {
    /// Counts `n` drops.
    pub fn add(&self, reason: DropReason, n: u64) {
        self.0[reason as usize].add(n);
    }

    /// Each reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&reason| (reason, self.0[reason as usize].get()))
    }

    /// All drops.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// What one endpoint has done. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct EndpointStats {
    /// Bytes received from the endpoint (stream bytes, or bytes of packets).
    pub bytes_received: Counter,
    /// Bytes sent to the endpoint.
    pub bytes_sent: Counter,
    /// Packets received, counted as they would lie on a wire (segments of a super-packet each).
    pub packets_received: Counter,
    /// Packets sent, counted the same way.
    pub packets_sent: Counter,
    /// TLS records opened.
    pub records_received: Counter,
    /// TLS records sealed.
    pub records_sent: Counter,
    /// System calls that received.
    pub receive_calls: Counter,
    /// System calls that sent.
    pub send_calls: Counter,
    /// Packets dropped.
    pub drops: Drops,
}
