//! Packet ports: whole packets, may drop. The other kind of endpoint.
//!
//! Ports hand over [`PacketBatch`]es. Every port passes the conformance suite in [`conformance`].

pub mod adapt;
pub mod conformance;
pub mod counter;
pub mod datagram;
pub mod framed;
pub mod memory;
pub mod spec;
mod sys;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod tun;
pub mod udp;

use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};

pub use sapper_proto::packet::PacketBatch;
use sapper_proto::packet::{Checksum, Gso, Packet};

use crate::buffer::BLOCK;
use crate::error::Result;
use crate::stats::{DropReason, EndpointStats};
use crate::stream::Stream;

/// Packets that one batch holds at most: a `sendmmsg` of this size costs what 64 calls would in
/// system time, and its latency stays below a tenth of a millisecond.
pub const BATCH_PACKETS: usize = 256;

/// Batches that a thread keeps for reuse: 4 MiB of arenas at most stay after a burst.
const KEEP_BATCHES: usize = 16;

thread_local! {
    static BATCHES: RefCell<Vec<PacketBatch>> = const { RefCell::new(Vec::new()) };
}

/// An empty batch from the thread's pool: [`BATCH_PACKETS`] packets in [`BLOCK`] bytes.
pub fn take_batch() -> PacketBatch {
    BATCHES.with_borrow_mut(Vec::pop).unwrap_or_else(|| PacketBatch::new(BLOCK, BATCH_PACKETS))
}

/// Gives a batch back; what it holds is forgotten.
pub fn give_batch(mut batch: PacketBatch) {
    batch.clear();
    // A thread that ends has no pool any more: then the batch is freed.
    let _ = BATCHES.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        if pool.len() < KEEP_BATCHES {
            pool.push(batch);
        }
    });
}

/// Whole packets in both directions; the rules of `poll_*` are those of [`crate::stream::Stream`].
pub trait PacketPort: Send {
    /// What the port takes now. It may change while it runs (path MTU, an interface's MTU): the pump
    /// asks before each batch, so this is cheap.
    fn abilities(&self) -> PortAbilities;

    /// Appends at least one packet to `batch` (which has room for one of the largest size) and as
    /// many more as are there and fit. `Ok(false)` is the orderly end of the port.
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>>;

    /// Becomes ready when [`poll_receive`](Self::poll_receive) is worth a batch.
    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Takes the packets of `batch` from the front: sends them, or drops and counts what it cannot
    /// carry. Ready when the batch is empty; `Pending` leaves what was not taken.
    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>>;

    /// Ready when all that was taken is handed to the system.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Says that no more packets come, where the port can say so.
    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// The descriptor behind it, where there is one.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Gives pooled memory back; called when nothing moved for a moment.
    fn release_idle(&mut self) {}

    /// As of a [`Stream`].
    fn is_movable(&self) -> bool {
        false
    }

    /// As of a [`Stream`].
    fn moved(&mut self) -> Result<()> {
        Ok(())
    }

    /// Its counters.
    fn stats(&self) -> &Arc<EndpointStats>;

    /// The stream that carries the packets, where there is one.
    fn stream_mut(&mut self) -> Option<&mut dyn Stream> {
        None
    }

    /// For people: `tun sapper0 (virtio-net, TSO4 TSO6 USO)`.
    fn describe(&self) -> String;

    /// Offloads in use, or why not, for `stats()`: `("tso", "on")`, `("uso", "off: kernel 5.10")`.
    fn offloads(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// A port of any kind.
pub type BoxPort = Box<dyn PacketPort>;

/// What a port takes on sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAbilities {
    /// Largest ordinary packet in bytes.
    pub max_packet: usize,
    /// Takes TCP super-packets over IPv4.
    pub tso4: bool,
    /// Takes TCP super-packets over IPv6.
    pub tso6: bool,
    /// Takes UDP super-packets.
    pub uso: bool,
    /// Takes packets whose checksum is partial.
    pub partial_checksum: bool,
    /// Takes bare datagrams back to back ([`sapper_proto::packet::Gso::Datagrams`]).
    pub datagrams: bool,
    /// Merging packets before this port saves more than it costs (a TUN: a system call a packet).
    pub wants_coalescing: bool,
    /// What the packets are.
    pub kind: PacketKind,
}

/// What lies at a packet's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// An IP header.
    Ip,
    /// An Ethernet header (TAP).
    Ethernet,
    /// Nothing that anybody looks at.
    Opaque,
}

impl PortAbilities {
    /// Ordinary packets up to `max_packet`, nothing else.
    pub const fn plain(max_packet: usize, kind: PacketKind) -> Self {
        Self {
            max_packet,
            tso4: false,
            tso6: false,
            uso: false,
            partial_checksum: false,
            datagrams: false,
            wants_coalescing: false,
            kind,
        }
    }

    /// Whether a packet can go to the port as it is, and if not, what has to happen before.
    #[inline]
    pub fn fit(&self, packet: Packet<'_>) -> Fit {
        let (data, meta) = (packet.data, packet.meta);
        let partial = matches!(meta.checksum, Checksum::Partial { .. });
        let taken = match meta.gso {
            Gso::None => {
                return if data.is_empty() {
                    Fit::Never(DropReason::Malformed)
                } else if data.len() > self.max_packet {
                    Fit::Never(DropReason::TooLarge)
                } else if partial && !self.partial_checksum {
                    Fit::Complete
                } else {
                    Fit::AsItIs
                };
            }
            Gso::TcpV4 => self.tso4,
            Gso::TcpV6 => self.tso6,
            Gso::Udp => self.uso,
            Gso::Datagrams => self.datagrams,
        };
        let segment = usize::from(meta.header_len) + usize::from(meta.gso_size);
        if taken && self.partial_checksum >= partial && segment <= self.max_packet {
            Fit::AsItIs
        } else {
            Fit::Cut
        }
    }

    /// Why a packet that reached the port all the same must not leave, if so: what the pump would have
    /// had to complete or cut would leave as if it were whole.
    #[inline]
    fn refuses(&self, packet: Packet<'_>) -> Option<DropReason> {
        match self.fit(packet) {
            Fit::AsItIs => None,
            Fit::Complete | Fit::Cut => Some(DropReason::BadOffload),
            Fit::Never(reason) => Some(reason),
        }
    }
}

/// What has to happen to a packet before a port takes it ([`PortAbilities::fit`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Nothing.
    AsItIs,
    /// Its checksum has to be completed.
    Complete,
    /// It has to be cut into segments.
    Cut,
    /// Nothing helps.
    Never(DropReason),
}

/// Packets that a (super-)packet is on a wire, for the counters.
#[inline]
fn wire_packets(packet: Packet<'_>) -> u64 {
    if packet.meta.gso == Gso::None {
        return 1;
    }
    let payload = packet.data.len().saturating_sub(usize::from(packet.meta.header_len));
    payload.div_ceil(usize::from(packet.meta.gso_size).max(1)).max(1) as u64
}
