//! Packets in batches: the unit that every packet port hands over.

mod batch;
pub mod checksum;
pub mod gro;
pub mod gso;
pub mod ip;
#[cfg(test)]
pub(crate) mod testing;
pub mod virtio;

pub use batch::{HEADROOM, Packet, PacketBatch, PacketMut, Spare};

use std::net::SocketAddr;

/// What travels with a packet beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketMeta {
    /// How this packet is to be cut before it reaches a wire that takes no large packets.
    pub gso: Gso,
    /// Payload bytes of each segment; 0 where `gso` is [`Gso::None`].
    pub gso_size: u16,
    /// Bytes of the headers that each segment repeats (IP and transport); 0 where `gso` is none.
    pub header_len: u16,
    /// What is known about the transport checksum.
    pub checksum: Checksum,
    /// ECN bits of the carrier (for UDP ports: of the outer header).
    pub ecn: Ecn,
    /// Where a datagram came from, and on sending where it goes. `None` where the port has one peer.
    pub peer: Option<SocketAddr>,
}

/// Which large-packet form a packet has.
///
/// An IP super-packet has its length, sequence number and flags as one large packet would have
/// them, and always [`Checksum::Partial`]: its checksum field holds the pseudo-header's sum with the
/// length of the whole (what a kernel's TUN hands over and takes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gso {
    /// An ordinary packet.
    #[default]
    None,
    /// An IPv4 TCP super-packet.
    TcpV4,
    /// An IPv6 TCP super-packet.
    TcpV6,
    /// An IP UDP super-packet (USO, `VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
    /// Bare datagrams of `gso_size` bytes, back to back, the last one may be shorter (UDP sockets).
    Datagrams,
}

/// Which large packets and partial checksums somebody takes: a packet port, or the far end of a
/// superframe stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offloads {
    /// Partial checksums. Without them there are no large packets either.
    pub checksum: bool,
    /// IPv4 TCP super-packets.
    pub tso4: bool,
    /// IPv6 TCP super-packets.
    pub tso6: bool,
    /// UDP super-packets.
    pub uso: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { checksum: true, tso4: true, tso6: true, uso: true };
    /// None of them: ordinary, complete packets only.
    pub const NONE: Self = Self { checksum: false, tso4: false, tso6: false, uso: false };

    /// Whether partial checksums are taken where large packets are.
    pub fn is_consistent(self) -> bool {
        self.checksum || !(self.tso4 || self.tso6 || self.uso)
    }

    /// Whether a packet in this state is taken.
    pub fn allow(self, meta: &PacketMeta) -> bool {
        let large = match meta.gso {
            Gso::None => true,
            Gso::TcpV4 => self.tso4,
            Gso::TcpV6 => self.tso6,
            Gso::Udp => self.uso,
            Gso::Datagrams => false,
        };
        large && (self.checksum || !matches!(meta.checksum, Checksum::Partial { .. }))
    }
}

/// State of a packet's transport checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// The packet carries a checksum that nobody here has looked at.
    #[default]
    Unverified,
    /// Verified here, or vouched for by the kernel.
    Valid,
    /// Only the pseudo-header is summed: whoever puts the packet on a wire sums from `start` and
    /// stores the result at `start + offset` (virtio's `csum_start`, `csum_offset`).
    Partial {
        /// Where summing begins, from the start of the packet.
        start: u16,
        /// Where the checksum lies, from `start`.
        offset: u16,
    },
}

/// ECN codepoint of an IP header (RFC 3168, section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// Not ECN-capable.
    #[default]
    NotEct = 0,
    /// ECT(1).
    Ect1 = 1,
    /// ECT(0).
    Ect0 = 2,
    /// Congestion experienced.
    Ce = 3,
}

impl Ecn {
    /// From the two low bits of a TOS or traffic-class byte.
    pub fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            1 => Self::Ect1,
            2 => Self::Ect0,
            3 => Self::Ce,
            _ => Self::NotEct,
        }
    }
    /// The two bits of a TOS or traffic-class byte.
    pub fn bits(self) -> u8 {
        self as u8
    }
}
